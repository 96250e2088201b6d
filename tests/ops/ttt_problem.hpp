// The variants of ttt under test, and random problems for them with their results by the formulas: what the tests of
// all backends share.
#pragma once

#include <linattn/ops/ttt.hpp>

#include <array>
#include <cmath>
#include <optional>
#include <type_traits>
#include <vector>

#include "../reference/depthwise_conv.hpp"
#include "../reference/instance_norm.hpp"
#include "../reference/ttt.hpp"
#include "../support.hpp"

namespace ttt_cases {

using namespace linattn;
using namespace support;
using linattn::half;  // not that of the CUDA toolkit

template <class Model, class Loss, class Step = Plain>
struct Variant {
  using model = Model;
  using loss = Loss;
  using step = Step;
  static constexpr reference::InnerModel reference_model =
      std::is_same_v<Model, Linear>   ? reference::InnerModel::linear
      : std::is_same_v<Model, Mlp>    ? reference::InnerModel::mlp
      : std::is_same_v<Model, SwiGlu> ? reference::InnerModel::swiglu
      : std::is_same_v<Model, Glu>    ? reference::InnerModel::glu
                                      : reference::InnerModel::mlp3;
  static constexpr reference::InnerLoss reference_loss = std::is_same_v<Loss, InnerProduct>
                                                             ? reference::InnerLoss::inner_product
                                                             : reference::InnerLoss::squared_error;
  static constexpr reference::InnerStep reference_step =
      std::is_same_v<Step, Plain> ? reference::InnerStep::plain : reference::InnerStep::column_clip;
  static constexpr std::size_t matrices = detail::matrices<Model>;
};
using LinearIp = Variant<Linear, InnerProduct>;
using GluIp = Variant<Glu, InnerProduct>;
using MlpIp = Variant<Mlp, InnerProduct>;
using SwiGluIp = Variant<SwiGlu, InnerProduct>;
using Mlp3Ip = Variant<Mlp3, InnerProduct>;
using LinearL2 = Variant<Linear, SquaredError>;
using GluL2 = Variant<Glu, SquaredError>;
using MlpL2 = Variant<Mlp, SquaredError>;
using SwiGluL2 = Variant<SwiGlu, SquaredError>;
using Mlp3L2 = Variant<Mlp3, SquaredError>;
// The same, clipped.
template <class V>
using Clipped = Variant<typename V::model, typename V::loss, ColumnClip>;
#define MODELS_AND_LOSSES LinearIp, GluIp, MlpIp, SwiGluIp, Mlp3Ip, LinearL2, GluL2, MlpL2, SwiGluL2, Mlp3L2

struct Sizes {
  Index batch = 1, queries = 1, keys = 1, heads = 1, head_dim = 1;
};

// Relative L2 error that results stored as T may have against double on the same inputs.
// The double bound leaves room for W and its step to cancel, as they do in a head of one channel.
template <class T>
inline constexpr double tolerance = std::is_same_v<T, double>  ? 1e-13
                                    : std::is_same_v<T, float> ? 2e-6
                                    : std::is_same_v<T, half>  ? 5e-4
                                                               : 5e-3;

// One set of inputs, on the host, and what should come of it.
template <class V, class T, class W = T>
struct Inputs {
  using C = Compute<T>;
  using Model = typename V::model;
  using Loss = typename V::loss;
  using Step = typename V::step;

  Sizes sizes;
  Buffer<T, 4> q, k, v, out;
  std::vector<Buffer<W, 3>> w;
  Buffer<W, 4> q_taps, k_taps;
  Buffer<W, 1> q_bias, k_bias;
  TttWeights<W> weights;
  TttOptions<W> options;

  explicit Inputs(Sizes s, Layout layout = Layout::dense, std::uint64_t seed = 1)
      : sizes(s),
        q(make<T>(layout, {s.batch, s.queries, s.heads, s.head_dim})),
        k(make<T>(layout, {s.batch, s.keys, s.heads, s.head_dim})),
        v(make<T>(layout, {s.batch, s.keys, s.heads, s.head_dim})),
        out(make<T>(layout, {s.batch, s.queries, s.heads, s.head_dim})),
        q_taps({s.heads * s.head_dim, 1, 3, 3}),
        k_taps({s.heads * s.head_dim, 1, 3, 3}),
        q_bias({s.heads * s.head_dim}),
        k_bias({s.heads * s.head_dim}) {
    fill_normal(q.view(), seed);
    fill_normal(k.view(), seed + 1, 1.0, 0.5);
    fill_normal(v.view(), seed + 2);
    for (std::size_t m = 0; m < V::matrices; ++m) {
      // Rows with a gap behind each: the strides of a weight count.
      const Index row = s.head_dim + 3;
      w.push_back(Buffer<W, 3>({s.heads, s.head_dim, s.head_dim}, {s.head_dim * row, row, 1}, 0));
      fill_normal(w.back().view(), seed + 3 + m, 1.0 / std::sqrt(static_cast<double>(s.head_dim)));
    }
    const std::array<TensorView<const W, 3>*, 3> views = {&weights.w1, &weights.w2, &weights.w3};
    for (std::size_t m = 0; m < V::matrices; ++m) *views[m] = w[m].view();
    fill_normal(q_taps.view(), seed + 6, 0.3);
    fill_normal(k_taps.view(), seed + 7, 0.3);
    fill_normal(q_bias.view(), seed + 8, 0.3);
    fill_normal(k_bias.view(), seed + 9, 0.3);
  }

  // All of the prologue.
  void prologue(TokenGrid grid) {
    options.prologue = {.key_norm = true,
                        .key_norm_eps = 0.5,
                        .q_conv = q_taps.view(),
                        .k_conv = k_taps.view(),
                        .q_conv_bias = q_bias.view(),
                        .k_conv_bias = k_bias.view(),
                        .grid = grid};
  }

  [[nodiscard]] double scale() const {
    return options.scale.value_or(1.0 / std::sqrt(static_cast<double>(sizes.head_dim)));
  }

  // The result by the formulas in double, from the inputs as they are stored.
  [[nodiscard]] Buffer<double, 4> expected() const {
    auto queries = to_double(q), keys = to_double(k);
    const auto& p = options.prologue;
    if (p.key_norm) {
      const auto raw = to_double(k);
      reference::instance_norm(raw.view(), keys.view(), p.key_norm_eps, true);
    }
    const auto conv = [&](Buffer<double, 4>& x, const Buffer<W, 4>& taps, const Buffer<W, 1>& bias) {
      const auto raw = to_double(x);
      reference::depthwise_conv(raw.view(), to_double(taps).view(), to_double(bias).view(), x.view(), p.grid,
                                true);
    };
    if (p.q_conv.extent(0) != 0) conv(queries, q_taps, q_bias);
    if (p.k_conv.extent(0) != 0) conv(keys, k_taps, k_bias);
    std::vector<Buffer<double, 3>> initial;
    std::vector<Buffer<double, 4>> updated;
    reference::Matrices<const double> from, use;
    reference::Matrices<double> to;
    for (std::size_t m = 0; m < V::matrices; ++m) {
      initial.push_back(to_double(w[m]));
      updated.push_back(Buffer<double, 4>({sizes.batch, sizes.heads, sizes.head_dim, sizes.head_dim}));
      from[m] = reference::for_each_batch(initial[m].view(), sizes.batch);
      to[m] = updated[m].view();
      use[m] = updated[m].view();
    }
    reference::ttt_update(V::reference_model, V::reference_loss, keys.view(), to_double(v).view(), from,
                          scale(), options.inner_lr, to, V::reference_step);
    Buffer<double, 4> result(out.view().extents);
    reference::ttt_apply(V::reference_model, queries.view(), use, result.view());
    return result;
  }
};

}  // namespace ttt_cases

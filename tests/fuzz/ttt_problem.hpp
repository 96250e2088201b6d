// A problem of ttt from the bytes of an input, and what must come of it by the formulas in double.
#pragma once

#include <linattn/ops/ttt_cpu.hpp>

#include <optional>
#include <vector>

#include "../reference/depthwise_conv.hpp"
#include "../reference/instance_norm.hpp"
#include "../reference/ttt.hpp"
#include "op.hpp"

namespace fuzz {

using namespace linattn;
using Doubles = support::Buffer<double, 4>;

template <class Model, class Loss, class Step, class T>
struct Problem {
  static constexpr auto model = std::is_same_v<Model, Linear>   ? reference::InnerModel::linear
                                : std::is_same_v<Model, Mlp>    ? reference::InnerModel::mlp
                                : std::is_same_v<Model, SwiGlu> ? reference::InnerModel::swiglu
                                : std::is_same_v<Model, Glu>    ? reference::InnerModel::glu
                                                                : reference::InnerModel::mlp3;
  static constexpr bool squared = std::is_same_v<Loss, SquaredError>;
  static constexpr auto step =
      std::is_same_v<Step, Plain> ? reference::InnerStep::plain : reference::InnerStep::column_clip;
  static constexpr int matrices = detail::matrices<Model>;
  using C = Compute<T>;

  FuzzedDataProvider& in;
  bool prologue, special;
  TokenGrid grid;
  Index heads, head_dim, batch, queries, keys;
  Operand<T, 4> q, k, v, out;
  std::vector<Operand<T, 3>> w;
  Operand<T, 4> q_taps, k_taps;
  Operand<T, 1> q_bias, k_bias;
  TttWeights<T> weights;
  TttOptions<T> options;

  explicit Problem(FuzzedDataProvider& input)
      : in(input),
        prologue(in.ConsumeBool()),
        special(in.ConsumeIntegralInRange(0, 5) == 1),
        grid{.offset = extent(2, 4) - 1, .height = extent(3, 9), .width = extent(3, 9)},
        heads(extent(2, 3)),
        head_dim(extent(9, 40)),
        batch(extent(2, 2)),
        queries(prologue ? grid.offset + grid.tokens() : extent(9, 70)),
        keys(prologue ? queries : extent(9, 140)),
        q(in, {batch, queries, heads, head_dim}, Use::input),
        k(in, {batch, keys, heads, head_dim}, Use::input),
        v(in, {batch, keys, heads, head_dim}, Use::input),
        out(in, {batch, queries, heads, head_dim}, Use::output),
        q_taps(in, {heads * head_dim, 1, 3, 3}, Use::input),
        k_taps(in, {heads * head_dim, 1, 3, 3}, Use::input),
        q_bias(in, {heads * head_dim}, Use::input),
        k_bias(in, {heads * head_dim}, Use::input) {
    q.fill(in, 1.0, special), k.fill(in, 1.0, special), v.fill(in, 1.0, special);
    q_taps.fill(in, 0.3), k_taps.fill(in, 0.3), q_bias.fill(in, 0.3), k_bias.fill(in, 0.3);
    const std::array<TensorView<const T, 3>*, 3> views{&weights.w1, &weights.w2, &weights.w3};
    for (int m = 0; m < matrices; ++m) {
      w.emplace_back(in, std::array{heads, head_dim, head_dim}, Use::input);
      w.back().fill(in, 1.0 / std::sqrt(static_cast<double>(head_dim)));
      *views[static_cast<std::size_t>(m)] = w.back().view();
    }
    options.inner_lr = in.PickValueInArray({1.0, 0.3, -1.0, 0.0});
    if (in.ConsumeBool()) options.scale = in.PickValueInArray({1.0, 0.5, -0.2});
    if (!prologue) return;
    options.prologue = {
        .key_norm = in.ConsumeBool(), .key_norm_eps = in.PickValueInArray({1.0, 0.5}), .grid = grid};
    if (in.ConsumeBool())
      options.prologue.q_conv = q_taps.view(), options.prologue.q_conv_bias = q_bias.view();
    if (in.ConsumeBool()) options.prologue.k_conv = k_taps.view();
    if (in.ConsumeBool() && options.prologue.k_conv.data != nullptr)
      options.prologue.k_conv_bias = k_bias.view();
  }

  Index extent(Index few, Index many) {
    return in.ConsumeIntegralInRange<Index>(1, in.ConsumeIntegralInRange(0, 7) == 1 ? many : few);
  }

  // The result by the formulas; or, with `sizes`, what its error is measured by: the formulas on the sizes of all terms, so
  // that none cancels another. silu(z) is at least z / 2 there.
  [[nodiscard]] Doubles formulas(bool sizes) const {
    const AsDouble read{.odd_to_nan = true, .absolute = sizes};
    Doubles queried = read(q), keyed = read(k), target = read(v);
    const auto& said = options.prologue;
    if (said.key_norm && !sizes) {
      const Doubles raw = AsDouble{}(keyed.view());
      reference::instance_norm(raw, keyed, said.key_norm_eps, true);
    } else if (said.key_norm) {
      Doubles raw = AsDouble{}(keyed.view());
      for_each_index(keyed.view().extents, [&](const auto& i) {
        double most = 0;
        for (Index n = 0; n < keys; ++n) most = std::max(most, raw.view()(i[0], n, i[2], i[3]));
        element(keyed.view(), i) = 2 * most / std::sqrt(said.key_norm_eps);
      });
    }
    const auto conv = [&](Doubles& x, const auto& taps, const auto& bias) {
      if (taps.extent(0) == 0) return;
      const Doubles raw = AsDouble{}(x.view());
      reference::depthwise_conv(raw, read(taps), read(bias), x, said.grid, true);
    };
    conv(queried, said.q_conv, said.q_conv_bias), conv(keyed, said.k_conv, said.k_conv_bias);

    std::vector<support::Buffer<double, 3>> initial;
    std::vector<Doubles> updated;
    reference::Matrices<const double> from, use;
    reference::Matrices<double> to;
    for (std::size_t m = 0; m < static_cast<std::size_t>(matrices); ++m) {
      initial.push_back(read(w[m]));
      updated.emplace_back(std::array{batch, heads, head_dim, head_dim});
      from[m] = reference::for_each_batch(initial[m].view(), batch);
      to[m] = updated[m].view(), use[m] = updated[m].view();
    }
    auto loss = squared ? reference::InnerLoss::squared_error : reference::InnerLoss::inner_product;
    double scale = options.scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim))),
           rate = options.inner_lr;
    if (sizes) {
      // |f(k) - v| is at most the sum of both; the step of the inner product then only adds.
      if (squared) {
        Doubles y(target.view().extents);
        reference::ttt_apply(model, keyed, from, y);
        for_each_index(y.view().extents,
                       [&](const auto& i) { element(target.view(), i) += 2 * element(y.view(), i); });
      }
      loss = reference::InnerLoss::inner_product, scale = std::abs(scale), rate = std::abs(rate);
    }
    reference::ttt_update(model, loss, keyed, target, from, scale, rate, to,
                          sizes ? reference::InnerStep::plain : step);
    Doubles result(out.view().extents);
    reference::ttt_apply(model, queried, use, result);
    return result;
  }

  void check(const TensorView<T, 4>& result) const {
    const Doubles expected = formulas(false), sizes = formulas(true);
    // Each result goes through at most three products of the forward and three of the backward pass, sums over channels and
    // tokens; a relative error is at most doubled by each silu.
    const double terms = 6 * static_cast<double>(head_dim) + static_cast<double>(keys) + 40;
    const double share = 32 * terms * support::unit_roundoff<C>;
    expect_close(result, expected.view(), [&](const auto& i) { return share * element(sizes.view(), i); });
  }
};

}  // namespace fuzz

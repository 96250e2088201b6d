// Random parameters of attention layers, in any storage type and in double, and the attentions of the reference.
#pragma once

#include <linattn/layers/ttt_attention.hpp>

#include "../reference/attention_layer.hpp"
#include "../reference/depthwise_conv.hpp"
#include "../reference/instance_norm.hpp"
#include "../reference/ttt.hpp"
#include "../support.hpp"

namespace layer_cases {

using namespace linattn;
using support::Buffer;

struct Shape {
  Index batch = 1, tokens = 1, text = 0;
  Index in = 8, text_in = 8;  // channels of x and of the context
  Index heads = 1, head_dim = 8;
  bool bias = true, qk_norm = true, project = true;
  TokenGrid grid{};
  [[nodiscard]] Index width() const { return heads * head_dim; }
};

// The relative L2 error that a layer may have against double on the same rounded inputs. 16-bit storage rounds each
// element of the output, by one unit roundoff at most.
template <class T>
inline constexpr double tolerance = std::is_same_v<T, double>  ? 5e-15
                                    : std::is_same_v<T, float> ? 1e-6
                                                               : 1.01 * support::unit_roundoff<T>;
// Without an output projection q, k and v are rounded, too.
template <class T>
inline constexpr double unprojected = sizeof(T) == 2 ? 2.0 * support::unit_roundoff<T> : tolerance<T>;

// Says that a constructor takes the same values in double.
struct Widened {};

// Memory of one input's projections.
template <class W>
struct Weights {
  Weights(const Shape& s, Index in, Index out, std::uint64_t seed)
      : matrices{Buffer<W, 2>({s.width(), in}), Buffer<W, 2>({s.width(), in}), Buffer<W, 2>({s.width(), in}),
                 Buffer<W, 2>({s.project ? out : 0, s.width()})},
        biases{Buffer<W, 1>({s.bias ? s.width() : 0}), Buffer<W, 1>({s.bias ? s.width() : 0}),
               Buffer<W, 1>({s.bias ? s.width() : 0}), Buffer<W, 1>({s.bias && s.project ? out : 0})},
        norms{Buffer<W, 1>({s.qk_norm ? s.head_dim : 0}), Buffer<W, 1>({s.qk_norm ? s.head_dim : 0})} {
    for (auto& m : matrices)
      support::fill_normal(m.view(), ++seed, 1.0 / std::sqrt(static_cast<double>(m.view().extent(1))));
    for (auto& b : biases) support::fill_normal(b.view(), ++seed, 0.3);
    for (auto& n : norms) support::fill_normal(n.view(), ++seed, 0.2, 1.0);
  }
  template <class V>
  Weights(Widened, const Weights<V>& other)
      : matrices{support::to_double(other.matrices[0]), support::to_double(other.matrices[1]),
                 support::to_double(other.matrices[2]), support::to_double(other.matrices[3])},
        biases{support::to_double(other.biases[0]), support::to_double(other.biases[1]),
               support::to_double(other.biases[2]), support::to_double(other.biases[3])},
        norms{support::to_double(other.norms[0]), support::to_double(other.norms[1])} {}

  [[nodiscard]] AttentionWeights<W> views() const {
    const auto p = [&](std::size_t i) { return Projection<W>{matrices[i].view(), biases[i].view()}; };
    return {p(0), p(1), p(2), p(3), norms[0].view(), norms[1].view()};
  }

  std::array<Buffer<W, 2>, 4> matrices;
  std::array<Buffer<W, 1>, 4> biases;
  std::array<Buffer<W, 1>, 2> norms;
};

// Memory of the TTT parameters.
template <class F>
struct Inner {
  Inner(const Shape& s, int count, bool conv, std::uint64_t seed)
      : matrices{matrix(s, count > 0), matrix(s, count > 1), matrix(s, count > 2)},
        kernels{Buffer<F, 4>({conv ? s.width() : 0, 1, 3, 3}), Buffer<F, 4>({conv ? s.width() : 0, 1, 3, 3})},
        biases{Buffer<F, 1>({conv ? s.width() : 0}), Buffer<F, 1>({conv ? s.width() : 0})} {
    for (auto& m : matrices)
      support::fill_normal(m.view(), ++seed, 1.0 / std::sqrt(static_cast<double>(s.head_dim)));
    for (auto& k : kernels) support::fill_normal(k.view(), ++seed, 0.2);
    for (auto& b : biases) support::fill_normal(b.view(), ++seed, 0.2);
  }
  template <class G>
  Inner(Widened, const Inner<G>& o)
      : matrices{support::to_double(o.matrices[0]), support::to_double(o.matrices[1]),
                 support::to_double(o.matrices[2])},
        kernels{support::to_double(o.kernels[0]), support::to_double(o.kernels[1])},
        biases{support::to_double(o.biases[0]), support::to_double(o.biases[1])} {}

  template <class W>
  [[nodiscard]] TttAttentionWeights<W, F> views(const AttentionWeights<W>& projections) const {
    return {projections,       {matrices[0].view(), matrices[1].view(), matrices[2].view()},
            kernels[0].view(), kernels[1].view(),
            biases[0].view(),  biases[1].view()};
  }
  static Buffer<F, 3> matrix(const Shape& s, bool used) {
    return Buffer<F, 3>({used ? s.heads : 0, s.head_dim, s.head_dim});
  }

  std::array<Buffer<F, 3>, 3> matrices;
  std::array<Buffer<F, 4>, 2> kernels;
  std::array<Buffer<F, 1>, 2> biases;
};

// Softmax over all keys.
inline reference::Attention softmax_reference(const Shape& s) {
  return [s](const auto& q, const auto& k, const auto& v, const auto& out) {
    reference::plain_softmax_attention(q, k, v, out, 1.0 / std::sqrt(static_cast<double>(s.head_dim)));
  };
}

// The T5 layer's attention from the unfused pieces; the grid lies behind the text.
inline reference::Attention ttt_reference(const Shape& s, const Inner<double>& inner,
                                          reference::InnerModel model, reference::InnerLoss loss,
                                          const TttLayerOptions& options,
                                          reference::InnerStep step = reference::InnerStep::plain) {
  return [&, s, model, loss, options, step](const auto& q, const auto& k, const auto& v, const auto& out) {
    reference::Tokens norm(k.extents), keys(k.extents), queries(k.extents);
    support::copy(k, norm.view());
    if (options.key_norm) reference::instance_norm(k, norm.view(), options.key_norm_eps, true);
    TokenGrid grid = options.grid;
    grid.offset += s.text;
    const auto convolve = [&](const TensorView<const double, 4>& x, std::size_t which,
                              reference::Tokens& to) {
      if (inner.kernels[which].view().extent(0) > 0)
        reference::depthwise_conv(x, inner.kernels[which].view(), inner.biases[which].view(), to.view(), grid,
                                  true);
      else
        support::copy(x, to.view());
    };
    convolve(q, 0, queries);
    convolve(norm.view(), 1, keys);
    reference::Matrices<const double> w;
    reference::Matrices<double> updated;
    std::vector<double> memory(static_cast<std::size_t>(3 * s.batch * s.heads * s.head_dim * s.head_dim));
    for (std::size_t m = 0; m < 3; ++m) {
      w[m] = reference::for_each_batch(inner.matrices[m].view(), s.batch);
      updated[m] = {memory.data() + static_cast<Index>(m) * s.batch * s.heads * s.head_dim * s.head_dim,
                    {s.batch, s.heads, s.head_dim, s.head_dim}};
    }
    const double scale = options.scale.value_or(1.0 / std::sqrt(static_cast<double>(s.head_dim)));
    reference::ttt_update(model, loss, keys.view(), v, w, scale, options.inner_lr, updated, step);
    reference::ttt_apply(model, queries.view(), {updated[0], updated[1], updated[2]}, out);
  };
}

// Inputs and outputs of a layer.
template <class T>
struct Data {
  explicit Data(const Shape& s)
      : x({s.batch, s.tokens, s.in}, {(s.tokens + 2) * (s.in + 3), s.in + 3, 1}, 5),
        context({s.batch, s.text, s.text_in}),
        x_out({s.batch, s.tokens, s.project ? s.in : s.width()}),
        context_out({s.batch, s.text, s.text_in}, {(s.text + 1) * (s.text_in + 5), s.text_in + 5, 1}, 7) {
    support::fill_normal(x.view(), 101);
    support::fill_normal(context.view(), 102, 1.0, 0.3);
  }
  Buffer<T, 3> x, context, x_out, context_out;
};

}  // namespace layer_cases

// Softmax attention with its projections, over the tokens of one input.
//
//   q, k, v = x W_q^T + b_q, ...;   q, k = rms_norm(q), rms_norm(k) where weights for it are given
//   out     = softmax(scale q k^T) v W_out^T + b_out
//
// Shapes: x (b, n, in), out (b, n, any); projections [heads * head_dim, in], out projection [any, heads *
// head_dim], or none (empty): then out is (b, n, heads * head_dim), head-major.
// Numerics: those of linear, rms_norm and softmax_attention. On the host all between the projections is held in
// Compute<T>, so 16-bit storage rounds `out` alone; without an output projection, and on Cuda, q, k, v and what is
// attended are rounded to T, too.
// Errors: those of the ops, with the names of the layer's tensors; workspace. `out` may be x, if the layer has an
// output projection.
// Source: A. Vaswani et al., "Attention is all you need", 2017; with qk-norm the attn2 of SD3.5 Medium.
#pragma once

#include <cstddef>
#include <optional>
#include <type_traits>

#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/layers/projections.hpp>
#include <linattn/ops/softmax_attention.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN

struct SoftmaxLayerOptions {
  Index heads = 1;
  std::optional<double> scale{};  // head_dim^-1/2 by default
  double qk_norm_eps = 1e-6;
};

namespace detail::inline LINATTN_TARGET {

// The attention between the projections.
struct SoftmaxCore {
  std::optional<double> scale;

  template <class Context, class T>
  [[nodiscard]] std::size_t workspace(const Context& ctx, const TensorView<T, 4>& q,
                                      const TensorView<T, 4>& k, const TensorView<T, 4>& v,
                                      const TensorView<T, 4>& out) const {
    return softmax_attention_workspace(ctx, q, k, v, out, options<T>());
  }
  template <class Context, class T>
  [[nodiscard]] Status run(const Context& ctx, const TensorView<T, 4>& q, const TensorView<T, 4>& k,
                           const TensorView<T, 4>& v, const TensorView<T, 4>& out) const {
    return softmax_attention(ctx, q, k, v, out, options<T>());
  }

 private:
  template <class T>
  [[nodiscard]] SoftmaxAttentionOptions<Compute<T>> options() const {
    SoftmaxAttentionOptions<Compute<T>> result;
    result.scale = scale;
    return result;
  }
};

}  // namespace detail::inline LINATTN_TARGET

inline namespace LINATTN_TARGET {

// Bytes of scratch for the same call of softmax_attention_layer: 4 numbers a token and channel, and the ops' own.
template <class Context, Storage T, class W>
[[nodiscard]] std::size_t softmax_attention_layer_workspace(const Context& ctx, In<T, 3> x,
                                                            const AttentionWeights<W>& weights,
                                                            const TensorView<T, 3>& out,
                                                            const SoftmaxLayerOptions& options) {
  const AttentionWeights<W> none{};
  const detail::AttentionLayer<T, W> layer{x, {}, weights, none, out, {}, options.heads, options.qk_norm_eps};
  return layer.check().ok() ? layer.workspace(ctx, detail::SoftmaxCore{options.scale}) : 0;
}

// out = softmax(scale q k^T) v W_out^T + b_out. See above.
template <class Context, Storage T, class W>
[[nodiscard]] Status softmax_attention_layer(const Context& ctx, In<T, 3> x,
                                             const AttentionWeights<W>& weights, const TensorView<T, 3>& out,
                                             const SoftmaxLayerOptions& options) {
  const AttentionWeights<W> none{};
  const detail::AttentionLayer<T, W> layer{x, {}, weights, none, out, {}, options.heads, options.qk_norm_eps};
  return layer.run(ctx, detail::SoftmaxCore{options.scale}, "softmax_attention_layer, workspace");
}

}  // namespace LINATTN_TARGET
LINATTN_END

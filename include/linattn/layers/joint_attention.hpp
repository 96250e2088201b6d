// Attention over image tokens x and text tokens (context) together, each with its own projections, as in the
// blocks of Stable Diffusion 3 and 3.5: softmax, and its test-time-training form.
//
//   q, k, v = those of the context, then those of x;   q, k = rms_norm(q), rms_norm(k), each with its own weights
//   attended = softmax(scale q k^T) v, or f(q; W') of the T5 layer
//   x_out, context_out = the rows of each, through its own output projection
//
// With an empty context_out the context's queries are not computed, which is exact: nobody reads what they would
// receive (the last block of SD3.5). With no context tokens both forms are the image-only layers, bit for bit.
//
// No official TTT form for joint tokens exists; these are our choices:
//   - inherited qk-norm first, then the key norm, whose statistics run over all tokens, text and image: the
//     softmax is blind to a common shift of all keys that it sees, and it sees both;
//   - the convs act on the image grid (any aspect ratio) alone, text rows pass through: the conv is a residual
//     branch, and text has no grid;
//   - 1 / N with N all key tokens, and one set of fast weights a (sample, head), learned from all keys and values.
//
// Shapes: x (b, n, in), context (b, t, in'), t >= 0; outputs (b, n, any), (b, t, any). Layers and weights as in
// softmax_attention.hpp and ttt_attention.hpp; of the context's weights q and out are not looked at when
// context_out is empty. Where both have an output, both need an output projection.
// Numerics, errors: as there. Outputs may be their own inputs.
// Source: P. Esser et al., "Scaling rectified flow transformers for high-resolution image synthesis", 2024.
#pragma once

#include <cstddef>
#include <type_traits>

#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/layers/projections.hpp>
#include <linattn/layers/softmax_attention.hpp>
#include <linattn/layers/ttt_attention.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
inline namespace LINATTN_TARGET {

// Bytes of scratch for the same call of joint_attention.
template <class Context, Storage T, class W>
[[nodiscard]] std::size_t joint_attention_workspace(const Context& ctx, In<T, 3> x, In<T, 3> context,
                                                    const AttentionWeights<W>& x_weights,
                                                    const AttentionWeights<W>& context_weights,
                                                    const TensorView<T, 3>& x_out,
                                                    const std::type_identity_t<TensorView<T, 3>>& context_out,
                                                    const SoftmaxLayerOptions& options) {
  const detail::AttentionLayer<T, W> layer{x,     context,     x_weights,     context_weights,
                                           x_out, context_out, options.heads, options.qk_norm_eps};
  return layer.check().ok() ? layer.workspace(ctx, detail::SoftmaxCore{options.scale}) : 0;
}

// Softmax over the tokens of both. See above.
template <class Context, Storage T, class W>
[[nodiscard]] Status joint_attention(const Context& ctx, In<T, 3> x, In<T, 3> context,
                                     const AttentionWeights<W>& x_weights,
                                     const AttentionWeights<W>& context_weights,
                                     const TensorView<T, 3>& x_out,
                                     const std::type_identity_t<TensorView<T, 3>>& context_out,
                                     const SoftmaxLayerOptions& options) {
  const detail::AttentionLayer<T, W> layer{x,     context,     x_weights,     context_weights,
                                           x_out, context_out, options.heads, options.qk_norm_eps};
  return layer.run(ctx, detail::SoftmaxCore{options.scale}, "joint_attention, workspace");
}

// Bytes of scratch for the same call of joint_ttt_attention.
template <class Model = SwiGlu, class Loss = InnerProduct, class Step = Plain, class Context, Storage T,
          class W, class F>
[[nodiscard]] std::size_t joint_ttt_attention_workspace(
    const Context& ctx, In<T, 3> x, In<T, 3> context, const TttAttentionWeights<W, F>& x_weights,
    const AttentionWeights<W>& context_weights, const TensorView<T, 3>& x_out,
    const std::type_identity_t<TensorView<T, 3>>& context_out, const TttLayerOptions& options) {
  const detail::AttentionLayer<T, W> layer{x,     context,     x_weights.projections, context_weights,
                                           x_out, context_out, options.heads,         options.qk_norm_eps};
  const detail::TttCore<Model, Loss, Step, W, F> core{x_weights, options, layer.text(), layer.text_queries()};
  return layer.check().ok() ? layer.workspace(ctx, core) : 0;
}

// Test-time training over the tokens of both; options.grid counts from the first image token. See above.
template <class Model = SwiGlu, class Loss = InnerProduct, class Step = Plain, class Context, Storage T,
          class W, class F>
[[nodiscard]] Status joint_ttt_attention(const Context& ctx, In<T, 3> x, In<T, 3> context,
                                         const TttAttentionWeights<W, F>& x_weights,
                                         const AttentionWeights<W>& context_weights,
                                         const TensorView<T, 3>& x_out,
                                         const std::type_identity_t<TensorView<T, 3>>& context_out,
                                         const TttLayerOptions& options) {
  const detail::AttentionLayer<T, W> layer{x,     context,     x_weights.projections, context_weights,
                                           x_out, context_out, options.heads,         options.qk_norm_eps};
  const detail::TttCore<Model, Loss, Step, W, F> core{x_weights, options, layer.text(), layer.text_queries()};
  return layer.run(ctx, core, "joint_ttt_attention, workspace");
}

}  // namespace LINATTN_TARGET
LINATTN_END

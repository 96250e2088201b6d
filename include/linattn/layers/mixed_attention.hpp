// The DiT5 layer: test-time training for the whole of the picture and neighborhood attention for what is near, mixed
// half and half, with the projections that both share.
//
//   q, k, v  = x W_q^T + b_q, ...;   q, k = rms_norm(q), rms_norm(k) where weights for it are given
//   local    = neighborhood attention of the raw q, k, v
//   trained  = f(qk_scale[:, 0] q + qk_offset[:, 0]; W'),  W' learned from qk_scale[:, 1] k + qk_offset[:, 1] and v,
//              both by way of the key norm and the convs of the T5 layer, the loss against the raw v
//   out      = ((1 - mix) trained + mix local) W_out^T + b_out
//
// All tokens are on the grid, of any aspect ratio, where the official code knows squares alone.
//
// Shapes: those of ttt_attention_layer; qk_scale, qk_offset [heads * head_dim, 2], of any strides: the checkpoint's
// [1, 1, C, 2] without its leading axes.
// Numerics: those of linear, rms_norm, ttt, neighborhood_attention and elementwise; all between the projections is
// held in Compute<T>, so 16-bit storage rounds `out` alone; without an output projection what lies between is rounded
// to T, too.
// Errors: those of the ops, with the names of the layer's tensors; workspace. `out` may be x, if the layer has an
// output projection.
// Source: `MixedAttention` in DiT5/models.py of LeapLabTHU/Transformer-to-TTT.
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>
#include <type_traits>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/layers/projections.hpp>
#include <linattn/layers/ttt_attention.hpp>
#include <linattn/ops/elementwise.hpp>
#include <linattn/ops/neighborhood_attention.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN

template <class W, class F = W>
struct MixedAttentionWeights {
  TttAttentionWeights<W, F> ttt{};
  TensorView<const F, 2> qk_scale{}, qk_offset{};  // column 0 is for q, column 1 for k
};

struct MixedLayerOptions {
  Index heads = 1;
  TokenGrid grid{};
  Window kernel{};  // of the neighborhood attention
  double inner_lr = 1;
  std::optional<double> scale{};  // of both attentions, head_dim^-1/2 by default
  double key_norm_eps = 1;
  double mix = 0.5;  // the share of the neighborhood attention
  double qk_norm_eps = 1e-6;
};

namespace detail::inline LINATTN_TARGET {

// The attention between the projections.
template <class Model, class Loss, class W, class F>
struct MixedCore {
  const MixedAttentionWeights<W, F>& weights;
  const MixedLayerOptions& options;

  template <class Context, class T>
  [[nodiscard]] std::size_t workspace(const Context& ctx, const TensorView<T, 4>& q,
                                      const TensorView<T, 4>& k, const TensorView<T, 4>& v,
                                      const TensorView<T, 4>& out) const {
    Carver carver(Workspace{});
    const TensorView<T, 4> trained = take(carver, out);
    const TttLayerOptions ttt_layer = ttt_options();
    return carver.used() + std::max(neighborhood_attention_workspace(ctx, q, k, v, out, neighborhood()),
                                    TttCore<Model, Loss, Plain, W, F>{weights.ttt, ttt_layer, 0, 0}.workspace(
                                        ctx, q, k, v, trained));
  }

  // q and k are rescaled where they lie, after the neighborhood attention has read them.
  template <class Context, class T>
  [[nodiscard]] Status run(const Context& ctx, const TensorView<T, 4>& q, const TensorView<T, 4>& k,
                           const TensorView<T, 4>& v, const TensorView<T, 4>& out) const {
    const Index channels = q.extent(2) * q.extent(3);
    Status status = first_failure(expect_equal(channels, weights.qk_scale.extent(0), "qk_scale, channels"),
                                  expect_equal(2, weights.qk_scale.extent(1), "qk_scale, of q and of k"),
                                  expect_memory(weights.qk_scale, "qk_scale"),
                                  expect_equal(channels, weights.qk_offset.extent(0), "qk_offset, channels"),
                                  expect_equal(2, weights.qk_offset.extent(1), "qk_offset, of q and of k"),
                                  expect_memory(weights.qk_offset, "qk_offset"));
    Carver carver(ctx.workspace);
    const TensorView<T, 4> trained = take(carver, out);
    const Context inner = ctx.with(carver.rest());
    const TttLayerOptions ttt_layer = ttt_options();
    if (status.ok()) status = neighborhood_attention(inner, q, k, v, out, neighborhood());
    if (status.ok()) status = affine(inner, q, column(weights.qk_scale, 0), column(weights.qk_offset, 0), q);
    if (status.ok()) status = affine(inner, k, column(weights.qk_scale, 1), column(weights.qk_offset, 1), k);
    if (status.ok())
      status = TttCore<Model, Loss, Plain, W, F>{weights.ttt, ttt_layer, 0, 0}.run(inner, q, k, v, trained);
    if (status.ok()) status = mix(inner, trained, out, options.mix, out);
    return status;
  }

 private:
  [[nodiscard]] TttLayerOptions ttt_options() const {
    TttLayerOptions result;
    result.grid = options.grid;
    result.inner_lr = options.inner_lr;
    result.scale = options.scale;
    result.key_norm_eps = options.key_norm_eps;
    return result;
  }
  [[nodiscard]] NeighborhoodAttentionOptions neighborhood() const {
    return {options.grid, options.kernel, options.scale};
  }
  template <class T>
  [[nodiscard]] static TensorView<T, 4> take(Carver& carver, const TensorView<T, 4>& like) {
    return {carver.take<T>(like.elements()), like.extents};
  }
  [[nodiscard]] static Status expect_memory(const TensorView<const F, 2>& v, const char* what) {
    return v.data != nullptr ? Status{} : fail(Code::null_data, what, v.elements(), 0);
  }
  [[nodiscard]] static TensorView<const F, 1> column(const TensorView<const F, 2>& v, Index index) {
    return at(permute<1, 0>(v), index);
  }
};

}  // namespace detail::inline LINATTN_TARGET

inline namespace LINATTN_TARGET {

// Bytes of scratch for the same call of mixed_attention_layer: 5 numbers a token and channel, and the ops' own.
template <class Model = Mlp, class Loss = SquaredError, class Context, Storage T, class W, class F>
[[nodiscard]] std::size_t mixed_attention_layer_workspace(const Context& ctx, In<T, 3> x,
                                                          const MixedAttentionWeights<W, F>& weights,
                                                          const TensorView<T, 3>& out,
                                                          const MixedLayerOptions& options) {
  const AttentionWeights<W> none{};
  const detail::AttentionLayer<T, W> layer{x,   {}, weights.ttt.projections, none,
                                           out, {}, options.heads,           options.qk_norm_eps};
  return layer.check().ok() ? layer.workspace(ctx, detail::MixedCore<Model, Loss, W, F>{weights, options})
                            : 0;
}

// out = ((1 - mix) trained + mix local) W_out^T + b_out. See above.
template <class Model = Mlp, class Loss = SquaredError, class Context, Storage T, class W, class F>
[[nodiscard]] Status mixed_attention_layer(const Context& ctx, In<T, 3> x,
                                           const MixedAttentionWeights<W, F>& weights,
                                           const TensorView<T, 3>& out, const MixedLayerOptions& options) {
  const AttentionWeights<W> none{};
  const detail::AttentionLayer<T, W> layer{x,   {}, weights.ttt.projections, none,
                                           out, {}, options.heads,           options.qk_norm_eps};
  return layer.run(ctx, detail::MixedCore<Model, Loss, W, F>{weights, options},
                   "mixed_attention_layer, workspace");
}

}  // namespace LINATTN_TARGET
LINATTN_END

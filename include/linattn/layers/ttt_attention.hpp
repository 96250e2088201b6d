// The T5 layer: test-time-training attention with its projections, over the tokens of one input.
//
//   q, k, v = x W_q^T + b_q, ...;   q, k = rms_norm(q), rms_norm(k) where weights for it are given
//   k  = instance norm of k over the tokens (eps = 1)
//   q += conv3x3(q), k += conv3x3(k) on the token grid, where weights for it are given
//   W' = W - inner_lr dl/dW (k, v),  out = f(q; W') W_out^T + b_out
//
// T5 is SwiGlu and InnerProduct with both convs; its first version Mlp and InnerProduct without a conv; the TTT
// branch of DiT5 Mlp and SquaredError. Any other model, loss and step of ttt_inner.hpp is as good. Grids of any
// aspect ratio, where the official code knows squares alone.
//
// Shapes: as softmax_attention_layer; w1, w2, w3 [heads, head_dim, head_dim], those that the model has; conv
// weights [heads * head_dim, 1, 3, 3], biases [heads * head_dim], or empty.
// Numerics: those of linear, rms_norm and ttt. On the host all between the projections is held in Compute<T>, so
// 16-bit storage rounds `out` alone; without an output projection, and on Cuda, q, k, v and what is attended are
// rounded to T, too.
// Errors: those of the ops, with the names of the layer's tensors; workspace. `out` may be x, if the layer has an
// output projection.
// Source: T5/models.py, T5/models_tttv0.py and DiT5/models.py of LeapLabTHU/Transformer-to-TTT.
#pragma once

#include <cstddef>
#include <optional>
#include <type_traits>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/layers/projections.hpp>
#include <linattn/ops/ttt.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN

// Projections stored as W (they are inherited), the TTT parameters as F.
template <class W, class F = W>
struct TttAttentionWeights {
  AttentionWeights<W> projections{};
  TttWeights<F> inner{};
  TensorView<const F, 4> q_conv{}, k_conv{};
  TensorView<const F, 1> q_conv_bias{}, k_conv_bias{};
};

struct TttLayerOptions {
  Index heads = 1;
  TokenGrid grid{};  // among the tokens of x; needed with a conv only
  double inner_lr = 1;
  std::optional<double> scale{};  // head_dim^-1/2 by default
  bool key_norm = true;
  double key_norm_eps = 1;
  double qk_norm_eps = 1e-6;
};

namespace detail::inline LINATTN_TARGET {

// The attention between the projections. Keys are `text` tokens, then those of x; of the text the last
// `text_queries` ask (all or none).
template <class Model, class Loss, class Step, class W, class F>
struct TttCore {
  const TttAttentionWeights<W, F>& weights;
  const TttLayerOptions& options;
  Index text, text_queries;

  template <class Context, class T>
  [[nodiscard]] std::size_t workspace(const Context& ctx, const TensorView<T, 4>& q,
                                      const TensorView<T, 4>& k, const TensorView<T, 4>& v,
                                      const TensorView<T, 4>& out) const {
    if (text == text_queries)
      return ttt_workspace<Model, Loss, Step>(ctx, q, k, v, weights.inner, out, ttt_options(text));
    Carver carver(Workspace{});
    const FastWeights<Compute<T>> fast = take<Compute<T>>(carver, k);
    return carver.used() +
           std::max(
               ttt_update_workspace<Model, Loss, Step>(ctx, k, v, weights.inner, fast, ttt_options(text)),
               ttt_apply_workspace<Model>(ctx, q, FastWeights<const Compute<T>>(fast), out, ttt_options(0)));
  }

  template <class Context, class T>
  [[nodiscard]] Status run(const Context& ctx, const TensorView<T, 4>& q, const TensorView<T, 4>& k,
                           const TensorView<T, 4>& v, const TensorView<T, 4>& out) const {
    if (text == text_queries)
      return ttt<Model, Loss, Step>(ctx, q, k, v, weights.inner, out, ttt_options(text));
    // The image lies elsewhere among the queries than among the keys, so the halves of ttt are called apart.
    Carver carver(ctx.workspace);
    const FastWeights<Compute<T>> fast = take<Compute<T>>(carver, k);
    const Context inner = ctx.with(carver.rest());
    const Status status = ttt_update<Model, Loss, Step>(inner, k, v, weights.inner, fast, ttt_options(text));
    if (!status.ok()) return status;
    return ttt_apply<Model>(inner, q, FastWeights<const Compute<T>>(fast), out, ttt_options(0));
  }

 private:
  [[nodiscard]] TttOptions<F> ttt_options(Index text_before) const {
    TttOptions<F> result{options.inner_lr, options.scale, {}};
    result.prologue = {options.key_norm,    options.key_norm_eps, weights.q_conv, weights.k_conv,
                       weights.q_conv_bias, weights.k_conv_bias,  options.grid};
    result.prologue.grid.offset += text_before;
    return result;
  }
  template <class C, class T>
  [[nodiscard]] FastWeights<C> take(Carver& carver, const TensorView<T, 4>& k) const {
    const Index batch = k.extent(0), heads = k.extent(2), d = k.extent(3);
    const auto matrix = [&](bool used) {
      return used ? TensorView<C, 4>(carver.take<C>(batch * heads * d * d), {batch, heads, d, d})
                  : TensorView<C, 4>{};
    };
    FastWeights<C> fast;
    fast.w1 = matrix(true);
    fast.w2 = matrix(matrices<Model> >= 2);
    fast.w3 = matrix(matrices<Model> >= 3);
    return fast;
  }
};

}  // namespace detail::inline LINATTN_TARGET

inline namespace LINATTN_TARGET {

// Bytes of scratch for the same call of ttt_attention_layer: 4 numbers a token and channel, and the ops' own.
template <class Model = SwiGlu, class Loss = InnerProduct, class Step = Plain, class Context, Storage T,
          class W, class F>
[[nodiscard]] std::size_t ttt_attention_layer_workspace(const Context& ctx, In<T, 3> x,
                                                        const TttAttentionWeights<W, F>& weights,
                                                        const TensorView<T, 3>& out,
                                                        const TttLayerOptions& options) {
  const AttentionWeights<W> none{};
  const detail::AttentionLayer<T, W> layer{x,   {}, weights.projections, none,
                                           out, {}, options.heads,       options.qk_norm_eps};
  return layer.check().ok()
             ? layer.workspace(ctx, detail::TttCore<Model, Loss, Step, W, F>{weights, options, 0, 0})
             : 0;
}

// out = f(q; W') W_out^T + b_out. See above.
template <class Model = SwiGlu, class Loss = InnerProduct, class Step = Plain, class Context, Storage T,
          class W, class F>
[[nodiscard]] Status ttt_attention_layer(const Context& ctx, In<T, 3> x,
                                         const TttAttentionWeights<W, F>& weights,
                                         const TensorView<T, 3>& out, const TttLayerOptions& options) {
  const AttentionWeights<W> none{};
  const detail::AttentionLayer<T, W> layer{x,   {}, weights.projections, none,
                                           out, {}, options.heads,       options.qk_norm_eps};
  return layer.run(ctx, detail::TttCore<Model, Loss, Step, W, F>{weights, options, 0, 0},
                   "ttt_attention_layer, workspace");
}

}  // namespace LINATTN_TARGET
LINATTN_END

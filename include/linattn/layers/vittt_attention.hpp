// The ViT3 layer: a gated inner model on every head and, beside it, one convolution on a head of its own, both trained
// at test time, with the projections around them.
//
//   q, k, v, q2, k2, v2 = x W_qkv^T + b_qkv        q, k, v of `heads` heads, q2, k2, v2 of one
//   gated     = f(q; W1', W2'),  f(x; W1, W2) = (x W1) * silu(x W2)
//   convolved = conv3x3(q2; w3')                                             on the token grid
//   out       = [gated | convolved] W_out^T + b_out
//
// W1', W2' and w3' are one step from W1, W2 and w3 on -(scale / tokens) sum <v, f(k)>, of k2 and v2 for w3; each column
// of a gradient, each channel's of w3, is divided by its norm + 1. No key norm, no qk-norm.
//
// Shapes: x (b, n, in), n = grid.height * grid.width, of any aspect ratio; out (b, n, any); qkv projection
// [3 (heads + 1) head_dim, in], rows q | k | v | q2 | k2 | v2, head-major; out projection [any, (heads + 1) head_dim],
// or none (empty): then out is (b, n, (heads + 1) head_dim); w1, w2 [heads, head_dim, head_dim]; w3 [head_dim, 1, 3, 3].
// Numerics: those of linear, ttt and ttt_conv; all between the projections is held in Compute<T>, so 16-bit storage
// rounds `out` alone; without an output projection what lies between is rounded to T, too.
// Errors: those of the ops, with the names of the layer's tensors; workspace. `out` may be x, if the layer has an
// output projection.
// Source: `TTT` in ttt_block.py of LeapLabTHU/ViTTT; W1 and W2 are its w1 and w2, which Glu takes the other way round.
#pragma once

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <type_traits>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/layers/projections.hpp>
#include <linattn/ops/linear.hpp>
#include <linattn/ops/ttt.hpp>
#include <linattn/ops/ttt_conv.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN

// Projections stored as W, the TTT parameters as F.
template <class W, class F = W>
struct VitttAttentionWeights {
  Projection<W> qkv{}, out{};
  TensorView<const F, 3> w1{}, w2{};
  TensorView<const F, 4> w3{};
};

struct VitttLayerOptions {
  Index heads = 1;
  TokenGrid grid{};
  double inner_lr = 1;
  double scale = 1.0 / 3.0;
};

namespace detail::inline LINATTN_TARGET {

// One call of the layer.
template <class T, class W, class F>
struct VitttLayer {
  TensorView<const T, 3> x;
  const VitttAttentionWeights<W, F>& weights;
  TensorView<T, 3> out;
  const VitttLayerOptions& options;

  [[nodiscard]] constexpr bool projects() const { return weights.out.weight.extent(0) != 0; }
  // Channels of what the attentions give: those of the heads, and one head more.
  [[nodiscard]] constexpr Index width() const { return weights.qkv.weight.extent(0) / 3; }
  [[nodiscard]] constexpr Index head_dim() const { return width() / (options.heads + 1); }

  [[nodiscard]] constexpr Status check() const {
    constexpr ProjectionNames qkv = {"qkv weight, out",          "qkv weight, in", "qkv weight",
                                     "qkv weight, stride of in", "qkv bias, out",  "qkv bias",
                                     "qkv bias, stride"};
    const Status first = first_failure(
        expect_positive(x.extent(0), "x, batch"), expect_positive(x.extent(1), "x, tokens"),
        expect_positive(x.extent(2), "x, channels"), expect_view(x, "x", "x, channel stride"),
        expect_positive(options.heads, "heads"), expect_positive(width(), "qkv weight, out"),
        expect_equal(x.extent(0), out.extent(0), "out, batch"),
        expect_equal(x.extent(1), out.extent(1), "out, tokens"),
        expect_positive(out.extent(2), "out, channels"), expect_view(out, "out", "out, channel stride"));
    if (!first.ok()) return first;
    const Index rows = weights.qkv.weight.extent(0), heads = 3 * (options.heads + 1);
    if (rows % heads != 0)
      return fail(Code::shape, "qkv weight, out (a multiple of 3 heads + 3)", heads, rows);
    // Under the names that they have here, before Glu and ttt_conv see them under theirs.
    const TttWeights<F> matrices{weights.w1, weights.w2, {}};
    const Status second = first_failure(check_projection(weights.qkv, x.extent(2), rows, qkv),
                                        check_ttt_weights<Glu>(matrices, options.heads, head_dim()),
                                        expect_equal(head_dim(), weights.w3.extent(0), "w3, channels"),
                                        expect_equal(1, weights.w3.extent(1), "w3, inputs a channel"),
                                        expect_equal(3, weights.w3.extent(2), "w3, kernel rows"),
                                        expect_equal(3, weights.w3.extent(3), "w3, kernel columns"),
                                        expect_view(weights.w3, "w3", "w3, kernel column stride"));
    if (!second.ok()) return second;
    if (projects()) return check_projection(weights.out, width(), out.extent(2), x_names.out);
    return expect_equal(width(), out.extent(2), "out, channels (no out projection)");
  }

  template <class Context>
  [[nodiscard]] std::size_t workspace(const Context& ctx) const {
    if (!projects()) return workspace_as<T>(ctx);
    return workspace_as<typename Context::template Between<T>>(ctx);
  }

  template <class Context>
  [[nodiscard]] Status run(const Context& ctx) const {
    if (const Status status = check(); !status.ok()) return status;
    const std::size_t needed = workspace(ctx);
    if (ctx.workspace.data == nullptr || ctx.workspace.size < needed)
      return fail(Code::workspace, "vittt_attention_layer, workspace", static_cast<Index>(needed),
                  ctx.workspace.data == nullptr ? 0 : static_cast<Index>(ctx.workspace.size));
    if (!projects()) return run_as<T>(ctx);
    return run_as<typename Context::template Between<T>>(ctx);
  }

 private:
  // All that the projection gives, token by token, the two attentions' views of it, and what they give.
  template <class C>
  struct Memory {
    TensorView<C, 3> packed, attended;
    Qkv<C> gated, convolved;
    TensorView<C, 4> gated_out, convolved_out;
  };
  template <class C>
  [[nodiscard]] Memory<C> take(Carver& carver) const {
    const Index batch = x.extent(0), tokens = x.extent(1), d = head_dim(), channels = options.heads * d;
    Memory<C> m;
    m.packed = {carver.take<C>(batch * tokens * 3 * width()), {batch, tokens, 3 * width()}};
    if (projects()) {
      m.attended = {carver.take<C>(batch * tokens * width()), {batch, tokens, width()}};
    } else if constexpr (std::is_same_v<C, T>) {
      m.attended = out;
    }
    m.gated = unpack_qkv(slice<2>(m.packed, 0, 3 * channels), options.heads);
    m.convolved = unpack_qkv(slice<2>(m.packed, 3 * channels, 3 * d), 1);
    m.gated_out = split_heads(slice<2>(m.attended, 0, channels), options.heads);
    m.convolved_out = split_heads(slice<2>(m.attended, channels, d), 1);
    return m;
  }

  // Glu applies silu to what its first matrix gives.
  [[nodiscard]] TttWeights<F> glu() const { return {weights.w2, weights.w1, {}}; }
  [[nodiscard]] TttOptions<F> ttt_options() const { return {options.inner_lr, options.scale, {}}; }
  [[nodiscard]] TttConvOptions conv_options() const {
    return {options.grid, options.scale, options.inner_lr};
  }

  template <class C, class Context>
  [[nodiscard]] std::size_t workspace_as(const Context& ctx) const {
    Carver carver(Workspace{});
    const Memory<C> m = take<C>(carver);
    const TensorView<const C, 3> attended = m.attended;
    const std::size_t bytes[] = {
        linear_workspace(ctx, x, weights.qkv.weight, weights.qkv.bias, m.packed),
        ttt_workspace<Glu, InnerProduct, ColumnClip>(ctx, m.gated.q, m.gated.k, m.gated.v, glu(), m.gated_out,
                                                     ttt_options()),
        ttt_conv_workspace(ctx, m.convolved.q, m.convolved.k, m.convolved.v, weights.w3, m.convolved_out,
                           conv_options()),
        projects() ? linear_workspace(ctx, attended, weights.out.weight, weights.out.bias, out) : 0};
    return carver.used() + *std::max_element(std::begin(bytes), std::end(bytes));
  }

  template <class C, class Context>
  [[nodiscard]] Status run_as(const Context& ctx) const {
    Carver carver(ctx.workspace);
    const Memory<C> m = take<C>(carver);
    const TensorView<const C, 3> attended = m.attended;
    const Context inner = ctx.with(carver.rest());
    Status status = linear(inner, x, weights.qkv.weight, weights.qkv.bias, m.packed);
    if (status.ok())
      status = ttt<Glu, InnerProduct, ColumnClip>(inner, m.gated.q, m.gated.k, m.gated.v, glu(), m.gated_out,
                                                  ttt_options());
    if (status.ok())
      status = ttt_conv(inner, m.convolved.q, m.convolved.k, m.convolved.v, weights.w3, m.convolved_out,
                        conv_options());
    if (status.ok() && projects())
      status = linear(inner, attended, weights.out.weight, weights.out.bias, out);
    return status;
  }
};

}  // namespace detail::inline LINATTN_TARGET

inline namespace LINATTN_TARGET {

// Bytes of scratch for the same call of vittt_attention_layer: 4 numbers a token and channel, and the ops' own.
template <class Context, Storage T, class W, class F>
[[nodiscard]] std::size_t vittt_attention_layer_workspace(const Context& ctx, In<T, 3> x,
                                                          const VitttAttentionWeights<W, F>& weights,
                                                          const TensorView<T, 3>& out,
                                                          const VitttLayerOptions& options) {
  const detail::VitttLayer<T, W, F> layer{x, weights, out, options};
  return layer.check().ok() ? layer.workspace(ctx) : 0;
}

// out = [gated | convolved] W_out^T + b_out. See above.
template <class Context, Storage T, class W, class F>
[[nodiscard]] Status vittt_attention_layer(const Context& ctx, In<T, 3> x,
                                           const VitttAttentionWeights<W, F>& weights,
                                           const TensorView<T, 3>& out, const VitttLayerOptions& options) {
  return detail::VitttLayer<T, W, F>{x, weights, out, options}.run(ctx);
}

}  // namespace LINATTN_TARGET
LINATTN_END

// What attention layers share: the projections around an attention, over the tokens of one or of two inputs.
//
//   [q | k | v] = context rows first, then those of x; each input has its own projections
//   q, k        RMS-normalised over the channels of each head, where the weights for it are given
//   attended    = attention(q, k, v)
//   out         = attended W_out^T + b_out, each input's own rows
//
// Both inputs are projected into one buffer of the workspace, and the outputs read slices of one, so nothing is
// concatenated. Between the projections all is held in the context's Between<T>. On the host that is Compute<T>: 16-bit
// storage rounds the outputs alone. On Cuda it is T, which tensor cores take and which halves the traffic: q, k, v, what
// rms_norm makes of them and what is attended are rounded to T, too.
// Written once for any context: the ops are found by the context's type, so include the headers of its backend
// (cpu.hpp for the host).
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/ops/linear.hpp>
#include <linattn/ops/rms_norm.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN

// y = x weight^T + bias: weight [out, in], bias [out] or empty.
template <class W>
struct Projection {
  TensorView<const W, 2> weight{};
  TensorView<const W, 1> bias{};
};

// The parameters around an attention of `heads` heads: q, k, v map (.., in) to (.., heads * head_dim), head-major.
template <class W>
struct AttentionWeights {
  Projection<W> q{}, k{}, v{};
  Projection<W> out{};                        // maps heads * head_dim to the output; empty weight: none
  TensorView<const W, 1> q_norm{}, k_norm{};  // [head_dim], RMS norm of each head's q and k; empty: none
};

inline namespace LINATTN_TARGET {

// q, k and v of a fused projection: weight [3 * width, in], bias [3 * width] or empty, rows q | k | v.
template <class W>
[[nodiscard]] constexpr AttentionWeights<W> split_qkv(const TensorView<const W, 2>& weight,
                                                      const TensorView<const W, 1>& bias) {
  const Index width = weight.extent(0) / 3;
  const auto part = [&](Index i) {
    return Projection<W>{slice<0>(weight, i * width, width),
                         bias.extent(0) == 0 ? bias : slice<0>(bias, i * width, width)};
  };
  return {part(0), part(1), part(2)};
}

}  // namespace LINATTN_TARGET

namespace detail::inline LINATTN_TARGET {

// Literals for a Status: what was wrong with one projection.
struct ProjectionNames {
  const char *out, *in, *null, *stride, *bias, *bias_null, *bias_stride;
};
#define LINATTN_PROJECTION_NAMES(p)                                                                       \
  {                                                                                                       \
    p " weight, out", p " weight, in", p " weight", p " weight, stride of in", p " bias, out", p " bias", \
        p " bias, stride"                                                                                 \
  }
struct AttentionNames {
  ProjectionNames q, k, v, out;
  const char *q_norm, *q_norm_null, *q_norm_stride, *k_norm, *k_norm_null, *k_norm_stride;
};
inline constexpr AttentionNames x_names = {LINATTN_PROJECTION_NAMES("q"),
                                           LINATTN_PROJECTION_NAMES("k"),
                                           LINATTN_PROJECTION_NAMES("v"),
                                           LINATTN_PROJECTION_NAMES("out"),
                                           "q_norm, channels",
                                           "q_norm",
                                           "q_norm, stride",
                                           "k_norm, channels",
                                           "k_norm",
                                           "k_norm, stride"};
inline constexpr AttentionNames context_names = {LINATTN_PROJECTION_NAMES("context q"),
                                                 LINATTN_PROJECTION_NAMES("context k"),
                                                 LINATTN_PROJECTION_NAMES("context v"),
                                                 LINATTN_PROJECTION_NAMES("context out"),
                                                 "context q_norm, channels",
                                                 "context q_norm",
                                                 "context q_norm, stride",
                                                 "context k_norm, channels",
                                                 "context k_norm",
                                                 "context k_norm, stride"};
#undef LINATTN_PROJECTION_NAMES

template <class W>
[[nodiscard]] constexpr Status check_projection(const Projection<W>& p, Index in, Index out,
                                                const ProjectionNames& names) {
  const Status first = first_failure(expect_equal(out, p.weight.extent(0), names.out),
                                     expect_equal(in, p.weight.extent(1), names.in),
                                     expect_view(p.weight, names.null, names.stride));
  if (!first.ok() || p.bias.extent(0) == 0) return first;
  return first_failure(expect_equal(out, p.bias.extent(0), names.bias),
                       expect_view(p.bias, names.bias_null, names.bias_stride));
}

template <class W>
[[nodiscard]] constexpr Status check_norm_weight(const TensorView<const W, 1>& weight, Index head_dim,
                                                 const char* channels, const char* null, const char* stride) {
  if (weight.extent(0) == 0) return {};
  return first_failure(expect_equal(head_dim, weight.extent(0), channels), expect_view(weight, null, stride));
}

// The parameters of one input of `in` channels. `queries`: whether its tokens ask; `projects`: whether what they
// receive is projected to `out` channels.
template <class W>
[[nodiscard]] constexpr Status check_attention_weights(const AttentionWeights<W>& w, Index in, Index width,
                                                       Index head_dim, bool queries, bool projects, Index out,
                                                       const AttentionNames& n) {
  const Status keys =
      first_failure(check_projection(w.k, in, width, n.k), check_projection(w.v, in, width, n.v),
                    check_norm_weight(w.k_norm, head_dim, n.k_norm, n.k_norm_null, n.k_norm_stride));
  if (!keys.ok() || !queries) return keys;
  return first_failure(check_projection(w.q, in, width, n.q),
                       check_norm_weight(w.q_norm, head_dim, n.q_norm, n.q_norm_null, n.q_norm_stride),
                       projects ? check_projection(w.out, width, out, n.out) : Status{});
}

// One call of a layer: all that the steps below share.
template <class T, class W>
struct AttentionLayer {
  TensorView<const T, 3> x, context;  // (b, n, in), (b, t, in'); t may be 0
  const AttentionWeights<W>& x_weights;
  const AttentionWeights<W>& context_weights;
  TensorView<T, 3> x_out, context_out;  // context_out may be empty: then context tokens do not ask
  Index heads;
  double qk_norm_eps;

  // Without an output projection the attention writes into x_out itself.
  [[nodiscard]] constexpr bool projects() const { return x_weights.out.weight.extent(0) != 0; }
  [[nodiscard]] constexpr Index text() const { return context.extent(1); }
  [[nodiscard]] constexpr Index text_queries() const { return context_out.empty() ? 0 : text(); }
  [[nodiscard]] constexpr Index width() const { return x_weights.q.weight.extent(0); }

  [[nodiscard]] constexpr Status check() const {
    const Status first =
        first_failure(expect_positive(x.extent(0), "x, batch"), expect_positive(x.extent(1), "x, tokens"),
                      expect_positive(x.extent(2), "x, channels"), expect_view(x, "x", "x, channel stride"),
                      expect_positive(heads, "heads"), expect_positive(width(), "q weight, out"),
                      expect_equal(x.extent(0), x_out.extent(0), "x_out, batch"),
                      expect_equal(x.extent(1), x_out.extent(1), "x_out, tokens"),
                      expect_positive(x_out.extent(2), "x_out, channels"),
                      expect_view(x_out, "x_out", "x_out, channel stride"));
    if (!first.ok()) return first;
    if (width() % heads != 0) return fail(Code::shape, "q weight, out (a multiple of heads)", heads, width());
    if (!projects() && text_queries() > 0)
      return fail(Code::empty, "out weight, out (two outputs need it)", 1, 0);
    if (!projects() && x_out.extent(2) != width())
      return fail(Code::shape, "x_out, channels (no out projection)", width(), x_out.extent(2));
    const Index head_dim = width() / heads;
    const Status own = check_attention_weights(x_weights, x.extent(2), width(), head_dim, true, projects(),
                                               x_out.extent(2), x_names);
    if (!own.ok() || text() == 0) return own;
    const Status second = first_failure(expect_equal(x.extent(0), context.extent(0), "context, batch"),
                                        expect_positive(context.extent(2), "context, channels"),
                                        expect_view(context, "context", "context, channel stride"));
    if (!second.ok()) return second;
    if (text_queries() > 0) {
      const Status third =
          first_failure(expect_equal(context.extent(0), context_out.extent(0), "context_out, batch"),
                        expect_equal(text(), context_out.extent(1), "context_out, tokens"),
                        expect_view(context_out, "context_out", "context_out, channel stride"));
      if (!third.ok()) return third;
    }
    return check_attention_weights(context_weights, context.extent(2), width(), head_dim, text_queries() > 0,
                                   true, context_out.extent(2), context_names);
  }

  template <class Context, class Core>
  [[nodiscard]] std::size_t workspace(const Context& ctx, const Core& core) const {
    if (!projects()) return workspace_as<T>(ctx, core);
    return workspace_as<typename Context::template Between<T>>(ctx, core);
  }

  template <class Context, class Core>
  [[nodiscard]] Status run(const Context& ctx, const Core& core, const char* what) const {
    if (const Status status = check(); !status.ok()) return status;
    const std::size_t needed = workspace(ctx, core);
    if (ctx.workspace.data == nullptr || ctx.workspace.size < needed)
      return fail(Code::workspace, what, static_cast<Index>(needed),
                  ctx.workspace.data == nullptr ? 0 : static_cast<Index>(ctx.workspace.size));
    if (!projects()) return run_as<T>(ctx, core);
    return run_as<typename Context::template Between<T>>(ctx, core);
  }

 private:
  // q | k | v of context and x tokens, and what the attention makes of them, token by token, stored as C.
  template <class C>
  struct Memory {
    TensorView<C, 3> packed;    // (b, t + n, 3 * width)
    TensorView<C, 3> attended;  // (b, text queries + n, width), or x_out
  };
  template <class C>
  [[nodiscard]] Memory<C> take(Carver& carver) const {
    const Index batch = x.extent(0), tokens = text() + x.extent(1), asking = text_queries() + x.extent(1);
    Memory<C> m;
    m.packed = {carver.take<C>(batch * tokens * 3 * width()), {batch, tokens, 3 * width()}};
    if (projects()) {
      m.attended = {carver.take<C>(batch * asking * width()), {batch, asking, width()}};
    } else if constexpr (std::is_same_v<C, T>) {
      m.attended = x_out;
    }
    return m;
  }

  // The attention's views of the memory: all keys and values, the queries of those that ask.
  template <class C>
  [[nodiscard]] Qkv<C> qkv(const Memory<C>& m) const {
    Qkv<C> views = unpack_qkv(m.packed, heads);
    views.q = slice<1>(views.q, text() - text_queries(), text_queries() + x.extent(1));
    return views;
  }

  template <class C, class Context, class Core>
  [[nodiscard]] std::size_t workspace_as(const Context& ctx, const Core& core) const {
    Carver carver(Workspace{});
    const Memory<C> m = take<C>(carver);
    const Qkv<C> views = qkv(m);
    std::size_t bytes = core.workspace(ctx, views.q, views.k, views.v, split_heads(m.attended, heads));
    const auto add = [&](const auto& from, const Projection<W>& p, const auto& to) {
      bytes = std::max<std::size_t>(bytes, linear_workspace(ctx, from, p.weight, p.bias, to));
      return Status{};
    };
    (void)project_inputs(m, add);
    (void)project_outputs(m, add);
    return carver.used() + bytes;
  }

  template <class C, class Context, class Core>
  [[nodiscard]] Status run_as(const Context& ctx, const Core& core) const {
    Carver carver(ctx.workspace);
    const Memory<C> m = take<C>(carver);
    const Context inner = ctx.with(carver.rest());
    const auto project = [&](const auto& from, const Projection<W>& p, const auto& to) {
      return linear(inner, from, p.weight, p.bias, to);
    };
    if (const Status status = project_inputs(m, project); !status.ok()) return status;
    const auto normalise = [&](Index part, Index first, Index count, const TensorView<const W, 1>& weight) {
      if (count == 0 || weight.extent(0) == 0) return Status{};
      const TensorView<C, 4> v = split_heads(rows(m, part, first, count), heads);
      return rms_norm(inner, v, weight, v, RmsNormOptions{.eps = qk_norm_eps});
    };
    const Status norms[] = {normalise(0, 0, text_queries(), context_weights.q_norm),
                            normalise(1, 0, text(), context_weights.k_norm),
                            normalise(0, text(), x.extent(1), x_weights.q_norm),
                            normalise(1, text(), x.extent(1), x_weights.k_norm)};
    if (const Status status = first_failure(norms[0], norms[1], norms[2], norms[3]); !status.ok())
      return status;
    const Qkv<C> views = qkv(m);
    const Status status = core.run(inner, views.q, views.k, views.v, split_heads(m.attended, heads));
    return status.ok() ? project_outputs(m, project) : status;
  }

  // Third `part` (q, k, v) of the tokens [first, first + count) of the packed buffer.
  template <class C>
  [[nodiscard]] TensorView<C, 3> rows(const Memory<C>& m, Index part, Index first, Index count) const {
    return slice<2>(slice<1>(m.packed, first, count), part * width(), width());
  }
  // f(from, projection, to) for each projection that there is, until one fails.
  template <class C, class F>
  [[nodiscard]] Status project_inputs(const Memory<C>& m, const F& f) const {
    const auto all = [&](const TensorView<const T, 3>& from, const AttentionWeights<W>& w, Index first,
                         bool asks) {
      const Index count = from.extent(1);
      Status status;
      if (asks) status = f(from, w.q, rows(m, 0, first, count));
      if (status.ok()) status = f(from, w.k, rows(m, 1, first, count));
      if (status.ok()) status = f(from, w.v, rows(m, 2, first, count));
      return status;
    };
    const Status status = text() > 0 ? all(context, context_weights, 0, text_queries() > 0) : Status{};
    return status.ok() ? all(x, x_weights, text(), true) : status;
  }
  template <class C, class F>
  [[nodiscard]] Status project_outputs(const Memory<C>& m, const F& f) const {
    if (!projects()) return {};
    const TensorView<const C, 3> attended = m.attended;
    const Status status =
        text_queries() > 0 ? f(slice<1>(attended, 0, text()), context_weights.out, context_out) : Status{};
    return status.ok() ? f(slice<1>(attended, text_queries(), x.extent(1)), x_weights.out, x_out) : status;
  }
};

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

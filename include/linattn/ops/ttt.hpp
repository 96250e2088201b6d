// Test-time-training attention: keys and values train a small model per (batch, head), queries read it. The
// contract; the inner models, losses and steps are in ttt_inner.hpp, the forms in ttt_cpu.hpp and ttt_cuda.cuh.
//
//   W' = W - inner_lr * dl/dW                one step, all N = k tokens, every gradient at the initial W
//   out = f(q; W')                           ColumnClip: dl/dW clipped, column by column
//
// with l = -(scale / N) sum <v, f(k; W)> (InnerProduct) or (scale / 2N) sum |f(k; W) - v|^2 (SquaredError),
// and the fast weights acting from the right, x W. `ttt_update` is the first line, `ttt_apply` the second;
// `ttt` is both, and gives the bits that the two in turn give. Callers need them apart to keep W' while k and
// v stay, or to reduce it over machines.
//
// The prologue, in this order and each part optional: k becomes its instance norm over all k tokens, then
// x + conv3x3(x) + bias on the token grid for q and for the normalised k (zeros outside the grid are zeros
// after the norm). It is fused: raw q, k, v are read (k once more for the statistics), and no token-sized
// intermediate is written. Its specification is instance_norm and depthwise_conv, whose arithmetic it repeats
// bit for bit (tensor cores apart).
//
// Shapes    q, out (b, nq, h, d); k, v (b, nk, h, d), nk may differ from nq; weights w1, w2, w3 [h, d, d],
//           those that the model has (ttt_inner.hpp says which), the others empty; fast weights
//           [b, h, d, d]; conv weights [h * d, 1, 3, 3] and biases [h * d], channel = head * d + j,
//           or empty. Any d >= 1 and any strides with channel stride 1.
// Numerics  arithmetic and fast weights in Compute<T>; activations rounded to T once, on output. On the host
//           token sums run in tiles of 64 within chunks of 512 tokens, chunks added in order, so results are
//           bitwise equal for any number of workers. Relative L2 error against double on the same inputs,
//           w ~ d^-1/2: float 4.3e-7 (d = 128, whatever the tokens; 2e-6 is tested), f16 storage 2e-4 (5e-4),
//           bf16 2e-3 (5e-3).
//           On Cuda tokens are split by shapes alone and the splits added in order: the same bits each time, on
//           any GPU. Float storage: 6e-7 (2e-6 is tested). 16-bit storage on tensor cores rounds to T what enters
//           a product: up to 8 factors of a result, each wrong by 0.43 u in the mean square (u = 2^-11 for f16,
//           2^-8 for bf16), so 0.43 sqrt(8) u = 1.2 u in all (2 u is tested); f16 overflows where one of them
//           passes 65504. Elsewhere only the output is rounded.
// Errors    empty (an axis), shape, stride, null_data, option (eps negative, a rate or a scale that is not
//           finite, a grid that does not fit the tokens; on Cuda more than 2^30 tokens), alias (out starts where
//           q, k or v does), workspace.
//           out must not overlap q, k, v or a weight, and fast weights nothing else.
// Workspace X_workspace of the same arguments; it does not grow with the tokens, but on the host for two rows of
//           the grid a worker if the prologue convolves, on Cuda up to 1024 partial gradients.
// Source    Transformer-to-TTT, `TTTAttention` of T5 and DiT5; ViTTT, `TTT`.
#pragma once

#include <optional>
#include <type_traits>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/ops/depthwise_conv.hpp>
#include <linattn/ops/ttt_inner.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN

// Initial weights, one set a head, stored as W; a model's unused ones stay empty.
template <class W>
struct TttWeights {
  TensorView<const W, 3> w1{}, w2{}, w3{};

  [[nodiscard]] LINATTN_INLINE constexpr const TensorView<const W, 3>& operator[](int i) const {
    return i == 0 ? w1 : i == 1 ? w2 : w3;
  }
};

// Updated weights, one set a batch entry and head, in the type of the arithmetic.
template <class C>
struct FastWeights {
  TensorView<C, 4> w1{}, w2{}, w3{};

  [[nodiscard]] LINATTN_INLINE constexpr const TensorView<C, 4>& operator[](int i) const {
    return i == 0 ? w1 : i == 1 ? w2 : w3;
  }
  // What ttt_update wrote is what ttt_apply reads.
  template <class D>
  requires(std::is_same_v<D, const C> && !std::is_const_v<C>) [[nodiscard]] LINATTN_INLINE constexpr
  operator FastWeights<D>() const {
    return {w1, w2, w3};
  }
};

// What happens to raw q and k before the fast weights see them. Empty conv views mean no conv.
template <class W>
struct TttPrologue {
  bool key_norm = false;
  double key_norm_eps = 1;
  TensorView<const W, 4> q_conv{}, k_conv{};
  TensorView<const W, 1> q_conv_bias{}, k_conv_bias{};
  TokenGrid grid{};
};

template <class W>
struct TttOptions {
  double inner_lr = 1;
  std::optional<double> scale{};  // head_dim^-1/2 by default
  TttPrologue<W> prologue{};
};

namespace detail::inline LINATTN_TARGET {

// Which of q and k a message is about.
enum class Side { q, k };

template <class W>
[[nodiscard]] constexpr Status check_ttt_conv(Side side, const TensorView<const W, 4>& weight,
                                              const TensorView<const W, 1>& bias, const TokenGrid& grid,
                                              Index channels, Index tokens) {
  const auto what = [side](const char* q, const char* k) { return side == Side::q ? q : k; };
  if (weight.extent(0) == 0) {
    return expect_equal(0, bias.extent(0),
                        what("q_conv_bias, channels (no q_conv)", "k_conv_bias, channels (no k_conv)"));
  }
  const Status first = first_failure(
      expect_equal(channels, weight.extent(0), what("q_conv, channels", "k_conv, channels")),
      expect_equal(1, weight.extent(1), what("q_conv, inputs a channel", "k_conv, inputs a channel")),
      expect_equal(3, weight.extent(2), what("q_conv, kernel rows", "k_conv, kernel rows")),
      expect_equal(3, weight.extent(3), what("q_conv, kernel columns", "k_conv, kernel columns")),
      expect_view(weight, what("q_conv", "k_conv"),
                  what("q_conv, kernel column stride", "k_conv, kernel column stride")),
      check_grid(grid, tokens));
  if (!first.ok() || bias.extent(0) == 0) return first;
  return first_failure(
      expect_equal(channels, bias.extent(0), what("q_conv_bias, channels", "k_conv_bias, channels")),
      expect_view(bias, what("q_conv_bias", "k_conv_bias"),
                  what("q_conv_bias, stride", "k_conv_bias, stride")));
}

// One matrix a head: [h, d, d] if the model has it, else empty.
template <class W>
[[nodiscard]] constexpr Status check_ttt_matrix(bool used, const TensorView<W, 3>& w, Index heads,
                                                Index head_dim, const char* unused, const char* head_axis,
                                                const char* rows, const char* columns, const char* null,
                                                const char* stride) {
  if (!used) return expect_equal(0, w.elements(), unused);
  return first_failure(expect_equal(heads, w.extent(0), head_axis), expect_equal(head_dim, w.extent(1), rows),
                       expect_equal(head_dim, w.extent(2), columns), expect_view(w, null, stride));
}

template <class Model, class W>
[[nodiscard]] constexpr Status check_ttt_weights(const TttWeights<W>& w, Index heads, Index head_dim) {
  return first_failure(
      check_ttt_matrix(true, w.w1, heads, head_dim, "", "w1, heads", "w1, rows", "w1, columns", "w1",
                       "w1, column stride"),
      check_ttt_matrix(matrices<Model> >= 2, w.w2, heads, head_dim, "w2, elements (the model has none)",
                       "w2, heads", "w2, rows", "w2, columns", "w2", "w2, column stride"),
      check_ttt_matrix(matrices<Model> >= 3, w.w3, heads, head_dim, "w3, elements (the model has none)",
                       "w3, heads", "w3, rows", "w3, columns", "w3", "w3, column stride"));
}

template <class Model, class C>
[[nodiscard]] constexpr Status check_fast_weights(const FastWeights<C>& w, Index batch, Index heads,
                                                  Index head_dim) {
  // The batch axis apart, each entry is a set of weights.
  const auto entry = [](const TensorView<C, 4>& v) {
    TensorView<C, 3> e = at(v, 0);
    return e;
  };
  const auto used = [&](int index, const TensorView<C, 4>& v, const char* what) {
    return index < matrices<Model> ? expect_equal(batch, v.extent(0), what) : Status{};
  };
  return first_failure(
      used(0, w.w1, "fast w1, batch"), used(1, w.w2, "fast w2, batch"), used(2, w.w3, "fast w3, batch"),
      check_ttt_matrix(true, entry(w.w1), heads, head_dim, "", "fast w1, heads", "fast w1, rows",
                       "fast w1, columns", "fast w1", "fast w1, column stride"),
      check_ttt_matrix(matrices<Model> >= 2, entry(w.w2), heads, head_dim,
                       "fast w2, elements (the model has none)", "fast w2, heads", "fast w2, rows",
                       "fast w2, columns", "fast w2", "fast w2, column stride"),
      check_ttt_matrix(matrices<Model> >= 3, entry(w.w3), heads, head_dim,
                       "fast w3, elements (the model has none)", "fast w3, heads", "fast w3, rows",
                       "fast w3, columns", "fast w3", "fast w3, column stride"));
}

// k and v, and what the prologue does to k.
template <class T, class W>
[[nodiscard]] constexpr Status check_ttt_keys(const TensorView<const T, 4>& k,
                                              const TensorView<const T, 4>& v, const TttOptions<W>& options) {
  const Status first = first_failure(
      expect_positive(k.extent(0), "k, batch"), expect_positive(k.extent(1), "k, tokens"),
      expect_positive(k.extent(2), "k, heads"), expect_positive(k.extent(3), "k, channels"),
      expect_equal(k.extent(0), v.extent(0), "v, batch"), expect_equal(k.extent(1), v.extent(1), "v, tokens"),
      expect_equal(k.extent(2), v.extent(2), "v, heads"),
      expect_equal(k.extent(3), v.extent(3), "v, channels"), expect_view(k, "k", "k, channel stride"),
      expect_view(v, "v", "v, channel stride"));
  if (!first.ok()) return first;
  const auto finite = [](double x) { return x - x == 0; };
  if (!finite(options.inner_lr)) return fail(Code::option, "inner_lr (finite)", 1, 0);
  if (!finite(options.scale.value_or(1))) return fail(Code::option, "scale (finite)", 1, 0);
  const TttPrologue<W>& prologue = options.prologue;
  if (prologue.key_norm && !(prologue.key_norm_eps >= 0))
    return fail(Code::option, "key_norm_eps (not negative)", 0, -1);
  return check_ttt_conv(Side::k, prologue.k_conv, prologue.k_conv_bias, prologue.grid,
                        product(k.extent(2), k.extent(3)), k.extent(1));
}

// q and out, and what the prologue does to q.
template <class T, class W>
[[nodiscard]] constexpr Status check_ttt_queries(const TensorView<const T, 4>& q, const TensorView<T, 4>& out,
                                                 const TttPrologue<W>& prologue) {
  const Status first =
      first_failure(expect_positive(q.extent(0), "q, batch"), expect_positive(q.extent(1), "q, tokens"),
                    expect_positive(q.extent(2), "q, heads"), expect_positive(q.extent(3), "q, channels"),
                    expect_equal(q.extent(0), out.extent(0), "out, batch"),
                    expect_equal(q.extent(1), out.extent(1), "out, tokens"),
                    expect_equal(q.extent(2), out.extent(2), "out, heads"),
                    expect_equal(q.extent(3), out.extent(3), "out, channels"),
                    expect_view(q, "q", "q, channel stride"), expect_view(out, "out", "out, channel stride"));
  if (!first.ok()) return first;
  if (q.data == out.data) return fail(Code::alias, "out, apart from q", 1, 0);
  return check_ttt_conv(Side::q, prologue.q_conv, prologue.q_conv_bias, prologue.grid,
                        product(q.extent(2), q.extent(3)), q.extent(1));
}

template <class Model, class T, class W>
[[nodiscard]] constexpr Status check_ttt_update(const TensorView<const T, 4>& k,
                                                const TensorView<const T, 4>& v, const TttWeights<W>& weights,
                                                const FastWeights<Compute<T>>& fast_weights,
                                                const TttOptions<W>& options) {
  const Status first = check_ttt_keys(k, v, options);
  if (!first.ok()) return first;
  return first_failure(check_ttt_weights<Model>(weights, k.extent(2), k.extent(3)),
                       check_fast_weights<Model>(fast_weights, k.extent(0), k.extent(2), k.extent(3)));
}

template <class Model, class T, class W>
[[nodiscard]] constexpr Status check_ttt_apply(const TensorView<const T, 4>& q,
                                               const FastWeights<const Compute<T>>& fast_weights,
                                               const TensorView<T, 4>& out, const TttOptions<W>& options) {
  const Status first = check_ttt_queries(q, out, options.prologue);
  if (!first.ok()) return first;
  return check_fast_weights<Model>(fast_weights, q.extent(0), q.extent(2), q.extent(3));
}

template <class Model, class T, class W>
[[nodiscard]] constexpr Status check_ttt(const TensorView<const T, 4>& q, const TensorView<const T, 4>& k,
                                         const TensorView<const T, 4>& v, const TttWeights<W>& weights,
                                         const TensorView<T, 4>& out, const TttOptions<W>& options) {
  const Status first = first_failure(
      check_ttt_queries(q, out, options.prologue), check_ttt_keys(k, v, options),
      expect_equal(q.extent(0), k.extent(0), "k, batch"), expect_equal(q.extent(2), k.extent(2), "k, heads"),
      expect_equal(q.extent(3), k.extent(3), "k, channels"));
  if (!first.ok()) return first;
  if (k.data == out.data) return fail(Code::alias, "out, apart from k", 1, 0);
  if (v.data == out.data) return fail(Code::alias, "out, apart from v", 1, 0);
  return check_ttt_weights<Model>(weights, q.extent(2), q.extent(3));
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

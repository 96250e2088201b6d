// Which keys a query looks at, for softmax and for TTT attention alike: the contract. The host's form is in
// attention_map_cpu.hpp.
//
//   map[i, j] = (1 / d) tr(d o_i / d v_j)
//
// the mean over the channels of how far channel c of output i follows channel c of value j. In softmax attention
// o_i = sum_j p_ij v_j, the Jacobian is p_ij I, and the map is the probabilities. A TTT layer writes down no map, yet
// v_j reaches o_i through the fast weights; its Jacobian is a full d x d matrix, and its normalised trace is the
// multiple of I that is nearest to it in the Frobenius norm, so the two are on one scale. Entries may be negative,
// and a row need not sum to 1.
//
// Derivation (one batch entry and head; k and q behind the prologue, which no value enters; vectors are rows). With
// dE_j / dv_j = -(scale / N) I, true of both losses, and W' = W - inner_lr dl/dW, f(x) = a(x W1[, x W2]) W_out,
//
//   d o_i / d v_j = c ((a'_i . a_j) I + (q_i . k_j) W_out^T diag(s_ij) W_out'),      c = inner_lr scale / N,
//   s_ij = da/dz1(q_i; W') * da/dz1(k_j; W) + da/dz2(q_i; W') * da/dz2(k_j; W)
//
// where a'_i = a(q_i; W') and a_j = a(k_j; W). Its trace is a sum of products of a query and a key,
//
//   map[i, j] = c (a'_i . a_j + (q_i . k_j) sum_m r_m s_ij,m),      r_m = <row m of W_out, row m of W_out'> / d.
//
// Linear: c (q_i . k_j). Glu, which has no W_out: r = 1 / d and no first term. Mlp3, with s1 = silu(x W1),
// s2 = silu(s1 W2), their derivatives d1 and d2 (with ' those of q_i at W', else of k_j at W), P = W3' W3^T / d:
//
//   map[i, j] = c (s2'_i . s2_j + (s1'_i . s1_j) sum_m r_m d2'_i,m d2_j,m + (q_i . k_j) d1_j M_i d2_j^T),
//   M_i = (diag(d1'_i) W2' diag(d2'_i) P) * W2
//
// The loss enters through W' alone. The step ColumnClip divides the gradient g of a column by |g| + 1, so that a change of the
// gradient is divided as well, and what of it lies along g once more. With h = |g| / (|g| + 1) and u = g / |g|, both
// read off W - W', x the input of the matrix (q and k, or a' and a) and s the rest of its sum over the columns m,
//
//   (x'_i . x_j) sum_m s_m   becomes   sum_m s_m (1 - h_m) ((x'_i . x_j) - h_m (x'_i . u_m) (x_j . u_m)).
//
// Shapes    q (b, nq, h, d), k, v (b, nk, h, d); weights as in ttt; out (b, h, rows, nk) in Compute<T>, rows =
//           nq, or those of `queries`: their tokens, in any order.
// Numerics  a key that a query of softmax does not see has the entry 0 and no influence, be it NaN;
//           closed form, no differences: all in Compute<T>, sums of d terms; |error| a few d eps of the sum of the
//           absolute values of the terms (softmax: as softmax_attention). Relative L2 error of a map at
//           w ~ d^-1/2: float 4e-7 (2e-6 is tested). Bitwise equal for any layout, any number of workers, and for a
//           row alone or among others.
// Errors    as softmax_attention and ttt; shape (out), option (a query that is no token), workspace.
// Workspace ttt_attention_map_workspace of the same arguments: it grows with the tokens. Softmax takes none.
// Cost      nq nk d (Linear) to 4 nq nk d (SwiGlu) multiplications a head, Mlp3 nq d^3 + nq nk d^2, after those of
//           ttt.
// Source    the implicit attention map of arXiv 2605.02772; the closed form is derived above.
#pragma once

#include <optional>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/ops/softmax_attention.hpp>
#include <linattn/ops/ttt.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN

// C is Compute<T> of the activations.
template <class C>
struct SoftmaxMapOptions {
  TensorView<const Index, 1> queries{};  // tokens whose rows are wanted; empty: all
  std::optional<double> scale{};         // default head_dim^-1/2
  bool causal = false;
  TensorView<const C, 4> bias{};  // of all queries; empty: none
};

template <class W>
struct TttMapOptions {
  TensorView<const Index, 1> queries{};  // tokens whose rows are wanted; empty: all
  TttOptions<W> ttt{};                   // those of the layer that is looked at
};

namespace detail::inline LINATTN_TARGET {

[[nodiscard]] constexpr Index map_rows(const TensorView<const Index, 1>& queries, Index tokens) {
  return queries.extent(0) == 0 ? tokens : queries.extent(0);
}

// The token of a row of the map.
[[nodiscard]] constexpr Index map_query(const TensorView<const Index, 1>& queries, Index row) {
  return queries.extent(0) == 0 ? row : queries(row);
}

template <class T>
[[nodiscard]] constexpr Status check_map(const TensorView<const T, 4>& q, const TensorView<const T, 4>& k,
                                         const TensorView<Compute<T>, 4>& out,
                                         const TensorView<const Index, 1>& queries) {
  const Status first = first_failure(
      expect_positive(q.extent(0), "q, batch"), expect_positive(q.extent(1), "q, tokens"),
      expect_positive(q.extent(2), "q, heads"), expect_positive(q.extent(3), "q, channels"),
      expect_equal(q.extent(0), k.extent(0), "k, batch"), expect_positive(k.extent(1), "k, tokens"),
      expect_equal(q.extent(2), k.extent(2), "k, heads"),
      expect_equal(q.extent(3), k.extent(3), "k, channels"), expect_view(q, "q", "q, channel stride"),
      expect_view(k, "k", "k, channel stride"), expect_equal(q.extent(0), out.extent(0), "out, batch"),
      expect_equal(q.extent(2), out.extent(1), "out, heads"),
      expect_equal(map_rows(queries, q.extent(1)), out.extent(2), "out, rows"),
      expect_equal(k.extent(1), out.extent(3), "out, keys"), expect_view(out, "out", "out, key stride"));
  if (!first.ok() || queries.extent(0) == 0) return first;
  if (queries.data == nullptr) return fail(Code::null_data, "queries", queries.extent(0), 0);
  for (Index row = 0; row < queries.extent(0); ++row)
    if (queries(row) < 0 || queries(row) >= q.extent(1))
      return fail(Code::option, "queries (below the tokens of q)", q.extent(1), queries(row));
  return {};
}

template <class T>
[[nodiscard]] constexpr Status check_softmax_map(const TensorView<const T, 4>& q,
                                                 const TensorView<const T, 4>& k,
                                                 const TensorView<Compute<T>, 4>& out,
                                                 const SoftmaxMapOptions<Compute<T>>& options) {
  const Status first = check_map(q, k, out, options.queries);
  if (!first.ok()) return first;
  if (options.scale && !(*options.scale - *options.scale == 0))
    return fail(Code::option, "scale (finite)", 1, 0);
  if (options.bias.empty()) return {};
  return first_failure(expect_equal(q.extent(0), options.bias.extent(0), "bias, batch"),
                       expect_equal(q.extent(2), options.bias.extent(1), "bias, heads"),
                       expect_equal(q.extent(1), options.bias.extent(2), "bias, queries"),
                       expect_equal(k.extent(1), options.bias.extent(3), "bias, keys"),
                       expect_view(options.bias, "bias", "bias, key stride"));
}

template <class Model, class T, class W>
[[nodiscard]] constexpr Status check_ttt_map(const TensorView<const T, 4>& q, const TensorView<const T, 4>& k,
                                             const TensorView<const T, 4>& v, const TttWeights<W>& weights,
                                             const TensorView<Compute<T>, 4>& out,
                                             const TttMapOptions<W>& options) {
  const TttPrologue<W>& prologue = options.ttt.prologue;
  return first_failure(check_map(q, k, out, options.queries), check_ttt_keys(k, v, options.ttt),
                       check_ttt_weights<Model>(weights, k.extent(2), k.extent(3)),
                       check_ttt_conv(Side::q, prologue.q_conv, prologue.q_conv_bias, prologue.grid,
                                      product(q.extent(2), q.extent(3)), q.extent(1)));
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

// Softmax attention: the contract. The forms are in softmax_attention_cpu.hpp and softmax_attention_cuda.cuh.
//
//   s[i, j]   = scale sum_c q[i, c] k[j, c] + bias[i, j]
//   out[i, c] = sum_j p[i, j] v[j, c],   p[i, j] = exp(s[i, j] - lse[i]),   lse[i] = log sum_j exp(s[i, j])
//
// for every sample and head. With `causal`, query i sees the keys j <= i + (Nk - Nq): the last query sees all
// keys. A bias of -infinity hides a key from a query, too; no other value does. A query that sees no key gets
// out = 0 and lse = -infinity.
// A hidden key cannot be observed, whatever the bits of the key, of its value and, with `causal`, of its bias: the
// query's results have the bits that they have with zeros there. A NaN that is seen reaches all queries that see it.
//
// Shapes: q (b, Nq, h, d), k (b, Nk, h, d), v (b, Nk, h, dv), out (b, Nq, h, dv); bias (b, h, Nq, Nk), the
// batch stride may be 0; lse (b, Nq, h). Channels are dense, as are the keys of the bias; other strides are
// free. `out` must not overlap an input.
// Numerics: streaming over fixed blocks of keys in fixed order, no Nq x Nk intermediate. Logits, exponentials
// and sums in Compute<T>; a block's part of the sums is added up on its own and then to the total, so the
// error grows with the number of blocks and the length of a block, not with their product. A logit carries
// an absolute error of about eps max(|s|, sqrt(d) |q| |k| scale), which is the relative error of its p; the
// exponential adds 2 eps. eps that of Compute<T>; one rounding to T at the end. Results are bitwise equal for
// any layout and any number of workers.
// On Cuda sums go on from block to block, in float: |error| <= 1e-5 |out| in L2. On tensor cores (half and bfloat16, d
// and dv multiples of 8 and at most 128, rows at multiples of 16 bytes) the weights exp(s - max) <= 1 are rounded to T
// too before they meet the values, their sum is not: with u the unit roundoff of T, |error| <= u (sum_j p |v| + |out|),
// in the mean square 0.6 u |out| where the values are independent. A half below 2^-14 errs by up to 2^-25 instead.
// Results are bitwise equal for all layouts that take the same path.
// Errors: empty (an axis of q, k, v), shape (k, v, out, bias, lse), stride (a last axis that is not dense),
// null_data, option (scale is not finite), alias (out is q, k or v), workspace.
// Source: A. Vaswani et al., "Attention is all you need", 2017; the streaming normaliser is that of
// M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax", 2018.
#pragma once

#include <cmath>
#include <limits>
#include <optional>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN

// C is Compute<T> of the activations.
template <class C>
struct SoftmaxAttentionOptions {
  std::optional<double> scale{};  // default head_dim^-1/2
  bool causal = false;
  TensorView<const C, 4> bias{};  // added to the logits; empty: none
  TensorView<C, 3> lse{};         // receives the log-sum-exp of each row; empty: not wanted
};

namespace detail::inline LINATTN_TARGET {

template <class T>
[[nodiscard]] constexpr Status check_softmax_attention(const TensorView<const T, 4>& q,
                                                       const TensorView<const T, 4>& k,
                                                       const TensorView<const T, 4>& v,
                                                       const TensorView<T, 4>& out,
                                                       const SoftmaxAttentionOptions<Compute<T>>& options) {
  const Index batch = q.extent(0), queries = q.extent(1), heads = q.extent(2), keys = k.extent(1);
  const Status first = first_failure(
      expect_positive(batch, "q, batch"), expect_positive(queries, "q, tokens"),
      expect_positive(heads, "q, heads"), expect_positive(q.extent(3), "q, channels"),
      expect_equal(batch, k.extent(0), "k, batch"), expect_positive(keys, "k, tokens"),
      expect_equal(heads, k.extent(2), "k, heads"), expect_equal(q.extent(3), k.extent(3), "k, channels"),
      expect_equal(batch, v.extent(0), "v, batch"), expect_equal(keys, v.extent(1), "v, tokens"),
      expect_equal(heads, v.extent(2), "v, heads"), expect_positive(v.extent(3), "v, channels"),
      expect_equal(batch, out.extent(0), "out, batch"), expect_equal(queries, out.extent(1), "out, tokens"),
      expect_equal(heads, out.extent(2), "out, heads"),
      expect_equal(v.extent(3), out.extent(3), "out, channels"), expect_view(q, "q", "q, channel stride"),
      expect_view(k, "k", "k, channel stride"), expect_view(v, "v", "v, channel stride"),
      expect_view(out, "out", "out, channel stride"));
  if (!first.ok()) return first;
  if (!options.bias.empty()) {
    const Status status = first_failure(expect_equal(batch, options.bias.extent(0), "bias, batch"),
                                        expect_equal(heads, options.bias.extent(1), "bias, heads"),
                                        expect_equal(queries, options.bias.extent(2), "bias, queries"),
                                        expect_equal(keys, options.bias.extent(3), "bias, keys"),
                                        expect_view(options.bias, "bias", "bias, key stride"));
    if (!status.ok()) return status;
  }
  if (!options.lse.empty()) {
    const Status status = first_failure(expect_equal(batch, options.lse.extent(0), "lse, batch"),
                                        expect_equal(queries, options.lse.extent(1), "lse, tokens"),
                                        expect_equal(heads, options.lse.extent(2), "lse, heads"));
    if (!status.ok()) return status;
    if (options.lse.data == nullptr) return fail(Code::null_data, "lse", options.lse.elements(), 0);
  }
  if (options.scale && !(*options.scale - *options.scale == 0.0))
    return fail(Code::option, "scale (finite)", 1, 0);
  if (out.data == q.data || out.data == k.data || out.data == v.data)
    return fail(Code::alias, "out, apart from q, k and v", 1, 0);
  return {};
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

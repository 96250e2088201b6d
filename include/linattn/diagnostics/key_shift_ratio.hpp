// How much the keys have in common: the contract. The host's form is in key_shift_ratio_cpu.hpp.
//
//   r = |mean_i k_i| / mean_i |k_i|        over the tokens i, for each batch entry and head
//
// 0: the keys are centred, as the key norm leaves them; 1: all keys point one way. Softmax attention does not see
// what its keys have in common (a shift of all logits of a query), a TTT layer does. About 0.5 in pretrained
// vision transformers, 0.07 in random ones. Keys that are all zero have the ratio 0.
//
// Shapes: k (b, n, h, c), out (b, h).
// Numerics: sums in double, in the order of the tokens, |error| <= (n + c) 2^-53, and one rounding to Compute<T>.
// Results do not depend on layout or threads. Errors: empty (an axis), shape (out), stride (the channel stride must
// be 1), null_data, workspace. Source: the key shift of arXiv 2605.02772.
#pragma once

#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

template <class T>
[[nodiscard]] constexpr Status check_key_shift_ratio(const TensorView<const T, 4>& k,
                                                     const TensorView<Compute<T>, 2>& out) {
  const Status first = first_failure(
      expect_positive(k.extent(0), "k, batch"), expect_positive(k.extent(1), "k, tokens"),
      expect_positive(k.extent(2), "k, heads"), expect_positive(k.extent(3), "k, channels"),
      expect_equal(k.extent(0), out.extent(0), "out, batch"),
      expect_equal(k.extent(2), out.extent(1), "out, heads"), expect_view(k, "k", "k, channel stride"));
  if (first.ok() && out.data == nullptr) return fail(Code::null_data, "out", out.elements(), 0);
  return first;
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

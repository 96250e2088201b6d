// Element-wise ops on tokens: the contract. The host's form is in elementwise_cpu.hpp.
//
//   affine   out[t, c] = scale[c] x[t, c] + offset[c]        a scale and an offset a channel
//   mix      out = (1 - weight) a + weight b
//
// Shapes: x, a, b, out (b, n, h, c); scale, offset [h * c], channel = head * head_dim + c, of any stride, so that
// a column of a matrix will do. `out` may be an input.
// Numerics: in Compute<T>, affine with one rounding and mix with two (|error| <= eps |y| and
// 2 eps (|a| + |b|)), and one rounding to T. Elements are independent of each other: results do not depend on
// layout or threads. A weight of 0 or 1 still reads both inputs.
// Errors: empty (an axis), shape (out, b, scale, offset), stride (the channel strides of the tokens must be 1),
// null_data, option (weight is not finite). No workspace.
// Source: DiT5's `MixedAttention` (LeapLabTHU/Transformer-to-TTT): the rescaling of q and k, the half-and-half of its
// two attentions.
#pragma once

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

template <class T>
[[nodiscard]] constexpr Status check_tokens(const TensorView<const T, 4>& x, const TensorView<T, 4>& out) {
  return first_failure(expect_positive(x.extent(0), "x, batch"), expect_positive(x.extent(1), "x, tokens"),
                       expect_positive(x.extent(2), "x, heads"), expect_positive(x.extent(3), "x, channels"),
                       expect_equal(x.extent(0), out.extent(0), "out, batch"),
                       expect_equal(x.extent(1), out.extent(1), "out, tokens"),
                       expect_equal(x.extent(2), out.extent(2), "out, heads"),
                       expect_equal(x.extent(3), out.extent(3), "out, channels"),
                       expect_view(x, "x", "x, channel stride"),
                       expect_view(out, "out", "out, channel stride"));
}

template <class W>
[[nodiscard]] constexpr Status check_channels(const TensorView<W, 1>& v, Index channels, const char* extent,
                                              const char* null) {
  if (v.extent(0) != channels) return fail(Code::shape, extent, channels, v.extent(0));
  return v.data != nullptr ? Status{} : fail(Code::null_data, null, channels, 0);
}

template <class T, class W>
[[nodiscard]] constexpr Status check_affine(const TensorView<const T, 4>& x, const TensorView<W, 1>& scale,
                                            const TensorView<W, 1>& offset, const TensorView<T, 4>& out) {
  const Index channels = product(x.extent(2), x.extent(3));
  return first_failure(check_tokens(x, out), check_channels(scale, channels, "scale, channels", "scale"),
                       check_channels(offset, channels, "offset, channels", "offset"));
}

template <class T>
[[nodiscard]] constexpr Status check_mix(const TensorView<const T, 4>& a, const TensorView<const T, 4>& b,
                                         double weight, const TensorView<T, 4>& out) {
  if (!(weight - weight == 0)) return fail(Code::option, "weight (finite)", 1, 0);
  return first_failure(
      expect_positive(a.extent(0), "a, batch"), expect_positive(a.extent(1), "a, tokens"),
      expect_positive(a.extent(2), "a, heads"), expect_positive(a.extent(3), "a, channels"),
      expect_equal(a.extent(0), b.extent(0), "b, batch"), expect_equal(a.extent(1), b.extent(1), "b, tokens"),
      expect_equal(a.extent(2), b.extent(2), "b, heads"),
      expect_equal(a.extent(3), b.extent(3), "b, channels"), expect_view(a, "a", "a, channel stride"),
      expect_view(b, "b", "b, channel stride"), check_tokens(a, out));
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

// Instance normalisation over the tokens: the contract. The forms are in instance_norm_cpu.hpp and
// instance_norm_cuda.cuh.
//
//   mean[c] = mean_n x[n, c]     var[c] = mean_n (x[n, c] - mean[c])^2        (biased)
//   y[n, c] = (x[n, c] - mean[c]) / sqrt(var[c] + eps)                        divide_by_std = true
//   y[n, c] = x[n, c] - mean[c]                                               divide_by_std = false
//
// for each batch, head and channel apart. No affine part. A constant added to all tokens changes nothing,
// which is what softmax attention grants its keys; eps = 1 inside the root keeps keys of small variance
// small. One token gives 0, and so does a constant channel, with eps = 0 too.
//
// Shapes: x, out (b, n, h, c). `out` may be x.
// Numerics: statistics in Compute<T> from one read of x, relative to a shift close to the mean, which is kept
// as the sum of two numbers: a common offset costs no digits beyond those that x lost by it. |error| is a few
// eps of |y| (2e-7 relative in float), and one rounding to T. Tokens are cut into chunks by their number
// alone: the result does not depend on layout or threads. Errors: empty (an axis), shape (out), stride (the
// channel strides must be 1), option (eps negative or NaN), null_data, workspace. Source: the key norm of T5
// (LeapLabTHU/Transformer-to-TTT), F.instance_norm with eps = 1.
#pragma once

#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN

struct InstanceNormOptions {
  double eps = 1.0;
  bool divide_by_std = true;
};

namespace detail::inline LINATTN_TARGET {

template <class T>
[[nodiscard]] constexpr Status check_instance_norm(const TensorView<const T, 4>& x,
                                                   const TensorView<T, 4>& out,
                                                   const InstanceNormOptions& options) {
  if (!(options.eps >= 0.0)) return fail(Code::option, "eps (not negative)", 0, -1);
  return first_failure(expect_positive(x.extent(0), "x, batch"), expect_positive(x.extent(1), "x, tokens"),
                       expect_positive(x.extent(2), "x, heads"), expect_positive(x.extent(3), "x, channels"),
                       expect_equal(x.extent(0), out.extent(0), "out, batch"),
                       expect_equal(x.extent(1), out.extent(1), "out, tokens"),
                       expect_equal(x.extent(2), out.extent(2), "out, heads"),
                       expect_equal(x.extent(3), out.extent(3), "out, channels"),
                       expect_view(x, "x", "x, channel stride"),
                       expect_view(out, "out", "out, channel stride"));
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

// Root-mean-square normalisation over the channels of each head: the contract. The forms are in
// rms_norm_cpu.hpp and rms_norm_cuda.cuh.
//
//   y[c] = weight[c] x[c] / sqrt(mean_c x[c]^2 + eps)        for each (batch, token, head)
//
// Shapes: x, out (b, n, h, c); weight [c]. `out` may be x.
// Numerics: sum of squares in Compute<T>, in a fixed order (one partial sum a SIMD lane), |error| about
// (2 + c / 16) eps |y|, and one rounding to T; each row alone: no layout or thread count changes it. On Cuda
// (4 + c / 64) eps |y|, and rows that do not start at 16 bytes may be summed in another order. Squares
// must be finite in Compute<T>: |x| < 1.8e19 in float. Errors: empty (an axis), shape (out, weight), stride
// (channel strides and that of weight must be 1), option (eps negative or NaN), null_data. No workspace.
// Source: B. Zhang, R. Sennrich, "Root Mean Square Layer Normalization", 2019; the query-key norm (ln_q,
// ln_k) of Stable Diffusion 3.5.
#pragma once

#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN

struct RmsNormOptions {
  double eps = 1e-6;
};

namespace detail::inline LINATTN_TARGET {

template <class T, class W>
[[nodiscard]] constexpr Status check_rms_norm(const TensorView<const T, 4>& x, const TensorView<W, 1>& weight,
                                              const TensorView<T, 4>& out, const RmsNormOptions& options) {
  if (!(options.eps >= 0.0)) return fail(Code::option, "eps (not negative)", 0, -1);
  return first_failure(expect_positive(x.extent(0), "x, batch"), expect_positive(x.extent(1), "x, tokens"),
                       expect_positive(x.extent(2), "x, heads"), expect_positive(x.extent(3), "x, channels"),
                       expect_equal(x.extent(0), out.extent(0), "out, batch"),
                       expect_equal(x.extent(1), out.extent(1), "out, tokens"),
                       expect_equal(x.extent(2), out.extent(2), "out, heads"),
                       expect_equal(x.extent(3), out.extent(3), "out, channels"),
                       expect_equal(x.extent(3), weight.extent(0), "weight, channels"),
                       expect_view(x, "x", "x, channel stride"),
                       expect_view(weight, "weight", "weight, stride"),
                       expect_view(out, "out", "out, channel stride"));
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

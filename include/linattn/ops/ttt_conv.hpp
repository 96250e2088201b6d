// Test-time training of a depthwise 3x3 convolution over the token grid: the contract. The host's form is in
// ttt_conv_cpu.hpp.
//
//   f(x; w)[t, c] = sum_{i, j < 3} w[c, 0, i, j] x[t', c]         t' as in depthwise_conv, zeros outside the grid
//   g[c, i, j]    = -(scale / tokens) sum_t v[t, c] k[t', c]      the gradient of -(scale / tokens) sum <v, f(k; w)>
//   w'[c]         = w[c] - inner_lr g[c] / (|g[c]|_2 + 1)         the norm over the 9 taps of a channel
//   out           = f(q; w')
//
// for each sample: one step on all tokens. No bias, no residual; the clip keeps the step of a channel below
// inner_lr. It is ViT3's second inner model, beside `ttt` with Glu and ColumnClip.
//
// Shapes: q, k, v, out (b, n, h, c), n = grid.height * grid.width, row by row: all tokens are on the grid; weight
// [h * c, 1, 3, 3], channel = head * head_dim + c, any strides but for dense kernel rows. `out` must not overlap an
// input.
// Numerics: in Compute<T>, w' too. The sum of a tap runs over strips of 16 tokens, these over the rows of a band,
// and the bands (at most 32) in double, each in its order: results are bitwise equal for any layout and any number
// of workers. |error of g| is about eps (4 + sqrt(band rows)) scale / tokens |v k|_2; the convolution adds
// 9 eps sum |w' q|, and one rounding to T at the end.
// Errors: empty (an axis, the grid), shape (k, v, out, weight; a grid that is not all tokens), stride (the channel
// strides must be 1), option (a grid with an offset, scale or inner_lr is not finite), null_data, alias (out is q,
// k or v), workspace.
// Source: LeapLabTHU/ViTTT, `inner_train_3x3dwc`.
#pragma once

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/ops/depthwise_conv.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN

struct TttConvOptions {
  TokenGrid grid{};
  double scale = 1.0 / 3.0;  // 9^-1/2, for the taps of a channel
  double inner_lr = 1;
};

namespace detail::inline LINATTN_TARGET {

template <class T, class W>
[[nodiscard]] constexpr Status check_ttt_conv_shapes(
    const TensorView<const T, 4>& q, const TensorView<const T, 4>& k, const TensorView<const T, 4>& v,
    const TensorView<W, 4>& weight, const TensorView<T, 4>& out, const TttConvOptions& options) {
  const auto [batch, tokens, heads, channels] = q.extents;
  return first_failure(
      expect_positive(batch, "q, batch"), expect_positive(tokens, "q, tokens"),
      expect_positive(heads, "q, heads"), expect_positive(channels, "q, channels"),
      expect_equal(batch, k.extent(0), "k, batch"), expect_equal(tokens, k.extent(1), "k, tokens"),
      expect_equal(heads, k.extent(2), "k, heads"), expect_equal(channels, k.extent(3), "k, channels"),
      expect_equal(batch, v.extent(0), "v, batch"), expect_equal(tokens, v.extent(1), "v, tokens"),
      expect_equal(heads, v.extent(2), "v, heads"), expect_equal(channels, v.extent(3), "v, channels"),
      expect_equal(batch, out.extent(0), "out, batch"), expect_equal(tokens, out.extent(1), "out, tokens"),
      expect_equal(heads, out.extent(2), "out, heads"),
      expect_equal(channels, out.extent(3), "out, channels"),
      expect_equal(product(heads, channels), weight.extent(0), "weight, channels"),
      expect_equal(1, weight.extent(1), "weight, inputs a channel"),
      expect_equal(3, weight.extent(2), "weight, kernel rows"),
      expect_equal(3, weight.extent(3), "weight, kernel columns"), check_whole_grid(options.grid, tokens));
}

template <class T, class W>
[[nodiscard]] constexpr Status check_ttt_conv_views(
    const TensorView<const T, 4>& q, const TensorView<const T, 4>& k, const TensorView<const T, 4>& v,
    const TensorView<W, 4>& weight, const TensorView<T, 4>& out, const TttConvOptions& options) {
  const Status first =
      first_failure(check_ttt_conv_shapes(q, k, v, weight, out, options),
                    expect_view(q, "q", "q, channel stride"), expect_view(k, "k", "k, channel stride"),
                    expect_view(v, "v", "v, channel stride"), expect_view(out, "out", "out, channel stride"),
                    expect_view(weight, "weight", "weight, kernel column stride"));
  if (!first.ok()) return first;
  const auto finite = [](double x) { return x - x == 0; };
  if (!finite(options.scale)) return fail(Code::option, "scale (finite)", 1, 0);
  if (!finite(options.inner_lr)) return fail(Code::option, "inner_lr (finite)", 1, 0);
  if (out.data == q.data || out.data == k.data || out.data == v.data)
    return fail(Code::alias, "out, apart from q, k and v", 1, 0);
  return {};
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

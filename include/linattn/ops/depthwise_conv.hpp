// Depthwise 3x3 convolution over the token grid: the contract. The forms are in depthwise_conv_cpu.hpp and
// depthwise_conv_cuda.cuh.
//
//   y[t, c] = (residual ? x[t, c] : 0) + bias[c] + sum_{i, j < 3} weight[c, 0, i, j] x[t', c]
//
// for the tokens t = offset + row * width + column of the grid; t' is the token at (row + i - 1,
// column + j - 1), and x is zero outside the grid. Tokens before and after the grid, such as text beside an
// image, pass through: y = x, whatever `residual` says.
//
// Shapes: x, out (b, n, h, c); weight [h * c, 1, 3, 3], channel = head * head_dim + c; bias [h * c] or empty.
// Numerics: one chain of fused multiply-adds an element, in the order bias, taps row by row, residual;
// |error| <= 11 eps (|x| + |bias| + sum |weight x|), eps that of Compute<T>, and one rounding to T. Elements
// are independent of each other: results do not depend on layout or threads.
// Errors: empty (an axis, the grid), shape (out, weight, bias), stride (the channel strides must be 1),
// option (a grid that does not fit the tokens), null_data, alias (out is x). No workspace.
// Source: q_conv2d and k_conv2d of the T5 layer (LeapLabTHU/Transformer-to-TTT), a locality bias.
#pragma once

#include <type_traits>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN

// Which tokens form an image: `height` rows of `width` tokens, row by row, the first of them token `offset`.
struct TokenGrid {
  Index offset = 0;
  Index height = 0;
  Index width = 0;

  [[nodiscard]] LINATTN_HD LINATTN_INLINE constexpr Index tokens() const { return height * width; }
};

struct DepthwiseConvOptions {
  TokenGrid grid{};
  bool residual = true;
};

namespace detail::inline LINATTN_TARGET {

// The grid is not empty and lies within a sequence of `tokens`. No product that could overflow is formed.
[[nodiscard]] constexpr Status check_grid(const TokenGrid& grid, Index tokens) {
  if (grid.height <= 0) return fail(Code::empty, "grid, height", 1, grid.height);
  if (grid.width <= 0) return fail(Code::empty, "grid, width", 1, grid.width);
  if (grid.offset < 0 || grid.offset > tokens)
    return fail(Code::option, "grid, offset (at most the tokens)", tokens, grid.offset);
  const Index room = tokens - grid.offset;
  if (grid.height > room / grid.width)
    return fail(Code::option, "grid, height (rows that fit behind the offset)", room / grid.width,
                grid.height);
  return {};
}

// The grid is the whole sequence.
[[nodiscard]] constexpr Status check_whole_grid(const TokenGrid& grid, Index tokens) {
  if (grid.offset != 0)
    return fail(Code::option, "grid, offset (all tokens are on the grid)", 0, grid.offset);
  if (const Status fits = check_grid(grid, tokens); !fits.ok()) return fits;
  return expect_equal(tokens, grid.tokens(), "grid, tokens (all are on the grid)");
}

// weight [channels, 1, 3, 3], dense in its kernel; bias [channels] or empty.
template <class W, class B>
[[nodiscard]] constexpr Status check_conv_weights(const TensorView<W, 4>& weight,
                                                  const TensorView<B, 1>& bias, Index channels) {
  const Status first = first_failure(expect_equal(channels, weight.extent(0), "conv weight, channels"),
                                     expect_equal(1, weight.extent(1), "conv weight, inputs a channel"),
                                     expect_equal(3, weight.extent(2), "conv weight, kernel rows"),
                                     expect_equal(3, weight.extent(3), "conv weight, kernel columns"),
                                     expect_view(weight, "conv weight", "conv weight, kernel column stride"));
  if (!first.ok() || bias.extent(0) == 0) return first;
  return first_failure(expect_equal(channels, bias.extent(0), "conv bias, channels"),
                       expect_view(bias, "conv bias", "conv bias, stride"));
}

template <class T, class W, class B>
[[nodiscard]] constexpr Status check_depthwise_conv(const TensorView<const T, 4>& x,
                                                    const TensorView<W, 4>& weight,
                                                    const TensorView<B, 1>& bias, const TensorView<T, 4>& out,
                                                    const DepthwiseConvOptions& options) {
  const Status first =
      first_failure(expect_positive(x.extent(0), "x, batch"), expect_positive(x.extent(1), "x, tokens"),
                    expect_positive(x.extent(2), "x, heads"), expect_positive(x.extent(3), "x, channels"),
                    expect_equal(x.extent(0), out.extent(0), "out, batch"),
                    expect_equal(x.extent(1), out.extent(1), "out, tokens"),
                    expect_equal(x.extent(2), out.extent(2), "out, heads"),
                    expect_equal(x.extent(3), out.extent(3), "out, channels"),
                    expect_view(x, "x", "x, channel stride"), expect_view(out, "out", "out, channel stride"));
  if (!first.ok()) return first;
  if (x.data == out.data) return fail(Code::alias, "out, apart from x", 1, 0);
  return first_failure(check_conv_weights(weight, bias, product(x.extent(2), x.extent(3))),
                       check_grid(options.grid, x.extent(1)));
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

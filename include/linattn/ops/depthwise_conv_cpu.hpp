// Depthwise 3x3 convolution on the host. Contract: depthwise_conv.hpp.
#pragma once

#include <algorithm>
#include <cstddef>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/detail/conv_taps.hpp>
#include <linattn/detail/lanes.hpp>
#include <linattn/ops/depthwise_conv.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

// A task walks down a strip of the grid with the last three rows in a window of its own: contiguous, widened
// once, zero outside the grid. In place the rows lie a power of two apart as often as not, and evict each other.
// Kernel and window of a block of channels fit a first-level cache together.
inline constexpr Index conv_block = 64;  // channels
inline constexpr Index conv_strip = 16;  // columns, and one more on either side
inline constexpr Index conv_group = 4;   // outputs side by side that share what they load

// Kernel and bias of `count` channels from `channel` on, tap by tap: taps[t * conv_block + c], the bias last.
template <class C, class W, class B>
inline void lay_out_taps(const TensorView<W, 4>& weight, const TensorView<B, 1>& bias, Index channel,
                         Index count, C* taps) {
  for (Index c = 0; c < count; ++c) {
    for (Index t = 0; t < 9; ++t) taps[t * conv_block + c] = convert<C>(weight(channel + c, 0, t / 3, t % 3));
    taps[9 * conv_block + c] = bias.extent(0) == 0 ? C(0) : convert<C>(bias(channel + c));
  }
}

// Columns [first - 1, first + conv_strip] of a row of the grid; x is its column 0, or null for a row of zeros.
template <class C, class T>
LINATTN_NOINLINE void load_conv_row(const T* x, Index step, Index first, Index width, Index channels, C* to) {
  for (Index column = first - 1; column <= first + conv_strip; ++column, to += conv_block) {
    const T* const from = x != nullptr && column >= 0 && column < width ? x + column * step : nullptr;
    for_each_pack<C>(0, channels, [&](Index c, auto lanes) {
      (from != nullptr ? lanes.load(from + c) : Pack<C>::zero()).store(to + c);
    });
  }
}

// `columns` outputs of one row, from the three rows of the window.
template <class C, class T>
LINATTN_NOINLINE void conv_row(const C* above, const C* here, const C* below, const C* taps, Index columns,
                               Index channels, bool residual, T* out, Index step) {
  const C* const window[3] = {above, here, below};
  for (Index first = 0; first < columns; first += conv_group) {
    const Index count = std::min(conv_group, columns - first);
    for_each_pack<C>(0, channels, [&](Index c, auto lanes) {
      Pack<C> y[conv_group];
      for (Index g = 0; g < conv_group; ++g)
        y[g] = conv_output<C>(
            Pack<C>::load(taps + 9 * conv_block + c),
            [&](int t) { return Pack<C>::load(taps + t * conv_block + c); },
            [&](int i, int j) { return Pack<C>::load(window[i] + (first + g + j) * conv_block + c); },
            residual);
      for (Index g = 0; g < count; ++g) lanes.store(out + (first + g) * step + c, y[g]);
    });
  }
}

// Rows [first_row, first_row + rows) of `columns` columns of the grid from `first` on. x and out: the grid's first
// token, at the first of the block's channels.
template <class C, class T>
void conv_strip_rows(const T* x, Index x_step, T* out, Index out_step, const TokenGrid& grid, Index first_row,
                     Index rows, Index first, const C* taps, Index channels, bool residual) {
  constexpr Index row_size = (conv_strip + 2) * conv_block;
  C window[3][row_size];
  const auto load_row = [&](Index row) {
    const T* const from = row >= 0 && row < grid.height ? x + row * grid.width * x_step : nullptr;
    load_conv_row(from, x_step, first, grid.width, channels, window[(row + 3) % 3]);
  };
  load_row(first_row - 1);
  load_row(first_row);
  for (Index row = first_row; row < first_row + rows; ++row) {
    load_row(row + 1);
    conv_row(window[(row + 2) % 3], window[row % 3], window[(row + 1) % 3], taps,
             std::min(conv_strip, grid.width - first), channels, residual,
             out + (row * grid.width + first) * out_step, out_step);
  }
}

// The convolution of all tokens of the grid; lay_out(b, h, begin, count, taps) says kernel and bias of a block of
// channels, [10][conv_block].
template <class C, class P, class T, class LayOut>
void conv_grid(const P& parallel, const TensorView<const T, 4>& x, const TensorView<T, 4>& out,
               const TokenGrid& grid, bool residual, const LayOut& lay_out) {
  // Bands of 32 rows: the two rows beside a band and the layout of the kernel are then small change.
  constexpr Index band = 32;
  const Index heads = x.extent(2), head_dim = x.extent(3);
  const Index bands = (grid.height + band - 1) / band, blocks = (head_dim + conv_block - 1) / conv_block;
  parallel.run(x.extent(0) * bands * heads * blocks, [&](Index task, Index) {
    const Index begin = task % blocks * conv_block, h = task / blocks % heads;
    const Index first_row = task / blocks / heads % bands * band, b = task / blocks / heads / bands;
    const Index channels = std::min(conv_block, head_dim - begin);
    C taps[10 * conv_block] = {};
    lay_out(b, h, begin, channels, taps);
    for (Index first = 0; first < grid.width; first += conv_strip)
      conv_strip_rows(x.pointer(b, grid.offset, h, begin), x.step(1), out.pointer(b, grid.offset, h, begin),
                      out.step(1), grid, first_row, std::min(band, grid.height - first_row), first, taps,
                      channels, residual);
  });
}

}  // namespace detail::inline LINATTN_TARGET

inline namespace LINATTN_TARGET {

// y = x + conv3x3(x; weight) + bias on the tokens of the grid, y = x elsewhere. See depthwise_conv.hpp.
template <ParallelPolicy P, Storage T, class W, class B>
[[nodiscard]] Status depthwise_conv(const Cpu<P>& ctx, In<T, 4> x, const TensorView<W, 4>& weight,
                                    const TensorView<B, 1>& bias, const TensorView<T, 4>& out,
                                    const DepthwiseConvOptions& options) {
  using C = Compute<T>;
  const Status status = detail::check_depthwise_conv<T>(x, weight, bias, out, options);
  if (!status.ok()) return status;

  const bool merged = detail::heads_are_dense(x) && detail::heads_are_dense(out);
  const TensorView<const T, 4> from = merged ? detail::merge_heads(x) : x;
  const TensorView<T, 4> to = merged ? detail::merge_heads(out) : out;
  const Index batch = from.extent(0), tokens = from.extent(1), heads = from.extent(2),
              head_dim = from.extent(3);
  const TokenGrid& grid = options.grid;
  detail::conv_grid<C>(ctx.parallel, from, to, grid, options.residual,
                       [&](Index, Index h, Index begin, Index channels, C* taps) {
                         detail::lay_out_taps(weight, bias, h * head_dim + begin, channels, taps);
                       });

  const Index outside = tokens - grid.tokens();
  ctx.parallel.run(batch * outside, [&](Index task, Index) {
    const Index i = task % outside, b = task / outside;
    const Index token = i < grid.offset ? i : i + grid.tokens();
    for (Index h = 0; h < heads; ++h)
      std::copy_n(from.pointer(b, token, h), static_cast<std::size_t>(head_dim), to.pointer(b, token, h));
  });
  return {};
}

}  // namespace LINATTN_TARGET
LINATTN_END

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
namespace detail {

inline constexpr Index conv_block = 128;  // channels whose kernel and neighbourhood stay in the first cache
inline constexpr Index conv_group = 4;    // outputs side by side that share what they load

// Kernel and bias of `count` channels from `channel` on, tap by tap: taps[t * conv_block + c], the bias last.
template <class C, class W, class B>
inline void lay_out_taps(const TensorView<W, 4>& weight, const TensorView<B, 1>& bias, Index channel,
                         Index count, C* taps) {
  for (Index c = 0; c < count; ++c) {
    for (Index t = 0; t < 9; ++t) taps[t * conv_block + c] = convert<C>(weight(channel + c, 0, t / 3, t % 3));
    taps[9 * conv_block + c] = bias.extent(0) == 0 ? C(0) : convert<C>(bias(channel + c));
  }
}

// `Group` outputs side by side. x[row][column] points to the first channel of a neighbour, or to zeros.
template <int Group, class C, class T>
LINATTN_INLINE void conv_outputs(const T* const (&x)[3][conv_group + 2], const C* taps, Index channels,
                                 bool residual, T* out, Index out_step) {
  for_each_pack<C>(0, channels, [&](Index c, auto lanes) {
    Pack<C> y[Group];
    for (int g = 0; g < Group; ++g)
      y[g] = conv_output<C>(
          Pack<C>::load(taps + 9 * conv_block + c),
          [&](int t) { return Pack<C>::load(taps + t * conv_block + c); },
          [&](int i, int j) { return lanes.load(x[i][g + j] + c); }, residual);
    for (int g = 0; g < Group; ++g) lanes.store(out + g * out_step + c, y[g]);
  });
}

// One row of the grid. `x` and `out` point to the first channel of the row's first token.
template <class C, class T>
LINATTN_NOINLINE void conv_row(const T* x, Index x_step, T* out, Index out_step, const TokenGrid& grid,
                               Index row, const C* taps, const T* zeros, Index channels, bool residual) {
  const auto neighbour = [&](Index i, Index column) {
    const bool inside = column >= 0 && column < grid.width && row + i >= 0 && row + i < grid.height;
    return inside ? x + (i * grid.width + column) * x_step : zeros;
  };
  const T* near[3][conv_group + 2];
  for (Index column = 0; column < grid.width;) {
    const bool group = column + conv_group <= grid.width;
    for (Index i = 0; i < 3; ++i)
      for (Index j = 0; j < (group ? conv_group : 1) + 2; ++j) near[i][j] = neighbour(i - 1, column + j - 1);
    T* const to = out + column * out_step;
    if (group)
      conv_outputs<conv_group>(near, taps, channels, residual, to, out_step);
    else
      conv_outputs<1>(near, taps, channels, residual, to, out_step);
    column += group ? conv_group : 1;
  }
}

}  // namespace detail

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

  // Bands of about 512 tokens: laying the kernel out and reading the rows beside the band are then small change.
  const Index band = std::max<Index>(1, 512 / grid.width), bands = (grid.height + band - 1) / band;
  const Index blocks = (head_dim + detail::conv_block - 1) / detail::conv_block;
  ctx.parallel.run(batch * bands * heads * blocks, [&](Index task, Index) {
    const Index begin = task % blocks * detail::conv_block, h = task / blocks % heads;
    const Index first_row = task / blocks / heads % bands * band, b = task / blocks / heads / bands;
    const Index channels = std::min(detail::conv_block, head_dim - begin);
    C taps[10 * detail::conv_block] = {};
    const T zeros[detail::conv_block] = {};
    detail::lay_out_taps(weight, bias, h * head_dim + begin, channels, taps);
    for (Index row = first_row; row < std::min(first_row + band, grid.height); ++row) {
      const Index token = grid.offset + row * grid.width;
      detail::conv_row(from.pointer(b, token, h, begin), from.stride(1), to.pointer(b, token, h, begin),
                       to.stride(1), grid, row, taps, zeros, channels, options.residual);
    }
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

LINATTN_END

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

// Rows [first_row, first_row + rows) of the grid, channels [begin, end) of one head. `x` and `out` point to
// channel 0 of the grid's first token; channel 0 has the weights of `channel`.
template <class C, class T, class W, class B>
LINATTN_NOINLINE void conv_block(const T* x, Index x_step, T* out, Index out_step,
                                 const TensorView<W, 4>& weight, const TensorView<B, 1>& bias,
                                 const DepthwiseConvOptions& options, Index first_row, Index rows,
                                 Index channel, Index begin, Index end) {
  const TokenGrid& grid = options.grid;
  for_each_pack<C>(begin, end, [&](Index c, auto lanes) {
    const int count = static_cast<int>(std::min<Index>(end - c, Pack<C>::size));
    const ConvTaps<C> taps = load_conv_taps<C>(weight, bias, channel + c, count);
    conv_tokens<C>(
        grid, first_row * grid.width, rows * grid.width, taps, options.residual,
        [&](Index token) { return lanes.load(x + token * x_step + c); },
        [&](Index token, Pack<C> y) { lanes.store(out + token * out_step + c, y); });
  });
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

  // Bands of about 512 tokens: the kernel's re-layout and the two rows beside a band are then small change.
  constexpr Index channel_block = 64;
  const Index band = std::max<Index>(1, 512 / grid.width);
  const Index bands = (grid.height + band - 1) / band,
              blocks = (head_dim + channel_block - 1) / channel_block;
  ctx.parallel.run(batch * bands * heads * blocks, [&](Index task, Index) {
    const Index block = task % blocks, h = task / blocks % heads;
    const Index first_row = task / blocks / heads % bands * band, b = task / blocks / heads / bands;
    detail::conv_block<C>(from.pointer(b, grid.offset, h), from.stride(1), to.pointer(b, grid.offset, h),
                          to.stride(1), weight, bias, options, first_row,
                          std::min(band, grid.height - first_row), h * head_dim, block * channel_block,
                          std::min((block + 1) * channel_block, head_dim));
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

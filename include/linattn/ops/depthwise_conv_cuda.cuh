// Depthwise 3x3 convolution on a CUDA device. Contract: depthwise_conv.hpp. The sums are those of the host, step by
// step, so float gives its bits.
//
// A block has 16 columns of the grid and walks down a band of its rows. A thread keeps the sums of the rows that are
// under way, and so reads each row once, and the columns beside its own from the L1 cache, where its neighbours bring
// them.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/detail/channel_tiles.cuh>
#include <linattn/detail/cuda.cuh>
#include <linattn/detail/ptx.cuh>
#include <linattn/ops/depthwise_conv.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

// Rows of a band: the two beside it cost an eighth more reads, most of them from the L2 cache.
inline constexpr int conv_band = 16;

template <class T, class W, class B>
struct ConvParams {
  Rows<const T> x;  // token 0 is the first of the grid
  Rows<T> out;
  ChannelTiles tiles;  // a part is a strip of 16 columns in a band of rows
  int height, width, strips;
  const W* weight;
  Index tap_channel, tap_row;  // strides of the weight
  const B* bias;               // null: none
  bool residual;
};

// Columns [column - 1, column + 1] of a row of the grid, zero outside; `row` may be outside.
template <int Width, class T>
__device__ __forceinline__ void load_neighbours(const Rows<const T>& x, Index b, int head, int channel,
                                                int row, int column, int height, int width,
                                                float (&to)[3][Width]) {
#pragma unroll
  for (int j = 0; j < 3; ++j) {
    const int at = column + j - 1;
    if (row >= 0 && row < height && at >= 0 && at < width) {
      load_channels<Width>(x.at(b, static_cast<Index>(row) * width + at, head) + channel, to[j]);
    } else {
#pragma unroll
      for (int c = 0; c < Width; ++c) to[j][c] = 0.0f;
    }
  }
}

template <class T, class W, class B, int Width>
static __global__ void __launch_bounds__(tile_threads, 2) depthwise_conv_kernel(ConvParams<T, W, B> p) {
  const auto [b, part, head, channel, inside] = p.tiles.template place<Width>();
  const int column = part % p.strips * tile_rows + static_cast<int>(threadIdx.x) / tile_columns;
  if (!inside || column >= p.width) return;
  const int first = part / p.strips * conv_band, last = min(first + conv_band, p.height) - 1;

  float taps[3][3][Width], bias[Width];
#pragma unroll
  for (int c = 0; c < Width; ++c) {
    const Index place = static_cast<Index>(head) * p.tiles.head_dim + channel + c;
#pragma unroll
    for (int t = 0; t < 9; ++t)
      taps[t / 3][t % 3][c] = to_float(p.weight[place * p.tap_channel + t / 3 * p.tap_row + t % 3]);
    bias[c] = p.bias == nullptr ? 0.0f : to_float(p.bias[place]);
  }
  const auto add_row = [&taps](int i, const float(&x)[3][Width], float(&sum)[Width]) {
#pragma unroll
    for (int j = 0; j < 3; ++j)
#pragma unroll
      for (int c = 0; c < Width; ++c) sum[c] = fmaf(taps[i][j][c], x[j][c], sum[c]);
  };

  // In turn r the row r is the upper one of `below`, the middle of `here` and the lower of `above`, which is done.
  float x[3][Width], ahead[3][Width], middle[Width] = {}, above[Width] = {}, here[Width] = {};
  load_neighbours<Width>(p.x, b, head, channel, first - 1, column, p.height, p.width, x);
  for (int row = first - 1; row <= last + 1; ++row) {
    load_neighbours<Width>(p.x, b, head, channel, row < last + 1 ? row + 1 : -1, column, p.height, p.width,
                           ahead);
    float below[Width];
#pragma unroll
    for (int c = 0; c < Width; ++c) below[c] = bias[c];
    add_row(0, x, below);
    add_row(1, x, here);
    add_row(2, x, above);
    if (row > first) {
#pragma unroll
      for (int c = 0; c < Width; ++c) above[c] = p.residual ? middle[c] + above[c] : above[c];
      store_channels<Width>(p.out.at(b, static_cast<Index>(row - 1) * p.width + column, head) + channel,
                            above);
    }
#pragma unroll
    for (int c = 0; c < Width; ++c) {
      above[c] = here[c], here[c] = below[c], middle[c] = x[1][c];
#pragma unroll
      for (int j = 0; j < 3; ++j) x[j][c] = ahead[j][c];
    }
  }
}

template <class T>
struct PassThroughParams {
  Rows<const T> x;
  Rows<T> out;
  ChannelTiles tiles;
  int tokens;               // outside the grid
  int grid_begin, on_grid;  // the tokens behind grid_begin are on_grid further on
};

inline constexpr int pass_part = 4 * tile_rows;  // tokens of a part

template <class T, int Width>
static __global__ void __launch_bounds__(tile_threads, 4) pass_through_kernel(PassThroughParams<T> p) {
  const auto [b, part, head, channel, inside] = p.tiles.template place<Width>();
  const int begin = part * pass_part, end = min(begin + pass_part, p.tokens);
  for (int i = begin + static_cast<int>(threadIdx.x) / tile_columns; inside && i < end; i += tile_rows) {
    const int token = i < p.grid_begin ? i : i + p.on_grid;
    copy_channels<Width>(p.out.at(b, token, head) + channel, p.x.at(b, token, head) + channel);
  }
}

}  // namespace detail::inline LINATTN_TARGET

inline namespace LINATTN_TARGET {

// y = x + conv3x3(x; weight) + bias on the tokens of the grid, y = x elsewhere. See depthwise_conv.hpp.
template <Storage T, class W, class B>
[[nodiscard]] Status depthwise_conv(const Cuda& ctx, In<T, 4> x, const TensorView<W, 4>& weight,
                                    const TensorView<B, 1>& bias, const TensorView<T, 4>& out,
                                    const DepthwiseConvOptions& options) {
  LINATTN_REQUIRE_DEVICE_STORAGE(T);
  LINATTN_REQUIRE_DEVICE_STORAGE(W);
  LINATTN_REQUIRE_DEVICE_STORAGE(B);
  using Weight = std::remove_const_t<W>;
  using Bias = std::remove_const_t<B>;
  const Status status = detail::first_failure(detail::check_depthwise_conv<T>(x, weight, bias, out, options),
                                              detail::check_token_count(x));
  if (!status.ok()) return status;

  const bool merged = detail::heads_are_dense(x) && detail::heads_are_dense(out);
  const TensorView<const T, 4> from = merged ? detail::merge_heads(x) : x;
  const TensorView<T, 4> to = merged ? detail::merge_heads(out) : out;
  const Index batch = from.extent(0), outside = from.extent(1) - options.grid.tokens();
  const TokenGrid& grid = options.grid;
  return detail::with_width(from, to, [&](auto width) {
    const Index strips = detail::ceil_div(grid.width, detail::tile_rows),
                bands = detail::ceil_div(grid.height, detail::conv_band);
    const detail::ConvParams<T, Weight, Bias> conv{
        .x = detail::rows(slice<1>(from, grid.offset, grid.tokens())),
        .out = detail::rows(slice<1>(to, grid.offset, grid.tokens())),
        .tiles = detail::channel_tiles<width>(from, strips * bands),
        .height = static_cast<int>(grid.height),
        .width = static_cast<int>(grid.width),
        .strips = static_cast<int>(strips),
        .weight = weight.data,
        .tap_channel = weight.stride(0),
        .tap_row = weight.stride(2),
        .bias = bias.extent(0) == 0 ? nullptr : bias.data,
        .residual = options.residual};
    const Status launched =
        detail::launch(ctx, "depthwise_conv", detail::depthwise_conv_kernel<T, Weight, Bias, width>,
                       detail::grid_of(conv.tiles, batch), detail::tile_threads, 0, conv);
    if (!launched.ok() || outside == 0) return launched;
    const detail::PassThroughParams<T> rest{
        .x = detail::rows(from),
        .out = detail::rows(to),
        .tiles = detail::channel_tiles<width>(from, detail::ceil_div(outside, detail::pass_part)),
        .tokens = static_cast<int>(outside),
        .grid_begin = static_cast<int>(grid.offset),
        .on_grid = static_cast<int>(grid.tokens())};
    return detail::launch(ctx, "depthwise_conv, pass through", detail::pass_through_kernel<T, width>,
                          detail::grid_of(rest.tiles, batch), detail::tile_threads, 0, rest);
  });
}

}  // namespace LINATTN_TARGET
LINATTN_END

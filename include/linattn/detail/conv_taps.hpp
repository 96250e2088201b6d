// The 3x3 convolution of one pack of channels along the tokens of a grid. depthwise_conv is built on this,
// and the fused prologue of ttt calls the same functions, so that both give the same bits.
#pragma once

#include <algorithm>

#include <linattn/core/dtype.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/detail/simd.hpp>
#include <linattn/ops/depthwise_conv.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail {

// The kernel and the bias of one pack of channels, a lane a channel.
template <class C>
struct ConvTaps {
  Pack<C> weight[9];
  Pack<C> bias;
};

// Channels [channel, channel + count) of weight [channels, 1, 3, 3] and bias [channels] or empty.
template <class C, class W, class B>
[[nodiscard]] inline ConvTaps<C> load_conv_taps(const TensorView<W, 4>& weight, const TensorView<B, 1>& bias,
                                                Index channel, int count) {
  ConvTaps<C> taps;
  C lanes[Pack<C>::size] = {};
  for (int tap = 0; tap < 9; ++tap) {
    for (int l = 0; l < count; ++l) lanes[l] = convert<C>(weight(channel + l, 0, tap / 3, tap % 3));
    taps.weight[tap] = Pack<C>::load(lanes);
  }
  for (int l = 0; l < count; ++l) lanes[l] = bias.extent(0) == 0 ? C(0) : convert<C>(bias(channel + l));
  taps.bias = Pack<C>::load(lanes);
  return taps;
}

// The three neighbours of one column, from the row above to the row below.
template <class C>
struct ConvColumn {
  Pack<C> row[3];
};

// One output: bias, then the taps row by row, then the residual, each step rounded once.
template <class C>
[[nodiscard]] LINATTN_INLINE Pack<C> apply_conv_taps(const ConvTaps<C>& taps, const ConvColumn<C>& left,
                                                     const ConvColumn<C>& middle, const ConvColumn<C>& right,
                                                     bool residual) {
  Pack<C> sum = taps.bias;
  for (int i = 0; i < 3; ++i) {
    sum = fma(taps.weight[3 * i], left.row[i], sum);
    sum = fma(taps.weight[3 * i + 1], middle.row[i], sum);
    sum = fma(taps.weight[3 * i + 2], right.row[i], sum);
  }
  return residual ? middle.row[1] + sum : sum;
}

// emit(token, y) for the tokens [first, first + count) of the grid, row by row; load(token) gives x there.
// Tokens count from the beginning of the grid. A window of three columns slides along each row, so every
// token is loaded three times.
template <class C, class Load, class Emit>
LINATTN_INLINE void conv_tokens(const TokenGrid& grid, Index first, Index count, const ConvTaps<C>& taps,
                                bool residual, const Load& load, const Emit& emit) {
  const Index end = first + count;
  for (Index token = first; token < end;) {
    const Index row = token / grid.width;
    const Index row_begin = row * grid.width, row_end = row_begin + grid.width;
    const bool above = row > 0, below = row + 1 < grid.height;
    const auto column = [&](Index t) {
      ConvColumn<C> result;
      const bool inside = t >= row_begin && t < row_end;
      result.row[0] = inside && above ? load(t - grid.width) : Pack<C>::zero();
      result.row[1] = inside ? load(t) : Pack<C>::zero();
      result.row[2] = inside && below ? load(t + grid.width) : Pack<C>::zero();
      return result;
    };
    ConvColumn<C> left = column(token - 1), middle = column(token);
    for (const Index stop = std::min(end, row_end); token < stop; ++token) {
      const ConvColumn<C> right = column(token + 1);
      emit(token, apply_conv_taps(taps, left, middle, right, residual));
      left = middle;
      middle = right;
    }
  }
}

}  // namespace detail
LINATTN_END

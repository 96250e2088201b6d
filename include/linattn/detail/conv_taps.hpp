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
namespace detail::inline LINATTN_TARGET {

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

// One output: the bias, then the taps row by row, then the residual, each step rounded once. weight(tap) and
// x(row, column) give packs; the middle is x(1, 1).
template <class C, class Weight, class Input>
[[nodiscard]] LINATTN_INLINE Pack<C> conv_output(Pack<C> bias, const Weight& weight, const Input& x,
                                                 bool residual) {
  Pack<C> sum = fma(weight(0), x(0, 0), bias);
  sum = fma(weight(1), x(0, 1), sum);
  sum = fma(weight(2), x(0, 2), sum);
  sum = fma(weight(3), x(1, 0), sum);
  sum = fma(weight(4), x(1, 1), sum);
  sum = fma(weight(5), x(1, 2), sum);
  sum = fma(weight(6), x(2, 0), sum);
  sum = fma(weight(7), x(2, 1), sum);
  sum = fma(weight(8), x(2, 2), sum);
  return residual ? x(1, 1) + sum : sum;
}

// emit(token, y) for the tokens [first, first + count) of the grid, row by row, one pack of channels; load(token)
// gives x there. Tokens count from the beginning of the grid. A window of three columns slides along the row, so
// every element is loaded three times.
template <class C, class Load, class Emit>
LINATTN_INLINE void conv_tokens(const TokenGrid& grid, Index first, Index count, const ConvTaps<C>& taps,
                                bool residual, const Load& load, const Emit& emit) {
  using P = Pack<C>;
  const P zero = P::zero();
  const Index width = grid.width, end = first + count;
  for (Index token = first; token < end;) {
    const Index row = token / width, row_end = (row + 1) * width;
    const bool above = row > 0, below = row + 1 < grid.height;
    P window[3][3];
    const auto load_column = [&](Index t, int column) {
      window[0][column] = above ? load(t - width) : zero;
      window[1][column] = load(t);
      window[2][column] = below ? load(t + width) : zero;
    };
    window[0][0] = window[1][0] = window[2][0] = zero;
    if (token > row * width) load_column(token - 1, 0);
    load_column(token, 1);
    for (const Index stop = std::min(end, row_end); token < stop; ++token) {
      window[0][2] = window[1][2] = window[2][2] = zero;
      if (token + 1 < row_end) load_column(token + 1, 2);
      emit(token, conv_output<C>(
                      taps.bias, [&](int tap) { return taps.weight[tap]; },
                      [&](int i, int j) { return window[i][j]; }, residual));
      for (auto& r : window) r[0] = r[1], r[1] = r[2];
    }
  }
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

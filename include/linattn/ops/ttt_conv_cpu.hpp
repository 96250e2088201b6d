// Test-time training of a depthwise 3x3 convolution on the host. Contract: ttt_conv.hpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/detail/lanes.hpp>
#include <linattn/detail/simd.hpp>
#include <linattn/ops/depthwise_conv_cpu.hpp>
#include <linattn/ops/ttt_conv.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

// The sums of the 9 taps run over bands of rows, at most 32 of them so that the scratch does not grow with the
// tokens, and over blocks of channels.
struct TttConvPlan {
  Index heads, head_dim, band, bands, blocks;

  constexpr TttConvPlan(Index head_count, Index channels, const TokenGrid& grid)
      : heads(head_count),
        head_dim(channels),
        band(std::max(Index{8}, (grid.height + 31) / 32)),
        bands((grid.height + band - 1) / band),
        blocks((channels + conv_block - 1) / conv_block) {}
  // Blocks of channels of one sample.
  [[nodiscard]] constexpr Index all_blocks() const { return heads * blocks; }
};

// sums: [sample][block][band][9][conv_block], sum of v[t] k[t'] for each tap; taps: [sample][block][10][conv_block],
// the updated kernel as conv_grid takes it.
template <class C>
struct TttConvWork {
  static constexpr Index sums_size = 9 * conv_block, taps_size = 10 * conv_block;
  C *sums, *taps;

  TttConvWork(Carver& carver, Index batch, const TttConvPlan& plan)
      : sums(carver.take<C>(batch * plan.all_blocks() * plan.bands * sums_size)),
        taps(carver.take<C>(batch * plan.all_blocks() * taps_size)) {}
};

// sums[t][c] += sum over `columns` tokens of v[x][c] window[t / 3][x + t % 3][c], added up on its own first.
template <class C, class T>
LINATTN_NOINLINE void add_conv_gradient(const C* above, const C* here, const C* below, const T* v, Index step,
                                        Index columns, Index channels, C* sums) {
  const C* const window[3] = {above, here, below};
  for_each_pack<C>(0, channels, [&](Index c, auto lanes) {
    Pack<C> g[9];
    unroll<9>([&](auto t) LINATTN_INLINE_LAMBDA { g[t] = Pack<C>::zero(); });
    for (Index x = 0; x < columns; ++x) {
      const Pack<C> value = lanes.load(v + x * step + c);
      unroll<9>([&](auto t) LINATTN_INLINE_LAMBDA {
        g[t] = fma(value, Pack<C>::load(window[t / 3] + (x + t % 3) * conv_block + c), g[t]);
      });
    }
    unroll<9>([&](auto t) LINATTN_INLINE_LAMBDA {
      C* const at = sums + t * conv_block + c;
      (Pack<C>::load(at) + g[t]).store(at);
    });
  });
}

// The sums of one band of rows and one block of channels. k and v: the grid's first token, at the first channel.
template <class C, class T>
void conv_gradient_band(const T* k, Index k_step, const T* v, Index v_step, const TokenGrid& grid,
                        Index first_row, Index rows, Index channels, C* sums) {
  constexpr Index row_size = (conv_strip + 2) * conv_block;
  C window[3][row_size], strip[TttConvWork<C>::sums_size];
  std::fill_n(sums, TttConvWork<C>::sums_size, C(0));
  for (Index first = 0; first < grid.width; first += conv_strip) {
    const auto load_row = [&](Index row) {
      const T* const from = row >= 0 && row < grid.height ? k + row * grid.width * k_step : nullptr;
      load_conv_row(from, k_step, first, grid.width, channels, window[(row + 3) % 3]);
    };
    std::fill_n(strip, TttConvWork<C>::sums_size, C(0));
    load_row(first_row - 1);
    load_row(first_row);
    for (Index row = first_row; row < first_row + rows; ++row) {
      load_row(row + 1);
      add_conv_gradient(window[(row + 2) % 3], window[row % 3], window[(row + 1) % 3],
                        v + (row * grid.width + first) * v_step, v_step,
                        std::min(conv_strip, grid.width - first), channels, strip);
    }
    for (Index i = 0; i < TttConvWork<C>::sums_size; ++i) sums[i] += strip[i];
  }
}

// w' of a block of channels, from the sums of the bands: g = rate sum, rate = -scale / tokens.
template <class C, class W>
void learn_taps(const TensorView<W, 4>& weight, Index channel, Index channels, const C* sums, Index bands,
                double rate, double inner_lr, C* taps) {
  std::fill_n(taps, TttConvWork<C>::taps_size, C(0));
  for (Index c = 0; c < channels; ++c) {
    double g[9] = {}, squares = 0;
    for (Index t = 0; t < 9; ++t) {
      for (Index band = 0; band < bands; ++band)
        g[t] += static_cast<double>(sums[band * TttConvWork<C>::sums_size + t * conv_block + c]);
      g[t] *= rate;
      squares += g[t] * g[t];
    }
    const double step = inner_lr / (std::sqrt(squares) + 1);
    for (Index t = 0; t < 9; ++t)
      taps[t * conv_block + c] =
          static_cast<C>(convert<double>(weight(channel + c, 0, t / 3, t % 3)) - step * g[t]);
  }
}

}  // namespace detail::inline LINATTN_TARGET

inline namespace LINATTN_TARGET {

// Bytes of scratch for the same call of ttt_conv: up to 33 kernels a sample. 0 for a call that would be refused.
template <ParallelPolicy P, Storage T, class W>
[[nodiscard]] std::size_t ttt_conv_workspace(const Cpu<P>&, In<T, 4> q, In<T, 4> k, In<T, 4> v,
                                             const TensorView<W, 4>& weight, const TensorView<T, 4>& out,
                                             const TttConvOptions& options) {
  if (!detail::check_ttt_conv_shapes<T>(q, k, v, weight, out, options).ok()) return 0;
  Carver carver(Workspace{});
  detail::TttConvWork<Compute<T>>(carver, q.extent(0), {q.extent(2), q.extent(3), options.grid});
  return carver.used();
}

// out = conv3x3(q; w'), w' learned from k and v. See ttt_conv.hpp.
template <ParallelPolicy P, Storage T, class W>
[[nodiscard]] Status ttt_conv(const Cpu<P>& ctx, In<T, 4> q, In<T, 4> k, In<T, 4> v,
                              const TensorView<W, 4>& weight, const TensorView<T, 4>& out,
                              const TttConvOptions& options) {
  using C = Compute<T>;
  if (const Status status = detail::check_ttt_conv_views<T>(q, k, v, weight, out, options); !status.ok())
    return status;
  const TokenGrid& grid = options.grid;
  const detail::TttConvPlan plan(q.extent(2), q.extent(3), grid);
  Carver carver(ctx.workspace);
  const detail::TttConvWork<C> work(carver, q.extent(0), plan);
  if (const Status status = carver.check("ttt_conv, workspace"); !status.ok()) return status;

  // Task or block -> its first channel, head and sample.
  const auto place = [&](Index block) {
    struct Place {
      Index begin, channels, h, b;
    };
    const Index begin = block % plan.blocks * detail::conv_block;
    return Place{begin, std::min(detail::conv_block, plan.head_dim - begin), block / plan.blocks % plan.heads,
                 block / plan.all_blocks()};
  };
  const Index blocks = q.extent(0) * plan.all_blocks();
  ctx.parallel.run(blocks * plan.bands, [&](Index task, Index) {
    const auto at = place(task / plan.bands);
    const Index row = task % plan.bands * plan.band;
    detail::conv_gradient_band(
        k.pointer(at.b, 0, at.h, at.begin), k.step(1), v.pointer(at.b, 0, at.h, at.begin), v.step(1), grid,
        row, std::min(plan.band, grid.height - row), at.channels, work.sums + task * work.sums_size);
  });
  const double rate = -options.scale / static_cast<double>(grid.tokens());
  ctx.parallel.run(blocks, [&](Index block, Index) {
    const auto at = place(block);
    detail::learn_taps(weight, at.h * plan.head_dim + at.begin, at.channels,
                       work.sums + block * plan.bands * work.sums_size, plan.bands, rate, options.inner_lr,
                       work.taps + block * work.taps_size);
  });
  detail::conv_grid<C>(ctx.parallel, q, out, grid, false, [&](Index b, Index h, Index begin, Index, C* taps) {
    const Index block = (b * plan.heads + h) * plan.blocks + begin / detail::conv_block;
    std::copy_n(work.taps + block * work.taps_size, work.taps_size, taps);
  });
  return {};
}

}  // namespace LINATTN_TARGET
LINATTN_END

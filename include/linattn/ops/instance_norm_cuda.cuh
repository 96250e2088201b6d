// Instance normalisation over the tokens, on a CUDA device. Contract: instance_norm.hpp.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/detail/channel_tiles.cuh>
#include <linattn/detail/cuda.cuh>
#include <linattn/detail/stats_chunks.hpp>
#include <linattn/detail/token_stats.cuh>
#include <linattn/ops/instance_norm.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

template <class T>
struct InstanceNormParams {
  Rows<const T> x;
  Rows<T> out;
  ChannelTiles tiles;
  Index tokens;
  const float *shift, *delta, *scale;
};

// Tokens of a part: each thread has 16, whose loads hide behind each other and outweigh its three statistics.
inline constexpr Index norm_part = 16 * tile_rows;

template <class T, int Width>
static __global__ void __launch_bounds__(tile_threads, 4) instance_norm_kernel(InstanceNormParams<T> p) {
  const auto [b, part, head, channel, inside] = p.tiles.template place<Width>();
  if (!inside) return;
  const Index place = (b * p.tiles.heads + head) * p.tiles.head_dim + channel;
  float shift[Width], delta[Width], scale[Width];
  load_channels<Width>(p.shift + place, shift);
  load_channels<Width>(p.delta + place, delta);
  load_channels<Width>(p.scale + place, scale);
  const Index begin = part * norm_part + static_cast<int>(threadIdx.x) / tile_columns,
              end = begin + norm_part < p.tokens ? begin + norm_part : p.tokens;
  // Loads of a group do not wait for each other, nor for stores to what may be the same memory.
  constexpr int group = 4;
  for (Index first = begin; first < end; first += group * tile_rows) {
    float x[group][Width] = {};
#pragma unroll
    for (int i = 0; i < group; ++i)
      if (first + i * tile_rows < end)
        load_channels<Width>(p.x.at(b, first + i * tile_rows, head) + channel, x[i]);
#pragma unroll
    for (int i = 0; i < group; ++i) {
      if (first + i * tile_rows >= end) break;
#pragma unroll
      for (int c = 0; c < Width; ++c) x[i][c] = ((x[i][c] - shift[c]) - delta[c]) * scale[c];
      store_channels<Width>(p.out.at(b, first + i * tile_rows, head) + channel, x[i]);
    }
  }
}

}  // namespace detail::inline LINATTN_TARGET

inline namespace LINATTN_TARGET {

// Bytes of scratch: 3 to 99 numbers a channel and sample.
template <Storage T>
[[nodiscard]] std::size_t instance_norm_workspace(const Cuda&, In<T, 4> x, const TensorView<T, 4>&,
                                                  const InstanceNormOptions& = {}) {
  Carver carver(Workspace{});
  (void)detail::take_token_stats<float>(carver, x.extent(0), x.extent(1), x.extent(2) * x.extent(3));
  return carver.used();
}

// y = (x - mean) / sqrt(var + eps) over the tokens. See instance_norm.hpp.
template <Storage T>
[[nodiscard]] Status instance_norm(const Cuda& ctx, In<T, 4> x, const TensorView<T, 4>& out,
                                   const InstanceNormOptions& options = {}) {
  LINATTN_REQUIRE_DEVICE_STORAGE(T);
  const Status status = detail::check_instance_norm<T>(x, out, options);
  if (!status.ok()) return status;
  Carver carver(ctx.workspace);
  const detail::TokenStats<float> stats =
      detail::take_token_stats<float>(carver, x.extent(0), x.extent(1), x.extent(2) * x.extent(3));
  const Status space = carver.check("instance_norm, workspace");
  if (!space.ok()) return space;
  const Status counted = detail::token_stats<T>(ctx, x, options.eps, options.divide_by_std, stats);
  if (!counted.ok()) return counted;

  const bool merged = detail::heads_are_dense(x) && detail::heads_are_dense(out);
  const TensorView<const T, 4> from = merged ? detail::merge_heads(x) : x;
  const TensorView<T, 4> to = merged ? detail::merge_heads(out) : out;
  return detail::with_width(from, to, [&](auto width) {
    const detail::InstanceNormParams<T> p{
        .x = detail::rows(from),
        .out = detail::rows(to),
        .tiles = detail::channel_tiles<width>(from, detail::ceil_div(from.extent(1), detail::norm_part)),
        .tokens = from.extent(1),
        .shift = stats.shift,
        .delta = stats.delta,
        .scale = stats.scale};
    return detail::launch(ctx, "instance_norm", detail::instance_norm_kernel<T, width>,
                          detail::grid_of(p.tiles, from.extent(0)), detail::tile_threads, 0, p);
  });
}

}  // namespace LINATTN_TARGET
LINATTN_END

// Mean and variance of each channel over the tokens on a device, in one read of the data: detail/token_stats.hpp in
// float alone, without double.
//
// Moments of two sets of tokens are joined by the update of Chan, Golub and LeVeque (1979), and a mean is held as the
// unevaluated sum of two floats, renewed by each join (D. E. Knuth, "The Art of Computer Programming", 4.2.2, theorem
// B). So neither a common offset of the tokens nor a first token far from the rest costs digits. A thread joins
// groups of 4 tokens, a block its threads, and a second kernel, by CUB, the blocks of a channel: the order depends on
// the shapes alone.
#pragma once

#include <cuda_runtime.h>

#include <linattn/core/context.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/detail/block_reduce.cuh>
#include <linattn/detail/channel_tiles.cuh>
#include <linattn/detail/cuda.cuh>
#include <linattn/detail/ptx.cuh>
#include <linattn/detail/stats_chunks.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

// Of some tokens of a channel: mean = shift + delta, |delta| <= half an ulp of shift; squares = sum (x - mean)^2.
struct Moments {
  float shift, delta, squares;
};

// shift + delta = shift + step, rounding error and all.
__device__ __forceinline__ void move_mean(float& shift, float& delta, float step) {
  const float mean = shift + step, part = mean - shift;
  delta = (shift - (mean - part)) + (step - part);
  shift = mean;
}

// The moments of `count_a` and of `count_b` tokens together; count_b may be 0.
[[nodiscard]] __device__ __forceinline__ Moments join(const Moments& a, float count_a, const Moments& b,
                                                      float count_b) {
  if (count_b == 0.0f) return a;
  const float weight = count_b / (count_a + count_b);
  const float apart = (b.shift - a.shift) + (b.delta - a.delta);
  Moments both = a;
  move_mean(both.shift, both.delta, fmaf(apart, weight, a.delta));
  both.squares = fmaf(apart * apart, count_a * weight, a.squares + b.squares);
  return both;
}

// The moments of x[0, count), 1 <= count <= 4; what lies behind is not looked at.
inline constexpr int stats_group = 4;
[[nodiscard]] __device__ __forceinline__ Moments moments(const float (&x)[stats_group], int count) {
  Moments m{.shift = x[0], .delta = 0.0f, .squares = 0.0f};
  float sum = 0.0f;
#pragma unroll
  for (int i = 1; i < stats_group; ++i) sum += i < count ? x[i] - x[0] : 0.0f;
  move_mean(m.shift, m.delta, sum / static_cast<float>(count));
#pragma unroll
  for (int i = 0; i < stats_group; ++i) {
    const float deviation = i < count ? (x[i] - m.shift) - m.delta : 0.0f;
    m.squares = fmaf(deviation, deviation, m.squares);
  }
  return m;
}

template <class T>
struct ChunkStatsParams {
  Rows<const T> x;
  ChannelTiles tiles;  // a part is a chunk
  int tokens, chunk;
  float* partial;  // [batch, channels, 3, chunks]
};

// One warp in the block for each two rows of threads.
template <int Width>
struct ChunkStatsShared {
  static constexpr int warps = tile_threads / warp_size, channels = tile_columns * Width;
  float count[warps];
  Moments moments[warps][channels];
};

template <class T, int Width>
static __global__ void __launch_bounds__(tile_threads, 4) chunk_stats_kernel(ChunkStatsParams<T> p) {
  using Shared = ChunkStatsShared<Width>;
  Shared& shared = dynamic_shared<Shared>();
  const auto [b, part, head, channel, inside] = p.tiles.template place<Width>();
  const int begin = part * p.chunk, end = min(begin + p.chunk, p.tokens);
  const int thread = static_cast<int>(threadIdx.x), column = thread % tile_columns,
            row = thread / tile_columns;

  Moments m[Width] = {};
  float count = 0.0f;
  for (int first = begin + row; inside && first < end; first += stats_group * tile_rows) {
    float x[stats_group][Width] = {};
#pragma unroll
    for (int i = 0; i < stats_group; ++i) {
      const int token = first + i * tile_rows;
      if (token < end) load_channels<Width>(p.x.at(b, token, head) + channel, x[i]);
    }
    const int present = min((end - first + tile_rows - 1) / tile_rows, stats_group);
#pragma unroll
    for (int c = 0; c < Width; ++c) {
      const float group[stats_group] = {x[0][c], x[1][c], x[2][c], x[3][c]};
      const Moments next = moments(group, present);
      m[c] = count == 0.0f ? next : join(m[c], count, next, static_cast<float>(present));
    }
    count += static_cast<float>(present);
  }

  // The two rows of a warp, then the warps in turn. The first rows are never without a token.
  const float count_below = __shfl_down_sync(0xffffffffu, count, tile_columns);
#pragma unroll
  for (int c = 0; c < Width; ++c) {
    const Moments below{__shfl_down_sync(0xffffffffu, m[c].shift, tile_columns),
                        __shfl_down_sync(0xffffffffu, m[c].delta, tile_columns),
                        __shfl_down_sync(0xffffffffu, m[c].squares, tile_columns)};
    m[c] = join(m[c], count, below, count_below);
  }
  count += count_below;
  const int warp = thread / warp_size;
  if (thread % warp_size < tile_columns) {
    if (column == 0) shared.count[warp] = count;
#pragma unroll
    for (int c = 0; c < Width; ++c) shared.moments[warp][column * Width + c] = m[c];
  }
  __syncthreads();

  // Now a thread for each channel.
  const int own = channel - column * Width + thread;
  if (thread >= Shared::channels || own >= p.tiles.head_dim) return;
  Moments all = shared.moments[0][thread];
  float total = shared.count[0];
  for (int w = 1; w < Shared::warps; ++w) {
    all = join(all, total, shared.moments[w][thread], shared.count[w]);
    total += shared.count[w];
  }
  const Index place = (b * p.tiles.heads + head) * p.tiles.head_dim + own, chunks = p.tiles.parts;
  float* const to = p.partial + place * 3 * chunks + part;
  to[0] = all.shift;
  to[chunks] = all.delta;
  to[2 * chunks] = all.squares;
}

struct JoinChunksParams {
  const float* partial;
  int tokens, chunk, chunks;
  float eps;
  bool divide_by_std;
  float *shift, *delta, *scale;
};
struct CountedMoments {
  float count;
  Moments moments;
};
struct JoinMoments {
  [[nodiscard]] __device__ __forceinline__ CountedMoments operator()(const CountedMoments& a,
                                                                     const CountedMoments& b) const {
    return {a.count + b.count, join(a.moments, a.count, b.moments, b.count)};
  }
};
struct JoinChunksShared {
  BlockReduceScratch<CountedMoments, warp_size> scratch;
};

// A block for each batch and channel, a thread for each chunk: stats_chunk makes them at most 32.
[[maybe_unused]] static __global__ void __launch_bounds__(warp_size) join_chunks_kernel(JoinChunksParams p) {
  const Index place = blockIdx.x;
  const int k = static_cast<int>(threadIdx.x);
  CountedMoments own{};
  if (k < p.chunks) {
    const float* const from = p.partial + place * 3 * p.chunks + k;
    own = {static_cast<float>(min(p.chunk, p.tokens - k * p.chunk)),
           {from[0], from[p.chunks], from[2 * p.chunks]}};
  }
  const CountedMoments all =
      block_reduce<warp_size>(own, JoinMoments{}, dynamic_shared<JoinChunksShared>().scratch);
  if (k != 0) return;
  // A constant channel with eps = 0 gives 0, the limit, and not 0 / 0.
  const float spread = all.moments.squares / static_cast<float>(p.tokens) + p.eps;
  p.shift[place] = all.moments.shift;
  p.delta[place] = all.moments.delta;
  p.scale[place] = !p.divide_by_std ? 1.0f : spread == 0.0f ? 0.0f : 1.0f / sqrtf(spread);
}

// Fills `stats` for x (batch, token, head, channel); eps is added to the biased variance.
template <class T>
[[nodiscard]] Status token_stats(const Cuda& ctx, TensorView<const T, 4> x, double eps, bool divide_by_std,
                                 const TokenStats<float>& stats) {
  LINATTN_REQUIRE_DEVICE_STORAGE(T);
  if (const Status fits = check_token_count(x); !fits.ok()) return fits;
  if (heads_are_dense(x)) x = merge_heads(x);
  const int tokens = static_cast<int>(x.extent(1)), chunk = static_cast<int>(stats_chunk(tokens)),
            chunks = static_cast<int>(stats_chunks(tokens));
  const Status status = with_width(x, x, [&](auto width) {
    const ChunkStatsParams<T> p{.x = rows(x),
                                .tiles = channel_tiles<width>(x, chunks),
                                .tokens = tokens,
                                .chunk = chunk,
                                .partial = stats.partial};
    return launch(ctx, "token_stats, chunks", chunk_stats_kernel<T, width>, grid_of(p.tiles, x.extent(0)),
                  tile_threads, sizeof(ChunkStatsShared<width>), p);
  });
  if (!status.ok()) return status;
  const JoinChunksParams p{.partial = stats.partial,
                           .tokens = tokens,
                           .chunk = chunk,
                           .chunks = chunks,
                           .eps = static_cast<float>(eps),
                           .divide_by_std = divide_by_std,
                           .shift = stats.shift,
                           .delta = stats.delta,
                           .scale = stats.scale};
  return launch(ctx, "token_stats, join", join_chunks_kernel,
                Grid{.x = x.extent(0) * x.extent(2) * x.extent(3)}, warp_size, sizeof(JoinChunksShared), p);
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

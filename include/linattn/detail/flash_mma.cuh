// Softmax attention on tensor cores, for heads of at most 128 channels stored in 16 bits.
//
// A block has 128 queries, which stay in registers, and walks the keys by 64. K and V arrive by cp.async in one of two
// stages while the other is worked on, so a step has one barrier. Each warp has whole rows of the logits: maximum and
// sum go round four lanes. Accumulators of the logits are, rounded to T, the operand of the product with the values.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include <linattn/core/status.hpp>
#include <linattn/detail/cuda.cuh>
#include <linattn/detail/mma_tiles.cuh>
#include <linattn/detail/ptx.cuh>
#include <linattn/detail/softmax_problem.cuh>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

// Width: channels, of which the last may be padding. With 32 queries a warp, each fragment of K and V that is read from
// shared memory serves two products; sums of 128 channels leave registers for 16 only.
template <int Width>
struct FlashTile {
  static constexpr int queries = 128, keys = 64;
  static constexpr int row_tiles = Width <= 64 ? 2 : 1;  // of 16 queries, a warp
  static constexpr int warp_queries = 16 * row_tiles;
  static constexpr int threads = queries / warp_queries * warp_size;
  static constexpr int min_blocks = Width == 32 ? 3 : Width == 64 ? 2 : 1;
};

// The rows of two stages; of each the keys come first, then the values. The queries pass through the second stage before
// the walk, the results through either behind it.
template <int Width>
struct FlashShared {
  using Tile = FlashTile<Width>;
  static constexpr int stage = 2 * Tile::keys;
  static_assert(stage == Tile::queries);
  MmaTile<2 * stage, Width> rows;
};

// Count rows of `channels` channels, which are a multiple of 8; zeros beyond them and beyond the `tokens` that there are.
template <int Count, int Threads, class T, int Height, int Width>
__device__ __forceinline__ void load_rows_async(MmaTile<Height, Width>& tile, int tile_row, const T* from,
                                                Index stride, int first_token, int tokens, int channels) {
  constexpr int row_chunks = Width / 8, step = Threads / row_chunks;
  static_assert(Count % step == 0 && step % 8 == 0);  // then all rows of a thread are permuted alike
  const int thread = static_cast<int>(threadIdx.x), row = thread / row_chunks, chunk = thread % row_chunks;
  const int place = tile.place(tile_row + row, chunk);
  const bool inside = 8 * chunk < channels;
  const T* at = from + (first_token + row) * stride + 8 * chunk;
#pragma unroll
  for (int i = 0; i < Count / step; ++i, at += step * stride) {
    const bool valid = inside && first_token + row + i * step < tokens;
    cp_async_16(&tile.chunks[place + i * step * row_chunks], valid ? at : from, valid);
  }
}

// The chunk 16 `down` rows below and 2 `right` chunks right of the one at `place`, which is the first or second of its row:
// the former leaves the permutation as it is, the latter exchanges with it. So a lane needs one place, and constants.
template <int Height, int Width>
[[nodiscard]] __device__ __forceinline__ const uint4* block_at(const MmaTile<Height, Width>& tile, int place,
                                                               int down, int right) {
  return &tile.chunks[(place ^ (2 * right)) + 16 * down * (Width / 8)];
}

// Logits in units of log 2, with bias, and -infinity where the query does not see the key; unless guarded NaN where a bias
// of -infinity meets NaN or infinity. `first_query` and `first_key` are this lane's.
template <bool Guarded, class T, int Tiles>
__device__ __forceinline__ void finish_logits(float (&s)[Tiles][4], const SoftmaxProblem<T>& p, float scale,
                                              const float* bias, int first_query, int first_key) {
  constexpr float log2_e = 1.44269504f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int query = first_query + 8 * i;
    const int seen = (query < p.queries ? p.seen(query) : 0) - first_key;
#pragma unroll
    for (int n = 0; n < Tiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& logit = s[n][2 * i + e];
        logit = 8 * n + e < seen ? logit * scale : -INFINITY;
      }
    if (bias == nullptr) continue;
    const float* const row = bias + query * p.bias.token + first_key;
#pragma unroll
    for (int n = 0; n < Tiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (8 * n + e < seen) {
          const float added = row[8 * n + e];
          float& logit = s[n][2 * i + e];
          if (Guarded && added == -INFINITY) logit = 0.0f;
          logit = fmaf(log2_e, added, logit);
        }
  }
}

// 1 where a query sees a key, of 16 x 16; `first_query` and `first_key` are this lane's.
template <class T>
[[nodiscard]] __device__ __forceinline__ MmaOperand seen_block(const SoftmaxProblem<T>& p, const float* bias,
                                                               int first_query, int first_key) {
  MmaSums seen;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int query = first_query + 8 * (i / 2 % 2), key = first_key + 8 * (i / 4) + i % 2;
    const float* const row = bias == nullptr ? nullptr : bias + query * p.bias.token;
    seen.d[i / 4][i % 4] = p.sees(query, row, key) ? 1.0f : 0.0f;
  }
  return to_operand<T>(seen);
}

// Bits 0 and 16 of the result: whether the lower and the upper of two values are not finite. Adding 1 to an exponent of all
// ones overflows it.
template <class T>
[[nodiscard]] __device__ __forceinline__ std::uint32_t not_finite(std::uint32_t two) {
  constexpr std::uint32_t one = std::is_same_v<T, half> ? 0x04000400u : 0x00800080u;
  return ((two & 0x7fff7fffu) + one) >> 15 & 0x00010001u;
}

// Whether this thread finds a result of the tile that is not finite.
template <int Threads, class T>
[[nodiscard]] __device__ __forceinline__ bool left_not_finite(const SoftmaxProblem<T>& p, Index b, Index h,
                                                              int first_query, int last_query) {
  std::uint32_t any = 0;
  const int row_chunks = p.value_dim / 8, chunks = (last_query - first_query + 1) * row_chunks;
  for (int i = static_cast<int>(threadIdx.x); i < chunks; i += Threads) {
    const auto x = load<uint4>(p.out.at(b, first_query + i / row_chunks, h) + 8 * (i % row_chunks));
    any |= not_finite<T>(x.x) | not_finite<T>(x.y) | not_finite<T>(x.z) | not_finite<T>(x.w);
  }
  return any != 0;
}

// Puts 0 where `Count` rows from `tile_row` on are not finite; whether this thread did.
template <int Count, int Threads, class T, int Height, int Width>
[[nodiscard]] __device__ __forceinline__ bool leave_out_not_finite(MmaTile<Height, Width>& tile,
                                                                   int tile_row) {
  std::uint32_t any = 0;
  const auto finite = [&any](std::uint32_t two) {
    const std::uint32_t found = not_finite<T>(two);
    any |= found;
    return two & ~(found * 0xffffu);
  };
  for (int i = static_cast<int>(threadIdx.x); i < Count * Width / 8; i += Threads) {
    uint4* const at = &tile.chunks[tile_row * (Width / 8) + i];
    const auto x = load<uint4>(at);
    store(at, uint4{finite(x.x), finite(x.y), finite(x.z), finite(x.w)});
  }
  return any != 0;
}

// 1 for infinity, 64 for -infinity, both for NaN: sums of 16 such numbers are exact, and tell which there were.
[[nodiscard]] __device__ __forceinline__ float not_finite_code(float x) {
  return is_finite(x) ? 0.0f : x > 0.0f ? 1.0f : x < 0.0f ? 64.0f : 65.0f;
}

// Adds the values of a stage that are not finite to the sums of the queries that see them. `first_query` and `first_key`
// are this lane's.
template <class T, int Rows, int Columns>
__device__ __forceinline__ void add_not_finite(float (&sums)[Rows][Columns][4], const SoftmaxProblem<T>& p,
                                               Index b, Index h, const float* bias, int first_query,
                                               int first_key) {
#pragma unroll 1
  for (int n = 0; n < FlashTile<8 * Columns>::keys / 16; ++n) {
    MmaOperand seen[Rows];
#pragma unroll
    for (int r = 0; r < Rows; ++r) seen[r] = seen_block(p, bias, first_query + 16 * r, first_key + 16 * n);
#pragma unroll
    for (int c = 0; c < Columns / 2; ++c) {
      MmaOperand values;  // as ldmatrix_x4_trans gives them
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first_key + 16 * n + 8 * (i % 2), channel = 16 * c + 8 * (i / 2) + mma_lane() / 4;
        const auto code = [&](int k) {
          const bool inside = k < p.keys && channel < p.value_dim;
          return inside ? not_finite_code(to_float(p.v.at(b, k, h)[channel])) : 0.0f;
        };
        values.r[i] = pack<T>(code(key), code(key + 1));
      }
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        MmaSums codes;
        multiply_add<T>(codes, seen[r], values);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int count = static_cast<int>(codes.d[i / 4][i % 4]);
          float& sum = sums[r][2 * c + i / 4][i % 4];
          if (count % 64 != 0) sum += INFINITY;
          if (count >= 64) sum -= INFINITY;
        }
      }
    }
  }
}

// What a block does: all of flash_mma_kernel or, guarded, of flash_guarded_kernel.
template <bool Guarded, int Width, class T>
__device__ __forceinline__ void flash_tile(const SoftmaxProblem<T>& p) {
  using Tile = FlashTile<Width>;
  using Shared = FlashShared<Width>;
  constexpr int row_tiles = Tile::row_tiles, threads = Tile::threads, keys = Tile::keys;
  constexpr float log2_e = 1.44269504f, log_2 = 0.693147181f;
  auto& rows = dynamic_shared<Shared>().rows;

  // The tiles of a head come together, for the L2 cache, and those that a causal mask leaves most keys first.
  const unsigned tiles = (static_cast<unsigned>(p.queries) + Tile::queries - 1) / Tile::queries;
  const unsigned group = blockIdx.x / tiles, heads = static_cast<unsigned>(p.heads);
  const int first_query = static_cast<int>(tiles - 1 - blockIdx.x % tiles) * Tile::queries;
  const Index b = group / heads, h = group % heads;
  const int lane = mma_lane(), warp_row = mma_warp() * Tile::warp_queries;
  const int warp_query = first_query + warp_row;

  const int last_query = min(first_query + Tile::queries, p.queries) - 1;
  if constexpr (Guarded)
    if (!p.hides(first_query, last_query) ||
        !__syncthreads_or(left_not_finite<threads>(p, b, h, first_query, last_query)))
      return;
  const int steps = (p.seen(last_query) + keys - 1) / keys;
  const T *const k = p.k.at(b, 0, h), *const v = p.v.at(b, 0, h);
  const auto load_stage = [&](int step) {
    const int stage = step % 2 * Shared::stage;
    load_rows_async<keys, threads>(rows, stage, k, p.k.token, step * keys, p.keys, p.head_dim);
    load_rows_async<keys, threads>(rows, stage + keys, v, p.v.token, step * keys, p.keys, p.value_dim);
  };
  load_rows_async<Tile::queries, threads>(rows, Shared::stage, p.q.at(b, 0, h), p.q.token, first_query,
                                          p.queries, p.head_dim);
  cp_async_commit();
  if (steps > 0) load_stage(0);
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();
  MmaOperand q[row_tiles][Width / 16];
#pragma unroll
  for (int r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int c = 0; c < Width / 16; ++c) load_a(q[r][c], rows, Shared::stage + warp_row + 16 * r, 2 * c);

  // The last key that any query of this warp sees, and the first that not all see.
  const int warp_last = min(warp_query + Tile::warp_queries, p.queries) - 1;
  const int end = warp_query < p.queries ? p.seen(warp_last) : 0, masked = p.seen(warp_query);
  const float scale = log2_e * p.scale;
  const float* const bias = p.bias.data == nullptr ? nullptr : p.bias.at(b, 0, h);
  float sums[row_tiles][Width / 8][4] = {};
  float top[row_tiles][2],
      total[row_tiles][2];  // the running maximum, in units of log 2, and this lane's sum
#pragma unroll
  for (int r = 0; r < row_tiles; ++r)
#pragma unroll
    for (int i = 0; i < 2; ++i) top[r][i] = -INFINITY, total[r][i] = 0.0f;

  for (int step = 0; step < steps; ++step) {
    // All have the stage; all have left the other one.
    cp_async_wait<0>();
    __syncthreads();
    if (step + 1 < steps) load_stage(step + 1);
    cp_async_commit();
    const int first_key = step * keys;
    bool left_out = false;  // values of this stage that are not finite
    if constexpr (Guarded)
      left_out =
          __syncthreads_or(leave_out_not_finite<keys, threads, T>(rows, step % 2 * Shared::stage + keys));
    if (first_key >= end) continue;
    // Of the blocks of K and V as load_b and load_b_transposed read them.
    const int row = step % 2 * Shared::stage + lane % 8;
    const int key_place = rows.place(row + lane / 16 * 8, lane / 8 % 2);
    const int value_place = rows.place(row + keys + lane / 8 % 2 * 8, lane / 16);

    float s[row_tiles][keys / 8][4] = {};
#pragma unroll
    for (int c = 0; c < Width / 16; ++c)
#pragma unroll
      for (int n = 0; n < keys / 16; ++n) {
        MmaOperand operand;
        ldmatrix_x4(operand.r, block_at(rows, key_place, n, c));
#pragma unroll
        for (int r = 0; r < row_tiles; ++r) multiply_add<T>(s[r][2 * n], s[r][2 * n + 1], q[r][c], operand);
      }

    // Only the maximum of logits that are not negated is that of the products.
    float factor = scale;
    if (first_key + keys > masked || bias != nullptr || scale < 0.0f) {
#pragma unroll
      for (int r = 0; r < row_tiles; ++r)
        finish_logits<Guarded>(s[r], p, scale, bias, warp_query + 16 * r + lane / 4,
                               first_key + lane % 4 * 2);
      factor = 1.0f;
    }

#pragma unroll
    for (int r = 0; r < row_tiles; ++r)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float most = -INFINITY;
#pragma unroll
        for (int n = 0; n < keys / 8; ++n) most = fmaxf(most, fmaxf(s[r][n][2 * i], s[r][n][2 * i + 1]));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
        most = fmaxf(top[r][i], most * factor);
        const float shift = softmax_shift(most), rescale = exp2_approx(top[r][i] - shift);
        top[r][i] = most;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < keys / 8; ++n)
#pragma unroll
          for (int e = 2 * i; e < 2 * i + 2; ++e)
            sum += s[r][n][e] = exp2_approx(fmaf(s[r][n][e], factor, -shift));
        total[r][i] = fmaf(total[r][i], rescale, sum);
#pragma unroll
        for (int c = 0; c < Width / 8; ++c) sums[r][c][2 * i] *= rescale, sums[r][c][2 * i + 1] *= rescale;
      }

#pragma unroll
    for (int n = 0; n < keys / 16; ++n) {
      MmaOperand weights[row_tiles];
#pragma unroll
      for (int r = 0; r < row_tiles; ++r) weights[r] = to_operand<T>(s[r][2 * n], s[r][2 * n + 1]);
#pragma unroll
      for (int c = 0; c < Width / 16; ++c) {
        MmaOperand operand;
        ldmatrix_x4_trans(operand.r, block_at(rows, value_place, n, c));
#pragma unroll
        for (int r = 0; r < row_tiles; ++r)
          multiply_add<T>(sums[r][2 * c], sums[r][2 * c + 1], weights[r], operand);
      }
    }
    if (left_out) add_not_finite(sums, p, b, h, bias, warp_query + lane / 4, first_key + lane % 4 * 2);
  }

  // All warps have left the stage that the last step did not use; each has its own rows of it.
  const int out_row = steps % 2 * Shared::stage + warp_row;
#pragma unroll
  for (int r = 0; r < row_tiles; ++r) {
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = total[r][i];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      inverse[i] = sum == 0.0f ? 0.0f : 1.0f / sum;
      const int query = warp_query + 16 * r + lane / 4 + 8 * i;
      if (p.lse.data != nullptr && lane % 4 == 0 && query < p.queries)
        *p.lse.at(b, query, h) = sum == 0.0f ? -INFINITY : log_2 * (top[r][i] + log2f(sum));
    }
#pragma unroll
    for (int c = 0; c < Width / 16; ++c) {
      MmaSums block;
#pragma unroll
      for (int i = 0; i < 8; ++i) block.d[i / 4][i % 4] = sums[r][2 * c + i / 4][i % 4] * inverse[i / 2 % 2];
      store_operand(rows, out_row + 16 * r, 8 * c, to_operand<T>(block));
    }
  }
  __syncwarp();
  constexpr int row_chunks = Width / 8, rows_at_once = warp_size / row_chunks;
  const int chunk = lane % row_chunks;
#pragma unroll
  for (int i = 0; i < Tile::warp_queries / rows_at_once; ++i) {
    const int row = lane / row_chunks + i * rows_at_once, query = warp_query + row;
    if (query < p.queries && 8 * chunk < p.value_dim)
      store(p.out.at(b, query, h) + 8 * chunk, load<uint4>(rows.chunk(out_row + row, chunk)));
  }
}

template <class T, int Width>
static __global__ void __launch_bounds__(FlashTile<Width>::threads, FlashTile<Width>::min_blocks)
    flash_mma_kernel(SoftmaxProblem<T> p) {
  flash_tile<false, Width>(p);
}

// For heads of any size: channels that are 0 change no bit.
inline constexpr int flash_guarded_width = 128;
template <class T>
static __global__ void __launch_bounds__(FlashTile<flash_guarded_width>::threads)
    flash_guarded_kernel(SoftmaxProblem<T> p) {
  flash_tile<true, flash_guarded_width>(p);
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

// Softmax attention in float arithmetic without tensor cores, for any type, stride and number of channels.
//
// A block has 64 queries and walks the keys by 64; 16 x 16 threads have 4 x 4 of the logits and 4 rows of the sums each.
// Tiles lie in shared memory in float, rows 4 floats longer than they are: the rows of 8 threads then begin in different
// banks, and four channels, or keys, are read at once.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include <linattn/core/status.hpp>
#include <linattn/detail/channel_tiles.cuh>
#include <linattn/detail/cuda.cuh>
#include <linattn/detail/ptx.cuh>
#include <linattn/detail/softmax_problem.cuh>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

inline constexpr int softmax_plain_tokens = 64;  // queries, and keys, of a tile
inline constexpr int softmax_plain_threads = 256;

// Width: value channels that a block sums up; heads with more have several blocks, which find the same logits.
template <int Width>
struct SoftmaxPlainShared {
  static constexpr int tokens = softmax_plain_tokens, channels = 32, keys = 16, gap = 4;
  float4 q[tokens][(channels + gap) / 4];
  float4 k[tokens][(channels + gap) / 4];
  float4 weights[tokens][(tokens + gap) / 4];
  float4 v[keys][Width / 4];
};

// Rows of a float4 array from rows of a view; zeros where there are none.
template <int Rows, int Columns, class T, int Pitch>
__device__ __forceinline__ void stage_rows(float4 (&to)[Rows][Pitch], const T* from, Index stride, int rows,
                                           int columns) {
  static_assert(Rows * Columns % softmax_plain_threads == 0);
#pragma unroll 4
  for (int i = 0; i < Rows * Columns / softmax_plain_threads; ++i) {
    const int at = i * softmax_plain_threads + static_cast<int>(threadIdx.x);
    const int row = at / Columns, column = at % Columns;
    const float value = row < rows && column < columns ? to_float(from[row * stride + column]) : 0.0f;
    store(reinterpret_cast<float*>(to[row]) + column, value);
  }
}

// sum += a . b
__device__ __forceinline__ void add_product(float& sum, const float4& a, const float4& b) {
  sum = fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, sum))));
}
// sum += a b. Guarded: where a < 0 the value is hidden, and 0 if it is not finite.
template <bool Guarded>
__device__ __forceinline__ void add_scaled(float4& sum, float a, float4 b) {
  if constexpr (Guarded)
    if (a < 0.0f) {
      a = 0.0f;
      b = {is_finite(b.x) ? b.x : 0.0f, is_finite(b.y) ? b.y : 0.0f, is_finite(b.z) ? b.z : 0.0f,
           is_finite(b.w) ? b.w : 0.0f};
    }
  sum = {fmaf(a, b.x, sum.x), fmaf(a, b.y, sum.y), fmaf(a, b.z, sum.z), fmaf(a, b.w, sum.w)};
}

// Whether this thread finds a result of a tile that is not finite.
template <class T>
[[nodiscard]] __device__ __forceinline__ bool left_not_finite(const T* out, Index stride, int queries,
                                                              int values) {
  bool any = false;
  for (int i = static_cast<int>(threadIdx.x); i < queries * values; i += softmax_plain_threads)
    any = any || !is_finite(to_float(out[i / values * stride + i % values]));
  return any;
}

// What a block does: all of softmax_plain_kernel or, guarded, of softmax_plain_guarded_kernel.
template <bool Guarded, int Width, class T>
__device__ __forceinline__ void softmax_plain_tile(const SoftmaxProblem<T>& p) {
  using Shared = SoftmaxPlainShared<Width>;
  constexpr int tokens = Shared::tokens, channels = Shared::channels, chunk_keys = Shared::keys;
  constexpr int side = 16, part = tokens / side;     // threads, and what each has, along either axis
  constexpr int column_groups = Width / (4 * side);  // of 4 value channels a thread
  auto& shared = dynamic_shared<Shared>();

  const unsigned tiles = (static_cast<unsigned>(p.queries) + tokens - 1) / tokens;
  const unsigned group = blockIdx.x / tiles, heads = static_cast<unsigned>(p.heads);
  const int first_query = static_cast<int>(tiles - 1 - blockIdx.x % tiles) * tokens;
  const int first_value = static_cast<int>(blockIdx.y) * Width,
            values = min(Width, p.value_dim - first_value);
  const Index b = group / heads, h = group % heads;
  const int x = static_cast<int>(threadIdx.x) % side, y = static_cast<int>(threadIdx.x) / side;
  const int queries = min(tokens, p.queries - first_query);

  if constexpr (Guarded)
    if (!p.hides(first_query, first_query + queries - 1) ||
        !__syncthreads_or(
            left_not_finite(p.out.at(b, first_query, h) + first_value, p.out.token, queries, values)))
      return;

  float4 sums[part][column_groups] = {};  // rows part * y + i, channels 4 (x + side * j)
  float top[part], total[part];           // the running maximum, and this thread's sum
#pragma unroll
  for (int i = 0; i < part; ++i) top[i] = -INFINITY, total[i] = 0.0f;

  const int end = p.seen(first_query + queries - 1);
  for (int first_key = 0; first_key < end; first_key += tokens) {
    const int keys = min(tokens, p.keys - first_key);
    float s[part][part] = {};  // queries part * y + i, keys x + side * j
    for (int channel = 0; channel < p.head_dim; channel += channels) {
      const int count = p.head_dim - channel;
      __syncthreads();
      stage_rows<tokens, channels>(shared.q, p.q.at(b, first_query, h) + channel, p.q.token, queries, count);
      stage_rows<tokens, channels>(shared.k, p.k.at(b, first_key, h) + channel, p.k.token, keys, count);
      __syncthreads();
#pragma unroll 1
      for (int c = 0; c < channels / 4; ++c) {
        float4 query[part];
#pragma unroll
        for (int i = 0; i < part; ++i) query[i] = load<float4>(&shared.q[part * y + i][c]);
#pragma unroll
        for (int j = 0; j < part; ++j) {
          const float4 key = load<float4>(&shared.k[x + side * j][c]);
#pragma unroll
          for (int i = 0; i < part; ++i) add_product(s[i][j], query[i], key);
        }
      }
    }

#pragma unroll
    for (int i = 0; i < part; ++i) {
      const int query = first_query + part * y + i;
      const int seen = query < p.queries ? p.seen(query) : 0;
      float most = top[i];
      [[maybe_unused]] bool hidden[part];
#pragma unroll
      for (int j = 0; j < part; ++j) {
        const int key = first_key + x + side * j;
        const bool sees = key < seen;
        const float added = sees && p.bias.data != nullptr ? p.bias.at(b, query, h)[key] : 0.0f;
        hidden[j] = !sees || (Guarded && added == -INFINITY);
        s[i][j] = hidden[j] ? -INFINITY : fmaf(s[i][j], p.scale, added);
        most = fmaxf(most, s[i][j]);
      }
#pragma unroll
      for (int apart = side / 2; apart > 0; apart /= 2)
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, apart));
      const float shift = softmax_shift(most), rescale = expf(top[i] - shift);
      top[i] = most;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < part; ++j) {
        const float weight = expf(s[i][j] - shift);
        sum += weight;
        store(reinterpret_cast<float*>(shared.weights[part * y + i]) + x + side * j,
              Guarded && hidden[j] ? -1.0f : weight);
      }
      total[i] = fmaf(total[i], rescale, sum);
#pragma unroll
      for (int j = 0; j < column_groups; ++j) {
        float4& row = sums[i][j];
        row = {row.x * rescale, row.y * rescale, row.z * rescale, row.w * rescale};
      }
    }

#pragma unroll 1
    for (int key = 0; key < keys; key += chunk_keys) {
      __syncthreads();
      stage_rows<chunk_keys, Width>(shared.v, p.v.at(b, first_key + key, h) + first_value, p.v.token,
                                    keys - key, values);
      __syncthreads();
#pragma unroll 1
      for (int four = 0; four < chunk_keys; four += 4) {
        float weights[part][4];
#pragma unroll
        for (int i = 0; i < part; ++i) {
          const auto w = load<float4>(&shared.weights[part * y + i][(key + four) / 4]);
          weights[i][0] = w.x, weights[i][1] = w.y, weights[i][2] = w.z, weights[i][3] = w.w;
        }
#pragma unroll
        for (int j = 0; j < column_groups; ++j) {
          if (4 * side * j >= values) continue;
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            const float4 value = load<float4>(&shared.v[four + n][x + side * j]);
#pragma unroll
            for (int i = 0; i < part; ++i) add_scaled<Guarded>(sums[i][j], weights[i][n], value);
          }
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < part; ++i) {
    float sum = total[i];
#pragma unroll
    for (int apart = side / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
    const int query = first_query + part * y + i;
    if (query >= p.queries) continue;
    if (p.lse.data != nullptr && x == 0 && blockIdx.y == 0)
      *p.lse.at(b, query, h) = sum == 0.0f ? -INFINITY : top[i] + logf(sum);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    T* const out = p.out.at(b, query, h) + first_value;
#pragma unroll
    for (int j = 0; j < column_groups; ++j) {
      const int column = 4 * (x + side * j);
      const float4& row = sums[i][j];
      const float four[quad] = {row.x * inverse, row.y * inverse, row.z * inverse, row.w * inverse};
      if (p.quads) {
        if (column < values) store_channels<quad>(out + column, four);
        continue;
      }
#pragma unroll
      for (int n = 0; n < quad; ++n)
        if (column + n < values) out[column + n] = from_float<T>(four[n]);
    }
  }
}

// Grid: (tiles of queries * batch * heads, blocks of value channels).
template <class T, int Width>
static __global__ void __launch_bounds__(softmax_plain_threads, Width <= 128 ? 2 : 1)
    softmax_plain_kernel(SoftmaxProblem<T> p) {
  softmax_plain_tile<false, Width>(p);
}

// For values of any size. The grid is the same.
inline constexpr int softmax_plain_guarded_width = 512;
template <class T>
static __global__ void __launch_bounds__(softmax_plain_threads)
    softmax_plain_guarded_kernel(SoftmaxProblem<T> p) {
  softmax_plain_tile<true, softmax_plain_guarded_width>(p);
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

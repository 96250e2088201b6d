// TTT in float, for heads of any size, any storage type and any strides: what ttt_mma.cuh does not take.
//
// A block walks over the tokens of one split of one head, 32 or 16 at a time. All that such a tile becomes (keys,
// features, derivatives, errors) lies in shared memory, rows by token; matrices are read from a copy in float,
// padded with zeros to whole blocks of 32 channels, which the caches hold. A product is cut into blocks of 16 x 32
// results, each of one warp, 4 x 4 of them a lane: 8 loads of 16 bytes a lane feed 64 multiply-adds. Gradients are
// summed over the tokens of a tile in registers, and over the tiles in the block's part of the partial sums, by the
// same lane each time.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/detail/cuda.cuh>
#include <linattn/detail/ptx.cuh>
#include <linattn/detail/token_stats.cuh>
#include <linattn/detail/ttt_mma.cuh>
#include <linattn/ops/ttt.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

inline constexpr int ttt_plain_warps = 4;
inline constexpr int ttt_plain_threads = ttt_plain_warps * warp_size;
inline constexpr int ttt_plain_rows = 16, ttt_plain_columns = 32;  // of a block of results

// How one head's matrices and tiles lie.
struct TttPlainShape {
  int head_dim;
  int padded;  // rows and columns of a matrix
  int stride;  // of a tile's rows: 4 mod 32, so that four rows are read without a bank conflict
  int tokens;  // of a tile

  // `tiles`: how many a block needs. They are in shared memory where 99 KB, what every GPU has, hold them.
  [[nodiscard]] static constexpr TttPlainShape of(Index head_dim, int tiles) {
    const int padded = static_cast<int>(ceil_div(head_dim, ttt_plain_columns)) * ttt_plain_columns;
    TttPlainShape s{static_cast<int>(head_dim), padded, padded + 4, 2 * ttt_plain_rows};
    if (s.bytes(tiles) > most_shared) s.tokens = ttt_plain_rows;
    return s;
  }
  [[nodiscard]] LINATTN_HD constexpr int tile() const { return tokens * stride; }
  [[nodiscard]] LINATTN_HD constexpr int matrix() const { return padded * padded; }
  [[nodiscard]] constexpr std::size_t bytes(int tiles) const {
    return static_cast<std::size_t>(tiles) * static_cast<std::size_t>(tile()) * sizeof(float);
  }
  [[nodiscard]] constexpr bool is_shared(int tiles) const { return bytes(tiles) <= most_shared; }

  static constexpr std::size_t most_shared = 99 * 1024;
};

// Tiles of an update: keys, the features that each chained matrix reads, the derivatives of the function wherever it
// is applied, errors. Tiles of an answer: what a matrix reads, and what it gives.
template <class Model>
inline constexpr int ttt_plain_derivatives = Model::has_activation
                                                 ? Model::projections + std::max(Model::chained - 1, 0)
                                                 : 0;
template <class Model>
inline constexpr int ttt_plain_update_tiles = 2 + Model::chained + ttt_plain_derivatives<Model>;
inline constexpr int ttt_plain_apply_tiles = 2;

// Tokens of a block, from the shapes alone: some 1024 blocks, but not less than 256 tokens each, which outweigh its
// partial sums. A query of the workspace may come with empty shapes.
[[nodiscard]] constexpr Index ttt_plain_split_tokens(Index groups, Index tokens) {
  constexpr Index tile = 2 * ttt_plain_rows;
  const Index most = std::min(1024 / std::max<Index>(groups, 1), tokens / 256);
  return std::max<Index>(ceil_div(ceil_div(tokens, std::max<Index>(most, 1)), tile), 1) * tile;
}

// ---- a copy of the matrices ----

template <class S>
struct TttPackParameters {
  Rows<const S> matrices[3];  // (batch, row, head)
  float* to;                  // [batch * heads, slot, padded, padded]
  Index heads;
  int head_dim, padded;
  int slots;       // the matrices, and behind them the transposes
  int count;       // of the matrices
  int transposed;  // the first one of which there is a transpose
};

template <class S>
static __global__ void __launch_bounds__(ttt_plain_threads) ttt_pack_kernel(TttPackParameters<S> p) {
  const Index block = blockIdx.x, group = block / p.slots;
  const int slot = static_cast<int>(block % p.slots);
  const bool transpose = slot >= p.count;
  const Rows<const S> matrix = p.matrices[transpose ? p.transposed + slot - p.count : slot];
  const S* const from = matrix.at(group / p.heads, 0, group % p.heads);
  float* const to = p.to + block * p.padded * p.padded;
  for (int row = static_cast<int>(threadIdx.x) / warp_size; row < p.padded; row += ttt_plain_warps)
    for (int column = static_cast<int>(threadIdx.x) % warp_size; column < p.padded; column += warp_size) {
      const bool inside = row < p.head_dim && column < p.head_dim;
      const Index at = transpose ? column * matrix.token + row : row * matrix.token + column;
      to[row * p.padded + column] = inside ? to_float(from[at]) : 0.0f;
    }
}

// ---- products ----

[[nodiscard]] __device__ __forceinline__ int ttt_plain_lane_row() {
  return static_cast<int>(threadIdx.x) % warp_size / 8;
}
[[nodiscard]] __device__ __forceinline__ int ttt_plain_lane_column() {
  return static_cast<int>(threadIdx.x) % 8 * 4;
}

__device__ __forceinline__ void load_four(float (&to)[4], const float* from) {
  const float4 four = load<float4>(from);
  to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}
__device__ __forceinline__ void store_four(float* to, const float (&from)[4]) {
  store(to, float4{from[0], from[1], from[2], from[3]});
}

// f(row, column) for each block of a rows x columns result that is this warp's.
template <class F>
__device__ __forceinline__ void for_each_block(int rows, int columns, const F& f) {
  const int across = columns / ttt_plain_columns, count = rows / ttt_plain_rows * across;
  for (int i = static_cast<int>(threadIdx.x) / warp_size; i < count; i += ttt_plain_warps)
    f(i / across * ttt_plain_rows, i % across * ttt_plain_columns);
}

// A lane's part of a block: rows lane / 8 + 4 i, columns 4 (lane % 8) + j.
struct TttPlainBlock {
  float v[4][4] = {};

  // Where row i of the part lies in a tile.
  [[nodiscard]] __device__ static __forceinline__ int place(const TttPlainShape& s, int row, int column,
                                                            int i) {
    return (row + ttt_plain_lane_row() + 4 * i) * s.stride + column + ttt_plain_lane_column();
  }
  // The block at (row, column) of tile * matrix.
  __device__ __forceinline__ void multiply(const TttPlainShape& s, const float* tile, const float* matrix,
                                           int row, int column) {
    const float* const a = tile + (row + ttt_plain_lane_row()) * s.stride;
    const float* b = matrix + column + ttt_plain_lane_column();
    for (int k = 0; k < s.head_dim; k += 4) {
      float x[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) load_four(x[i], a + 4 * i * s.stride + k);
#pragma unroll
      for (int l = 0; l < 4; ++l, b += s.padded) {
        float y[4];
        load_four(y, b);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) v[i][j] += x[i][l] * y[j];
      }
    }
  }
};

// gradient += a^T e over the first `count` tokens of two tiles; `first`: there is no sum yet.
__device__ __forceinline__ void add_gradient(const TttPlainShape& s, const float* a, const float* e,
                                             int count, bool first, float* gradient) {
  const int rows = (s.head_dim + ttt_plain_rows - 1) / ttt_plain_rows * ttt_plain_rows;
  for_each_block(rows, s.padded, [&](int row, int column) {
    const int from = row + 4 * ttt_plain_lane_row(), to = column + ttt_plain_lane_column();
    float sum[4][4] = {};
    for (int t = 0; t < count; ++t) {
      float x[4], y[4];
      load_four(x, a + t * s.stride + from);
      load_four(y, e + t * s.stride + to);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += x[i] * y[j];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float* const g = gradient + (from + i) * s.padded + to;
      if (!first) {
        float old[4];
        load_four(old, g);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += old[j];
      }
      store_four(g, sum[i]);
    }
  });
}

// ---- tokens ----

// One channel of one head's tokens, as the model sees them.
template <class T, class W>
struct TttPlainChannel {
  const TttTokens<T, W>& tokens;
  const T* x;
  float shift = 0.0f, delta = 0.0f, scale = 1.0f;
  float taps[9] = {}, bias = 0.0f;

  __device__ TttPlainChannel(const TttTokens<T, W>& all, Index b, Index h, int c)
      : tokens(all), x(all.x.at(b, 0, h) + c) {
    const Index channel = h * all.head_dim + c, entry = b * all.heads * all.head_dim + channel;
    if (all.shift != nullptr) shift = all.shift[entry], delta = all.delta[entry], scale = all.scale[entry];
    if (all.taps == nullptr) return;
#pragma unroll
    for (int tap = 0; tap < 9; ++tap)
      taps[tap] = to_float(all.taps[channel * all.tap_channel + tap / 3 * all.tap_row + tap % 3]);
    if (all.bias != nullptr) bias = to_float(all.bias[channel]);
  }

  [[nodiscard]] __device__ __forceinline__ float normalized(int token) const {
    return multiply_rounded((to_float(x[token * tokens.x.token]) - shift) - delta, scale);
  }
  [[nodiscard]] __device__ __forceinline__ float operator()(int token) const {
    const float middle = normalized(token);
    if (tokens.taps == nullptr || token < tokens.grid_begin || token >= tokens.grid_end) return middle;
    // As the unfused op: the bias, then the taps row by row, then the residual.
    const int width = tokens.grid_width, column = (token - tokens.grid_begin) % width;
    float sum = bias;
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
      const int right = tap % 3 - 1, other = token + (tap / 3 - 1) * width + right;
      const bool inside = column + right >= 0 && column + right < width && other >= tokens.grid_begin &&
                          other < tokens.grid_end;
      sum = fmaf(taps[tap], inside ? normalized(other) : 0.0f, sum);
    }
    return middle + sum;
  }
};

// f(tile element, row, channel) for all elements of a tile: a warp has rows, a lane channels.
template <class F>
__device__ __forceinline__ void for_each_channel(const TttPlainShape& s, const F& f) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size,
            warp = static_cast<int>(threadIdx.x) / warp_size;
  const int rows = s.tokens / ttt_plain_warps;
  for (int c = lane; c < s.padded; c += warp_size) f(c, warp * rows, (warp + 1) * rows);
}

// The tokens [first, first + count) through the prologue; zeros beyond them and beyond the head.
template <class T, class W>
__device__ __forceinline__ void load_tile(const TttPlainShape& s, const TttTokens<T, W>& tokens, Index b,
                                          Index h, int first, int count, float* tile) {
  for_each_channel(s, [&](int c, int begin, int end) {
    const bool inside = c < s.head_dim;
    const TttPlainChannel<T, W> channel(tokens, b, h, inside ? c : 0);
    for (int t = begin; t < end; ++t)
      tile[t * s.stride + c] = inside && t < count ? channel(first + t) : 0.0f;
  });
}

// ---- the update ----

template <class T, class W>
struct TttPlainUpdateParameters {
  TttPlainShape shape;
  TttTokens<T, W> keys;
  Rows<const T> values;
  const float*
      weights;      // [head, slot, padded, padded]: the matrices, then the transposes of the chained ones
  float* partials;  // [split, batch * heads, matrix, padded, padded]
  float* tiles;     // of all blocks; null: in shared memory
  Index groups;     // batch * heads
  int split_tokens;
};

struct TttPlainShared {
  float4 tiles[1];  // of as many as the launch says
};
[[nodiscard]] __device__ __forceinline__ float* ttt_plain_tiles(float* global, Index elements) {
  return global == nullptr ? reinterpret_cast<float*>(dynamic_shared<TttPlainShared>().tiles)
                           : global + blockIdx.x * elements;
}

template <class Model, class Loss, class T, class W>
static __global__ void __launch_bounds__(ttt_plain_threads, 4)
    ttt_plain_update_kernel(TttPlainUpdateParameters<T, W> p) {
  constexpr int projections = Model::projections, chained = Model::chained;
  constexpr bool only_gates = Model::has_activation && chained == 0;  // the function makes the outputs
  const TttPlainShape s = p.shape;
  const Index split = blockIdx.x / p.groups, group = blockIdx.x % p.groups;
  const Index b = group / p.keys.heads, h = group % p.keys.heads;
  const int begin = static_cast<int>(split) * p.split_tokens,
            end = min(begin + p.split_tokens, p.keys.tokens);

  float* const x = ttt_plain_tiles(p.tiles, Index{ttt_plain_update_tiles<Model>} * s.tile());
  float* const errors = x + s.tile();
  const auto features = [&](int i) { return errors + (1 + i) * s.tile(); };  // what chained matrix i reads
  const auto derivative = [&](int i, int z) {                                // of what makes them
    return features(chained) + (i == 0 ? z : projections + i - 1) * s.tile();
  };
  const auto input = [&](int i) { return i == 0 ? x : features(i - 1); };
  const float* const weights = p.weights + h * (matrices<Model> + chained) * s.matrix();
  const auto transposed = [&](int i) { return weights + (matrices<Model> + i) * s.matrix(); };
  float* const gradients = p.partials + blockIdx.x * (Index{matrices<Model>} * s.matrix());
  const T* const values = p.values.at(b, 0, h);

  for (int first = begin; first < end; first += s.tokens) {
    const int count = min(s.tokens, end - first);
    load_tile(s, p.keys, b, h, first, count, x);
    for_each_channel(s, [&](int c, int from, int to) {
      for (int t = from; t < to; ++t) {
        const bool inside = c < s.head_dim && t < count;
        const float v = inside ? to_float(values[(first + t) * p.values.token + c]) : 0.0f;
        errors[t * s.stride + c] = Loss::needs_prediction || only_gates ? v : Loss::error(v, 0.0f);
      }
    });
    __syncthreads();

    // Forward.
    if constexpr (Model::has_activation) {
#pragma unroll
      for (int i = 0; i < (only_gates ? 1 : chained); ++i) {
        const bool gated = projections == 2 && i == 0;
        for_each_block(s.tokens, s.padded, [&](int row, int column) {
          TttPlainBlock z1, z2;
          z1.multiply(s, input(i), weights + (i == 0 ? 0 : projections + i - 1) * s.matrix(), row, column);
          if (gated) z2.multiply(s, x, weights + s.matrix(), row, column);
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int place = TttPlainBlock::place(s, row, column, r);
            float value[4], d1[4], d2[4], target[4];
            if constexpr (only_gates) load_four(target, errors + place);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const Activation<float> f = Model::differentiate(z1.v[r][j], gated ? z2.v[r][j] : z1.v[r][j]);
              float e = 1.0f;
              if constexpr (only_gates) e = Loss::error(target[j], f.value);
              value[j] = f.value, d1[j] = f.d1 * e, d2[j] = f.d2 * e;
            }
            if constexpr (!only_gates) store_four(features(i) + place, value);
            store_four(derivative(i, 0) + place, d1);
            if (gated) store_four(derivative(0, 1) + place, d2);
          }
        });
        __syncthreads();
      }
    }
    if constexpr (Loss::needs_prediction && !only_gates) {
      for_each_block(s.tokens, s.padded, [&](int row, int column) {
        TttPlainBlock y;
        y.multiply(s, input(chained), weights + (matrices<Model> - 1) * s.matrix(), row, column);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          float* const at = errors + TttPlainBlock::place(s, row, column, r);
          float e[4];
          load_four(e, at);
#pragma unroll
          for (int j = 0; j < 4; ++j) e[j] = Loss::error(e[j], y.v[r][j]);
          store_four(at, e);
        }
      });
      __syncthreads();
    }

    // Backward, chained matrices first. The errors in front of a matrix take the place of the derivatives there.
    const bool is_first = first == begin;
    const float* e = errors;
#pragma unroll
    for (int i = chained - 1; i >= 0; --i) {
      add_gradient(s, features(i), e, count, is_first, gradients + (projections + i) * s.matrix());
      for_each_block(s.tokens, s.padded, [&](int row, int column) {
        TttPlainBlock back;
        back.multiply(s, e, transposed(i), row, column);
#pragma unroll
        for (int z = 0; z < (i == 0 ? projections : 1); ++z)
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            float* const at = derivative(i, z) + TttPlainBlock::place(s, row, column, r);
            float d[4];
            load_four(d, at);
#pragma unroll
            for (int j = 0; j < 4; ++j) d[j] *= back.v[r][j];
            store_four(at, d);
          }
      });
      __syncthreads();
      e = derivative(i, 0);
    }
#pragma unroll
    for (int z = 0; z < projections; ++z)
      add_gradient(s, x, Model::has_activation ? derivative(0, z) : errors, count, is_first,
                   gradients + z * s.matrix());
    __syncthreads();
  }
}

// ---- the answers ----

template <class T, class W>
struct TttPlainApplyParameters {
  TttPlainShape shape;
  TttTokens<T, W> queries;
  Rows<T> out;
  const float* weights;  // [batch * heads, matrix, padded, padded]
  float* tiles;          // of all blocks; null: in shared memory
  Index groups;          // batch * heads
  int split_tokens;
};

template <class Model, class T, class W>
static __global__ void __launch_bounds__(ttt_plain_threads, 4)
    ttt_plain_apply_kernel(TttPlainApplyParameters<T, W> p) {
  constexpr int projections = Model::projections, chained = Model::chained;
  constexpr bool only_gates = Model::has_activation && chained == 0;
  const TttPlainShape s = p.shape;
  const Index split = blockIdx.x / p.groups, group = blockIdx.x % p.groups;
  const Index b = group / p.queries.heads, h = group % p.queries.heads;
  const int begin = static_cast<int>(split) * p.split_tokens,
            end = min(begin + p.split_tokens, p.queries.tokens);

  float* const tiles = ttt_plain_tiles(p.tiles, Index{ttt_plain_apply_tiles} * s.tile());
  const auto tile = [&](int i) { return tiles + i % 2 * s.tile(); };
  const float* const weights = p.weights + group * (Index{matrices<Model>} * s.matrix());
  T* const out = p.out.at(b, 0, h);

  for (int first = begin; first < end; first += s.tokens) {
    const int count = min(s.tokens, end - first);
    load_tile(s, p.queries, b, h, first, count, tile(0));
    __syncthreads();

    constexpr int layers = only_gates ? 1 : chained + 1;
#pragma unroll
    for (int i = 0; i < layers; ++i) {
      const bool gated = projections == 2 && i == 0, applies = only_gates || i < chained;
      for_each_block(s.tokens, s.padded, [&](int row, int column) {
        TttPlainBlock z1, z2;
        z1.multiply(s, tile(i), weights + (i == 0 ? 0 : projections + i - 1) * s.matrix(), row, column);
        if (gated) z2.multiply(s, tile(i), weights + s.matrix(), row, column);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          if constexpr (Model::has_activation) {
#pragma unroll
            for (int j = 0; j < 4; ++j)
              if (applies) z1.v[r][j] = Model::activate(z1.v[r][j], gated ? z2.v[r][j] : z1.v[r][j]);
          }
          store_four(tile(i + 1) + TttPlainBlock::place(s, row, column, r), z1.v[r]);
        }
      });
      __syncthreads();
    }

    for_each_channel(s, [&](int c, int from, int to) {
      for (int t = from; t < min(to, count); ++t)
        if (c < s.head_dim)
          out[(first + t) * p.out.token + c] = from_float<T>(tile(layers)[t * s.stride + c]);
    });
    __syncthreads();
  }
}

// ---- launches ----

// The scratch of one side of a call.
struct TttPlainScratch {
  float* weights = nullptr;  // the copies of the matrices
  float* tiles = nullptr;    // of all blocks, if they are too large for shared memory

  [[nodiscard]] static TttPlainScratch take(Carver& carver, const TttPlainShape& shape, Index copies,
                                            int tiles, Index blocks) {
    TttPlainScratch s;
    s.weights = carver.take<float>(copies * shape.matrix());
    if (!shape.is_shared(tiles)) s.tiles = carver.take<float>(blocks * tiles * shape.tile());
    return s;
  }
};

// The tokens [batch * heads of x, split] as blocks.
template <class T>
[[nodiscard]] Index ttt_plain_splits(const TensorView<T, 4>& x) {
  return ceil_div(x.extent(1), ttt_plain_split_tokens(x.extent(0) * x.extent(2), x.extent(1)));
}

template <class Model>
[[nodiscard]] constexpr TttPlainShape ttt_plain_update_shape(Index head_dim) {
  return TttPlainShape::of(head_dim, ttt_plain_update_tiles<Model>);
}
[[nodiscard]] constexpr TttPlainShape ttt_plain_apply_shape(Index head_dim) {
  return TttPlainShape::of(head_dim, ttt_plain_apply_tiles);
}

template <class Model, class T>
[[nodiscard]] TttPlainScratch take_ttt_plain_update(Carver& carver, const TensorView<T, 4>& k) {
  return TttPlainScratch::take(
      carver, ttt_plain_update_shape<Model>(k.extent(3)), k.extent(2) * (matrices<Model> + Model::chained),
      ttt_plain_update_tiles<Model>, ttt_plain_splits(k) * k.extent(0) * k.extent(2));
}
template <class Model, class T>
[[nodiscard]] TttPlainScratch take_ttt_plain_apply(Carver& carver, const TensorView<T, 4>& q) {
  return TttPlainScratch::take(carver, ttt_plain_apply_shape(q.extent(3)),
                               q.extent(0) * q.extent(2) * matrices<Model>, ttt_plain_apply_tiles,
                               ttt_plain_splits(q) * q.extent(0) * q.extent(2));
}

// The partial gradients as in ttt_mma.cuh, but [split, batch * heads, matrix, padded, padded]; what lies beyond the
// head is not written or zero.
template <class Model, class Loss, class T, class W>
[[nodiscard]] Status ttt_plain_update(const Cuda& ctx, const TensorView<const T, 4>& k,
                                      const TensorView<const T, 4>& v, const TttWeights<W>& weights,
                                      const TokenStats<float>* stats, const TttPlainScratch& scratch,
                                      float* partials, const TttOptions<W>& options) {
  const TttPlainShape shape = ttt_plain_update_shape<Model>(k.extent(3));
  constexpr int tiles = ttt_plain_update_tiles<Model>, slots = matrices<Model> + Model::chained;
  TttPackParameters<W> pack{{},           scratch.weights, k.extent(2),     shape.head_dim,
                            shape.padded, slots,           matrices<Model>, Model::projections};
  for (int i = 0; i < matrices<Model>; ++i)
    pack.matrices[i] = {weights[i].data, 0, weights[i].stride(1), weights[i].stride(0)};
  const Status packed =
      launch(ctx, "ttt_pack", ttt_pack_kernel<W>, Grid{k.extent(2) * slots}, ttt_plain_threads, 0, pack);
  if (!packed.ok()) return packed;

  const TttPrologue<W>& prologue = options.prologue;
  const Index groups = k.extent(0) * k.extent(2);
  TttPlainUpdateParameters<T, W> p{
      .shape = shape,
      .keys = ttt_tokens<T, W>(k, prologue.k_conv, prologue.k_conv_bias, prologue.grid),
      .values = rows(v),
      .weights = scratch.weights,
      .partials = partials,
      .tiles = scratch.tiles,
      .groups = groups,
      .split_tokens = static_cast<int>(ttt_plain_split_tokens(groups, k.extent(1)))};
  if (stats != nullptr) {
    p.keys.shift = stats->shift;
    p.keys.delta = stats->delta;
    p.keys.scale = stats->scale;
  }
  return launch(ctx, "ttt_plain_update", ttt_plain_update_kernel<Model, Loss, T, W>,
                Grid{ttt_plain_splits(k) * groups}, ttt_plain_threads,
                shape.is_shared(tiles) ? shape.bytes(tiles) : 0, p);
}

// out = f(q; fast_weights)
template <class Model, class T, class W>
[[nodiscard]] Status ttt_plain_apply(const Cuda& ctx, const TensorView<const T, 4>& q,
                                     const FastWeights<const float>& fast_weights,
                                     const TensorView<T, 4>& out, const TttPlainScratch& scratch,
                                     const TttOptions<W>& options) {
  const TttPlainShape shape = ttt_plain_apply_shape(q.extent(3));
  const Index groups = q.extent(0) * q.extent(2);
  constexpr int count = matrices<Model>;
  TttPackParameters<float> pack{{},           scratch.weights, q.extent(2), shape.head_dim,
                                shape.padded, count,           count,       0};
  for (int i = 0; i < count; ++i)
    pack.matrices[i] = {fast_weights[i].data, fast_weights[i].stride(0), fast_weights[i].stride(2),
                        fast_weights[i].stride(1)};
  const Status packed =
      launch(ctx, "ttt_pack", ttt_pack_kernel<float>, Grid{groups * count}, ttt_plain_threads, 0, pack);
  if (!packed.ok()) return packed;

  const TttPrologue<W>& prologue = options.prologue;
  const TttPlainApplyParameters<T, W> p{
      .shape = shape,
      .queries = ttt_tokens<T, W>(q, prologue.q_conv, prologue.q_conv_bias, prologue.grid),
      .out = rows(out),
      .weights = scratch.weights,
      .tiles = scratch.tiles,
      .groups = groups,
      .split_tokens = static_cast<int>(ttt_plain_split_tokens(groups, q.extent(1)))};
  return launch(ctx, "ttt_plain_apply", ttt_plain_apply_kernel<Model, T, W>,
                Grid{ttt_plain_splits(q) * groups}, ttt_plain_threads,
                shape.is_shared(ttt_plain_apply_tiles) ? shape.bytes(ttt_plain_apply_tiles) : 0, p);
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

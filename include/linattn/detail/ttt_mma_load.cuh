// What the tensor-core kernels of TTT share: tiles in shared memory and their fragments, and the way of one head's
// keys or queries into such tiles, through the prologue.
//
// A block walks over a range of tokens, 64 at a time. Raw tokens arrive by cp.async in a ring of rows, which a
// block with a conv keeps as long as the tokens around it need them: a width of the grid and one token before and
// behind the 64. Each token of a range is thus read from global memory once, and a halo of 2 (width + 1) tokens a
// range. From the ring the tokens are normalised and convolved in float, and rounded to T once, as operands.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include <linattn/core/dtype.hpp>
#include <linattn/detail/cuda.cuh>
#include <linattn/detail/ptx.cuh>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail {

inline constexpr int ttt_mma_tile = 64;  // tokens that pass through the products together

// ---- tiles and fragments ----

// Height x Width elements of 16 bits in shared memory. The chunks of 16 bytes of a row are permuted, so that 8
// neighbouring rows of one column of chunks lie in different banks: ldmatrix reads them in one wavefront, by rows
// and transposed, and a row or a column of fragments is written in one.
template <int Height, int Width>
struct MmaTile {
  static_assert(Width == 32 || Width == 64);
  static constexpr int row_chunks = Width / 8;
  uint4 chunks[Height * row_chunks];

  [[nodiscard]] __device__ static int place(int row, int chunk) {
    const int permutation = Width == 64 ? row % 8 : row / 2 % 4;
    return row * row_chunks + (chunk ^ permutation);
  }
  [[nodiscard]] __device__ uint4* chunk(int row, int column) { return &chunks[place(row, column)]; }
  [[nodiscard]] __device__ const uint4* chunk(int row, int column) const {
    return &chunks[place(row, column)];
  }
  // The two elements 2 pair, 2 pair + 1 of a row.
  [[nodiscard]] __device__ std::uint32_t* word(int row, int pair) {
    return reinterpret_cast<std::uint32_t*>(chunk(row, pair / 4)) + pair % 4;
  }
};

// A 16 x 16 block of A, or two 16 x 8 blocks of B side by side: what one ldmatrix_x4 gives.
struct MmaOperand {
  std::uint32_t r[4];
};
// 16 x 16 sums: two accumulators side by side.
struct MmaSums {
  float d[2][4] = {};
};

[[nodiscard]] __device__ __forceinline__ int mma_lane() { return static_cast<int>(threadIdx.x) % warp_size; }
[[nodiscard]] __device__ __forceinline__ int mma_warp() { return static_cast<int>(threadIdx.x) / warp_size; }

// The row of this lane in the 16 x 16 block at (row, chunk): the four 8 x 8 matrices down first, or right first.
template <bool DownFirst, int Height, int Width>
[[nodiscard]] __device__ __forceinline__ const uint4* block_row(const MmaTile<Height, Width>& tile, int row,
                                                                int chunk) {
  const int lane = mma_lane(), minor = lane / 8 % 2, major = lane / 16;
  return tile.chunk(row + 8 * (DownFirst ? minor : major) + lane % 8, chunk + (DownFirst ? major : minor));
}
// A from a tile [m][k], or from its transpose [k][m]; B from a tile [n][k], or from its transpose [k][n].
template <int Height, int Width>
__device__ __forceinline__ void load_a(MmaOperand& a, const MmaTile<Height, Width>& tile, int m,
                                       int k_chunk) {
  ldmatrix_x4(a.r, block_row<true>(tile, m, k_chunk));
}
template <int Height, int Width>
__device__ __forceinline__ void load_a_transposed(MmaOperand& a, const MmaTile<Height, Width>& tile, int k,
                                                  int m_chunk) {
  ldmatrix_x4_trans(a.r, block_row<false>(tile, k, m_chunk));
}
template <int Height, int Width>
__device__ __forceinline__ void load_b(MmaOperand& b, const MmaTile<Height, Width>& tile, int n,
                                       int k_chunk) {
  ldmatrix_x4(b.r, block_row<false>(tile, n, k_chunk));
}
template <int Height, int Width>
__device__ __forceinline__ void load_b_transposed(MmaOperand& b, const MmaTile<Height, Width>& tile, int k,
                                                  int n_chunk) {
  ldmatrix_x4_trans(b.r, block_row<true>(tile, k, n_chunk));
}

// sums += A B
template <class T>
__device__ __forceinline__ void multiply_add(float (&left)[4], float (&right)[4], const MmaOperand& a,
                                             const MmaOperand& b) {
  mma_m16n8k16<T>(left, a.r, b.r[0], b.r[1]);
  mma_m16n8k16<T>(right, a.r, b.r[2], b.r[3]);
}
template <class T>
__device__ __forceinline__ void multiply_add(MmaSums& sums, const MmaOperand& a, const MmaOperand& b) {
  multiply_add<T>(sums.d[0], sums.d[1], a, b);
}

// Sums rounded to T, as A: accumulators and operands have the same places. And back.
template <class T>
[[nodiscard]] __device__ __forceinline__ MmaOperand to_operand(const float (&left)[4],
                                                               const float (&right)[4]) {
  return {{pack<T>(left[0], left[1]), pack<T>(left[2], left[3]), pack<T>(right[0], right[1]),
           pack<T>(right[2], right[3])}};
}
template <class T>
[[nodiscard]] __device__ __forceinline__ MmaOperand to_operand(const MmaSums& sums) {
  return to_operand<T>(sums.d[0], sums.d[1]);
}
template <class T>
[[nodiscard]] __device__ __forceinline__ MmaSums to_sums(const MmaOperand& a) {
  MmaSums sums;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = unpack<T>(a.r[i]);
    sums.d[i / 2][i % 2 * 2] = x.x;
    sums.d[i / 2][i % 2 * 2 + 1] = x.y;
  }
  return sums;
}
// The 16 x 16 block at (row, pair) of a tile.
template <int Height, int Width>
__device__ __forceinline__ void store_operand(MmaTile<Height, Width>& tile, int row, int pair,
                                              const MmaOperand& a) {
  const int lane = mma_lane();
#pragma unroll
  for (int i = 0; i < 4; ++i)
    store(tile.word(row + lane / 4 + i % 2 * 8, pair + lane % 4 + i / 2 * 4), a.r[i]);
}

// One [d, d] matrix to a tile, rounded to T, zeros beyond d.
template <class T, int Threads, class W, int Width>
__device__ __forceinline__ void stage_matrix(MmaTile<Width, Width>& tile, const W* from, Index row_stride,
                                             int d) {
#pragma unroll 8
  for (int i = 0; i < Width * Width / Threads; ++i) {
    const int at = i * Threads + static_cast<int>(threadIdx.x), row = at / Width, column = at % Width;
    const bool inside = row < d && column < d;
    const T value = from_float<T>(inside ? to_float(from[row * row_stride + column]) : 0.0f);
    store(reinterpret_cast<std::uint16_t*>(tile.word(row, column / 2)) + column % 2, value.bits);
  }
}

// ---- elements ----

// The number that the models' functions are given: e^x and 1 / x by the special function unit, 3 ulp.
struct Approximate {
  float value;

  friend __device__ Approximate operator+(Approximate a, Approximate b) { return {a.value + b.value}; }
  friend __device__ Approximate operator-(Approximate a, Approximate b) { return {a.value - b.value}; }
  friend __device__ Approximate operator*(Approximate a, Approximate b) { return {a.value * b.value}; }
  friend __device__ Approximate operator-(Approximate a) { return {-a.value}; }
  friend __device__ Approximate sigmoid(Approximate z) {
    constexpr float log2_e = 1.44269504f;
    return {reciprocal_approx(1.0f + exp2_approx(-log2_e * z.value))};
  }
};

// ---- tokens ----

// k or q of all heads, and what the prologue does to them.
template <class T, class W>
struct TttTokens {
  Rows<const T> x;
  int tokens, heads, head_dim;
  const float* shift = nullptr;  // [batch, heads * head_dim], as delta and scale; null: no norm
  const float* delta = nullptr;
  const float* scale = nullptr;
  const W* taps = nullptr;  // [heads * head_dim, 3, 3]; null: no conv
  Index tap_channel = 0, tap_row = 0;
  const W* bias = nullptr;  // [heads * head_dim]; null: none
  int grid_begin = 0, grid_end = 0, grid_width = 0;
  int halo = 0;  // tokens before and behind a tile that the ring holds; 0: none are needed, or too many
  int ring = ttt_mma_tile;  // tokens that the ring holds
};

// The prologue of one head, a channel a column; zero beyond the head.
template <int Width>
struct TttChannels {
  float mean[Width], scale[Width], bias[Width], taps[9][Width];
};

// The tokens [first, end) of one head on their way into tiles. All threads of the block call the members.
template <class T, class W, int Width, int Threads>
class TttLoader {
 public:
  // `ring` has tokens.ring rows of Width elements. Asks for the first tile and what surrounds it.
  __device__ TttLoader(const TttTokens<T, W>& tokens, Index b, Index h, int first, int end,
                       TttChannels<Width>& channels, uint4* ring)
      : tokens_(tokens),
        x_(tokens.x.at(b, 0, h)),
        channels_(channels),
        ring_(ring),
        end_(end),
        oldest_(first - tokens.halo) {
    // Around the range only tokens of the grid are of use, and only to tokens of the grid.
    const auto inside = [&tokens](int t) { return t > tokens.grid_begin && t < tokens.grid_end; };
    wanted_first_ = inside(first) ? max(first - tokens.halo, tokens.grid_begin) : first;
    wanted_end_ = inside(end) ? min(end + tokens.halo, tokens.grid_end) : end;
    fill(oldest_, ttt_mma_tile + 2 * tokens.halo);
    load_channels(b, h);
  }

  // Asks for what the next tile needs beside what this one had. No thread may still prepare this one.
  __device__ void advance() {
    oldest_ += ttt_mma_tile;
    oldest_row_ = wrap(oldest_row_ + ttt_mma_tile);
    fill(oldest_ + 2 * tokens_.halo, ttt_mma_tile);
  }

  // The tile of tokens from `first` on, as the model sees them; zeros beyond the range. What was asked for must
  // have arrived, for all threads.
  __device__ void prepare(MmaTile<ttt_mma_tile, Width>& tile, int first) const {
    if (tokens_.taps != nullptr && tokens_.halo == 0) {
      prepare<true>(tile, first);
    } else {
      prepare<false>(tile, first);
    }
  }

 private:
  static constexpr int pairs = Width / 2;

  // The three rows of the grid at one column, two channels.
  struct Column {
    float2 above{}, middle{}, below{};
  };

  [[nodiscard]] __device__ int wrap(int row) const { return row < tokens_.ring ? row : row - tokens_.ring; }
  [[nodiscard]] __device__ uint4* row(int token) const {
    return ring_ + wrap(oldest_row_ + (token - oldest_)) * (Width / 8);
  }

  // Asks for `count` tokens from `first` on; what is not wanted becomes zero.
  __device__ void fill(int first, int count) const {
    constexpr int row_chunks = Width / 8;
    const int chunk = static_cast<int>(threadIdx.x) % row_chunks;
    for (int i = static_cast<int>(threadIdx.x) / row_chunks; i < count; i += Threads / row_chunks) {
      const int token = first + i;
      const bool valid = token >= wanted_first_ && token < wanted_end_ && 8 * chunk < tokens_.head_dim;
      cp_async_16(row(token) + chunk, valid ? x_ + token * tokens_.x.token + 8 * chunk : x_, valid);
    }
  }

  __device__ void load_channels(Index b, Index h) const {
    for (int c = static_cast<int>(threadIdx.x); c < Width; c += Threads) {
      const bool inside = c < tokens_.head_dim;
      const Index channel = h * tokens_.head_dim + c, entry = b * tokens_.heads * tokens_.head_dim + channel;
      const bool norm = inside && tokens_.shift != nullptr, conv = inside && tokens_.taps != nullptr;
      // In one number the mean is off by eps(float) |mean|: 2^13 times less than the rounding of the tokens
      // themselves to T.
      channels_.mean[c] = norm ? tokens_.shift[entry] + tokens_.delta[entry] : 0.0f;
      channels_.scale[c] = norm ? tokens_.scale[entry] : inside ? 1.0f : 0.0f;
      channels_.bias[c] = conv && tokens_.bias != nullptr ? to_float(tokens_.bias[channel]) : 0.0f;
      for (int tap = 0; tap < 9; ++tap) {
        const Index at = channel * tokens_.tap_channel + tap / 3 * tokens_.tap_row + tap % 3;
        channels_.taps[tap][c] = conv ? to_float(tokens_.taps[at]) : 0.0f;
      }
    }
  }

  // Two channels of a token, normalised.
  template <bool FromGlobal>
  [[nodiscard]] __device__ __forceinline__ float2 normalized(int token, int pair, float2 mean,
                                                             float2 scale) const {
    float2 x{};
    if constexpr (FromGlobal) {
      if (2 * pair < tokens_.head_dim)
        x = unpack<T>(load<std::uint32_t>(x_ + token * tokens_.x.token + 2 * pair));
    } else {
      x = unpack<T>(load<std::uint32_t>(reinterpret_cast<const std::uint32_t*>(row(token)) + pair));
    }
    return {(x.x - mean.x) * scale.x, (x.y - mean.y) * scale.y};
  }

  // A thread takes two channels of a run of tokens, and along a row of the grid slides a window over them.
  // FromGlobal: the ring does not reach to the rows above and below.
  template <bool FromGlobal>
  __device__ __forceinline__ void prepare(MmaTile<ttt_mma_tile, Width>& tile, int first) const {
    constexpr int run = ttt_mma_tile * pairs / Threads;
    const int pair = static_cast<int>(threadIdx.x) % pairs,
              begin = static_cast<int>(threadIdx.x) / pairs * run;
    const float2 mean = load<float2>(channels_.mean + 2 * pair),
                 scale = load<float2>(channels_.scale + 2 * pair);
    const float2 bias = load<float2>(channels_.bias + 2 * pair);
    float2 taps[9];
#pragma unroll
    for (int i = 0; i < 9; ++i) taps[i] = load<float2>(channels_.taps[i] + 2 * pair);

    const int width = tokens_.grid_width;
    const auto column = [&](int token) {
      Column c;
      c.middle = normalized<FromGlobal>(token, pair, mean, scale);
      if (token - width >= tokens_.grid_begin)
        c.above = normalized<FromGlobal>(token - width, pair, mean, scale);
      if (token + width < tokens_.grid_end)
        c.below = normalized<FromGlobal>(token + width, pair, mean, scale);
      return c;
    };
    Column left, middle, right;
    int x = 0;
    bool sliding = false;  // left and middle are those of the token
#pragma unroll 2
    for (int i = begin; i < begin + run; ++i) {
      const int token = first + i;
      float2 y{};
      if (token >= end_) {
        // Zeros: no products come of them.
      } else if (token < tokens_.grid_begin || token >= tokens_.grid_end) {
        y = normalized<false>(token, pair, mean, scale);
        sliding = false;
      } else {
        if (!sliding) {
          x = (token - tokens_.grid_begin) % width;
          left = x > 0 ? column(token - 1) : Column{};
          middle = column(token);
        }
        right = x + 1 < width ? column(token + 1) : Column{};
        y = convolve(left, middle, right, taps, bias);
        left = middle;
        middle = right;
        sliding = ++x < width;
      }
      store(tile.word(i, pair), pack<T>(y.x, y.y));
    }
  }

  // As the unfused op: the bias, then the taps row by row, then the residual.
  [[nodiscard]] __device__ static __forceinline__ float2 convolve(const Column& left, const Column& middle,
                                                                  const Column& right,
                                                                  const float2 (&taps)[9], float2 bias) {
    const float2 inputs[9] = {left.above,   middle.above, right.above,  left.middle, middle.middle,
                              right.middle, left.below,   middle.below, right.below};
    float2 sum = bias;
#pragma unroll
    for (int i = 0; i < 9; ++i) {
      sum.x = fmaf(taps[i].x, inputs[i].x, sum.x);
      sum.y = fmaf(taps[i].y, inputs[i].y, sum.y);
    }
    return {middle.middle.x + sum.x, middle.middle.y + sum.y};
  }

  const TttTokens<T, W>& tokens_;
  const T* x_;  // token 0 of this head
  TttChannels<Width>& channels_;
  uint4* ring_;
  int end_;
  int wanted_first_, wanted_end_;  // tokens that are read
  int oldest_;                     // token in the ring
  int oldest_row_ = 0;             // and its row
};

}  // namespace detail
LINATTN_END

// The way of one head's keys or queries into tiles for the tensor cores, through the prologue.
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
#include <linattn/detail/mma_tiles.cuh>
#include <linattn/detail/ptx.cuh>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

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
  int grid_begin = 0, grid_end = 0, grid_width = 1;
  int halo = 0;  // tokens that the ring has room for before and behind a tile; 0: none, or too many
  int ring = ttt_mma_tile;  // tokens that the ring has room for
};

// The prologue of one head, a channel a column, zero beyond the head: bias + sum taps (x scale + offset), the
// residual being part of the middle tap.
template <int Width>
struct TttChannels {
  float scale[Width], offset[Width], bias[Width], taps[9][Width];
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
        ring_(reinterpret_cast<std::uint32_t*>(ring)),
        end_(end),
        oldest_(first - tokens.halo) {
    // Around the range only tokens of the grid are of use, and only to tokens of the grid.
    const auto inside = [&tokens](int t) { return t > tokens.grid_begin && t < tokens.grid_end; };
    const int reach = tokens.halo == 0 ? 0 : tokens.grid_width + 1;
    wanted_first_ = inside(first) ? max(first - reach, tokens.grid_begin) : first;
    wanted_end_ = inside(end) ? min(end + reach, tokens.grid_end) : end;
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
  // have arrived, for all threads. A thread takes two channels of a run of tokens; a run that lies in one row of the
  // grid, or outside the grid, and in one piece in the ring, is on the fast way.
  __device__ __forceinline__ void prepare(MmaTile<ttt_mma_tile, Width>& tile, int first) const {
    const int pair = static_cast<int>(threadIdx.x) % pairs;
    const int begin = static_cast<int>(threadIdx.x) / pairs * run, token = first + begin;
    const Prologue p(channels_, pair);
    const auto put = [&](int i, float2 y) { store(tile.word(begin + i, pair), pack<T>(y.x, y.y)); };
    const int width = tokens_.grid_width, x = (token - tokens_.grid_begin) % width;

    if (token + run <= end_ && is_straight(token) &&
        (token + run <= tokens_.grid_begin || token >= tokens_.grid_end)) {
      const std::uint32_t* const from = row(token) + pair;
#pragma unroll
      for (int i = 0; i < run; ++i) put(i, p.normalize(load<std::uint32_t>(from + i * pairs)));
    } else if (tokens_.halo > 0 && token >= tokens_.grid_begin &&
               token + run <= min(end_, tokens_.grid_end) && x + run <= width && is_straight(token - width) &&
               is_straight(token) && is_straight(token + width)) {
      const bool has_above = token - width >= tokens_.grid_begin,
                 has_below = token + width < tokens_.grid_end;
      const std::uint32_t* const above = row(token - width) + pair;
      const std::uint32_t* const middle = row(token) + pair;
      const std::uint32_t* const below = row(token + width) + pair;
      const auto inner_column = [&](int i) {
        Column c;
        if (has_above) c.above = p.normalize(load<std::uint32_t>(above + i * pairs));
        c.middle = p.normalize(load<std::uint32_t>(middle + i * pairs));
        if (has_below) c.below = p.normalize(load<std::uint32_t>(below + i * pairs));
        return c;
      };
      // A column joins the sums of the tokens before, at and behind it.
      float2 before = p.bias, here = p.bias;
      if (x > 0) p.template add<0>(here, column(token - 1, pair, p));
#pragma unroll
      for (int i = 0; i < run; ++i) {
        const Column c = inner_column(i);
        p.template add<2>(before, c);
        if (i > 0) put(i - 1, before);
        before = here;
        p.template add<1>(before, c);
        here = p.bias;
        p.template add<0>(here, c);
      }
      if (x + run < width) p.template add<2>(before, column(token + run, pair, p));
      put(run - 1, before);
    } else {
#pragma unroll 1
      for (int i = 0; i < run; ++i) put(i, token + i < end_ ? prepared(token + i, pair, p) : float2{});
    }
  }

 private:
  static constexpr int pairs = Width / 2, run = ttt_mma_tile * pairs / Threads;

  // Two channels of three rows of the grid, at one column.
  struct Column {
    float2 above{}, middle{}, below{};
  };

  // What becomes of two channels.
  struct Prologue {
    float2 scale, offset, bias, taps[9];

    __device__ __forceinline__ Prologue(const TttChannels<Width>& channels, int pair)
        : scale(load<float2>(channels.scale + 2 * pair)),
          offset(load<float2>(channels.offset + 2 * pair)),
          bias(load<float2>(channels.bias + 2 * pair)) {
#pragma unroll
      for (int i = 0; i < 9; ++i) taps[i] = load<float2>(channels.taps[i] + 2 * pair);
    }
    [[nodiscard]] __device__ __forceinline__ float2 normalize(std::uint32_t word) const {
      const float2 x = unpack<T>(word);
      return {fmaf(x.x, scale.x, offset.x), fmaf(x.y, scale.y, offset.y)};
    }
    // What a column adds to the token of which it is the left (0), its own (1) or the right (2) column.
    template <int At>
    __device__ __forceinline__ void add(float2& sum, const Column& c) const {
      const float2 x[3] = {c.above, c.middle, c.below};
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        sum.x = fmaf(taps[3 * i + At].x, x[i].x, sum.x);
        sum.y = fmaf(taps[3 * i + At].y, x[i].y, sum.y);
      }
    }
  };

  [[nodiscard]] __device__ int wrap(int row) const { return row < tokens_.ring ? row : row - tokens_.ring; }
  [[nodiscard]] __device__ int place(int token) const { return wrap(oldest_row_ + (token - oldest_)); }
  [[nodiscard]] __device__ std::uint32_t* row(int token) const { return ring_ + place(token) * pairs; }
  // Whether a run lies in one piece in the ring.
  [[nodiscard]] __device__ bool is_straight(int token) const { return place(token) + run <= tokens_.ring; }

  // Asks for `count` tokens from `first` on; what is not wanted becomes zero.
  __device__ void fill(int first, int count) const {
    constexpr int row_chunks = Width / 8;
    const int chunk = static_cast<int>(threadIdx.x) % row_chunks;
    for (int i = static_cast<int>(threadIdx.x) / row_chunks; i < count; i += Threads / row_chunks) {
      const int token = first + i;
      const bool valid = token >= wanted_first_ && token < wanted_end_ && 8 * chunk < tokens_.head_dim;
      cp_async_16(row(token) + 4 * chunk, valid ? x_ + token * tokens_.x.token + 8 * chunk : x_, valid);
    }
  }

  __device__ void load_channels(Index b, Index h) const {
    for (int c = static_cast<int>(threadIdx.x); c < Width; c += Threads) {
      const bool inside = c < tokens_.head_dim;
      const Index channel = h * tokens_.head_dim + c, entry = b * tokens_.heads * tokens_.head_dim + channel;
      const bool norm = inside && tokens_.shift != nullptr, conv = inside && tokens_.taps != nullptr;
      const float scale = norm ? tokens_.scale[entry] : inside ? 1.0f : 0.0f;
      channels_.scale[c] = scale;
      // Off by eps(float) |mean| scale: 2^12 times less than what the rounding of the tokens themselves to T costs.
      channels_.offset[c] = norm ? -(tokens_.shift[entry] + tokens_.delta[entry]) * scale : 0.0f;
      channels_.bias[c] = conv && tokens_.bias != nullptr ? to_float(tokens_.bias[channel]) : 0.0f;
      for (int tap = 0; tap < 9; ++tap) {
        const Index at = channel * tokens_.tap_channel + tap / 3 * tokens_.tap_row + tap % 3;
        const float residual = tap == 4 ? 1.0f : 0.0f;
        channels_.taps[tap][c] = conv ? to_float(tokens_.taps[at]) + residual : 0.0f;
      }
    }
  }

  // Two channels of one token, wherever it lies.
  [[nodiscard]] __device__ float2 prepared(int token, int pair, const Prologue& p) const {
    if (token < tokens_.grid_begin || token >= tokens_.grid_end)
      return p.normalize(load<std::uint32_t>(row(token) + pair));
    const int x = (token - tokens_.grid_begin) % tokens_.grid_width;
    float2 sum = p.bias;
    if (x > 0) p.template add<0>(sum, column(token - 1, pair, p));
    p.template add<1>(sum, column(token, pair, p));
    if (x + 1 < tokens_.grid_width) p.template add<2>(sum, column(token + 1, pair, p));
    return sum;
  }
  [[nodiscard]] __device__ Column column(int token, int pair, const Prologue& p) const {
    Column c;
    if (token - tokens_.grid_width >= tokens_.grid_begin)
      c.above = p.normalize(grid_word(token - tokens_.grid_width, pair));
    c.middle = p.normalize(grid_word(token, pair));
    if (token + tokens_.grid_width < tokens_.grid_end)
      c.below = p.normalize(grid_word(token + tokens_.grid_width, pair));
    return c;
  }
  // Of the ring, unless that has no room for the tokens around.
  [[nodiscard]] __device__ std::uint32_t grid_word(int token, int pair) const {
    if (tokens_.halo > 0) return load<std::uint32_t>(row(token) + pair);
    return 2 * pair < tokens_.head_dim ? load<std::uint32_t>(x_ + token * tokens_.x.token + 2 * pair) : 0u;
  }

  const TttTokens<T, W>& tokens_;
  const T* x_;  // token 0 of this head
  TttChannels<Width>& channels_;
  std::uint32_t* ring_;
  int end_;
  int wanted_first_, wanted_end_;  // tokens that are read
  int oldest_;                     // token in the ring
  int oldest_row_ = 0;             // and its row
};

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

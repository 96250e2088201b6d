// What the tensor-core kernels of softmax attention and TTT are made of: tiles in shared memory and their fragments; for
// TTT, the numbers that the models' functions are given.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include <linattn/core/dtype.hpp>
#include <linattn/detail/cuda.cuh>
#include <linattn/detail/ptx.cuh>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

inline constexpr int ttt_mma_tile = 64;  // tokens that pass through the products together

// Height x Width elements of 16 bits in shared memory. The chunks of 16 bytes of a row are permuted, so that 8
// neighbouring rows of one column of chunks lie in different banks: ldmatrix reads them in one wavefront, by rows
// and transposed, and a row or a column of fragments is written in one.
template <int Height, int Width>
struct MmaTile {
  static_assert(Width == 32 || Width == 64 || Width == 128);
  static constexpr int row_chunks = Width / 8;
  uint4 chunks[Height * row_chunks];

  [[nodiscard]] __device__ static int place(int row, int chunk) {
    const int permutation = Width == 32 ? row / 2 % 4 : row % 8;
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

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

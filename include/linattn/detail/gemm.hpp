// The matrix product that all kernels share: one tile of the result in registers.
//
//   tile[r][j] = sum_k a[r * row_stride + k * depth_stride] * panel[k * columns + j]
//
// `a` is read where it lies, an element broadcast at a time. The right-hand side is packed into panels
// [depth][columns], `columns` = two packs wide and padded with zeros, so one tile needs two loads of it a
// step. What becomes of the sums is the caller's: an epilogue receives them in registers.
#pragma once

#include <cstddef>

#include <linattn/core/status.hpp>
#include <linattn/detail/simd.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

// The register tile. Its sums, two packs of the panel and one broadcast fit the registers, and there are
// enough sums to hide the latency of an FMA: 16 of 32 registers with AVX-512, 12 of 16 otherwise.
template <class C>
struct Tile {
#if defined(__AVX512F__)
  static constexpr int rows = 8;
#else
  static constexpr int rows = 6;
#endif
  static constexpr int packs = 2;
  static constexpr int columns = packs * Pack<C>::size;
};

// The smallest multiple of the panel's width that holds `columns`.
template <class C>
[[nodiscard]] constexpr Index padded_columns(Index columns) {
  return (columns + Tile<C>::columns - 1) / Tile<C>::columns * Tile<C>::columns;
}

// Rows x one panel, the sums in registers.
template <std::size_t Rows, class C>
LINATTN_INLINE void multiply_tile(const C* a, Index row_stride, Index depth_stride, const C* panel,
                                  Index depth, Pack<C> (&sums)[Rows][2]) {
  using P = Pack<C>;
  unroll<int{Rows}>([&](auto r) LINATTN_INLINE_LAMBDA { sums[r][0] = sums[r][1] = P::zero(); });
  for (Index k = 0; k < depth; ++k) {
    const P b0 = P::load(panel), b1 = P::load(panel + P::size);
    unroll<int{Rows}>([&](auto r) LINATTN_INLINE_LAMBDA {
      const P x(a[r * row_stride]);
      sums[r][0] = fma(x, b0, sums[r][0]);
      sums[r][1] = fma(x, b1, sums[r][1]);
    });
    a += depth_stride;
    panel += Tile<C>::columns;
  }
}

// As many tiles of `Rows` rows as there are from `row` on; the first row that is left.
template <int Rows, class C, class Epilogue>
LINATTN_INLINE Index multiply_tiles(const C* a, Index row_stride, Index depth_stride, Index row, Index rows,
                                    const C* panel, Index depth, const Epilogue& epilogue) {
  for (; rows - row >= Rows; row += Rows) {
    Pack<C> sums[std::size_t{Rows}][2];
    multiply_tile(a + row * row_stride, row_stride, depth_stride, panel, depth, sums);
    epilogue(row, sums);
  }
  return row;
}

// All of `rows` rows x one panel. epilogue(row, sums) is called once a tile with the index of the tile's
// first row and its sums, Pack<C> (&)[R][2], where R is Tile<C>::rows and then 4, 2, 1 for what is left.
template <class C, class Epilogue>
LINATTN_INLINE void multiply_panel(const C* a, Index row_stride, Index depth_stride, Index rows,
                                   const C* panel, Index depth, const Epilogue& epilogue) {
  Index row = multiply_tiles<Tile<C>::rows>(a, row_stride, depth_stride, 0, rows, panel, depth, epilogue);
  row = multiply_tiles<4>(a, row_stride, depth_stride, row, rows, panel, depth, epilogue);
  row = multiply_tiles<2>(a, row_stride, depth_stride, row, rows, panel, depth, epilogue);
  multiply_tiles<1>(a, row_stride, depth_stride, row, rows, panel, depth, epilogue);
}

// ---- epilogues to memory: c[row * stride + 0 .. columns) ----

template <class C>
struct StoreTile {
  C* c;
  Index stride;
  template <std::size_t Rows>
  LINATTN_INLINE void operator()(Index row, Pack<C> (&sums)[Rows][2]) const {
    unroll<int{Rows}>([&](auto r) LINATTN_INLINE_LAMBDA {
      C* const at = c + (row + r) * stride;
      sums[r][0].store(at);
      sums[r][1].store(at + Pack<C>::size);
    });
  }
};

template <class C>
struct AddTile {
  C* c;
  Index stride;
  template <std::size_t Rows>
  LINATTN_INLINE void operator()(Index row, Pack<C> (&sums)[Rows][2]) const {
    unroll<int{Rows}>([&](auto r) LINATTN_INLINE_LAMBDA {
      C* const at = c + (row + r) * stride;
      (Pack<C>::load(at) + sums[r][0]).store(at);
      (Pack<C>::load(at + Pack<C>::size) + sums[r][1]).store(at + Pack<C>::size);
    });
  }
};

// ---- packing, widening 16-bit storage on the way ----
//
// Both fill one pack's width of a panel: panel[k * Tile<C>::columns + j] for j < Pack<C>::size, of which the
// first `columns` come from memory and the rest are zero. A whole panel is two calls, and a panel that
// interleaves two matrices is one call of each.

// b[k * depth_stride + j]: the columns lie side by side.
template <class C, class S>
LINATTN_INLINE void pack_rows(const S* b, Index depth_stride, Index depth, Index columns, C* panel) {
  using P = Pack<C>;
  if (columns >= P::size) {
    for (Index k = 0; k < depth; ++k) load<C>(b + k * depth_stride).store(panel + k * Tile<C>::columns);
  } else {
    const int count = columns > 0 ? static_cast<int>(columns) : 0;
    for (Index k = 0; k < depth; ++k)
      load_partial<C>(b + k * depth_stride, count).store(panel + k * Tile<C>::columns);
  }
}

// b[j * column_stride + k]: each column lies in a row of memory, as in a weight [out, in].
template <class C, class S>
LINATTN_INLINE void pack_transposed(const S* b, Index column_stride, Index depth, Index columns, C* panel) {
  using P = Pack<C>;
  P block[P::size];
  for (Index k = 0; k < depth; k += P::size) {
    const int count = static_cast<int>(depth - k < P::size ? depth - k : P::size);
    for (int j = 0; j < P::size; ++j) {
      block[j] = j >= columns       ? P::zero()
                 : count == P::size ? load<C>(b + j * column_stride + k)
                                    : load_partial<C>(b + j * column_stride + k, count);
    }
    transpose(block);
    for (int i = 0; i < count; ++i) block[i].store(panel + (k + i) * Tile<C>::columns);
  }
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

// The tiles of TTT on the host: 64 tokens of one head pass through at most five products, each stage a function
// of its own.
//
// A matrix that a product reads by vectors lies in panels of two packs, [panel][row][2 L] with L the lanes of a
// pack. A model with two projections pairs them, (W1 pack | W2 pack), so that one product leaves z1 and z2 of
// the same elements in registers, and the activation happens there; any other matrix has neighbouring packs in a
// panel. Gradients have the layout of their weights, so W' = W - c G is one stream and the queries use the
// result as it lies. Lanes beyond the head's channels hold numbers that no result depends on.
#pragma once

#include <algorithm>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/detail/conv_taps.hpp>
#include <linattn/detail/gemm.hpp>
#include <linattn/detail/lanes.hpp>
#include <linattn/detail/simd.hpp>
#include <linattn/detail/token_stats.hpp>
#include <linattn/ops/depthwise_conv.hpp>
#include <linattn/ops/ttt_inner.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail {

inline constexpr Index ttt_tile = 64;    // tokens that pass through the products together
inline constexpr Index ttt_chunk = 512;  // tokens whose gradients are summed before they join those of others

// Extents of a head's matrices and tiles, all fixed by the head's size and the model's projections.
template <class C>
struct TttShape {
  Index head_dim;
  Index packs;        // that hold one row of channels
  Index width;        // channels rounded up to panels: the row length of a tile
  Index projections;  // matrices that read x
  Index in_panels;    // of the projections
  Index out_panels;   // of the output matrix, if there is one

  template <InnerModel Model>
  [[nodiscard]] static constexpr TttShape of(Index head_dim) {
    TttShape s{};
    s.head_dim = head_dim;
    s.packs = (head_dim + Pack<C>::size - 1) / Pack<C>::size;
    s.width = padded_columns<C>(head_dim);
    s.projections = Model::projections;
    s.in_panels = Model::projections == 2 ? s.packs : s.panels();
    s.out_panels = Model::has_output ? s.panels() : 0;
    return s;
  }
  [[nodiscard]] constexpr Index panels() const { return width / Tile<C>::columns; }
  // Elements of one panel of a matrix, and of all panels of a head.
  [[nodiscard]] constexpr Index panel() const { return head_dim * Tile<C>::columns; }
  [[nodiscard]] constexpr Index in_size() const { return in_panels * panel(); }
  [[nodiscard]] constexpr Index out_size() const { return out_panels * panel(); }
  [[nodiscard]] constexpr Index size() const { return in_size() + out_size(); }
  // Elements of one panel of a tile of tokens, of the tile, and of a tile for each projection.
  [[nodiscard]] constexpr Index tile_panel() const { return ttt_tile * Tile<C>::columns; }
  [[nodiscard]] constexpr Index tile() const { return ttt_tile * width; }
  [[nodiscard]] constexpr Index derivatives() const { return projections * tile(); }
};

// ---- weights in panels ----

// One [d, d] matrix, neighbouring packs of columns in a panel.
template <class C, class W>
void pack_matrix(const TensorView<const W, 2>& w, C* panels) {
  const Index d = w.extent(0), panel = d * Tile<C>::columns;
  for (Index c = 0; c < padded_columns<C>(d); c += Pack<C>::size) {
    C* const to = panels + c / Tile<C>::columns * panel + c % Tile<C>::columns;
    if (c < d) {
      pack_rows<C>(w.pointer(0, c), w.stride(0), d, d - c, to);
    } else {
      for (Index r = 0; r < d; ++r) Pack<C>::zero().store(to + r * Tile<C>::columns);
    }
  }
}

// Its transpose.
template <class C, class W>
void pack_matrix_transposed(const TensorView<const W, 2>& w, C* panels) {
  const Index d = w.extent(0), panel = d * Tile<C>::columns;
  for (Index c = 0; c < padded_columns<C>(d); c += Pack<C>::size) {
    C* const to = panels + c / Tile<C>::columns * panel + c % Tile<C>::columns;
    pack_transposed<C>(w.data + c * w.stride(0), w.stride(0), d, d - c, to);
  }
}

// Two matrices, a pack of each in every panel.
template <class C, class W>
void pack_pair(const TensorView<const W, 2>& w1, const TensorView<const W, 2>& w2, C* panels) {
  const Index d = w1.extent(0), panel = d * Tile<C>::columns;
  for (Index c = 0; c < d; c += Pack<C>::size) {
    C* const to = panels + c / Pack<C>::size * panel;
    pack_rows<C>(w1.pointer(0, c), w1.stride(0), d, d - c, to);
    pack_rows<C>(w2.pointer(0, c), w2.stride(0), d, d - c, to + Pack<C>::size);
  }
}

// The way back: one matrix of the panels, every `step`-th pack from the `first`.
template <class C>
void unpack_matrix(const C* panels, Index first, Index step, const TensorView<C, 2>& w) {
  const Index d = w.extent(0), panel = d * Tile<C>::columns;
  Index pack = first;
  for (Index c = 0; c < d; c += Pack<C>::size, pack += step) {
    const C* const from = panels + pack / Tile<C>::packs * panel + pack % Tile<C>::packs * Pack<C>::size;
    for (Index r = 0; r < d; ++r)
      std::copy_n(from + r * Tile<C>::columns, std::min<Index>(Pack<C>::size, d - c), w.pointer(r, c));
  }
}

// ---- tokens into tiles ----

// Reads the tokens of one head, as the prologue makes them: normalised if there are statistics, convolved on the
// grid if there are taps.
template <class C, class T>
struct TokenReader {
  const T* data = nullptr;
  Index step = 0;
  Index head_dim = 0;
  Index width = 0;  // row length of what is written
  const C* shift = nullptr;
  const C* delta = nullptr;
  const C* scale = nullptr;
  const ConvTaps<C>* taps = nullptr;
  TokenGrid grid{};
  C* stage = nullptr;     // normalised rows of the grid, those that the conv of a chunk reads
  Index stage_first = 0;  // the grid's token in the first of them
  Index stage_end = 0;    // one beyond the last of them

  // Rows that the stage must hold: a chunk, and the row of the grid and one token on either side.
  [[nodiscard]] static constexpr Index stage_rows(const TokenGrid& grid) {
    return std::min(grid.tokens(), ttt_chunk + 2 * (grid.width + 1));
  }

  // Says that the next tiles begin at token `first` and go on from there, at most a chunk.
  void begin_chunk(Index first) {
    stage_first = std::clamp<Index>(first - grid.offset - grid.width - 1, 0, grid.tokens());
    stage_end = stage_first;
  }

  // Tokens [first, first + count) to rows of `width` channels, those beyond the head zero.
  void read(Index first, Index count, C* rows) {
    if (taps == nullptr) return read_rows(first, count, rows);
    const Index begin = std::clamp(grid.offset, first, first + count);
    const Index end = std::clamp(grid.offset + grid.tokens(), begin, first + count);
    if (first < begin) read_rows(first, begin - first, rows);
    if (begin < end) convolve(begin - grid.offset, end - begin, rows + (begin - first) * width);
    if (end < first + count) read_rows(end, first + count - end, rows + (end - first) * width);
  }

 private:
  LINATTN_NOINLINE void read_rows(Index first, Index count, C* rows) const {
    const T* x = data + first * step;
    for (Index r = 0; r < count; ++r, x += step, rows += width) {
      for_each_pack<C>(0, head_dim, [&](Index c, auto lanes) {
        Pack<C> value = lanes.load(x + c);
        if (scale != nullptr)
          value = normalize(value, lanes.load(shift + c), lanes.load(delta + c), lanes.load(scale + c));
        value.store(rows + c);
      });
    }
  }

  LINATTN_NOINLINE void convolve(Index first, Index count, C* rows) {
    const Index needed = std::min(first + count + grid.width + 1, grid.tokens());
    if (stage_end < needed) {
      read_rows(grid.offset + stage_end, needed - stage_end, stage + (stage_end - stage_first) * width);
      stage_end = needed;
    }
    for (Index c = 0; c < head_dim; c += Pack<C>::size) {
      conv_tokens<C>(
          grid, first, count, taps[c / Pack<C>::size], true,
          [&](Index token) { return Pack<C>::load(stage + (token - stage_first) * width + c); },
          [&](Index token, Pack<C> y) { y.store(rows + (token - first) * width + c); });
    }
  }
};

// ---- the products ----

// Values become errors: dl/dy as rows (to multiply with W^T) and in panels (to be multiplied with a^T). Without a
// prediction that is all there is to the loss; with one the rows keep the values until predict_errors.
template <class Loss, class C, class T>
LINATTN_NOINLINE void read_errors(const TttShape<C>& shape, const T* v, Index step, Index tokens, C* rows,
                                  C* panels) {
  for (Index t = 0; t < tokens; ++t, v += step, rows += shape.width) {
    for_each_pack<C>(0, shape.head_dim, [&](Index c, auto lanes) {
      Pack<C> value = lanes.load(v + c);
      if constexpr (!Loss::needs_prediction) {
        value = Loss::error(value, value);
        value.store(panels + (c / Tile<C>::columns * ttt_tile + t) * Tile<C>::columns + c % Tile<C>::columns);
      }
      value.store(rows + c);
    });
  }
}

// A tile back to the tokens.
template <class C, class T>
LINATTN_NOINLINE void write_rows(const TttShape<C>& shape, const C* rows, Index tokens, T* out, Index step) {
  for (Index t = 0; t < tokens; ++t, out += step, rows += shape.width)
    for_each_pack<C>(0, shape.head_dim,
                     [&](Index c, auto lanes) { lanes.store(out + c, Pack<C>::load(rows + c)); });
}

// A tile of tokens (or its transpose) by one panel, then epilogue(row, sum0, sum1) for each row.
template <class C, class Epilogue>
LINATTN_INLINE void multiply_by_panel(const TttShape<C>& shape, const C* tile, Index tokens, const C* panel,
                                      const Epilogue& epilogue) {
  multiply_panel(
      tile, shape.width, Index{1}, tokens, panel, shape.head_dim,
      [&]<int R>(Index row, Pack<C>(&sums)[R][2]) LINATTN_INLINE_LAMBDA {
        unroll<R>([&](auto r) LINATTN_INLINE_LAMBDA { epilogue(row + r, sums[r][0], sums[r][1]); });
      });
}

// z = x W_in, then a = activation(z) to rows and its derivatives, in the layout of W_in, to panels.
template <class Model, class C>
LINATTN_NOINLINE void differentiate(const TttShape<C>& shape, const C* x, Index tokens, const C* w_in,
                                    C* activation, C* derivatives) {
  using P = Pack<C>;
  for (Index p = 0; p < shape.in_panels; ++p) {
    C* const to = derivatives + p * shape.tile_panel();
    C* const values = activation + p * Tile<C>::columns / Model::projections;
    multiply_by_panel(shape, x, tokens, w_in + p * shape.panel(),
                      [&](Index row, P z1, P z2) LINATTN_INLINE_LAMBDA {
                        C* const d = to + row * Tile<C>::columns;
                        C* const a = values + row * shape.width;
                        if constexpr (Model::projections == 2) {
                          const Activation<P> f = Model::differentiate(z1, z2);
                          f.value.store(a);
                          f.d1.store(d);
                          f.d2.store(d + P::size);
                        } else {
                          const Activation<P> f1 = Model::differentiate(z1, z1);
                          const Activation<P> f2 = Model::differentiate(z2, z2);
                          f1.value.store(a);
                          f2.value.store(a + P::size);
                          f1.d1.store(d);
                          f2.d1.store(d + P::size);
                        }
                      });
  }
}

// The same without derivatives.
template <class Model, class C>
LINATTN_NOINLINE void activate(const TttShape<C>& shape, const C* x, Index tokens, const C* w_in,
                               C* activation) {
  using P = Pack<C>;
  for (Index p = 0; p < shape.in_panels; ++p) {
    C* const values = activation + p * Tile<C>::columns / Model::projections;
    multiply_by_panel(shape, x, tokens, w_in + p * shape.panel(),
                      [&](Index row, P z1, P z2) LINATTN_INLINE_LAMBDA {
                        C* const a = values + row * shape.width;
                        if constexpr (Model::projections == 2) {
                          Model::activate(z1, z2).store(a);
                        } else {
                          Model::activate(z1, z1).store(a);
                          Model::activate(z2, z2).store(a + P::size);
                        }
                      });
  }
}

// y = a W, rows by the panels of one matrix.
template <class C>
LINATTN_NOINLINE void multiply_rows(const TttShape<C>& shape, const C* a, Index tokens, const C* w, C* y) {
  using P = Pack<C>;
  for (Index p = 0; p < shape.panels(); ++p)
    multiply_by_panel(shape, a, tokens, w + p * shape.panel(),
                      [&](Index row, P y1, P y2) LINATTN_INLINE_LAMBDA {
                        C* const to = y + row * shape.width + p * Tile<C>::columns;
                        y1.store(to);
                        y2.store(to + P::size);
                      });
}

// y = a W and at once the error of y, whose target the rows hold.
template <class Loss, class C>
LINATTN_NOINLINE void predict_errors(const TttShape<C>& shape, const C* a, Index tokens, const C* w, C* rows,
                                     C* panels) {
  using P = Pack<C>;
  for (Index p = 0; p < shape.panels(); ++p)
    multiply_by_panel(shape, a, tokens, w + p * shape.panel(),
                      [&](Index row, P y1, P y2) LINATTN_INLINE_LAMBDA {
                        C* const target = rows + row * shape.width + p * Tile<C>::columns;
                        C* const to = panels + p * shape.tile_panel() + row * Tile<C>::columns;
                        const P e1 = Loss::error(P::load(target), y1);
                        const P e2 = Loss::error(P::load(target + P::size), y2);
                        e1.store(target);
                        e2.store(target + P::size);
                        e1.store(to);
                        e2.store(to + P::size);
                      });
}

// D = E W_out^T, and at once D times the derivatives, in place: what K^T multiplies.
template <int Projections, class C>
LINATTN_NOINLINE void backpropagate(const TttShape<C>& shape, const C* errors, Index tokens,
                                    const C* w_out_transposed, C* derivatives) {
  using P = Pack<C>;
  const auto multiply = [](C* at, P by) LINATTN_INLINE_LAMBDA { (P::load(at) * by).store(at); };
  for (Index p = 0; p < shape.panels(); ++p) {
    C* const panel = derivatives + p * Projections * shape.tile_panel();
    multiply_by_panel(shape, errors, tokens, w_out_transposed + p * shape.panel(),
                      [&](Index row, P d1, P d2) LINATTN_INLINE_LAMBDA {
                        C* const at = panel + row * Tile<C>::columns;
                        if constexpr (Projections == 2) {
                          C* const next = at + shape.tile_panel();
                          multiply(at, d1);
                          multiply(at + P::size, d1);
                          multiply(next, d2);
                          multiply(next + P::size, d2);
                        } else {
                          multiply(at, d1);
                          multiply(at + P::size, d2);
                        }
                      });
  }
}

// G += X^T P: rows of a tile against panels of a tile.
template <class C>
LINATTN_NOINLINE void accumulate_gradient(const TttShape<C>& shape, const C* x, Index tokens, const C* panels,
                                          Index count, C* gradient) {
  for (Index p = 0; p < count; ++p)
    multiply_panel(x, Index{1}, shape.width, shape.head_dim, panels + p * shape.tile_panel(), tokens,
                   AddTile<C>{gradient + p * shape.panel(), Tile<C>::columns});
}

}  // namespace detail
LINATTN_END

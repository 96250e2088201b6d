// The tiles of TTT on the host: 64 tokens of one head pass through the products, each stage a function
// of its own.
//
// A matrix that a product reads by vectors lies in panels of two packs, [panel][row][2 L] with L the lanes of
// a pack. A model with two projections pairs them, (W1 pack | W2 pack), so that one product leaves z1 and z2
// of the same elements in registers, and the activation happens there; any other matrix has neighbouring
// packs in a panel. Gradients have the layout of their weights, so W' is one pass over both and the queries use
// the result as it lies. Rows are rounded up to whole register tiles and columns to whole panels; what
// lies beyond the tokens of a tile and the channels of a head no result depends on.
#pragma once

#include <algorithm>
#include <cstdint>

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
namespace detail::inline LINATTN_TARGET {

inline constexpr Index ttt_tile = 64;    // tokens that pass through the products together
inline constexpr Index ttt_chunk = 512;  // tokens whose gradients are summed before they join those of others

// `rows` rounded up to whole register tiles.
template <class C>
[[nodiscard]] constexpr Index padded_rows(Index rows) {
  return (rows + Tile<C>::rows - 1) / Tile<C>::rows * Tile<C>::rows;
}

// Extents of a head's matrices and tiles, all fixed by the head's size and the model.
template <class C>
struct TttShape {
  Index head_dim;
  Index packs;        // that hold one row of channels
  Index width;        // channels rounded up to panels: the row length of a tile
  Index projections;  // matrices that read x
  Index in_panels;    // of the projections
  Index chained;      // matrices behind them
  Index functions;    // how often the model's function is applied
  bool errors_apart;  // whether dl/df is a tile of its own: the function is not the last thing the model does

  template <InnerModel Model>
  [[nodiscard]] static constexpr TttShape of(Index head_dim) {
    TttShape s{};
    s.head_dim = head_dim;
    s.packs = (head_dim + Pack<C>::size - 1) / Pack<C>::size;
    s.width = padded_columns<C>(head_dim);
    s.projections = Model::projections;
    s.in_panels = Model::projections == 2 ? s.packs : s.panels();
    s.chained = Model::chained;
    s.functions = Model::has_activation ? std::max(Model::chained, 1) : 0;
    s.errors_apart = Model::chained > 0 || !Model::has_activation;
    return s;
  }
  [[nodiscard]] constexpr Index panels() const { return width / Tile<C>::columns; }
  // Elements of one panel of a matrix, of the projections, of some chained matrices, and of a head.
  [[nodiscard]] constexpr Index panel() const { return padded_rows<C>(head_dim) * Tile<C>::columns; }
  [[nodiscard]] constexpr Index in_size() const { return in_panels * panel(); }
  [[nodiscard]] constexpr Index chained_size(Index matrices) const { return matrices * panels() * panel(); }
  [[nodiscard]] constexpr Index size() const { return in_size() + chained_size(chained); }
  // Where a chained matrix lies: behind the projections, in order.
  [[nodiscard]] constexpr Index chained_at(Index i) const { return in_size() + chained_size(i); }
  // Elements of one panel of a tile of tokens, of the tile, of what the chained matrices read, of the
  // derivatives of the function wherever it is applied, and of the errors.
  [[nodiscard]] constexpr Index tile_panel() const { return padded_rows<C>(ttt_tile) * Tile<C>::columns; }
  [[nodiscard]] constexpr Index tile() const { return padded_rows<C>(ttt_tile) * width; }
  [[nodiscard]] constexpr Index activations() const { return chained * tile(); }
  [[nodiscard]] constexpr Index derivatives() const { return functions * projections * tile(); }
  [[nodiscard]] constexpr Index errors() const { return errors_apart ? tile() : 0; }
  // Register tiles of the products that a tile of tokens passes through: of keys, whose gradients are
  // products as well, and of queries.
  [[nodiscard]] constexpr Index key_products() const {
    const Index forward = chained > 1 ? (chained - 1) * panels() : 0;
    return (in_panels + chained * panels()) *
               ((padded_rows<C>(ttt_tile) + padded_rows<C>(head_dim)) / Tile<C>::rows) +
           forward * padded_rows<C>(ttt_tile) / Tile<C>::rows;
  }
  [[nodiscard]] constexpr Index query_products() const {
    return (in_panels + chained * panels()) * (padded_rows<C>(ttt_tile) / Tile<C>::rows);
  }
};

// ---- weights in panels ----

// One [d, d] matrix, neighbouring packs of columns in a panel.
template <class C, class W>
void pack_matrix(const TttShape<C>& shape, const TensorView<const W, 2>& w, C* panels) {
  const Index d = shape.head_dim;
  for (Index c = 0; c < shape.width; c += Pack<C>::size) {
    C* const to = panels + c / Tile<C>::columns * shape.panel() + c % Tile<C>::columns;
    if (c < d) {
      pack_rows<C>(w.pointer(0, c), w.step(0), d, d - c, to);
    } else {
      for (Index r = 0; r < d; ++r) Pack<C>::zero().store(to + r * Tile<C>::columns);
    }
  }
}

// Its transpose.
template <class C, class W>
void pack_matrix_transposed(const TttShape<C>& shape, const TensorView<const W, 2>& w, C* panels) {
  const Index d = shape.head_dim;
  for (Index c = 0; c < shape.width; c += Pack<C>::size) {
    C* const to = panels + c / Tile<C>::columns * shape.panel() + c % Tile<C>::columns;
    pack_transposed<C>(w.pointer(c), w.step(0), d, d - c, to);
  }
}

// Two matrices, a pack of each in every panel.
template <class C, class W>
void pack_pair(const TttShape<C>& shape, const TensorView<const W, 2>& w1, const TensorView<const W, 2>& w2,
               C* panels) {
  const Index d = shape.head_dim;
  for (Index c = 0; c < d; c += Pack<C>::size) {
    C* const to = panels + c / Pack<C>::size * shape.panel();
    pack_rows<C>(w1.pointer(0, c), w1.step(0), d, d - c, to);
    pack_rows<C>(w2.pointer(0, c), w2.step(0), d, d - c, to + Pack<C>::size);
  }
}

// The way back: one matrix of the panels, every `step`-th pack from the `first`.
template <class C>
void unpack_matrix(const TttShape<C>& shape, const C* panels, Index first, Index step,
                   const TensorView<C, 2>& w) {
  const Index d = shape.head_dim;
  Index pack = first;
  for (Index c = 0; c < d; c += Pack<C>::size, pack += step) {
    const C* const from =
        panels + pack / Tile<C>::packs * shape.panel() + pack % Tile<C>::packs * Pack<C>::size;
    for (Index r = 0; r < d; ++r)
      std::copy_n(from + r * Tile<C>::columns, std::min<Index>(Pack<C>::size, d - c), w.pointer(r, c));
  }
}

// ---- tokens into tiles ----

// Asks for the rows of tokens that the next tiles read or write, evenly spread over the register tiles of the
// products, so that memory works while they multiply. Rows of one head lie far apart: no hardware follows
// them, and each may cost a walk through the page tables, which the products hide only if they come one at a
// time.
class Ahead {
 public:
  // The rows of the tile that begins at `token` of `tokens`, in `calls` calls of advance().
  template <class T>
  [[nodiscard]] static Ahead rows(const T* data, Index step, Index token, Index tokens, Index channels,
                                  Index calls) {
    Ahead ahead;
    if (token >= tokens) return ahead;
    ahead.at_ = reinterpret_cast<const char*>(data + token * step);
    ahead.step_ = step * Index{sizeof(T)};
    ahead.bytes_ = channels * Index{sizeof(T)};
    ahead.rows_ = ahead.left_ = std::min(ttt_tile, tokens - token);
    ahead.calls_ = calls;
    return ahead;
  }

  template <bool Write>
  LINATTN_INLINE void advance() {
#if defined(__GNUC__)
    for (due_ += rows_; due_ >= calls_ && left_ > 0; due_ -= calls_, --left_, at_ += step_)
      for (const char* line = at_ - (reinterpret_cast<std::uintptr_t>(at_) & 63); line < at_ + bytes_;
           line += 64)
        __builtin_prefetch(line, Write ? 1 : 0, 2);
#endif
  }

 private:
  const char* at_ = nullptr;
  Index step_ = 0, bytes_ = 0;
  Index rows_ = 0, left_ = 0;  // of the tile, and of those yet to be asked for
  Index calls_ = 1, due_ = 0;  // rows_ / calls_ rows a call, counted in parts of a row
};

// What is read next, from two places, and what is written.
struct Prefetch {
  Ahead first, second, written;

  LINATTN_INLINE void advance() {
    first.template advance<false>();
    second.template advance<false>();
    written.template advance<true>();
  }
};

// Reads the tokens of one head, as the prologue makes them: normalised if there are statistics, convolved on
// the grid if there are taps. For the conv the grid's tokens, normalised and with a border of zeros around
// the grid, go through a stage that moves along with the tiles, so each is read and normalised once a chunk.
template <class C, class T>
struct TokenReader {
  const T* data = nullptr;
  Index step = 0;
  Index tokens = 0;
  Index head_dim = 0;
  Index width = 0;  // row length of what is written
  const C* shift = nullptr;
  const C* delta = nullptr;
  const C* scale = nullptr;
  const ConvTaps<C>* taps = nullptr;
  TokenGrid grid{};
  C* stage = nullptr;
  // Places in the grid with its border, [height + 2][width + 2]: of the stage's first row, and one beyond its
  // last.
  Index stage_first = 0;
  Index stage_end = 0;

  // Rows that the stage must hold: a chunk with its borders, and a row and a token of the grid on either
  // side.
  [[nodiscard]] static constexpr Index stage_rows(const TokenGrid& grid) {
    const Index row = grid.width + 2;
    const Index crossed = (ttt_chunk - 1 + grid.width - 1) / std::max<Index>(grid.width, 1);
    return std::min((grid.height + 2) * row, ttt_chunk + 2 * crossed + 2 * row + 2);
  }

  // Says that the next tiles begin at token `first` and go on from there, at most a chunk.
  void begin_chunk(Index first) {
    stage_first = place(std::clamp<Index>(first - grid.offset, 0, grid.tokens())) - (grid.width + 2) - 1;
    stage_end = stage_first;
  }

  // The rows of memory that the tile at `token` will read first, to be asked for in `calls` calls.
  [[nodiscard]] Ahead ahead(Index token, Index calls) const {
    const Index next = taps == nullptr ? token : token + grid.width + 1;
    return Ahead::rows(data, step, next, tokens, head_dim, calls);
  }

  // Tokens [first, first + count) to rows of `width` channels, those beyond the head zero.
  void read(Index first, Index count, C* rows) {
    if (taps == nullptr) return read_rows(first, count, rows);
    const Index begin = std::clamp(grid.offset, first, first + count);
    const Index end = std::clamp(grid.offset + grid.tokens(), begin, first + count);
    if (first < begin) read_rows(first, begin - first, rows);
    if (begin < end) {
      fill_stage(place(end - 1 - grid.offset) + (grid.width + 2) + 2);
      convolve(begin - grid.offset, end - begin, rows + (begin - first) * width);
    }
    if (end < first + count) read_rows(end, first + count - end, rows + (end - first) * width);
  }

 private:
  // Where a token of the grid lies in the grid with its border.
  [[nodiscard]] Index place(Index token) const {
    return grid.width == 0 ? 0 : (token / grid.width + 1) * (grid.width + 2) + token % grid.width + 1;
  }

  LINATTN_NOINLINE void read_rows(Index first, Index count, C* rows) const {
    const T* x = data + first * step;
    for (Index r = 0; r < count; ++r, x += step, rows += width) {
      if (scale == nullptr) {
        for_each_pack<C>(0, head_dim, [&](Index c, auto lanes) { lanes.load(x + c).store(rows + c); });
      } else {
        for_each_pack<C>(0, head_dim, [&](Index c, auto lanes) {
          normalize(lanes.load(x + c), lanes.load(shift + c), lanes.load(delta + c), lanes.load(scale + c))
              .store(rows + c);
        });
      }
    }
  }

  void fill_stage(Index end) {
    const Index row = grid.width + 2;
    while (stage_end < end) {
      const Index y = stage_end / row - 1, x = stage_end % row - 1;
      const bool inside = y >= 0 && y < grid.height && x >= 0 && x < grid.width;
      const Index count = inside ? std::min(end - stage_end, grid.width - x) : 1;
      C* const to = stage + (stage_end - stage_first) * width;
      if (inside) {
        read_rows(grid.offset + y * grid.width + x, count, to);
      } else {
        std::fill_n(to, width, C(0));
      }
      stage_end += count;
    }
  }

  LINATTN_NOINLINE void convolve(Index first, Index count, C* rows) const {
    using P = Pack<C>;
    const Index below = (grid.width + 2) * width;
    for (Index c = 0; c < head_dim; c += P::size) {
      const ConvTaps<C>& from = taps[c / P::size];
      const P bias = from.bias;
      P weight[9];
      unroll<9>([&](auto i) LINATTN_INLINE_LAMBDA { weight[i] = from.weight[i]; });
      C* to = rows + c;
      for (Index token = first; token < first + count;) {
        const C* x = stage + (place(token) - stage_first) * width + c;
        const Index row_end = std::min((token / grid.width + 1) * grid.width, first + count);
        for (; token < row_end; ++token, x += width, to += width)
          conv_output<C>(
              bias, [&](int tap) LINATTN_INLINE_LAMBDA { return weight[tap]; },
              [&](int i, int j)
                  LINATTN_INLINE_LAMBDA { return P::load(x + (i - 1) * below + (j - 1) * width); },
              true)
              .store(to);
      }
    }
  }
};

// ---- the products ----

// The values of a tile, as they are, to rows.
template <class C, class T>
LINATTN_NOINLINE void read_values(const TttShape<C>& shape, const T* v, Index step, Index tokens, C* rows) {
  for (Index t = 0; t < tokens; ++t, v += step, rows += shape.width)
    for_each_pack<C>(0, shape.head_dim, [&](Index c, auto lanes) { lanes.load(v + c).store(rows + c); });
}

// The values of a tile, made errors, by a loss that needs no prediction: dl/df(K) as rows (to multiply with
// W^T) and in panels (to be multiplied with A^T).
template <class Loss, class C, class T>
LINATTN_NOINLINE void read_errors(const TttShape<C>& shape, const T* v, Index step, Index tokens, C* rows,
                                  C* panels) {
  for (Index t = 0; t < tokens; ++t, v += step, rows += shape.width) {
    for_each_pack<C>(0, shape.head_dim, [&](Index c, auto lanes) {
      const Pack<C> value = lanes.load(v + c);
      const Pack<C> error = Loss::error(value, value);
      error.store(panels + c / Tile<C>::columns * shape.tile_panel() + t * Tile<C>::columns +
                  c % Tile<C>::columns);
      error.store(rows + c);
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

// Rows by one panel in whole register tiles, then epilogue(row, sum0, sum1) for each row: one instance of the
// product a stage, and its sums stay in registers.
template <class C, class Epilogue>
LINATTN_INLINE void multiply_rows_by_panel(const C* a, Index row_stride, Index depth_stride, Index rows,
                                           const C* panel, Index depth, Prefetch& prefetch,
                                           const Epilogue& epilogue) {
  constexpr int R = Tile<C>::rows;
  multiply_tiles<R>(
      a, row_stride, depth_stride, 0, padded_rows<C>(rows), panel, depth,
      [&](Index row, auto& sums) LINATTN_INLINE_LAMBDA {
        unroll<R>([&](auto r) LINATTN_INLINE_LAMBDA { epilogue(row + r, sums[r][0], sums[r][1]); });
        prefetch.advance();
      });
}

// The tokens of a tile by one panel of a matrix.
template <class C, class Epilogue>
LINATTN_INLINE void multiply_by_panel(const TttShape<C>& shape, const C* tile, Index tokens, const C* panel,
                                      Prefetch& prefetch, const Epilogue& epilogue) {
  multiply_rows_by_panel(tile, shape.width, Index{1}, tokens, panel, shape.head_dim, prefetch, epilogue);
}

// z = x W_in, then the function and its derivatives: use(at, f) receives them while they are in registers,
// with the place of the element in `rows`; the derivatives that it leaves go to panels in the layout of W_in.
template <class Model, class C, class Use>
LINATTN_INLINE void differentiate(const TttShape<C>& shape, const C* x, Index tokens, const C* w_in, C* rows,
                                  C* derivatives, Prefetch& prefetch, const Use& use) {
  using P = Pack<C>;
  for (Index p = 0; p < shape.in_panels; ++p) {
    C* const to = derivatives + p * shape.tile_panel();
    C* const values = rows + p * Tile<C>::columns / Model::projections;
    multiply_by_panel(shape, x, tokens, w_in + p * shape.panel(), prefetch,
                      [&](Index row, P z1, P z2) LINATTN_INLINE_LAMBDA {
                        C* const d = to + row * Tile<C>::columns;
                        C* const a = values + row * shape.width;
                        if constexpr (Model::projections == 2) {
                          Activation<P> f = Model::differentiate(z1, z2);
                          use(a, f);
                          f.d1.store(d);
                          f.d2.store(d + P::size);
                        } else {
                          Activation<P> f1 = Model::differentiate(z1, z1);
                          Activation<P> f2 = Model::differentiate(z2, z2);
                          use(a, f1);
                          use(a + P::size, f2);
                          f1.d1.store(d);
                          f2.d1.store(d + P::size);
                        }
                      });
  }
}

// z = x W_in, then a(z) to rows and its derivatives to panels.
template <class Model, class C>
LINATTN_NOINLINE void activate_and_differentiate(const TttShape<C>& shape, const C* x, Index tokens,
                                                 const C* w_in, C* activation, C* derivatives,
                                                 Prefetch& prefetch) {
  differentiate<Model>(shape, x, tokens, w_in, activation, derivatives, prefetch,
                       [](C* at, const Activation<Pack<C>>& f) LINATTN_INLINE_LAMBDA { f.value.store(at); });
}

// The same where a(z) is the prediction: the derivatives at once times its error; the rows hold the target.
template <class Model, class Loss, class C>
LINATTN_NOINLINE void differentiate_loss(const TttShape<C>& shape, const C* x, Index tokens, const C* w_in,
                                         C* targets, C* derivatives, Prefetch& prefetch) {
  using P = Pack<C>;
  differentiate<Model>(shape, x, tokens, w_in, targets, derivatives, prefetch,
                       [](const C* at, Activation<P>& f) LINATTN_INLINE_LAMBDA {
                         const P error = Loss::error(P::load(at), f.value);
                         f.d1 = f.d1 * error;
                         f.d2 = f.d2 * error;
                       });
}

// z = x W_in, then a(z) to rows.
template <class Model, class C>
LINATTN_NOINLINE void activate(const TttShape<C>& shape, const C* x, Index tokens, const C* w_in,
                               C* activation, Prefetch& prefetch) {
  using P = Pack<C>;
  for (Index p = 0; p < shape.in_panels; ++p) {
    C* const values = activation + p * Tile<C>::columns / Model::projections;
    multiply_by_panel(shape, x, tokens, w_in + p * shape.panel(), prefetch,
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
LINATTN_NOINLINE void multiply_rows(const TttShape<C>& shape, const C* a, Index tokens, const C* w, C* y,
                                    Prefetch& prefetch) {
  using P = Pack<C>;
  for (Index p = 0; p < shape.panels(); ++p)
    multiply_by_panel(shape, a, tokens, w + p * shape.panel(), prefetch,
                      [&](Index row, P y1, P y2) LINATTN_INLINE_LAMBDA {
                        C* const to = y + row * shape.width + p * Tile<C>::columns;
                        y1.store(to);
                        y2.store(to + P::size);
                      });
}

// y = a W and at once the error of y, whose target the rows hold.
template <class Loss, class C>
LINATTN_NOINLINE void predict_errors(const TttShape<C>& shape, const C* a, Index tokens, const C* w, C* rows,
                                     C* panels, Prefetch& prefetch) {
  using P = Pack<C>;
  for (Index p = 0; p < shape.panels(); ++p)
    multiply_by_panel(shape, a, tokens, w + p * shape.panel(), prefetch,
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

// D = E W^T, and at once D times the derivatives, in place: the errors of the matrix before, in panels. As
// rows too if that is a chained matrix, which the errors go through next.
template <int Projections, bool ToRows, class C>
LINATTN_NOINLINE void backpropagate(const TttShape<C>& shape, const C* errors, Index tokens,
                                    const C* w_transposed, C* derivatives, C* rows, Prefetch& prefetch) {
  static_assert(Projections == 1 || !ToRows);
  using P = Pack<C>;
  const auto multiply = [](C* at, P by) LINATTN_INLINE_LAMBDA { (P::load(at) * by).store(at); };
  for (Index p = 0; p < shape.panels(); ++p) {
    C* const panel = derivatives + p * Projections * shape.tile_panel();
    multiply_by_panel(shape, errors, tokens, w_transposed + p * shape.panel(), prefetch,
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
                        if constexpr (ToRows) {
                          C* const to = rows + row * shape.width + p * Tile<C>::columns;
                          P::load(at).store(to);
                          P::load(at + P::size).store(to + P::size);
                        }
                      });
  }
}

// G += X^T P: rows of a tile against panels of a tile.
template <class C>
LINATTN_NOINLINE void accumulate_gradient(const TttShape<C>& shape, const C* x, Index tokens, const C* panels,
                                          Index count, C* gradient, Prefetch& prefetch) {
  using P = Pack<C>;
  for (Index p = 0; p < count; ++p)
    multiply_rows_by_panel(x, Index{1}, shape.width, shape.head_dim, panels + p * shape.tile_panel(), tokens,
                           prefetch, [&](Index row, P g1, P g2) LINATTN_INLINE_LAMBDA {
                             C* const to = gradient + p * shape.panel() + row * Tile<C>::columns;
                             (P::load(to) + g1).store(to);
                             (P::load(to + P::size) + g2).store(to + P::size);
                           });
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

// Neighborhood attention on the host. Contract: neighborhood_attention.hpp.
//
// Queries are the lanes: a tile of the grid, 4 x 4 tokens in a pack of 16, whose windows overlap. The keys that any
// of them sees form a rectangle, 8 x 8 for a window of 5 x 5. All logits of the rectangle are computed, key by key
// as the keys lie, and those that a query does not see become -infinity; the values are then added up for each
// query over its own window alone. Of the work on keys 25 / 64 is of use, of that on values all. A rectangle for
// one query would waste nothing, and pay for it by reducing each logit across lanes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/detail/gemm.hpp>
#include <linattn/detail/lanes.hpp>
#include <linattn/detail/simd.hpp>
#include <linattn/ops/neighborhood_attention.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

// [begin, begin + count)
struct Range {
  Index begin, count;
  [[nodiscard]] constexpr Index end() const { return begin + count; }
};
[[nodiscard]] constexpr Range intersect(Range a, Range b) {
  const Index begin = std::max(a.begin, b.begin);
  return {begin, std::max(Index{0}, std::min(a.end(), b.end()) - begin)};
}

// A row of tiles: the sample, the head, and the first token's place on the grid.
struct TileRow {
  Index b, h, row, column;
};

// How the grid is cut, by shapes alone. A row of tiles spans at most 32 columns of the grid, and a task walks down
// some rows of tiles of one head. Keys and values are copied block by block (contiguous, widened); with a usual
// window one block holds all that a row of tiles needs, and a step down copies the rows that are new.
template <class C>
struct NeighborhoodPlan {
  static constexpr Index lanes = Pack<C>::size;

  Window grid, kernel;
  Index head_dim, value_dim, heads;
  Window tile;   // queries of a pack
  Window reach;  // keys that a tile needs
  Window block;  // keys copied at a time
  Index group;   // tiles in a row
  Index band;    // rows of tiles in a task
  Index groups, bands, tasks;

  NeighborhoodPlan(const TokenGrid& all, Window window, Index batch, Index head_count, Index d, Index dv)
      : grid{all.height, all.width}, kernel(window), head_dim(d), value_dim(dv), heads(head_count) {
    // The tile with the fewest logits.
    double fewest = std::numeric_limits<double>::infinity();
    for (Index height = 1; height <= lanes; height *= 2) {
      const Window shape = {height, lanes / height};
      const Window keys = {key_rows(0, shape.height).count, key_columns(0, shape.width).count};
      const double logits = static_cast<double>(parts(grid.height, shape.height) * keys.height) *
                            static_cast<double>(parts(grid.width, shape.width) * keys.width);
      if (logits >= fewest) continue;
      fewest = logits;
      tile = shape;
      reach = keys;
    }
    const Index rows = parts(grid.height, tile.height), columns = parts(grid.width, tile.width);
    group = parts(columns, parts(columns, std::max(Index{1}, 32 / tile.width)));
    groups = parts(columns, group);
    // 16 tasks where there are as many rows: work for many threads, and few first blocks.
    band = parts(rows, std::min(rows, parts(16, batch * heads * groups)));
    bands = parts(rows, band);
    tasks = batch * heads * groups * bands;
    const Index limit = std::clamp(Index{65536} / (d + dv), Index{64}, Index{512});  // keys of a block
    block.width = std::min(key_columns(0, group * tile.width).count, limit);
    block.height = std::min(reach.height, limit / block.width);
  }

  // The keys that `queries` rows or columns from `first` on see: their windows and what lies between. At a border
  // of the grid they keep their number and move inside, as the windows themselves do.
  [[nodiscard]] constexpr Range key_rows(Index first, Index queries) const {
    return keys(first, queries, kernel.height, grid.height);
  }
  [[nodiscard]] constexpr Range key_columns(Index first, Index queries) const {
    return keys(first, queries, kernel.width, grid.width);
  }
  // Row i of a task. Tasks go from head to head first: neighbouring heads of a token share a page of memory.
  [[nodiscard]] constexpr TileRow tile_row(Index task, Index i) const {
    const Index place = task / heads, b = place / bands / groups;
    return {b, task % heads, (place % bands * band + i) * tile.height,
            place / bands % groups * group * tile.width};
  }
  // Tiles of a row, rows of tiles of a task: the last ones may have fewer.
  [[nodiscard]] constexpr Index tiles(const TileRow& at) const {
    return std::min(group, parts(grid.width - at.column, tile.width));
  }
  [[nodiscard]] constexpr Index tile_rows(Index task) const {
    return std::min(band, parts(grid.height - tile_row(task, 0).row, tile.height));
  }
  // Channels of a copied key and of a copied value.
  [[nodiscard]] constexpr Index key_size() const { return parts(head_dim, lanes) * lanes; }
  [[nodiscard]] constexpr Index value_size() const { return parts(value_dim, lanes) * lanes; }

 private:
  [[nodiscard]] static constexpr Index parts(Index extent, Index size) { return (extent + size - 1) / size; }
  [[nodiscard]] static constexpr Range keys(Index first, Index queries, Index window, Index extent) {
    const Index count = std::min(extent, queries + window - 1);
    return {std::clamp(first - window / 2, Index{0}, extent - count), count};
  }
};

// The scratch memory of all workers. Per tile: q [head_dim][lane], out [lane][value_size], the running maximum
// and sum. Shared by the tiles: a block of keys and values, the logits [key][lane] and how far each column lies
// outside the windows [column][lane].
template <class C>
struct NeighborhoodWork {
  Index q_size, out_size, state_size, k_size, v_size, logits_size, apart_size;
  C *q, *out, *max, *sum, *k, *v, *logits, *apart;

  NeighborhoodWork(Carver& carver, Index workers, const NeighborhoodPlan<C>& plan)
      : q_size(plan.group * plan.lanes * plan.head_dim),
        out_size(plan.group * plan.lanes * plan.value_size()),
        state_size(plan.group * plan.lanes),
        k_size(plan.block.height * plan.block.width * plan.key_size()),
        v_size(plan.block.height * plan.block.width * plan.value_size()),
        logits_size(plan.block.height * std::min(plan.block.width, plan.reach.width) * plan.lanes),
        apart_size(plan.block.width * plan.lanes),
        q(carver.take<C>(workers * q_size)),
        out(carver.take<C>(workers * out_size)),
        max(carver.take<C>(workers * state_size)),
        sum(carver.take<C>(workers * state_size)),
        k(carver.take<C>(workers * k_size)),
        v(carver.take<C>(workers * v_size)),
        logits(carver.take<C>(workers * logits_size)),
        apart(carver.take<C>(workers * apart_size)) {}

  [[nodiscard]] NeighborhoodWork scratch(Index worker) const {
    NeighborhoodWork own = *this;
    own.q += worker * q_size;
    own.out += worker * out_size;
    own.max += worker * state_size;
    own.sum += worker * state_size;
    own.k += worker * k_size;
    own.v += worker * v_size;
    own.logits += worker * logits_size;
    own.apart += worker * apart_size;
    return own;
  }
};

// The tokens of a tile, and where their windows begin. Lanes beyond the grid repeat its last row or column.
template <class C>
struct TileWindows {
  static constexpr Index lanes = Pack<C>::size;
  Index token[std::size_t{lanes}], row[std::size_t{lanes}], column[std::size_t{lanes}];
  Index rows, columns;  // of the tile, inside the grid
  Index tile_width;

  TileWindows(const NeighborhoodPlan<C>& plan, Index first_row, Index first_column)
      : rows(std::min(plan.tile.height, plan.grid.height - first_row)),
        columns(std::min(plan.tile.width, plan.grid.width - first_column)),
        tile_width(plan.tile.width) {
    for (Index lane = 0; lane < lanes; ++lane) {
      const Index y = first_row + std::min(lane / tile_width, rows - 1);
      const Index x = first_column + std::min(lane % tile_width, columns - 1);
      token[lane] = y * plan.grid.width + x;
      row[lane] = window_start(y, plan.kernel.height, plan.grid.height);
      column[lane] = window_start(x, plan.kernel.width, plan.grid.width);
    }
  }
  [[nodiscard]] bool inside(Index lane) const {
    return lane / tile_width < rows && lane % tile_width < columns;
  }
};

// The queries of a tile as lanes, scaled: to[c][lane].
template <class C, class T>
LINATTN_NOINLINE void pack_tile_queries(const T* q, Index token_stride, const Index* tokens, Index head_dim,
                                        C scale, C* to) {
  using P = Pack<C>;
  P block[P::size];
  for (Index c = 0; c < head_dim; c += P::size) {
    const int count = static_cast<int>(std::min(head_dim - c, Index{P::size}));
    for (int lane = 0; lane < P::size; ++lane) {
      const T* const from = q + tokens[lane] * token_stride + c;
      block[lane] = count == P::size ? load<C>(from) : load_partial<C>(from, count);
    }
    transpose(block);
    for (int i = 0; i < count; ++i) (block[i] * P(scale)).store(to + (c + i) * P::size);
  }
}

// Tokens side by side, to [token][padded]; channels beyond are zero.
template <class C, class T>
LINATTN_NOINLINE void copy_padded(const T* from, Index token_stride, Index tokens, Index channels,
                                  Index padded, C* to) {
  for (Index t = 0; t < tokens; ++t, from += token_stride, to += padded)
    for_each_pack<C>(0, channels, [&](Index c, auto lanes) { lanes.load(from + c).store(to + c); });
}

// By how much `position` misses the window of `size` places from each of `starts` on; less than 0.5: not at all.
template <class C>
[[nodiscard]] LINATTN_INLINE Pack<C> apart_from(Index position, const Index* starts, Index size) {
  C apart[Pack<C>::size];
  for (int lane = 0; lane < Pack<C>::size; ++lane)
    apart[lane] = static_cast<C>(std::max(starts[lane] - position, position - starts[lane] - size + 1));
  return Pack<C>::load(apart);
}

// logits[key][lane] = k[key] . q[lane] where the lane sees the key, -infinity elsewhere, for keys side by side in
// one row of the grid; `top` becomes the maximum over them.
template <int Keys, class C>
LINATTN_INLINE void tile_logits(const C* k, Index key_size, Index head_dim, const C* q, Pack<C> row_apart,
                                const C* column_apart, C* logits, Pack<C>& top) {
  using P = Pack<C>;
  P sums[std::size_t{Keys}];
  unroll<Keys>([&](auto key) LINATTN_INLINE_LAMBDA { sums[key] = P::zero(); });
  for (Index c = 0; c < head_dim; ++c) {
    const P x = P::load(q + c * P::size);
    unroll<Keys>([&](auto key)
                     LINATTN_INLINE_LAMBDA { sums[key] = fma(P(k[key * key_size + c]), x, sums[key]); });
  }
  unroll<Keys>([&](auto key) LINATTN_INLINE_LAMBDA {
    const P apart = max(row_apart, P::load(column_apart + key * P::size));
    const P s = select_less(apart, P(C(0.5)), sums[key], P(-std::numeric_limits<C>::infinity()));
    s.store(logits + key * P::size);
    top = max(top, s);
  });
}

// As many groups of `Keys` keys as there are from `key` on; the first key that is left.
template <int Keys, class C>
LINATTN_INLINE Index row_logits(const C* k, Index key_size, Index head_dim, Index key, Index keys, const C* q,
                                Pack<C> row_apart, const C* column_apart, C* logits, Pack<C>& top) {
  for (; keys - key >= Keys; key += Keys)
    tile_logits<Keys>(k + key * key_size, key_size, head_dim, q, row_apart,
                      column_apart + key * Pack<C>::size, logits + key * Pack<C>::size, top);
  return key;
}

// One row of keys.
template <class C>
LINATTN_NOINLINE void window_row_logits(const C* k, Index key_size, Index head_dim, Index keys, const C* q,
                                        Pack<C> row_apart, const C* column_apart, C* logits, C* block_max) {
  Pack<C> top = Pack<C>::load(block_max);
  Index key = row_logits<8>(k, key_size, head_dim, 0, keys, q, row_apart, column_apart, logits, top);
  key = row_logits<4>(k, key_size, head_dim, key, keys, q, row_apart, column_apart, logits, top);
  key = row_logits<2>(k, key_size, head_dim, key, keys, q, row_apart, column_apart, logits, top);
  row_logits<1>(k, key_size, head_dim, key, keys, q, row_apart, column_apart, logits, top);
  top.store(block_max);
}

// Moves the running maximum to that of the block too; logits become exp(logits - maximum), and the running sum
// takes them in. `block_max` leaves with the factor that rescales what was summed before.
template <class C>
LINATTN_NOINLINE void window_exponentials(C* logits, Index keys, C* running_max, C* running_sum,
                                          C* block_max) {
  using P = Pack<C>;
  const P before = P::load(running_max), top = max(P::load(block_max), before);
  P sum = P::zero();
  for (Index key = 0; key < keys; ++key) {
    const P e = exp(P::load(logits + key * P::size) - top);
    e.store(logits + key * P::size);
    sum += e;
  }
  const P rescale = exp(before - top);
  rescale.store(block_max);
  fma(P::load(running_sum), rescale, sum).store(running_sum);
  top.store(running_max);
}

// Keys of the copies that a query sees: `rows` rows of `columns` keys, the first of them in slot `slot` of a ring of
// `ring` rows.
struct SeenKeys {
  Index slot, rows, columns, ring;
};

// out[c] = rescale out[c] + sum over the keys that are seen of e[key] v[key][c], Packs packs of channels. v: the
// first of the columns in row 0 of the ring, e: the first of them in the first row, and the lane.
template <int Packs, class C>
LINATTN_INLINE void window_channels(const C* v, Index value_size, Index row_size, const C* e,
                                    Index e_row_size, const SeenKeys& keys, C rescale, C* out) {
  using P = Pack<C>;
  P sums[std::size_t{Packs}];
  unroll<Packs>([&](auto p) LINATTN_INLINE_LAMBDA { sums[p] = P::load(out + p * P::size) * P(rescale); });
  Index slot = keys.slot;
  for (Index y = 0; y < keys.rows; ++y, e += e_row_size) {
    const C *value = v + slot * row_size, *weight = e;
    for (Index x = 0; x < keys.columns; ++x, value += value_size, weight += P::size) {
      const P w(*weight);
      unroll<Packs>([&](auto p)
                        LINATTN_INLINE_LAMBDA { sums[p] = fma(w, P::load(value + p * P::size), sums[p]); });
    }
    if (++slot == keys.ring) slot = 0;
  }
  unroll<Packs>([&](auto p) LINATTN_INLINE_LAMBDA { sums[p].store(out + p * P::size); });
}

// All channels of one query.
template <class C>
LINATTN_NOINLINE void window_values(const C* v, Index value_size, Index row_size, const C* e,
                                    Index e_row_size, const SeenKeys& keys, C rescale, C* out) {
  Index c = 0;
  const auto take = [&]<int Packs>(std::integral_constant<int, Packs>) LINATTN_INLINE_LAMBDA {
    constexpr Index width = Packs * Pack<C>::size;
    for (; value_size - c >= width; c += width)
      window_channels<Packs>(v + c, value_size, row_size, e, e_row_size, keys, rescale, out + c);
  };
  take(std::integral_constant<int, 4>{});
  take(std::integral_constant<int, 2>{});
  take(std::integral_constant<int, 1>{});
}

// out[i] = from[i] / sum[i] for the tokens of a tile.
template <class C, class T>
LINATTN_NOINLINE void store_tile(const C* from, Index value_size, const C* sum, const TileWindows<C>& windows,
                                 Index channels, T* out, Index token_stride) {
  for (Index lane = 0; lane < windows.lanes; ++lane, from += value_size) {
    if (!windows.inside(lane)) continue;
    const Pack<C> inverse(sum[lane] == C(0) ? C(0) : C(1) / sum[lane]);
    T* const to = out + windows.token[lane] * token_stride;
    for_each_pack<C>(0, channels,
                     [&](Index c, auto lanes) { lanes.store(to + c, Pack<C>::load(from + c) * inverse); });
  }
}

// One call, in the scratch memory of one worker.
template <class T>
struct NeighborhoodWalker {
  using C = Compute<T>;
  static constexpr Index lanes = Pack<C>::size;
  const TensorView<const T, 4>& q;
  const TensorView<const T, 4>& k;
  const TensorView<const T, 4>& v;
  const TensorView<T, 4>& out;
  C scale;
  const NeighborhoodPlan<C>& plan;
  NeighborhoodWork<C> work;

  void run(Index task) const {
    const Index count = plan.tile_rows(task);
    Range copied{0, 0};  // rows of keys that the copies hold for all columns of the row of tiles
    for (Index i = 0; i < count; ++i) {
      const TileRow here = plan.tile_row(task, i);
      const Range rows = plan.key_rows(here.row, plan.tile.height);
      const Range columns = plan.key_columns(here.column, plan.group * plan.tile.width);
      const bool one_block = rows.count == plan.block.height && columns.count == plan.block.width;
      begin(here);
      for (Index y = rows.begin; y < rows.end(); y += plan.block.height)
        for (Index x = columns.begin; x < columns.end(); x += plan.block.width) {
          const Range block_rows = intersect(rows, {y, plan.block.height});
          const Range block_columns = intersect(columns, {x, plan.block.width});
          const Index first_new = one_block ? std::max(copied.end(), rows.begin) : y;
          copy(here, {first_new, block_rows.end() - first_new}, block_columns);
          for (Index t = 0; t < plan.tiles(here); ++t) attend(here, t, block_rows, block_columns);
        }
      copied = rows;
      finish(here);
    }
  }

 private:
  [[nodiscard]] TileWindows<C> windows(const TileRow& at, Index t) const {
    return {plan, at.row, at.column + t * plan.tile.width};
  }

  void begin(const TileRow& at) const {
    const Index count = plan.tiles(at);
    for (Index t = 0; t < count; ++t)
      pack_tile_queries(q.pointer(at.b, 0, at.h), q.step(1), windows(at, t).token, plan.head_dim, scale,
                        work.q + t * lanes * plan.head_dim);
    std::fill_n(work.out, count * lanes * plan.value_size(), C(0));
    std::fill_n(work.max, count * lanes, std::numeric_limits<C>::lowest());
    std::fill_n(work.sum, count * lanes, C(0));
  }

  // A row of the grid goes to the slot row % block.height.
  void copy(const TileRow& at, Range rows, Range columns) const {
    for (Index y = rows.begin; y < rows.end(); ++y) {
      const Index token = y * plan.grid.width + columns.begin, slot = y % plan.block.height * columns.count;
      copy_padded(k.pointer(at.b, token, at.h), k.step(1), columns.count, plan.head_dim, plan.key_size(),
                  work.k + slot * plan.key_size());
      copy_padded(v.pointer(at.b, token, at.h), v.step(1), columns.count, plan.value_dim, plan.value_size(),
                  work.v + slot * plan.value_size());
    }
  }

  // Tile t takes in the keys and values of a block.
  void attend(const TileRow& at, Index t, Range rows, Range columns) const {
    const TileWindows<C> tile = windows(at, t);
    const Index d = plan.head_dim, key_size = plan.key_size(), value_size = plan.value_size();
    const Range own = intersect(columns, plan.key_columns(at.column + t * plan.tile.width, plan.tile.width));
    if (own.count == 0) return;
    for (Index x = 0; x < own.count; ++x)
      apart_from<C>(own.begin + x, tile.column, plan.kernel.width).store(work.apart + x * lanes);
    alignas(64) C rescale[std::size_t{lanes}];
    std::fill_n(rescale, lanes, std::numeric_limits<C>::lowest());
    const Index ring = plan.block.height, first_slot = rows.begin % ring;
    const auto slot = [&](Index y) { return first_slot + y < ring ? first_slot + y : first_slot + y - ring; };
    for (Index y = 0; y < rows.count; ++y) {
      const Index key = slot(y) * columns.count + own.begin - columns.begin;
      window_row_logits(work.k + key * key_size, key_size, d, own.count, work.q + t * lanes * d,
                        apart_from<C>(rows.begin + y, tile.row, plan.kernel.height), work.apart,
                        work.logits + y * own.count * lanes, rescale);
    }
    window_exponentials(work.logits, rows.count * own.count, work.max + t * lanes, work.sum + t * lanes,
                        rescale);
    for (Index lane = 0; lane < lanes; ++lane) {
      const Range seen_rows = intersect(rows, {tile.row[lane], plan.kernel.height});
      const Range seen = intersect(columns, {tile.column[lane], plan.kernel.width});
      if (seen_rows.count == 0 || seen.count == 0) continue;
      const Index first = (seen_rows.begin - rows.begin) * own.count + seen.begin - own.begin;
      window_values(work.v + (seen.begin - columns.begin) * value_size, value_size,
                    columns.count * value_size, work.logits + first * lanes + lane, own.count * lanes,
                    {slot(seen_rows.begin - rows.begin), seen_rows.count, seen.count, ring}, rescale[lane],
                    work.out + (t * lanes + lane) * value_size);
    }
  }

  void finish(const TileRow& at) const {
    for (Index t = 0; t < plan.tiles(at); ++t)
      store_tile(work.out + t * lanes * plan.value_size(), plan.value_size(), work.sum + t * lanes,
                 windows(at, t), plan.value_dim, out.pointer(at.b, 0, at.h), out.step(1));
  }
};

template <class T>
[[nodiscard]] NeighborhoodPlan<Compute<T>> neighborhood_plan(const TensorView<const T, 4>& q,
                                                             const TensorView<const T, 4>& v,
                                                             const NeighborhoodAttentionOptions& options) {
  return {options.grid, options.kernel, q.extent(0), q.extent(2), q.extent(3), v.extent(3)};
}

}  // namespace detail::inline LINATTN_TARGET

inline namespace LINATTN_TARGET {

// Bytes of workspace that the same call of `neighborhood_attention` needs; grows with the workers, the head size
// and, to a limit, the window, not with the tokens. 0 for a call that would be refused.
template <ParallelPolicy P, Storage T>
[[nodiscard]] std::size_t neighborhood_attention_workspace(const Cpu<P>& ctx, const In<T, 4>& q,
                                                           const In<T, 4>& k, const In<T, 4>& v,
                                                           const TensorView<T, 4>& out,
                                                           const NeighborhoodAttentionOptions& options) {
  if (!detail::check_neighborhood_shapes<T>(q, k, v, out, options).ok()) return 0;
  Carver carver({});
  detail::NeighborhoodWork<Compute<T>>(carver, ctx.parallel.workers(),
                                       detail::neighborhood_plan<T>(q, v, options));
  return carver.used();
}

// out = softmax over each token's window of (scale q k^T) times v. See neighborhood_attention.hpp.
template <ParallelPolicy P, Storage T>
[[nodiscard]] Status neighborhood_attention(const Cpu<P>& ctx, const In<T, 4>& q, const In<T, 4>& k,
                                            const In<T, 4>& v, const TensorView<T, 4>& out,
                                            const NeighborhoodAttentionOptions& options) {
  if (const Status status = detail::check_neighborhood_attention<T>(q, k, v, out, options); !status.ok())
    return status;
  const auto plan = detail::neighborhood_plan<T>(q, v, options);
  Carver carver(ctx.workspace);
  const detail::NeighborhoodWork<Compute<T>> work(carver, ctx.parallel.workers(), plan);
  if (const Status status = carver.check("neighborhood_attention, workspace"); !status.ok()) return status;
  const double scale = options.scale.value_or(1.0 / std::sqrt(static_cast<double>(q.extent(3))));
  ctx.parallel.run(plan.tasks, [&](Index task, Index worker) {
    detail::NeighborhoodWalker<T>{q, k, v, out, static_cast<Compute<T>>(scale), plan, work.scratch(worker)}
        .run(task);
  });
  return {};
}

}  // namespace LINATTN_TARGET
LINATTN_END

// The linear layer on the host.
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include <linattn/core/context.hpp>
#include <linattn/detail/gemm.hpp>
#include <linattn/ops/linear.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

// A task computes a block of `rows` x `columns` of the output, `depth` inputs at a time: it copies that part
// of x (contiguous, widened), then takes the weight panel by panel (transposed, widened; a panel stays in
// L1), and adds to a tile of sums. Copies and sums together stay within a second-level cache of 1 MB, and
// each element copied serves enough products to hide its cost. Few blocks of rows, such as those of one
// picture, come with narrow columns, so that several cores have a share. The cut depends on the shapes alone.
//
// With few rows a weight would serve too few products to be worth transposing: then it is read once, as it
// lies, and sums run along the inputs, as long as these are enough to hide the final sums across lanes.
struct LinearPlan {
  bool few;
  Index total_rows;
  Index rows, columns, depth;  // of a block
  Index row_blocks, column_blocks;

  constexpr LinearPlan(Index all_rows, Index outputs, Index inputs)
      : few(all_rows <= (inputs >= 512 ? 96 : 16)),
        total_rows(all_rows),
        rows(block(all_rows, 256, 8)),
        columns(block(outputs, !few && all_rows <= 512 ? 96 : 512, 32)),
        depth(block(inputs, few ? 2048 : 256, 16)),
        row_blocks((all_rows + rows - 1) / rows),
        column_blocks((outputs + columns - 1) / columns) {}
  [[nodiscard]] constexpr Index tasks() const { return row_blocks * column_blocks; }

 private:
  // `extent` in nearly equal blocks of at most `limit`, each a multiple of `step`.
  static constexpr Index block(Index extent, Index limit, Index step) {
    const Index blocks = (extent + limit - 1) / limit;
    return ((extent + blocks - 1) / blocks + step - 1) / step * step;
  }
};

template <class T, class W, int R>
[[nodiscard]] constexpr LinearPlan linear_plan(const TensorView<const T, R>& x,
                                               const TensorView<W, 2>& weight) {
  return {R == 3 ? x.extent(0) * x.extent(1) : x.extent(0), weight.extent(0), weight.extent(1)};
}

// (batch, rows, columns) seen as a list of rows.
template <class T, int R>
[[nodiscard]] LINATTN_INLINE T* row_pointer(const TensorView<T, R>& v, Index row) {
  if constexpr (R == 2) {
    return v.pointer(row);
  } else {
    return v.pointer(row / v.extent(1), row % v.extent(1));
  }
}

template <class C, class S>
LINATTN_INLINE void copy_row(const S* from, Index count, C* to) {
  Index i = 0;
  for (; i + Pack<C>::size <= count; i += Pack<C>::size) load<C>(from + i).store(to + i);
  for (; i < count; ++i) to[i] = convert<C>(from[i]);
}
template <class C, class S>
LINATTN_INLINE void store_row(const C* from, Index count, S* to) {
  Index i = 0;
  for (; i + Pack<C>::size <= count; i += Pack<C>::size) store(to + i, Pack<C>::load(from + i));
  for (; i < count; ++i) to[i] = convert<S>(from[i]);
}

// A tile of sums along the inputs, in registers beside a column of weights and one x.
inline constexpr int dot_columns = 4;
#if defined(__AVX512F__)
inline constexpr int dot_rows = 4;
#else
inline constexpr int dot_rows = 2;
#endif

// sums[r][c] += sum_k x[r][k] weight[c][k], both sides read along k. With Ahead, `ahead` is the weight that is
// wanted next: rows of a few KB are too short for the machine's own prefetcher, which reaches half the bandwidth.
template <int Rows, int Columns, bool Ahead, class C, class W>
LINATTN_INLINE void dot_tile(const C* x, Index x_stride, const W* weight, const W* ahead, Index weight_stride,
                             Index depth, C* sums, Index sums_stride) {
  using P = Pack<C>;
  P acc[std::size_t{Rows}][std::size_t{Columns}], w[std::size_t{Columns}];
  unroll<Rows>([&](auto r) LINATTN_INLINE_LAMBDA {
    unroll<Columns>([&](auto c) LINATTN_INLINE_LAMBDA { acc[r][c] = P::zero(); });
  });
  Index k = 0;
  for (; k + P::size <= depth; k += P::size) {
    unroll<Columns>([&](auto c) LINATTN_INLINE_LAMBDA {
      w[c] = load<C>(weight + c * weight_stride + k);
      if constexpr (Ahead) prefetch(ahead + c * weight_stride + k);
    });
    unroll<Rows>([&](auto r) LINATTN_INLINE_LAMBDA {
      const P a = P::load(x + r * x_stride + k);
      unroll<Columns>([&](auto c) LINATTN_INLINE_LAMBDA { acc[r][c] = fma(a, w[c], acc[r][c]); });
    });
  }
  if (k < depth) {
    const int count = static_cast<int>(depth - k);
    unroll<Columns>(
        [&](auto c) LINATTN_INLINE_LAMBDA { w[c] = load_partial<C>(weight + c * weight_stride + k, count); });
    unroll<Rows>([&](auto r) LINATTN_INLINE_LAMBDA {
      const P a = load_partial<C>(x + r * x_stride + k, count);
      unroll<Columns>([&](auto c) LINATTN_INLINE_LAMBDA { acc[r][c] = fma(a, w[c], acc[r][c]); });
    });
  }
  unroll<Rows>([&](auto r) LINATTN_INLINE_LAMBDA {
    unroll<Columns>([&](auto c)
                        LINATTN_INLINE_LAMBDA { sums[r * sums_stride + c] += reduce_add(acc[r][c]); });
  });
}

// The scratch memory of all workers.
template <class C>
struct LinearWork {
  Index x_stride, sums_stride;
  Index x_size, panel_size, sums_size;
  C *x, *panel, *sums;

  LinearWork(Carver& carver, Index workers, const LinearPlan& plan)
      : x_stride(plan.depth + Pack<C>::size),  // rows of a power of two would share their cache sets
        sums_stride(padded_columns<C>(plan.columns)),
        x_size(plan.rows * x_stride),
        panel_size(plan.depth * Tile<C>::columns),
        sums_size(plan.rows * sums_stride),
        x(carver.take<C>(workers * x_size)),
        panel(carver.take<C>(workers * panel_size)),
        sums(carver.take<C>(workers * sums_size)) {}

  [[nodiscard]] LinearWork scratch(Index worker) const {
    LinearWork own = *this;
    own.x += worker * x_size;
    own.panel += worker * panel_size;
    own.sums += worker * sums_size;
    return own;
  }
};

// All rows past `Columns` columns, while these are in the first-level cache.
template <int Columns, class C, class W>
LINATTN_NOINLINE void multiply_few_rows(const C* x, Index x_stride, Index rows, const W* weight,
                                        const W* ahead, Index weight_stride, Index depth, C* sums,
                                        Index sums_stride) {
  Index row = 0;
  const auto tile = [&]<int Rows, bool Ahead>() {
    dot_tile<Rows, Columns, Ahead>(x + row * x_stride, x_stride, weight, ahead, weight_stride, depth,
                                   sums + row * sums_stride, sums_stride);
    row += Rows;
  };
  if (rows >= dot_rows) {
    tile.template operator()<dot_rows, true>();
  } else if (rows >= 2) {
    tile.template operator()<2, true>();
  } else {
    tile.template operator()<1, true>();
  }
  while (rows - row >= dot_rows) tile.template operator()<dot_rows, false>();
  while (rows - row >= 2) tile.template operator()<2, false>();
  while (rows - row >= 1) tile.template operator()<1, false>();
}

template <class C, class W>
LINATTN_NOINLINE void pack_weight(const W* weight, Index weight_stride, Index depth, Index columns,
                                  C* panel) {
  pack_transposed(weight, weight_stride, depth, columns, panel);
  pack_transposed(weight + Pack<C>::size * weight_stride, weight_stride, depth, columns - Pack<C>::size,
                  panel + Pack<C>::size);
}

template <class C>
LINATTN_NOINLINE void add_product(const C* x, Index x_stride, Index rows, const C* panel, Index depth,
                                  C* sums, Index sums_stride) {
  multiply_panel(x, x_stride, 1, rows, panel, depth, AddTile<C>{sums, sums_stride});
}

template <class X, class W, class B, class T, int R>
void linear_task(const TensorView<const X, R>& x, const TensorView<W, 2>& weight,
                 const TensorView<B, 1>& bias, const TensorView<T, R>& out, const LinearPlan& plan,
                 Index task, const LinearWork<Compute<T>>& scratch) {
  using C = Compute<T>;
  const Index outputs = weight.extent(0), inputs = weight.extent(1);
  const Index first_row = task % plan.row_blocks * plan.rows;
  const Index first_column = task / plan.row_blocks * plan.columns;
  const Index rows = std::min(plan.rows, plan.total_rows - first_row);
  const Index columns = std::min(plan.columns, outputs - first_column);

  for (Index r = 0; r < rows; ++r) {
    C* const sums = scratch.sums + r * scratch.sums_stride;
    if (bias.extent(0) != 0) {
      copy_row(bias.data + first_column, columns, sums);
      std::fill(sums + columns, sums + scratch.sums_stride, C(0));
    } else {
      std::fill(sums, sums + scratch.sums_stride, C(0));
    }
  }
  for (Index first = 0; first < inputs; first += plan.depth) {
    const Index depth = std::min(plan.depth, inputs - first);
    for (Index r = 0; r < rows; ++r)
      copy_row(row_pointer(x, first_row + r) + first, depth, scratch.x + r * scratch.x_stride);
    if (plan.few) {
      const W* const block = weight.pointer(first_column, first);
      const Index stride = weight.step(0);
      constexpr int at_once = dot_columns;
      Index c = 0;
      for (; c + at_once <= columns; c += at_once)
        multiply_few_rows<at_once>(scratch.x, scratch.x_stride, rows, block + c * stride,
                                   c + 2 * at_once <= columns ? block + (c + at_once) * stride : block,
                                   stride, depth, scratch.sums + c, scratch.sums_stride);
      for (; c < columns; ++c)
        multiply_few_rows<1>(scratch.x, scratch.x_stride, rows, block + c * stride, block, stride, depth,
                             scratch.sums + c, scratch.sums_stride);
    } else {
      for (Index c = 0; c < columns; c += Tile<C>::columns) {
        pack_weight(weight.pointer(first_column + c, first), weight.step(0), depth, columns - c,
                    scratch.panel);
        add_product(scratch.x, scratch.x_stride, rows, scratch.panel, depth, scratch.sums + c,
                    scratch.sums_stride);
      }
    }
  }
  for (Index r = 0; r < rows; ++r)
    store_row(scratch.sums + r * scratch.sums_stride, columns,
              row_pointer(out, first_row + r) + first_column);
}

template <class P, class X, class W, class B, class T, int R>
[[nodiscard]] Status run_linear(const Cpu<P>& ctx, const TensorView<const X, R>& x,
                                const TensorView<W, 2>& weight, const TensorView<B, 1>& bias,
                                const TensorView<T, R>& out) {
  static_assert(WeightStorage<std::remove_const_t<W>> && Storage<std::remove_const_t<B>>,
                "weight and bias are float, double, half or bfloat16, the weight float8_e4m3, too");
  if (const Status status = check_linear(x, weight, bias, out); !status.ok()) return status;
  const LinearPlan plan = linear_plan(x, weight);
  Carver carver(ctx.workspace);
  const LinearWork<Compute<T>> work(carver, ctx.parallel.workers(), plan);
  if (const Status status = carver.check("linear, workspace"); !status.ok()) return status;
  ctx.parallel.run(plan.tasks(), [&](Index task, Index worker) {
    linear_task(x, weight, bias, out, plan, task, work.scratch(worker));
  });
  return {};
}

}  // namespace detail::inline LINATTN_TARGET

inline namespace LINATTN_TARGET {

// Bytes of workspace that the same call of `linear` needs; grows with the workers, not with the rows. Few rows take
// another path and can need more than many: ask for each shape that is called, and keep the largest answer.
template <ParallelPolicy P, Storage T, int R, class W, class B>
[[nodiscard]] std::size_t linear_workspace(const Cpu<P>& ctx, const In<T, R>& x,
                                           const TensorView<W, 2>& weight, const TensorView<B, 1>&,
                                           const TensorView<T, R>&) {
  if (x.empty() || weight.empty()) return 0;
  Carver carver({});
  detail::LinearWork<Compute<T>>(carver, ctx.parallel.workers(), detail::linear_plan(x, weight));
  return carver.used();
}
template <ParallelPolicy P, Storage T, int R, detail::OtherStorage<T> X, class W, class B>
[[nodiscard]] std::size_t linear_workspace(const Cpu<P>& ctx, const TensorView<X, R>& x,
                                           const TensorView<W, 2>& weight, const TensorView<B, 1>&,
                                           const TensorView<T, R>&) {
  if (x.empty() || weight.empty()) return 0;
  Carver carver({});
  const TensorView<const std::remove_const_t<X>, R> rows(x);
  detail::LinearWork<Compute<T>>(carver, ctx.parallel.workers(), detail::linear_plan(rows, weight));
  return carver.used();
}

// out = x weight^T + bias. See linear.hpp.
template <ParallelPolicy P, Storage T, int R, class W, class B>
Status linear(const Cpu<P>& ctx, const In<T, R>& x, const TensorView<W, 2>& weight,
              const TensorView<B, 1>& bias, const TensorView<T, R>& out) {
  return detail::run_linear(ctx, x, weight, bias, out);
}
template <ParallelPolicy P, Storage T, int R, detail::OtherStorage<T> X, class W, class B>
Status linear(const Cpu<P>& ctx, const TensorView<X, R>& x, const TensorView<W, 2>& weight,
              const TensorView<B, 1>& bias, const TensorView<T, R>& out) {
  return detail::run_linear(ctx, TensorView<const std::remove_const_t<X>, R>(x), weight, bias, out);
}

}  // namespace LINATTN_TARGET
LINATTN_END

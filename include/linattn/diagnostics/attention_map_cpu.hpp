// Attention maps on the host. Contract and derivation: attention_map.hpp.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <limits>
#include <type_traits>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/detail/lanes.hpp>
#include <linattn/detail/simd.hpp>
#include <linattn/diagnostics/attention_map.hpp>
#include <linattn/ops/depthwise_conv_cpu.hpp>
#include <linattn/ops/instance_norm_cpu.hpp>
#include <linattn/ops/ttt_cpu.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

template <class C, class A, class B>
[[nodiscard]] C dot(const A* a, const B* b, Index count) {
  Pack<C> sum = Pack<C>::zero();
  for_each_pack<C>(0, count, [&](Index c, auto lanes) {
    sum = fma(Pack<C>(lanes.load(a + c)), Pack<C>(lanes.load(b + c)), sum);
  });
  return reduce_add(sum);
}

// y = x W, one row.
template <class C, class W>
void project(const C* x, const TensorView<const W, 2>& w, C* y) {
  for_each_pack<C>(0, w.extent(1), [&](Index c, auto lanes) {
    Pack<C> sum = Pack<C>::zero();
    for (Index r = 0; r < w.extent(0); ++r)
      sum = fma(Pack<C>(x[r]), Pack<C>(lanes.load(w.pointer(r, c))), sum);
    lanes.store(y + c, sum);
  });
}

template <class Model, class T>
using MapMatrices = std::array<TensorView<T, 2>, static_cast<std::size_t>(matrices<Model>)>;

// What a token, query or key, brings to the products of the map: on each level of the inner model the activation and
// its derivatives by z1 (and z2) side by side; and if the step clips, for each column of each matrix how far the
// matrix's input lies along the step of that column, times the derivative there.
template <class Model, class Step, class C>
struct MapFeatures {
  static constexpr int levels = !Model::has_activation ? 0 : Model::chained == 2 ? 2 : 1;
  static constexpr int clipped = Step::needs_column_norm ? matrices<Model> : 0;
  C* value[2];   // [d]
  C* slopes[2];  // [projections * d], [d]
  C* along;      // [clipped * d]

  [[nodiscard]] static constexpr Index before_along() {
    return levels == 0 ? 0 : 2 * levels + Model::projections - 1;
  }
  [[nodiscard]] static constexpr Index size(Index d) { return (before_along() + clipped) * d; }
  [[nodiscard]] static MapFeatures at(C* memory, Index token, Index d) {
    C* const mine = memory + token * size(d);
    return {{mine, mine + d},
            {mine + levels * d, mine + (levels + Model::projections) * d},
            mine + before_along() * d};
  }

  // At x, of the matrices w; `steps` are the directions of their columns' steps.
  template <class W>
  void compute(const C* x, const MapMatrices<Model, const W>& w, const MapMatrices<Model, C>& steps) const {
    const Index d = w[0].extent(0);
    if constexpr (levels > 0) {
      project<C, W>(x, w[0], slopes[0]);
      if constexpr (Model::projections == 2) project<C, W>(x, w[1], slopes[0] + d);
      differentiate<Model::projections>(0, d);
    }
    if constexpr (levels == 2) {
      project<C, W>(value[0], w[1], slopes[1]);
      differentiate<1>(1, d);
    }
    for (int m = 0; m < clipped; ++m) {
      const bool reads_x = m < Model::projections;
      C* const mine = along + m * d;
      project<C, C>(reads_x ? x : value[0], steps[static_cast<std::size_t>(m)], mine);
      if (levels > 0 && reads_x)
        for (Index c = 0; c < d; ++c) mine[c] *= slopes[0][m * d + c];
    }
  }

 private:
  // The slopes hold z.
  template <int Arguments>
  void differentiate(int level, Index d) const {
    C* const z = slopes[level];
    C* const second = z + (Arguments - 1) * d;
    for_each_pack<C>(0, d, [&](Index c, auto lanes) {
      const Activation<Pack<C>> f =
          Model::differentiate(Pack<C>(lanes.load(z + c)), Pack<C>(lanes.load(second + c)));
      lanes.store(value[level] + c, f.value);
      if constexpr (Arguments == 2) lanes.store(second + c, f.d2);
      lanes.store(z + c, f.d1);
    });
  }
};

// What a worker needs for one head.
template <class Model, class Step, class C>
struct MapScratch {
  C* features;          // of the keys, and of a query behind them
  C* overlap;           // r [d]
  C *between, *middle;  // P and M_i of two chained matrices, [d, d]
  C* row;               // [d]
  C *steps, *lengths;   // of the columns of each matrix, if the step clips: directions [d, d] and h [d]

  [[nodiscard]] static MapScratch take(Carver& carver, Index tokens, Index d) {
    using Features = MapFeatures<Model, Step, C>;
    MapScratch s{};
    s.features = carver.take<C>((tokens + 1) * Features::size(d));
    s.overlap = carver.take<C>(d);
    if (Model::chained == 2) {
      s.between = carver.take<C>(d * d);
      s.middle = carver.take<C>(d * d);
      s.row = carver.take<C>(d);
    }
    if (Features::clipped > 0) {
      s.steps = carver.take<C>(Features::clipped * d * d);
      s.lengths = carver.take<C>(Features::clipped * d);
    }
    return s;
  }
};

// The memory of one call.
template <class Model, class Step, class C>
struct TttMapMemory {
  FastWeights<C> fast{};
  TensorView<C, 4> q{}, k{};   // behind the prologue
  TensorView<C, 4> widened{};  // before a conv, which does not work in place
  std::byte* workers = nullptr;
  std::size_t worker_size = 0;

  template <class W>
  [[nodiscard]] static TttMapMemory take(Carver& carver, Index workers, const std::array<Index, 4>& q,
                                         const std::array<Index, 4>& k, const TttPrologue<W>& prologue) {
    const auto [batch, tokens, heads, d] = k;
    const auto view = [&](const std::array<Index, 4>& shape) {
      return TensorView<C, 4>(carver.take<C>(TensorView<C, 4>(nullptr, shape).elements()), shape);
    };
    TttMapMemory m;
    const std::array<Index, 4> matrix{batch, heads, d, d};
    m.fast.w1 = view(matrix);
    if (matrices<Model> >= 2) m.fast.w2 = view(matrix);
    if (matrices<Model> >= 3) m.fast.w3 = view(matrix);
    m.q = view(q);
    m.k = view(k);
    if (prologue.q_conv.extent(0) != 0 || prologue.k_conv.extent(0) != 0)
      m.widened = view(q[1] > tokens ? q : k);
    Carver one(Workspace{});
    (void)MapScratch<Model, Step, C>::take(one, tokens, d);
    m.worker_size = one.used() / Carver::alignment * Carver::alignment;  // the base is aligned already
    m.workers = carver.take<std::byte>(workers * static_cast<Index>(m.worker_size));
    return m;
  }

  [[nodiscard]] MapScratch<Model, Step, C> scratch(Index worker) const {
    Carver carver(Workspace{workers + static_cast<std::size_t>(worker) * worker_size, worker_size});
    return MapScratch<Model, Step, C>::take(carver, k.extent(1), k.extent(3));
  }
};

// x as the prologue makes it: widened, normalised, convolved.
template <class C, class T, class W, ParallelPolicy P>
[[nodiscard]] Status run_prologue(const Cpu<P>& ctx, const TensorView<const T, 4>& x, const double* norm_eps,
                                  const TensorView<const W, 4>& conv, const TensorView<const W, 1>& bias,
                                  const TokenGrid& grid, const TensorView<C, 4>& scratch,
                                  const TensorView<C, 4>& out) {
  const bool convolves = conv.extent(0) != 0;
  const TensorView<C, 4> wide = convolves ? TensorView<C, 4>(scratch.data, out.extents) : out;
  const Index heads = x.extent(2);
  ctx.parallel.run(x.extent(0) * x.extent(1), [&](Index task, Index) {
    const Index b = task / x.extent(1), n = task % x.extent(1);
    for (Index h = 0; h < heads; ++h)
      for_each_pack<C>(0, x.extent(3), [&](Index c, auto lanes) {
        lanes.store(wide.pointer(b, n, h, c), Pack<C>(lanes.load(x.pointer(b, n, h, c))));
      });
  });
  if (norm_eps != nullptr)
    if (const Status status = instance_norm(ctx, wide, wide, {.eps = *norm_eps}); !status.ok()) return status;
  if (!convolves) return {};
  return depthwise_conv(ctx, wide, conv, bias, out, {.grid = grid});
}

// The map of one head.
template <class Model, class Loss, class Step, class C, class W>
struct TttMapper {
  using Features = MapFeatures<Model, Step, C>;
  static constexpr int count = matrices<Model>;
  static constexpr std::size_t last = count - 1;
  // The last matrix is where the error arrives, unless a gate lies behind it.
  static constexpr bool ends_in_matrix = Model::chained > 0 || !Model::has_activation;
  static_assert(Features::clipped == 0 || std::is_same_v<Step, ColumnClip>,
                "the map knows the derivative of no other step that needs the norm");
  static_assert(Features::clipped == 0 || Model::chained < 2,
                "the map of two chained matrices with a clipped step has yet to be derived");

  const TttMapOptions<W>& options;
  const MapScratch<Model, Step, C> s;
  const TensorView<const C, 2> keys;
  MapMatrices<Model, const W> w{};
  MapMatrices<Model, const C> updated{};
  MapMatrices<Model, C> steps{};
  C last_rate = 1;  // 1 - h of the last matrix, on average

  TttMapper(const TttWeights<W>& weights, const TttMapOptions<W>& options_,
            const TttMapMemory<Model, Step, C>& memory, Index b, Index h, Index worker)
      : options(options_),
        s(memory.scratch(worker)),
        keys{memory.k.pointer(b, 0, h),
             {memory.k.extent(1), memory.k.extent(3)},
             {memory.k.step(1), Index{1}}} {
    const Index d = keys.extent(1);
    for (int m = 0; m < count; ++m) {
      const auto i = static_cast<std::size_t>(m);
      w[i] = at(weights[m], h);
      updated[i] = at(at(memory.fast[m], b), h);
      if constexpr (Features::clipped > 0) {
        steps[i] = TensorView<C, 2>(s.steps + m * d * d, {d, d});
        take_step(i, s.lengths + m * d);
      }
    }
    for (Index m = 0; m < d; ++m)
      s.overlap[m] = (Model::chained == 0 ? C(1) : dot<C>(w[last].pointer(m), updated[last].pointer(m), d)) /
                     static_cast<C>(d);
    if constexpr (Model::chained == 2)
      for (Index n = 0; n < d; ++n)
        for (Index m = 0; m < d; ++m)
          s.between[n * d + m] = dot<C>(updated[last].pointer(n), w[last].pointer(m), d) / static_cast<C>(d);
    if constexpr (Features::clipped > 0 && ends_in_matrix) {
      C sum = 0;
      for (Index c = 0; c < d; ++c) sum += C(1) - s.lengths[(count - 1) * d + c];
      last_rate = sum / static_cast<C>(d);
    }
    for (Index j = 0; j < keys.extent(0); ++j)
      Features::at(s.features, j, d).template compute<W>(keys.pointer(j), w, steps);
  }

  // One row: the query behind the prologue.
  void map(const C* q, C* out) const {
    const Index d = keys.extent(1), tokens = keys.extent(0);
    // How the error follows the value: a constant, as the loss is linear in its target.
    const double follows = Loss::error(1.0, 0.0) - Loss::error(0.0, 0.0);
    const double scale = options.ttt.scale.value_or(1.0 / std::sqrt(static_cast<double>(d)));
    const auto rate =
        static_cast<C>(-follows * Step::rate(options.ttt.inner_lr, scale / static_cast<double>(tokens), 0.0));
    const Features query = Features::at(s.features, tokens, d);
    query.template compute<C>(q, updated, steps);
    if constexpr (Model::chained == 2) compute_middle(query);
    weigh(query);
    for (Index j = 0; j < tokens; ++j)
      out[j] = rate * pair(q, query, keys.pointer(j), Features::at(s.features, j, d));
  }

 private:
  // Direction and length, in units of the rate, of the step of each column of matrix i.
  void take_step(std::size_t i, C* lengths) const {
    for (Index c = 0; c < w[i].extent(1); ++c) {
      double squares = 0;
      for (Index r = 0; r < w[i].extent(0); ++r) {
        const double step = convert<double>(w[i](r, c)) - static_cast<double>(updated[i](r, c));
        steps[i](r, c) = static_cast<C>(step);
        squares += step * step;
      }
      const double length = std::sqrt(squares), lr = std::abs(options.ttt.inner_lr);
      lengths[c] = lr == 0 ? C(0) : static_cast<C>(std::min(1.0, length / lr));
      for (Index r = 0; r < w[i].extent(0) && length > 0; ++r)
        steps[i](r, c) = static_cast<C>(static_cast<double>(steps[i](r, c)) / length);
    }
  }

  // M_i, from the derivatives at the query.
  void compute_middle(const Features& query) const {
    const Index d = keys.extent(1);
    for (Index p = 0; p < d; ++p) {
      for (Index n = 0; n < d; ++n) s.row[n] = query.slopes[0][p] * updated[1](p, n) * query.slopes[1][n];
      project<C, C>(s.row, TensorView<const C, 2>(s.between, {d, d}), s.middle + p * d);
      for (Index m = 0; m < d; ++m) s.middle[p * d + m] *= convert<C>(w[1](p, m));
    }
  }

  // What does not depend on the key: r, and what the clip leaves of each column.
  void weigh(const Features& query) const {
    const Index d = keys.extent(1);
    for (int m = 0; m < Features::clipped; ++m) {
      const bool is_last = ends_in_matrix && m == count - 1;
      for (Index c = 0; c < d; ++c) {
        const C h = s.lengths[m * d + c], left = C(1) - h;
        query.along[m * d + c] *= (is_last ? C(1) / static_cast<C>(d) : s.overlap[c]) * left * h;
        if (!is_last) query.slopes[0][m * d + c] *= left;
      }
    }
    if constexpr (Features::levels > 0) {
      C* const top = query.slopes[Features::levels - 1];
      const Index arguments = Features::levels == 2 ? 1 : Model::projections;
      for (Index i = 0; i < arguments * d; ++i) top[i] *= s.overlap[i % d];
    }
  }

  [[nodiscard]] C pair(const C* q, const Features& query, const C* k, const Features& key) const {
    const Index d = keys.extent(1);
    C sum = dot<C>(q, k, d);
    if constexpr (Features::levels == 0) sum *= last_rate;
    if constexpr (Features::levels == 1)
      sum *= dot<C>(query.slopes[0], key.slopes[0], Model::projections * d);
    if constexpr (Model::chained == 1) sum += last_rate * dot<C>(query.value[0], key.value[0], d);
    if constexpr (Model::chained == 2) {
      project<C, C>(key.slopes[0], TensorView<const C, 2>(s.middle, {d, d}), s.row);
      sum *= dot<C>(s.row, key.slopes[1], d);
      sum += dot<C>(query.value[0], key.value[0], d) * dot<C>(query.slopes[1], key.slopes[1], d);
      sum += dot<C>(query.value[1], key.value[1], d);
    }
    if constexpr (Features::clipped > 0) sum -= dot<C>(query.along, key.along, Features::clipped * d);
    return sum;
  }
};

}  // namespace detail::inline LINATTN_TARGET

inline namespace LINATTN_TARGET {

// out = softmax(scale q k^T + bias), as a matrix: the map of softmax attention. T is that of q. See
// attention_map.hpp.
template <ParallelPolicy P, class T>
[[nodiscard]] Status softmax_attention_map(
    const Cpu<P>& ctx, const TensorView<T, 4>& q, In<std::remove_const_t<T>, 4> k,
    const TensorView<Compute<T>, 4>& out,
    const std::type_identity_t<SoftmaxMapOptions<Compute<T>>>& options = {}) {
  using C = Compute<T>;
  const Status status = detail::check_softmax_map<std::remove_const_t<T>>(q, k, out, options);
  if (!status.ok()) return status;
  const Index heads = q.extent(2), d = q.extent(3), keys = k.extent(1), rows = out.extent(2);
  const auto scale = static_cast<C>(options.scale.value_or(1.0 / std::sqrt(static_cast<double>(d))));
  constexpr C none = -std::numeric_limits<C>::infinity();
  ctx.parallel.run(q.extent(0) * heads * rows, [&](Index task, Index) {
    const Index row = task % rows, h = task / rows % heads, b = task / rows / heads;
    const Index i = detail::map_query(options.queries, row);
    const Index seen = options.causal ? std::clamp<Index>(i + 1 + keys - q.extent(1), 0, keys) : keys;
    C* const p = out.pointer(b, h, row);
    C top = none;
    for (Index j = 0; j < seen; ++j) {
      const C added = options.bias.empty() ? C(0) : options.bias(b, h, i, j);
      p[j] = added == none ? none : added + scale * detail::dot<C>(q.pointer(b, i, h), k.pointer(b, j, h), d);
      top = std::max(top, p[j]);
    }
    std::fill(p + seen, p + keys, C(0));
    const C shift = top == none ? C(0) : top;
    double sum = 0;
    for (Index j = 0; j < seen; ++j) sum += static_cast<double>(p[j] = std::exp(p[j] - shift));
    for (Index j = 0; j < seen; ++j) p[j] = sum == 0 ? C(0) : static_cast<C>(static_cast<double>(p[j]) / sum);
  });
  return {};
}

template <InnerModel Model = SwiGlu, InnerLoss Loss = InnerProduct, InnerStep Step = Plain, ParallelPolicy P,
          class T, Storage W>
[[nodiscard]] std::size_t ttt_attention_map_workspace(
    const Cpu<P>& ctx, const TensorView<T, 4>& q, In<std::remove_const_t<T>, 4> k,
    In<std::remove_const_t<T>, 4> v, const TttWeights<W>& weights, const TensorView<Compute<T>, 4>&,
    const std::type_identity_t<TttMapOptions<W>>& options = {}) {
  using C = Compute<T>;
  Carver carver(Workspace{});
  const auto memory = detail::TttMapMemory<Model, Step, C>::take(
      carver, static_cast<Index>(ctx.parallel.workers()), q.extents, k.extents, options.ttt.prologue);
  return carver.used() +
         std::max(ttt_update_workspace<Model, Loss, Step>(ctx, k, v, weights, memory.fast, options.ttt),
                  instance_norm_workspace(ctx, memory.k, memory.k));
}

// out = (1 / d) tr(d ttt(q, k, v)_i / d v_j), the implicit attention map of a TTT layer. T is that of q. See
// attention_map.hpp.
template <InnerModel Model = SwiGlu, InnerLoss Loss = InnerProduct, InnerStep Step = Plain, ParallelPolicy P,
          class T, Storage W>
[[nodiscard]] Status ttt_attention_map(const Cpu<P>& ctx, const TensorView<T, 4>& q,
                                       In<std::remove_const_t<T>, 4> k, In<std::remove_const_t<T>, 4> v,
                                       const TttWeights<W>& weights, const TensorView<Compute<T>, 4>& out,
                                       const std::type_identity_t<TttMapOptions<W>>& options = {}) {
  using C = Compute<T>;
  using S = std::remove_const_t<T>;
  const TensorView<const S, 4> queries = q;
  Status status = detail::check_ttt_map<Model, S, W>(queries, k, v, weights, out, options);
  if (!status.ok()) return status;
  Carver carver(ctx.workspace);
  const auto memory = detail::TttMapMemory<Model, Step, C>::take(
      carver, static_cast<Index>(ctx.parallel.workers()), q.extents, k.extents, options.ttt.prologue);
  status = carver.check("ttt_attention_map, workspace");
  if (!status.ok()) return status;

  const Cpu<P> inner = ctx.with(carver.rest());
  const TttPrologue<W>& p = options.ttt.prologue;
  status = ttt_update<Model, Loss, Step>(inner, k, v, weights, memory.fast, options.ttt);
  if (!status.ok()) return status;
  status = detail::run_prologue<C, S, W>(inner, queries, nullptr, p.q_conv, p.q_conv_bias, p.grid,
                                         memory.widened, memory.q);
  if (!status.ok()) return status;
  status = detail::run_prologue<C, S, W>(inner, k, p.key_norm ? &p.key_norm_eps : nullptr, p.k_conv,
                                         p.k_conv_bias, p.grid, memory.widened, memory.k);
  if (!status.ok()) return status;

  const Index heads = q.extent(2);
  ctx.parallel.run(q.extent(0) * heads, [&](Index task, Index worker) {
    const Index b = task / heads, h = task % heads;
    const detail::TttMapper<Model, Loss, Step, C, W> mapper(weights, options, memory, b, h, worker);
    for (Index row = 0; row < out.extent(2); ++row)
      mapper.map(memory.q.pointer(b, detail::map_query(options.queries, row), h), out.pointer(b, h, row));
  });
  return {};
}

}  // namespace LINATTN_TARGET
LINATTN_END

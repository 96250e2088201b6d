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
namespace detail {

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

// What a token, query or key, brings to the products of the map: on each level of the inner model, the activation and
// its derivatives by z1 (and z2) side by side.
template <class Model, class C>
struct MapFeatures {
  static constexpr bool any = Model::has_activation;
  static constexpr int levels = !any ? 0 : Model::chained == 2 ? 2 : 1;
  C* value[2];   // [d]
  C* slopes[2];  // [projections * d], [d]

  [[nodiscard]] static constexpr Index size(Index d) {
    return any ? (2 * levels + Model::projections - 1) * d : 0;
  }
  [[nodiscard]] static MapFeatures at(C* memory, Index token, Index d) {
    C* const mine = memory + token * size(d);
    return {{mine, mine + d}, {mine + levels * d, mine + (levels + Model::projections) * d}};
  }

  // At x, of matrices w[0], w[1], w[2], those that the model has.
  template <class W>
  void compute(const C* x, const std::array<TensorView<const W, 2>, 3>& w) const {
    const Index d = w[0].extent(0);
    project<C, W>(x, w[0], slopes[0]);
    if constexpr (Model::projections == 2) project<C, W>(x, w[1], slopes[0] + d);
    differentiate<Model::projections>(0, d);
    if constexpr (levels == 2) {
      project<C, W>(value[0], w[1], slopes[1]);
      differentiate<1>(1, d);
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

// The memory of one call.
template <class Model, class C>
struct TttMapMemory {
  FastWeights<C> fast{};
  TensorView<C, 4> q{}, k{};                // behind the prologue
  TensorView<C, 4> widened{};               // before a conv, which does not work in place
  C* features = nullptr;                    // of each worker: of a head's keys, and of a query behind them
  C* overlap = nullptr;                     // of each worker: r
  C *between = nullptr, *middle = nullptr;  // of each worker, with two chained matrices: P and M_i, [d, d]
  C* row = nullptr;

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
    m.features = carver.take<C>(workers * (tokens + 1) * MapFeatures<Model, C>::size(d));
    m.overlap = carver.take<C>(workers * d);
    if (Model::chained == 2) {
      m.between = carver.take<C>(workers * d * d);
      m.middle = carver.take<C>(workers * d * d);
      m.row = carver.take<C>(workers * d);
    }
    return m;
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

// Rows of the map of one head.
template <class Model, class Loss, class C, class W>
struct TttMapper {
  using Features = MapFeatures<Model, C>;
  const TttWeights<W>& weights;
  const TttMapOptions<W>& options;
  const TttMapMemory<Model, C>& memory;
  const TensorView<C, 4>& out;

  void map(Index b, Index h, Index worker) const {
    const Index d = memory.k.extent(3), tokens = memory.k.extent(1);
    std::array<TensorView<const W, 2>, 3> w{};
    std::array<TensorView<const C, 2>, 3> w_new{};
    for (int i = 0; i < matrices<Model>; ++i) {
      w[static_cast<std::size_t>(i)] = at(weights[i], h);
      w_new[static_cast<std::size_t>(i)] = at(at(memory.fast[i], b), h);
    }
    constexpr std::size_t last = matrices<Model> - 1;
    const TensorView<C, 2> between(memory.between + worker * d * d, {d, d});
    const TensorView<C, 2> middle(memory.middle + worker * d * d, {d, d});
    C* const features = memory.features + worker * (tokens + 1) * Features::size(d);
    C* const overlap = memory.overlap + worker * d;
    C* const row_of_d = memory.row + worker * d;

    if constexpr (Features::any)
      for (Index j = 0; j < tokens; ++j) Features::at(features, j, d).compute(memory.k.pointer(b, j, h), w);
    for (Index m = 0; m < d; ++m)
      overlap[m] = (Model::chained == 0 ? C(1) : dot<C>(w[last].pointer(m), w_new[last].pointer(m), d)) /
                   static_cast<C>(d);
    if constexpr (Model::chained == 2)
      for (Index n = 0; n < d; ++n)
        for (Index m = 0; m < d; ++m)
          between(n, m) = dot<C>(w_new[last].pointer(n), w[last].pointer(m), d) / static_cast<C>(d);

    // How the error follows the value: a constant, as the loss is linear in its target.
    const double follows = Loss::error(1.0, 0.0) - Loss::error(0.0, 0.0);
    const double scale = options.ttt.scale.value_or(1.0 / std::sqrt(static_cast<double>(d)));
    const auto rate = static_cast<C>(-follows * options.ttt.inner_lr * scale / static_cast<double>(tokens));
    const Features asks = Features::at(features, tokens, d);
    for (Index row = 0; row < out.extent(2); ++row) {
      const C* const q = memory.q.pointer(b, map_query(options.queries, row), h);
      if constexpr (Features::any) asks.compute(q, w_new);
      if constexpr (Model::chained == 2) {
        for (Index p = 0; p < d; ++p) {
          for (Index n = 0; n < d; ++n) row_of_d[n] = asks.slopes[0][p] * w_new[1](p, n) * asks.slopes[1][n];
          project<C, C>(row_of_d, between, middle.pointer(p));
          for (Index m = 0; m < d; ++m) middle(p, m) *= convert<C>(w[1](p, m));
        }
      }
      if constexpr (Features::any) {
        C* const top = asks.slopes[Features::levels - 1];
        const Index arguments = Features::levels == 2 ? 1 : Model::projections;
        for (Index i = 0; i < arguments * d; ++i) top[i] *= overlap[i % d];
      }
      for (Index j = 0; j < tokens; ++j) {
        C sum = dot<C>(q, memory.k.pointer(b, j, h), d);
        if constexpr (Features::any) {
          const Features key = Features::at(features, j, d);
          if constexpr (Model::chained == 2) {
            project<C, C>(key.slopes[0], middle, row_of_d);
            sum *= dot<C>(row_of_d, key.slopes[1], d);
            sum += dot<C>(asks.value[0], key.value[0], d) * dot<C>(asks.slopes[1], key.slopes[1], d);
            sum += dot<C>(asks.value[1], key.value[1], d);
          } else {
            sum *= dot<C>(asks.slopes[0], key.slopes[0], Model::projections * d);
            if constexpr (Model::chained == 1) sum += dot<C>(asks.value[0], key.value[0], d);
          }
        }
        out(b, h, row, j) = rate * sum;
      }
    }
  }
};

}  // namespace detail

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
      p[j] = scale * detail::dot<C>(q.pointer(b, i, h), k.pointer(b, j, h), d);
      if (!options.bias.empty()) p[j] += options.bias(b, h, i, j);
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

template <InnerModel Model = SwiGlu, InnerLoss Loss = InnerProduct, ParallelPolicy P, class T, Storage W>
[[nodiscard]] std::size_t ttt_attention_map_workspace(
    const Cpu<P>& ctx, const TensorView<T, 4>& q, In<std::remove_const_t<T>, 4> k,
    In<std::remove_const_t<T>, 4> v, const TttWeights<W>& weights, const TensorView<Compute<T>, 4>&,
    const std::type_identity_t<TttMapOptions<W>>& options = {}) {
  using C = Compute<T>;
  Carver carver(Workspace{});
  const auto memory = detail::TttMapMemory<Model, C>::take(carver, static_cast<Index>(ctx.parallel.workers()),
                                                           q.extents, k.extents, options.ttt.prologue);
  return carver.used() +
         std::max(ttt_update_workspace<Model, Loss>(ctx, k, v, weights, memory.fast, options.ttt),
                  instance_norm_workspace(ctx, memory.k, memory.k));
}

// out = (1 / d) tr(d ttt(q, k, v)_i / d v_j), the implicit attention map of a TTT layer. T is that of q. See
// attention_map.hpp.
template <InnerModel Model = SwiGlu, InnerLoss Loss = InnerProduct, ParallelPolicy P, class T, Storage W>
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
  const auto memory = detail::TttMapMemory<Model, C>::take(carver, static_cast<Index>(ctx.parallel.workers()),
                                                           q.extents, k.extents, options.ttt.prologue);
  status = carver.check("ttt_attention_map, workspace");
  if (!status.ok()) return status;

  const Cpu<P> inner = ctx.with(carver.rest());
  const TttPrologue<W>& p = options.ttt.prologue;
  status = ttt_update<Model, Loss>(inner, k, v, weights, memory.fast, options.ttt);
  if (!status.ok()) return status;
  status = detail::run_prologue<C, S, W>(inner, queries, nullptr, p.q_conv, p.q_conv_bias, p.grid,
                                         memory.widened, memory.q);
  if (!status.ok()) return status;
  status = detail::run_prologue<C, S, W>(inner, k, p.key_norm ? &p.key_norm_eps : nullptr, p.k_conv,
                                         p.k_conv_bias, p.grid, memory.widened, memory.k);
  if (!status.ok()) return status;

  const detail::TttMapper<Model, Loss, C, W> mapper{weights, options, memory, out};
  const Index heads = q.extent(2);
  ctx.parallel.run(q.extent(0) * heads,
                   [&](Index task, Index worker) { mapper.map(task / heads, task % heads, worker); });
  return {};
}

LINATTN_END

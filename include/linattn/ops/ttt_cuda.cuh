// Test-time-training attention on CUDA. Contract: ttt.hpp. The ways to the gradients and to the answers are
// in detail/ttt_mma.cuh (tensor cores: 16-bit storage, heads of at most 64 channels in multiples of 8, rows aligned to
// 16 bytes, at most one chained matrix) and in detail/ttt_plain.cuh (all else).
//
// Statistics of the keys, then partial gradients of splits of the tokens, then the step, which adds the splits in
// their order, then the answers. Where work is split depends on shapes alone.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <type_traits>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/detail/cuda.cuh>
#include <linattn/detail/ptx.cuh>
#include <linattn/detail/token_stats.cuh>
#include <linattn/detail/ttt_mma.cuh>
#include <linattn/detail/ttt_plain.cuh>
#include <linattn/ops/ttt.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

// ---- the step ----

template <class W>
struct TttStepParameters {
  Rows<const W> weights[3]{};     // (-, row, head)
  Rows<float> fast_weights[3]{};  // (batch, row, head)
  const float* partials;          // [split, batch * heads, matrix, size, size]
  Index groups, splits, heads;    // batch * heads, ...
  Index across;                   // blocks that a matrix's columns make
  int matrices, head_dim, size;   // size >= head_dim
  float inner_lr, factor;         // as in InnerStep
  float rate;                     // inner_lr * factor, unless it depends on the column
};

inline constexpr int ttt_step_warps = 8;
struct TttStepShared {
  float squares[ttt_step_warps][warp_size];
};

// W' = W - rate * sum of the partial gradients. A block has 32 columns of one matrix.
template <class Step, class W>
static __global__ void __launch_bounds__(ttt_step_warps* warp_size) ttt_step_kernel(TttStepParameters<W> p) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size,
            warp = static_cast<int>(threadIdx.x) / warp_size;
  const Index block = blockIdx.x;
  const int column = static_cast<int>(block % p.across) * warp_size + lane;
  const int matrix = static_cast<int>(block / p.across % p.matrices);
  const Index group = block / p.across / p.matrices, b = group / p.heads, h = group % p.heads;
  const bool inside = column < p.head_dim;

  const Index square = Index{p.size} * p.size, between = p.groups * p.matrices * square;
  const float* const partials = p.partials + (group * p.matrices + matrix) * square + column;
  const W* const from = p.weights[matrix].at(0, 0, h) + column;
  float* const to = p.fast_weights[matrix].at(b, 0, h) + column;
  const auto gradient = [&](int row) {
    const float* part = partials + row * p.size;
    float sum = *part;
#pragma unroll 4
    for (Index split = 1; split < p.splits; ++split) sum += *(part += between);
    return sum;
  };
  const Index from_row = p.weights[matrix].token, to_row = p.fast_weights[matrix].token;
  if constexpr (!Step::needs_column_norm) {
    if (!inside) return;
    for (int row = warp; row < p.head_dim; row += ttt_step_warps)
      to[row * to_row] = to_float(from[row * from_row]) - p.rate * gradient(row);
  } else {
    // The sums wait where the result goes.
    auto& shared = dynamic_shared<TttStepShared>();
    float squares = 0.0f;
    if (inside)
      for (int row = warp; row < p.head_dim; row += ttt_step_warps) {
        const float sum = gradient(row), g = p.factor * sum;
        squares = fmaf(g, g, squares);
        to[row * to_row] = sum;
      }
    shared.squares[warp][lane] = squares;
    __syncthreads();
    squares = 0.0f;
    for (int i = 0; i < ttt_step_warps; ++i) squares += shared.squares[i][lane];
    const float rate = Step::rate(p.inner_lr, p.factor, sqrtf(squares));
    if (inside)
      for (int row = warp; row < p.head_dim; row += ttt_step_warps)
        to[row * to_row] = to_float(from[row * from_row]) - rate * to[row * to_row];
  }
}

template <class Model, class Step, class W>
[[nodiscard]] Status ttt_step(const Cuda& ctx, const TttWeights<W>& weights, const float* partials,
                              Index splits, Index tokens, int size, const FastWeights<float>& fast_weights,
                              const TttOptions<W>& options) {
  static_assert(!Step::needs_column_norm || requires(float x) {
    { Step::rate(x, x, x) } -> std::same_as<float>;
  });
  const Index heads = fast_weights.w1.extent(1), d = fast_weights.w1.extent(2);
  const Index groups = fast_weights.w1.extent(0) * heads;
  const double scale = options.scale.value_or(1.0 / std::sqrt(static_cast<double>(d)));
  const double factor = scale / static_cast<double>(tokens);
  TttStepParameters<W> p{.partials = partials,
                         .groups = groups,
                         .splits = splits,
                         .heads = heads,
                         .across = ceil_div(d, warp_size),
                         .matrices = matrices<Model>,
                         .head_dim = static_cast<int>(d),
                         .size = size,
                         .inner_lr = static_cast<float>(options.inner_lr),
                         .factor = static_cast<float>(factor),
                         .rate = static_cast<float>(Step::rate(options.inner_lr, factor, 0.0))};
  for (int i = 0; i < matrices<Model>; ++i) {
    p.weights[i] = {weights[i].data, 0, weights[i].stride(1), weights[i].stride(0)};
    p.fast_weights[i] = {fast_weights[i].data, fast_weights[i].stride(0), fast_weights[i].stride(2),
                         fast_weights[i].stride(1)};
  }
  return launch(ctx, "ttt_step", ttt_step_kernel<Step, W>, Grid{p.across * matrices<Model> * groups},
                ttt_step_warps * warp_size, Step::needs_column_norm ? sizeof(TttStepShared) : 0, p);
}

// ---- the two halves ----

// Whether there are heads that can go the way of tensor cores.
template <class Model, class Loss, class T>
inline constexpr bool may_use_ttt_mma = has_ttt_mma<Model, Loss> && sizeof(T) == 2;

// Tokens are counted in ints by the kernels.
[[nodiscard]] constexpr Status check_ttt_tokens(Index tokens, const char* what) {
  constexpr Index most = Index{1} << 30;
  return tokens <= most ? Status{} : fail(Code::option, what, most, tokens);
}

// Of an update; a query of the workspace may come with empty shapes.
template <class T, class W>
[[nodiscard]] Index ttt_mma_split_tokens(const TensorView<T, 4>& k, const TttOptions<W>& options) {
  const auto positive = [](Index x) { return std::max<Index>(x, 1); };
  return ttt_mma_split_tokens(positive(k.extent(0) * k.extent(2)), positive(k.extent(1)),
                              options.prologue.k_conv, options.prologue.grid);
}
template <class T, class W>
[[nodiscard]] Index ttt_mma_splits(const TensorView<T, 4>& k, const TttOptions<W>& options) {
  return ceil_div(k.extent(1), ttt_mma_split_tokens(k, options));
}

// What either way needs, so that the size does not depend on where views lie in memory.
struct TttUpdateScratch {
  TokenStats<float> stats{};
  TttPlainScratch plain{};
  float* partials = nullptr;

  template <class Model, class T, class W>
  [[nodiscard]] static TttUpdateScratch take(Carver& carver, const TensorView<T, 4>& k,
                                             const TttOptions<W>& options) {
    const TttPrologue<W>& prologue = options.prologue;
    const Index groups = k.extent(0) * k.extent(2);
    TttUpdateScratch s;
    if (prologue.key_norm)
      s.stats = take_token_stats<float>(carver, k.extent(0), k.extent(1), k.extent(2) * k.extent(3));
    s.plain = take_ttt_plain_update<Model>(carver, k);
    // The plain way has the larger matrices; the other may have more splits.
    const Index splits = std::max(ttt_plain_splits(k), ttt_mma_splits(k, options));
    s.partials = carver.take<float>(splits * groups * matrices<Model> *
                                    ttt_plain_update_shape<Model>(k.extent(3)).matrix());
    return s;
  }
};

// The fast weights of a call that does not hand them out.
template <class Model>
[[nodiscard]] FastWeights<float> take_fast_weights(Carver& carver, Index batch, Index heads, Index head_dim) {
  FastWeights<float> fast;
  TensorView<float, 4>* const views[] = {&fast.w1, &fast.w2, &fast.w3};
  for (int i = 0; i < matrices<Model>; ++i)
    *views[i] = {carver.take<float>(batch * heads * head_dim * head_dim), {batch, heads, head_dim, head_dim}};
  return fast;
}

template <class Model, class Loss, class Step, class T, class W>
[[nodiscard]] Status ttt_learn(const Cuda& ctx, const TensorView<const T, 4>& k,
                               const TensorView<const T, 4>& v, const TttWeights<W>& weights,
                               const TttUpdateScratch& scratch, const FastWeights<float>& fast_weights,
                               const TttOptions<W>& options) {
  const TttPrologue<W>& prologue = options.prologue;
  const TokenStats<float>* stats = nullptr;
  if (prologue.key_norm) {
    stats = &scratch.stats;
    const Status status = token_stats(ctx, k, prologue.key_norm_eps, true, scratch.stats);
    if (!status.ok()) return status;
  }
  if constexpr (may_use_ttt_mma<Model, Loss, T>) {
    if (ttt_mma_fits(k, v)) {
      const Index splits = ttt_mma_splits(k, options);
      const Status status = ttt_mma_update<Model, Loss, T, W>(
          ctx, k, v, weights, stats, splits, ttt_mma_split_tokens(k, options), scratch.partials, options);
      if (!status.ok()) return status;
      return ttt_step<Model, Step, W>(ctx, weights, scratch.partials, splits, k.extent(1),
                                      static_cast<int>(k.extent(3)), fast_weights, options);
    }
  }
  const Status status = ttt_plain_update<Model, Loss, T, W>(ctx, k, v, weights, stats, scratch.plain,
                                                            scratch.partials, options);
  if (!status.ok()) return status;
  return ttt_step<Model, Step, W>(ctx, weights, scratch.partials, ttt_plain_splits(k), k.extent(1),
                                  ttt_plain_update_shape<Model>(k.extent(3)).padded, fast_weights, options);
}

template <class Model, class T, class W>
[[nodiscard]] Status ttt_answer(const Cuda& ctx, const TensorView<const T, 4>& q,
                                const FastWeights<const float>& fast_weights, const TensorView<T, 4>& out,
                                const TttPlainScratch& scratch, const TttOptions<W>& options) {
  if constexpr (may_use_ttt_mma<Model, InnerProduct, T>) {
    if (ttt_mma_fits(q, out)) return ttt_mma_apply<Model, T, W>(ctx, q, fast_weights, out, options);
  }
  return ttt_plain_apply<Model, T, W>(ctx, q, fast_weights, out, scratch, options);
}

// All of a call of ttt.
struct TttCudaScratch {
  TttUpdateScratch update{};
  FastWeights<float> fast_weights{};
  TttPlainScratch apply{};

  template <class Model, class T, class W>
  [[nodiscard]] static TttCudaScratch take(Carver& carver, const TensorView<const T, 4>& q,
                                           const TensorView<const T, 4>& k, const TttOptions<W>& options) {
    TttCudaScratch s;
    s.update = TttUpdateScratch::take<Model>(carver, k, options);
    s.fast_weights = take_fast_weights<Model>(carver, k.extent(0), k.extent(2), k.extent(3));
    s.apply = take_ttt_plain_apply<Model>(carver, q);
    return s;
  }
};

}  // namespace detail::inline LINATTN_TARGET

inline namespace LINATTN_TARGET {

// Bytes of scratch: the statistics of the keys, the weights in float and the partial gradients, of which there are
// at most 1024, or one a batch entry and head.
template <InnerModel Model = SwiGlu, InnerLoss Loss = InnerProduct, InnerStep Step = Plain, Storage T,
          Storage W>
[[nodiscard]] std::size_t ttt_workspace(const Cuda&, In<T, 4> q, In<T, 4> k, In<T, 4>, const TttWeights<W>&,
                                        const TensorView<T, 4>&,
                                        const std::type_identity_t<TttOptions<W>>& options = {}) {
  Carver carver(Workspace{});
  (void)detail::TttCudaScratch::take<Model, T, W>(carver, q, k, options);
  return carver.used();
}

// out = f(q; W - inner_lr * dl/dW (k, v)). See ttt.hpp.
template <InnerModel Model = SwiGlu, InnerLoss Loss = InnerProduct, InnerStep Step = Plain, Storage T,
          Storage W>
[[nodiscard]] Status ttt(const Cuda& ctx, In<T, 4> q, In<T, 4> k, In<T, 4> v, const TttWeights<W>& weights,
                         const TensorView<T, 4>& out,
                         const std::type_identity_t<TttOptions<W>>& options = {}) {
  LINATTN_REQUIRE_DEVICE_STORAGE(T);
  LINATTN_REQUIRE_DEVICE_STORAGE(W);
  Status status = detail::check_ttt<Model, T, W>(q, k, v, weights, out, options);
  if (!status.ok()) return status;
  status = detail::first_failure(detail::check_ttt_tokens(q.extent(1), "q, tokens (at most)"),
                                 detail::check_ttt_tokens(k.extent(1), "k, tokens (at most)"));
  if (!status.ok()) return status;
  Carver carver(ctx.workspace);
  const auto scratch = detail::TttCudaScratch::take<Model, T, W>(carver, q, k, options);
  status = carver.check("ttt, workspace");
  if (!status.ok()) return status;

  status = detail::ttt_learn<Model, Loss, Step, T, W>(ctx, k, v, weights, scratch.update,
                                                      scratch.fast_weights, options);
  if (!status.ok()) return status;
  return detail::ttt_answer<Model, T, W>(ctx, q, scratch.fast_weights, out, scratch.apply, options);
}

template <InnerModel Model = SwiGlu, InnerLoss Loss = InnerProduct, InnerStep Step = Plain, class T,
          Storage W>
[[nodiscard]] std::size_t ttt_update_workspace(const Cuda&, const TensorView<T, 4>& k,
                                               In<std::remove_const_t<T>, 4>, const TttWeights<W>&,
                                               const FastWeights<Compute<T>>&,
                                               const std::type_identity_t<TttOptions<W>>& options = {}) {
  Carver carver(Workspace{});
  (void)detail::TttUpdateScratch::take<Model>(carver, k, options);
  return carver.used();
}

// fast_weights = W - inner_lr * dl/dW (k, v), for each batch entry and head. T is that of k. See ttt.hpp.
template <InnerModel Model = SwiGlu, InnerLoss Loss = InnerProduct, InnerStep Step = Plain, class T,
          Storage W>
[[nodiscard]] Status ttt_update(const Cuda& ctx, const TensorView<T, 4>& k, In<std::remove_const_t<T>, 4> v,
                                const TttWeights<W>& weights, const FastWeights<Compute<T>>& fast_weights,
                                const std::type_identity_t<TttOptions<W>>& options = {}) {
  LINATTN_REQUIRE_DEVICE_STORAGE(T);
  LINATTN_REQUIRE_DEVICE_STORAGE(W);
  using Key = std::remove_const_t<T>;
  const TensorView<const Key, 4> keys = k;
  Status status = detail::check_ttt_update<Model, Key, W>(keys, v, weights, fast_weights, options);
  if (!status.ok()) return status;
  status = detail::check_ttt_tokens(k.extent(1), "k, tokens (at most)");
  if (!status.ok()) return status;
  Carver carver(ctx.workspace);
  const auto scratch = detail::TttUpdateScratch::take<Model>(carver, keys, options);
  status = carver.check("ttt_update, workspace");
  if (!status.ok()) return status;
  return detail::ttt_learn<Model, Loss, Step, Key, W>(ctx, keys, v, weights, scratch, fast_weights, options);
}

template <InnerModel Model = SwiGlu, Storage T, Storage W = T>
[[nodiscard]] std::size_t ttt_apply_workspace(const Cuda&, In<T, 4> q,
                                              const std::type_identity_t<FastWeights<const Compute<T>>>&,
                                              const TensorView<T, 4>&, const TttOptions<W>& = {}) {
  Carver carver(Workspace{});
  (void)detail::take_ttt_plain_apply<Model>(carver, q);
  return carver.used();
}

// out = f(q; fast_weights). Of the options only the prologue's part for q matters. See ttt.hpp.
template <InnerModel Model = SwiGlu, Storage T, Storage W = T>
[[nodiscard]] Status ttt_apply(const Cuda& ctx, In<T, 4> q,
                               const std::type_identity_t<FastWeights<const Compute<T>>>& fast_weights,
                               const TensorView<T, 4>& out, const TttOptions<W>& options = {}) {
  LINATTN_REQUIRE_DEVICE_STORAGE(T);
  LINATTN_REQUIRE_DEVICE_STORAGE(W);
  Status status = detail::check_ttt_apply<Model, T, W>(q, fast_weights, out, options);
  if (!status.ok()) return status;
  status = detail::check_ttt_tokens(q.extent(1), "q, tokens (at most)");
  if (!status.ok()) return status;
  Carver carver(ctx.workspace);
  const auto scratch = detail::take_ttt_plain_apply<Model>(carver, q);
  status = carver.check("ttt_apply, workspace");
  if (!status.ok()) return status;
  return detail::ttt_answer<Model, T, W>(ctx, q, fast_weights, out, scratch, options);
}

}  // namespace LINATTN_TARGET
LINATTN_END

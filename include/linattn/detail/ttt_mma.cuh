// TTT on tensor cores, for heads of at most 64 channels stored in 16 bits: where it applies, and its launches.
// The kernels are in ttt_mma_update.cuh and ttt_mma_apply.cuh.
//
// Sums are in float; what enters a product is rounded to T: the keys and queries behind the prologue, the weights
// W and W', the features a, their errors D * da/dz and, if the loss predicts, the errors e. With half, features and
// errors beyond 65504 overflow.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/detail/cuda.cuh>
#include <linattn/detail/mma_tiles.cuh>
#include <linattn/detail/token_stats.cuh>
#include <linattn/detail/ttt_mma_apply.cuh>
#include <linattn/detail/ttt_mma_load.cuh>
#include <linattn/detail/ttt_mma_update.cuh>
#include <linattn/ops/ttt.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

// One chained matrix at most; a loss whose error is minus the target, or one of the prediction.
template <class Model, class Loss>
inline constexpr bool has_ttt_mma = Model::chained <= 1 &&
                                    (Loss::needs_prediction || std::is_same_v<Loss, InnerProduct>);

// Whether k and v, or q and out, can go the way of tensor cores.
template <class T, class U>
[[nodiscard]] bool ttt_mma_fits(const TensorView<T, 4>& a, const TensorView<U, 4>& b) {
  constexpr Index most_tokens = Index{1} << 30;  // of which a kernel's ints may hold twice as many
  const Index d = a.extent(3);
  return sizeof(T) == 2 && d <= 64 && d % 8 == 0 && a.extent(1) <= most_tokens && has_aligned_rows(a) &&
         has_aligned_rows(b);
}

// How far the tokens that a token's conv reads lie apart from it, where they are kept in the ring: those of wider
// grids, whose rows would fill shared memory, are read through the L2 cache.
template <class W>
[[nodiscard]] Index ttt_mma_reach(const TensorView<const W, 4>& conv, const TokenGrid& grid) {
  constexpr Index widest = 128;
  return conv.extent(0) == 0 || grid.width > widest ? 0 : grid.width + 1;
}

// Tokens of a block, from the shapes alone. Some 256 blocks, of which most GPUs hold all at once; but not less than
// 512 tokens each, that its weights and gradients weigh little, nor so few that its halo is more than 5 % of the bytes
// of ttt. In rows of 64 channels a block moves 5 tokens and 1344 for its three matrices (14 bytes an element), and the
// halo, `reach` tokens on either side of k and of q, is 4 reach: 4.7 % with 17 reach - 256 tokens.
template <class W>
[[nodiscard]] Index ttt_mma_split_tokens(Index groups, Index tokens, const TensorView<const W, 4>& conv,
                                         const TokenGrid& grid) {
  const Index most =
      std::min(256 / groups, tokens / std::max<Index>(512, 17 * ttt_mma_reach(conv, grid) - 256));
  return ceil_div(ceil_div(tokens, std::max<Index>(most, 1)), ttt_mma_tile) * ttt_mma_tile;
}

// k or q with the conv of its side; no norm yet.
template <class T, class W>
[[nodiscard]] TttTokens<T, W> ttt_tokens(const TensorView<const T, 4>& x, const TensorView<const W, 4>& conv,
                                         const TensorView<const W, 1>& bias, const TokenGrid& grid) {
  TttTokens<T, W> tokens{.x = rows(x),
                         .tokens = static_cast<int>(x.extent(1)),
                         .heads = static_cast<int>(x.extent(2)),
                         .head_dim = static_cast<int>(x.extent(3))};
  if (conv.extent(0) == 0) return tokens;
  tokens.taps = conv.data;
  tokens.tap_channel = conv.stride(0);
  tokens.tap_row = conv.stride(2);
  tokens.bias = bias.extent(0) == 0 ? nullptr : bias.data;
  tokens.grid_begin = static_cast<int>(grid.offset);
  tokens.grid_end = static_cast<int>(grid.offset + grid.tokens());
  tokens.grid_width = static_cast<int>(grid.width);
  if (const Index reach = ttt_mma_reach(conv, grid); reach > 0) {
    constexpr Index run = 16;  // of the loader's threads: begins where no run of an aligned grid is cut
    tokens.halo = static_cast<int>(ceil_div(reach, run) * run);
    tokens.ring = ttt_mma_tile + 2 * tokens.halo;
  }
  return tokens;
}

// The gradients of all matrices, dl/dW without the factor scale / N, as partial sums
// [split, batch * heads, matrix, d, d]: split s has the tokens [s, s + 1) * split_tokens. `stats`: of the key norm, or
// null.
template <class Model, class Loss, class T, class W>
[[nodiscard]] Status ttt_mma_update(const Cuda& ctx, const TensorView<const T, 4>& k,
                                    const TensorView<const T, 4>& v, const TttWeights<W>& weights,
                                    const TokenStats<float>* stats, Index splits, Index split_tokens,
                                    float* partials, const TttOptions<W>& options) {
  const TttPrologue<W>& prologue = options.prologue;
  TttUpdateParameters<T, W> p{
      .keys = ttt_tokens<T, W>(k, prologue.k_conv, prologue.k_conv_bias, prologue.grid),
      .values = rows(v),
      .partials = partials,
      .groups = k.extent(0) * k.extent(2),
      .split_tokens = static_cast<int>(split_tokens)};
  if (stats != nullptr) {
    p.keys.shift = stats->shift;
    p.keys.delta = stats->delta;
    p.keys.scale = stats->scale;
  }
  for (int i = 0; i < matrices<Model>; ++i)
    p.weights[i] = {weights[i].data, 0, weights[i].stride(1), weights[i].stride(0)};
  const auto run = [&](auto width) {
    constexpr int w = width;
    const std::size_t shared =
        sizeof(TttUpdateShared<Model, Loss, w>) + static_cast<std::size_t>(p.keys.ring) * w * sizeof(T);
    return launch(ctx, "ttt_mma_update", ttt_mma_update_kernel<Model, Loss, T, W, w>, Grid{splits * p.groups},
                  2 * w, shared, p);
  };
  return p.keys.head_dim <= 32 ? run(std::integral_constant<int, 32>{})
                               : run(std::integral_constant<int, 64>{});
}

// out = f(q; fast_weights)
template <class Model, class T, class W>
[[nodiscard]] Status ttt_mma_apply(const Cuda& ctx, const TensorView<const T, 4>& q,
                                   const FastWeights<const float>& fast_weights, const TensorView<T, 4>& out,
                                   const TttOptions<W>& options) {
  const TttPrologue<W>& prologue = options.prologue;
  const Index groups = q.extent(0) * q.extent(2);
  const Index split_tokens = ttt_mma_split_tokens(groups, q.extent(1), prologue.q_conv, prologue.grid);
  TttApplyParameters<T, W> p{
      .queries = ttt_tokens<T, W>(q, prologue.q_conv, prologue.q_conv_bias, prologue.grid),
      .out = rows(out),
      .groups = groups,
      .split_tokens = static_cast<int>(split_tokens)};
  for (int i = 0; i < matrices<Model>; ++i)
    p.weights[i] = {fast_weights[i].data, fast_weights[i].stride(0), fast_weights[i].stride(2),
                    fast_weights[i].stride(1)};
  const auto run = [&](auto width) {
    constexpr int w = width;
    const std::size_t shared =
        sizeof(TttApplyShared<Model, w>) + static_cast<std::size_t>(p.queries.ring) * w * sizeof(T);
    return launch(ctx, "ttt_mma_apply", ttt_mma_apply_kernel<Model, T, W, w>,
                  Grid{ceil_div(q.extent(1), split_tokens) * groups}, 128, shared, p);
  };
  return p.queries.head_dim <= 32 ? run(std::integral_constant<int, 32>{})
                                  : run(std::integral_constant<int, 64>{});
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

// Mean and variance of each channel over the tokens, in one read of the data. instance_norm is built on this,
// and the fused prologue of ttt calls the same functions, so that both give the same bits.
//
// Tokens are cut into chunks (by their number alone), chunks into tiles of 8. A tile gives its mean and its
// sum of squared deviations; they join those of the tiles before it by the update of Chan, Golub and LeVeque
// ("Updating formulae and a pairwise algorithm for computing sample variances", 1979). All is relative to a
// shift, the mean of the chunk's first tile, so a large common offset of the keys costs no digits. The chunks
// are joined in their order, in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/detail/lanes.hpp>
#include <linattn/detail/simd.hpp>
#include <linattn/detail/stats_chunks.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

template <class V>
[[nodiscard]] LINATTN_INLINE V normalize(V x, V shift, V delta, V scale) {
  return ((x - shift) - delta) * scale;
}

// Sum over `rows` rows, `step` apart, of term(x).
template <class P, class Rows, class T, class Lanes, class Term>
[[nodiscard]] LINATTN_INLINE P sum_rows(const T* x, Index step, Rows rows, const Lanes& lanes,
                                        const Term& term) {
  P sum = P::zero();
  for (Index r = 0; r < rows; ++r) sum = term(lanes.load(x + r * step), sum);
  return sum;
}

// One tile of `rows` tokens joins the `before` tokens in front of it.
template <class C, class Rows, class T>
LINATTN_INLINE void join_tile(const T* tile, Index step, Rows rows, Index before, Index channels,
                              const C* shift, C* delta, C* squares) {
  using P = Pack<C>;
  const auto count = static_cast<C>(Index{rows});
  const P inverse(C(1) / count);
  const P weight(count / static_cast<C>(before + rows));
  const P joint(static_cast<C>(before) * (count / static_cast<C>(before + rows)));
  for_each_pack<C>(0, channels, [&](Index c, auto lanes) {
    const P s = lanes.load(shift + c);
    const P mean =
        inverse * sum_rows<P>(tile + c, step, rows, lanes, [&](P x, P sum) { return sum + (x - s); });
    // x - (s + mean) would round the centre to the grid of x, which a large offset makes coarse.
    const P square = sum_rows<P>(tile + c, step, rows, lanes, [&](P x, P sum) {
      const P deviation = (x - s) - mean;
      return fma(deviation, deviation, sum);
    });
    const P old = lanes.load(delta + c), apart = mean - old;
    lanes.store(delta + c, fma(apart, weight, old));
    lanes.store(squares + c, fma(apart * apart, joint, lanes.load(squares + c) + square));
  });
}

// One chunk: `tokens` rows of `channels` elements, `step` apart.
template <class C, class T>
LINATTN_NOINLINE void chunk_stats(const T* x, Index step, Index tokens, Index channels, C* shift, C* delta,
                                  C* squares) {
  using P = Pack<C>;
  using WholeTile = std::integral_constant<Index, stats_tile>;
  for_each_pack<C>(0, channels, [&](Index c, auto lanes) {
    const Index rows = std::min(stats_tile, tokens);
    const P first = lanes.load(x + c);
    const P sum =
        sum_rows<P>(x + c, step, rows, lanes, [&](P v, P partial) { return partial + (v - first); });
    lanes.store(shift + c, fma(sum, P(C(1) / static_cast<C>(rows)), first));
    lanes.store(delta + c, P::zero());
    lanes.store(squares + c, P::zero());
  });
  Index t = 0;
  for (; t + stats_tile <= tokens; t += stats_tile)
    join_tile(x + t * step, step, WholeTile{}, t, channels, shift, delta, squares);
  if (t < tokens) join_tile(x + t * step, step, tokens - t, t, channels, shift, delta, squares);
}

// Joins the chunks of one sample, channels [begin, begin + count), count <= stats_block.
inline constexpr Index stats_block = 128;
template <class C>
LINATTN_NOINLINE void join_chunk_stats(const C* partial, Index tokens, Index channels, Index begin,
                                       Index count, double eps, bool divide_by_std, C* shift, C* delta,
                                       C* scale) {
  const Index chunk = stats_chunk(tokens), chunks = stats_chunks(tokens);
  const double per_token = 1.0 / static_cast<double>(tokens);
  const auto weight = [&](Index k) { return static_cast<double>(std::min(chunk, tokens - k * chunk)); };
  const auto row = [&](Index k, Index which) { return partial + (k * 3 + which) * channels + begin; };
  const C* const base = row(0, 0);  // means are relative to the first chunk's shift
  double mean[stats_block] = {}, squares[stats_block] = {};
  for (Index k = 0; k < chunks; ++k) {
    const C *const s = row(k, 0), *const d = row(k, 1);
    const double w = weight(k) * per_token;
    for (Index c = 0; c < count; ++c)
      mean[c] += w * ((static_cast<double>(s[c]) - static_cast<double>(base[c])) + static_cast<double>(d[c]));
  }
  for (Index k = 0; k < chunks; ++k) {
    const C *const s = row(k, 0), *const d = row(k, 1), *const q = row(k, 2);
    const double w = weight(k);
    for (Index c = 0; c < count; ++c) {
      const double apart =
          ((static_cast<double>(s[c]) - static_cast<double>(base[c])) + static_cast<double>(d[c])) - mean[c];
      squares[c] += static_cast<double>(q[c]) + w * (apart * apart);
    }
  }
  for (Index c = 0; c < count; ++c) {
    const auto first = static_cast<double>(base[c]);
    shift[c] = static_cast<C>(first + mean[c]);
    delta[c] = static_cast<C>((first - static_cast<double>(shift[c])) + mean[c]);
  }
  for (Index c = 0; c < count; ++c) {
    // A constant channel with eps = 0 gives 0, the limit, and not 0 / 0.
    const double spread = squares[c] * per_token + eps;
    scale[c] = !divide_by_std ? C(1) : spread == 0.0 ? C(0) : static_cast<C>(1.0 / std::sqrt(spread));
  }
}

// Fills `stats` for x (batch, token, head, channel); eps is added to the biased variance. Its scratch holds
// [batch, chunks, 3, channels]: shift, delta and squared deviations of each chunk.
template <class C, class T, ParallelPolicy P>
void token_stats(const P& parallel, TensorView<const T, 4> x, double eps, bool divide_by_std,
                 const TokenStats<C>& stats) {
  const Index batch = x.extent(0), tokens = x.extent(1), channels = x.extent(2) * x.extent(3);
  if (heads_are_dense(x)) x = merge_heads(x);
  const Index heads = x.extent(2), head_dim = x.extent(3);
  const Index chunk = stats_chunk(tokens), chunks = stats_chunks(tokens);
  parallel.run(batch * chunks * heads, [&](Index task, Index) {
    const Index h = task % heads, k = task / heads % chunks, b = task / heads / chunks;
    C* const partial = stats.partial + (b * chunks + k) * 3 * channels + h * head_dim;
    chunk_stats<C>(x.pointer(b, k * chunk, h), x.step(1), std::min(chunk, tokens - k * chunk), head_dim,
                   partial, partial + channels, partial + 2 * channels);
  });
  const Index blocks = (channels + stats_block - 1) / stats_block;
  parallel.run(batch * blocks, [&](Index task, Index) {
    const Index begin = task % blocks * stats_block, b = task / blocks, first = b * channels + begin;
    join_chunk_stats(stats.partial + b * chunks * 3 * channels, tokens, channels, begin,
                     std::min(stats_block, channels - begin), eps, divide_by_std, stats.shift + first,
                     stats.delta + first, stats.scale + first);
  });
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

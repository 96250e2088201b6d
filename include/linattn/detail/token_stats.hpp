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

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/detail/lanes.hpp>
#include <linattn/detail/simd.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail {

// What normalises a channel: y = ((x - shift) - delta) * scale. The mean is shift + delta, more exactly than
// one number of type C could hold it. Each array is [batch, channels].
template <class C>
struct TokenStats {
  C* shift = nullptr;
  C* delta = nullptr;
  C* scale = nullptr;
  C* partial = nullptr;  // [batch, chunks, 3, channels]: shift, delta and squared deviations of each chunk
};

template <class V>
[[nodiscard]] LINATTN_INLINE V normalize(V x, V shift, V delta, V scale) {
  return ((x - shift) - delta) * scale;
}

// At most 32 chunks, so that the scratch does not grow with the tokens; at least 128 tokens each.
inline constexpr Index stats_tile = 8;
[[nodiscard]] constexpr Index stats_chunk(Index tokens) {
  const Index thirty_second = (tokens + 31) / 32;
  return std::max<Index>(128, (thirty_second + stats_tile - 1) / stats_tile * stats_tile);
}
[[nodiscard]] constexpr Index stats_chunks(Index tokens) {
  return (tokens + stats_chunk(tokens) - 1) / stats_chunk(tokens);
}

template <class C>
[[nodiscard]] TokenStats<C> take_token_stats(Carver& carver, Index batch, Index tokens, Index channels) {
  TokenStats<C> stats;
  stats.shift = carver.take<C>(batch * channels);
  stats.delta = carver.take<C>(batch * channels);
  stats.scale = carver.take<C>(batch * channels);
  stats.partial = carver.take<C>(batch * stats_chunks(tokens) * 3 * channels);
  return stats;
}

// One chunk: `tokens` rows of `channels` elements, `step` apart.
template <class C, class T>
LINATTN_NOINLINE void chunk_stats(const T* x, Index step, Index tokens, Index channels, C* shift, C* delta,
                                  C* squares) {
  using P = Pack<C>;
  for_each_pack<C>(0, channels, [&](Index c, auto lanes) {
    const Index rows = std::min(stats_tile, tokens);
    const P first = lanes.load(x + c);
    P sum = P::zero();
    for (Index r = 1; r < rows; ++r) sum += lanes.load(x + r * step + c) - first;
    lanes.store(shift + c, first + sum * P(C(1) / static_cast<C>(rows)));
    lanes.store(delta + c, P::zero());
    lanes.store(squares + c, P::zero());
  });
  for (Index t = 0; t < tokens; t += stats_tile) {
    const Index rows = std::min(stats_tile, tokens - t);
    const T* const tile = x + t * step;
    const P inverse(C(1) / static_cast<C>(rows));
    const P weight(static_cast<C>(rows) / static_cast<C>(t + rows));
    const P joint(static_cast<C>(t) * (static_cast<C>(rows) / static_cast<C>(t + rows)));
    for_each_pack<C>(0, channels, [&](Index c, auto lanes) {
      const P s = lanes.load(shift + c);
      P sum = P::zero();
      for (Index r = 0; r < rows; ++r) sum += lanes.load(tile + r * step + c) - s;
      const P mean = sum * inverse;
      // An error e of the centre adds rows * e^2 to the squares: its rounding does not matter.
      const P centre = s + mean;
      P square = P::zero();
      for (Index r = 0; r < rows; ++r) {
        const P deviation = lanes.load(tile + r * step + c) - centre;
        square = fma(deviation, deviation, square);
      }
      const P before = lanes.load(delta + c);
      const P apart = mean - before;
      lanes.store(delta + c, fma(apart, weight, before));
      lanes.store(squares + c, fma(apart * apart, joint, lanes.load(squares + c) + square));
    });
  }
}

// Joins the chunks of one sample, channels [begin, end).
template <class C>
void join_chunk_stats(const C* partial, Index tokens, Index channels, Index begin, Index end, double eps,
                      bool divide_by_std, C* shift, C* delta, C* scale) {
  const Index chunk = stats_chunk(tokens), chunks = stats_chunks(tokens);
  const auto number = static_cast<double>(tokens);
  for (Index c = begin; c < end; ++c) {
    const auto base = static_cast<double>(partial[c]);
    const auto row = [&](Index k, Index which) {
      return static_cast<double>(partial[(k * 3 + which) * channels + c]);
    };
    const auto weight = [&](Index k) { return static_cast<double>(std::min(chunk, tokens - k * chunk)); };
    const auto mean_of = [&](Index k) { return (row(k, 0) - base) + row(k, 1); };
    double sum = 0.0;
    for (Index k = 0; k < chunks; ++k) sum += weight(k) * mean_of(k);
    const double mean = sum / number;  // relative to base
    double squares = 0.0;
    for (Index k = 0; k < chunks; ++k) {
      const double apart = mean_of(k) - mean;
      squares += row(k, 2) + weight(k) * apart * apart;
    }
    shift[c] = static_cast<C>(base + mean);
    delta[c] = static_cast<C>((base - static_cast<double>(shift[c])) + mean);
    // A constant channel with eps = 0 gives 0, the limit, and not 0 / 0.
    const double spread = squares / number + eps;
    scale[c] = !divide_by_std ? C(1) : spread == 0.0 ? C(0) : static_cast<C>(1.0 / std::sqrt(spread));
  }
}

// Fills `stats` for x (batch, token, head, channel); eps is added to the biased variance.
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
    chunk_stats<C>(x.pointer(b, k * chunk, h), x.stride(1), std::min(chunk, tokens - k * chunk), head_dim,
                   partial, partial + channels, partial + 2 * channels);
  });
  constexpr Index block = 256;
  const Index blocks = (channels + block - 1) / block;
  parallel.run(batch * blocks, [&](Index task, Index) {
    const Index begin = task % blocks * block, b = task / blocks;
    join_chunk_stats(stats.partial + b * chunks * 3 * channels, tokens, channels, begin,
                     std::min(begin + block, channels), eps, divide_by_std, stats.shift + b * channels,
                     stats.delta + b * channels, stats.scale + b * channels);
  });
}

}  // namespace detail
LINATTN_END

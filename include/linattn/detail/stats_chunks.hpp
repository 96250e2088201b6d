// What the statistics of each channel over the tokens are, and the chunks of tokens that they are made of: shared by
// all backends.
#pragma once

#include <algorithm>

#include <linattn/core/context.hpp>
#include <linattn/core/status.hpp>
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
  C* partial = nullptr;  // 3 numbers a batch, chunk and channel: scratch of token_stats
};

}  // namespace detail

namespace detail::inline LINATTN_TARGET {

// At most 32 chunks, so that the scratch does not grow with the tokens; at least 128 tokens each.
inline constexpr Index stats_tile = 8;
[[nodiscard]] constexpr Index stats_chunk(Index tokens) {
  const Index thirty_second = tokens / 32 + (tokens % 32 != 0 ? 1 : 0);  // no sum that overflows
  return std::max<Index>(128, (thirty_second + stats_tile - 1) / stats_tile * stats_tile);
}
[[nodiscard]] constexpr Index stats_chunks(Index tokens) {
  const Index chunk = stats_chunk(tokens);
  return tokens / chunk + (tokens % chunk != 0 ? 1 : 0);
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

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

// Benchmarks of the ops on a grid of tokens that are not streams alone: neighborhood_attention, ttt_conv.
#include <string>

#include "ops_bench.hpp"

namespace {

using namespace bench;

// 4 k^2 d a token and head: two products with the keys of its window.
template <class T, class Parallel>
void neighborhood(Index kernel, Index side, const Shape& s, Parallel parallel) {
  const std::string variant = std::to_string(kernel) + "x" + std::to_string(kernel);
  add(name("neighborhood_attention", variant, dtype_name<T>, parallel.workers(), s),
      [=](benchmark::State& state) {
        const Attention<T> a(s);
        const linattn::Qkv<T>& in = a.views;
        const linattn::NeighborhoodAttentionOptions options{{0, side, s.tokens / side}, {kernel, kernel}, {}};
        const double rows = static_cast<double>(s.batch * s.heads * s.tokens);
        measure<linattn::Compute<T>>(
            state, parallel, 4 * rows * static_cast<double>(kernel * kernel * s.head_dim),
            static_cast<double>(s.batch * s.tokens),
            [&](const auto& context) {
              return linattn::neighborhood_attention_workspace(context, in.q, in.k, in.v, a.out, options);
            },
            [&](const auto& context) {
              return linattn::neighborhood_attention(context, in.q, in.k, in.v, a.out, options);
            });
      });
}

// 36 FLOPs a token and channel: the gradient of 9 taps, and the convolution. k and v are read, then q, and out is
// written; here k, v and q are the same tokens.
template <class Parallel>
void ttt_conv(Index side, const Shape& s, Parallel parallel) {
  add(name("ttt_conv", "3x3", "f32", parallel.workers(), s), [=](benchmark::State& state) {
    const Stream x(s);
    const Index channels = s.heads * s.head_dim;
    const auto w = random<float>(channels * 9, 0.3f, 2);
    const TensorView<const float, 4> weight(w.data(), {channels, 1, 3, 3});
    const linattn::TttConvOptions options{.grid = {0, side, s.tokens / side}};
    measure<float>(
        state, parallel, 36 * x.tokens() * static_cast<double>(channels), x.tokens(),
        [&](const auto& context) {
          return linattn::ttt_conv_workspace(context, x.in, x.in, x.in, weight, x.out, options);
        },
        [&](const auto& context) {
          return linattn::ttt_conv(context, x.in, x.in, x.in, weight, x.out, options);
        },
        x.bytes(4));
  });
}

// Registered before main, which runs what it finds.
const bool registered = [] {
  for (const Index side : {16, 32, 64}) neighborhood<float>(5, side, {1, 8, 64, side * side}, Serial{});
  for (const Index kernel : {3, 7, 13}) neighborhood<float>(kernel, 32, {1, 8, 64, 1024}, Serial{});
  for (const Index d : {32, 72, 128}) neighborhood<float>(5, 32, {1, 8, d, 1024}, Serial{});
  neighborhood<half>(5, 32, {1, 8, 64, 1024}, Serial{});
  neighborhood<bfloat16>(5, 32, {1, 8, 64, 1024}, Serial{});
  neighborhood<double>(5, 32, {1, 8, 64, 1024}, Serial{});
#if defined(_OPENMP)
  neighborhood<float>(5, 32, {1, 8, 64, 1024}, linattn::OpenMp{2});
#endif
  for (const Index side : {14, 32}) ttt_conv(side, {1, 1, 64, side * side}, Serial{});
  ttt_conv(32, {1, 24, 64, 1024}, Serial{});
  return true;
}();

}  // namespace

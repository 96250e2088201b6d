// What the benchmarks of the ops share: activations, the measurement, names.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include <linattn/cpu.hpp>

namespace bench {

using linattn::bfloat16;
using linattn::Cpu;
using linattn::half;
using linattn::Index;
using linattn::Serial;
using linattn::TensorView;
using linattn::Workspace;

template <class T>
inline constexpr const char* dtype_name = std::is_same_v<T, float>    ? "f32"
                                          : std::is_same_v<T, double> ? "f64"
                                          : std::is_same_v<T, half>   ? "f16"
                                                                      : "bf16";

// Fused multiply-adds a second of one core in type C, as FLOP/s: the best of a few runs of 16 independent
// chains.
template <class C>
double peak_flops() {
  using P = linattn::detail::Pack<C>;
  constexpr int chains = 16, rounds = 100000, repeats = 5;
  double best = 0;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    P sums[chains];
    for (int i = 0; i < chains; ++i) sums[i] = P(C(i));
    P a(C(0.999)), b(C(0.001));
    benchmark::DoNotOptimize(a);
    benchmark::DoNotOptimize(b);
    const auto start = std::chrono::steady_clock::now();
    for (int round = 0; round < rounds; ++round)
      linattn::detail::unroll<chains>(
          [&](auto i) LINATTN_INLINE_LAMBDA { sums[i] = linattn::detail::fma(sums[i], a, b); });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    for (P& sum : sums) benchmark::DoNotOptimize(sum);
    best = std::max(best, 2.0 * rounds * chains * P::size / elapsed.count());
  }
  return best;
}

template <class T>
std::vector<T> random(Index count, float scale, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<T> out(static_cast<std::size_t>(count));
  for (T& value : out) value = linattn::convert<T>(normal(engine));
  return out;
}

struct Shape {
  Index batch, heads, head_dim, tokens;
};

// Activations as a model has them: one packed projection (batch, token, q | k | v).
template <class T>
struct Attention {
  explicit Attention(const Shape& s)
      : packed(random<T>(s.batch * s.tokens * 3 * s.heads * s.head_dim, 1.0f, 1)),
        output(static_cast<std::size_t>(s.batch * s.tokens * s.heads * s.head_dim)),
        views(linattn::unpack_qkv(
            TensorView<T, 3>(packed.data(), {s.batch, s.tokens, 3 * s.heads * s.head_dim}), s.heads)),
        out(output.data(), {s.batch, s.tokens, s.heads, s.head_dim}) {}

  std::vector<T> packed, output;
  linattn::Qkv<T> views;
  TensorView<T, 4> out;
};

// Runs op(context) until the clock is satisfied; workspace(context) says what it needs.
template <class C, class Parallel, class Query, class Op>
void measure(benchmark::State& state, const Parallel& parallel, double flops, double tokens,
             const Query& query, const Op& op, double bytes = 0) {
  std::vector<std::byte> memory(query(Cpu<Parallel>{{}, parallel}));
  const Cpu<Parallel> context{{memory.data(), memory.size()}, parallel};
  if (const linattn::Status status = op(context); !status.ok())
    return state.SkipWithError(linattn::message(status).c_str());
  const double peak = peak_flops<C>() * static_cast<double>(parallel.workers());
  const auto start = std::chrono::steady_clock::now();
  for (auto _ : state) {
    if (!op(context).ok()) return state.SkipWithError("the op failed in the timed loop");
    benchmark::ClobberMemory();
  }
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  const double runs = static_cast<double>(state.iterations()), seconds = elapsed.count();
  state.counters["tokens/s"] = tokens * runs / seconds;
  if (flops > 0) {
    state.counters["FLOP/s"] = flops * runs / seconds;
    state.counters["%peak"] = 100 * flops * runs / peak / seconds;
  }
  if (bytes > 0) state.counters["bytes/s"] = bytes * runs / seconds;
}

inline std::string name(const std::string& op, const std::string& variant, const char* dtype, Index threads,
                        const Shape& s) {
  return op + "/" + variant + "/" + dtype + "/cpu" + std::to_string(threads) + "/" + std::to_string(s.batch) +
         "/" + std::to_string(s.heads) + "/" + std::to_string(s.head_dim) + "/" + std::to_string(s.tokens);
}

template <class Run>
void add(const std::string& full_name, Run run) {
  benchmark::RegisterBenchmark(full_name.c_str(), run)->Unit(benchmark::kMillisecond);
}

// Tokens in and out, for the ops where bytes matter and not FLOPs.
struct Stream {
  explicit Stream(const Shape& s)
      : input(random<float>(s.batch * s.tokens * s.heads * s.head_dim, 1.0f, 1)),
        output(input.size()),
        in(input.data(), {s.batch, s.tokens, s.heads, s.head_dim}),
        out(output.data(), in.extents) {}

  std::vector<float> input, output;
  TensorView<const float, 4> in;
  TensorView<float, 4> out;

  [[nodiscard]] double tokens() const { return static_cast<double>(in.extent(0) * in.extent(1)); }
  [[nodiscard]] double bytes(int passes) const { return passes * 4.0 * static_cast<double>(input.size()); }
};

}  // namespace bench

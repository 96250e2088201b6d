// Benchmarks of the ops on the host: op/variant/dtype/context/B/H/D/N.
//
// Counters: FLOP/s (the op's useful arithmetic, stated at each op), tokens/s, and `of_peak`, the share of the
// fused-multiply-add peak of one core, measured in the same process immediately before (times the threads
// used). After the run, the number of tokens at which TTT overtakes softmax attention is printed for each
// head size.

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "ops_bench.hpp"

namespace {

using namespace bench;

// 4 N^2 d a head: two products.
template <class T, class Parallel>
void softmax(const Shape& s, Parallel parallel) {
  add(name("softmax_attention", "full", dtype_name<T>, parallel.workers(), s), [=](benchmark::State& state) {
    const Attention<T> a(s);
    const auto& [q, k, v] = a.views;
    const double rows = static_cast<double>(s.batch * s.heads * s.tokens);
    measure<linattn::Compute<T>>(
        state, parallel, 4 * rows * static_cast<double>(s.tokens * s.head_dim),
        static_cast<double>(s.batch * s.tokens),
        [&](const auto& context) { return linattn::softmax_attention_workspace(context, q, k, v, a.out); },
        [&](const auto& context) { return linattn::softmax_attention(context, q, k, v, a.out); });
  });
}

// Products of 2 N d^2 a head, with the inner product, which needs no prediction; the prologue's statistics and
// convolutions are not counted.
//            forward  backward  gradients  answers
//   Linear                          1         1
//   Glu         2                   2         2
//   Mlp         1        1          2         2
//   SwiGlu      2        1          3         3
//   Mlp3        2        2          3         3
template <class Model, class T, class Step = linattn::Plain, class Parallel>
void ttt(const char* variant, double flops_per_weight, const Shape& s, Parallel parallel,
         Index grid_height = 0) {
  add(name("ttt", variant, dtype_name<T>, parallel.workers(), s), [=](benchmark::State& state) {
    const Attention<T> a(s);
    const auto& [q, k, v] = a.views;
    const Index d = s.head_dim, channels = s.heads * d;
    const auto w = random<T>(3 * s.heads * d * d, 1.0f / std::sqrt(static_cast<float>(d)), 2);
    const auto conv = random<T>(2 * channels * 10, 0.1f, 3);
    const auto matrix = [&](Index i) {
      return TensorView<const T, 3>(w.data() + i * s.heads * d * d, {s.heads, d, d});
    };
    linattn::TttWeights<T> weights{.w1 = matrix(0)};
    if (linattn::detail::matrices < Model >> 1) weights.w2 = matrix(1);
    if (linattn::detail::matrices < Model >> 2) weights.w3 = matrix(2);
    linattn::TttOptions<T> options;
    if (grid_height > 0) {
      options.prologue.key_norm = true;
      options.prologue.q_conv = {conv.data(), {channels, 1, 3, 3}};
      options.prologue.k_conv = {conv.data() + channels * 9, {channels, 1, 3, 3}};
      options.prologue.q_conv_bias = {conv.data() + channels * 18, {channels}};
      options.prologue.k_conv_bias = {conv.data() + channels * 19, {channels}};
      options.prologue.grid = {0, grid_height, s.tokens / grid_height};
    }
    const double rows = static_cast<double>(s.batch * s.heads * s.tokens);
    measure<linattn::Compute<T>>(
        state, parallel, flops_per_weight * rows * static_cast<double>(d * d),
        static_cast<double>(s.batch * s.tokens),
        [&](const auto& context) {
          return linattn::ttt_workspace<Model, linattn::InnerProduct, Step>(context, q, k, v, weights, a.out,
                                                                            options);
        },
        [&](const auto& context) {
          return linattn::ttt<Model, linattn::InnerProduct, Step>(context, q, k, v, weights, a.out, options);
        });
  });
}

// 2 N in out; D = in = out.
template <class T, class W, class Parallel>
void linear(const Shape& s, Parallel parallel) {
  const std::string variant = std::string("weight_") + dtype_name<W>;
  add(name("linear", variant, dtype_name<T>, parallel.workers(), s), [=](benchmark::State& state) {
    const Index rows = s.batch * s.tokens, width = s.head_dim;
    auto x = random<T>(rows * width, 1.0f, 1);
    const auto w = random<W>(width * width, 0.02f, 2);
    std::vector<T> y(x.size());
    const TensorView<const T, 2> in(x.data(), {rows, width});
    const TensorView<const W, 2> weight(w.data(), {width, width});
    const TensorView<const W, 1> bias;
    const TensorView<T, 2> out(y.data(), {rows, width});
    measure<linattn::Compute<T>>(
        state, parallel, 2.0 * static_cast<double>(rows * width * width), static_cast<double>(rows),
        [&](const auto& context) { return linattn::linear_workspace(context, in, weight, bias, out); },
        [&](const auto& context) { return linattn::linear(context, in, weight, bias, out); });
  });
}

// Two reads and one write of the tokens.
template <class Parallel>
void instance_norm(const Shape& s, Parallel parallel) {
  add(name("instance_norm", "eps1", "f32", parallel.workers(), s), [=](benchmark::State& state) {
    const Stream x(s);
    measure<float>(
        state, parallel, 0, x.tokens(),
        [&](const auto& context) { return linattn::instance_norm_workspace(context, x.in, x.out); },
        [&](const auto& context) { return linattn::instance_norm(context, x.in, x.out); }, x.bytes(3));
  });
}

// One read and one write.
template <class Parallel>
void depthwise_conv(const Shape& s, Index grid_height, Parallel parallel) {
  add(name("depthwise_conv", "residual", "f32", parallel.workers(), s), [=](benchmark::State& state) {
    const Stream x(s);
    const Index channels = s.heads * s.head_dim;
    const auto w = random<float>(channels * 10, 0.1f, 2);
    const TensorView<const float, 4> weight(w.data(), {channels, 1, 3, 3});
    const TensorView<const float, 1> bias(w.data() + channels * 9, {channels});
    const linattn::DepthwiseConvOptions options{.grid = {0, grid_height, s.tokens / grid_height}};
    measure<float>(
        state, parallel, 0, x.tokens(), [](const auto&) { return std::size_t{0}; },
        [&](const auto& context) {
          return linattn::depthwise_conv(context, x.in, weight, bias, x.out, options);
        },
        x.bytes(2));
  });
}

// Remembers times by name, and shows them as the console does.
class Recorder : public benchmark::ConsoleReporter {
 public:
  Recorder() : ConsoleReporter(isatty(STDOUT_FILENO) ? OO_Color : OO_None) {}

  std::map<std::string, double> seconds;

  void ReportRuns(const std::vector<Run>& runs) override {
    for (const Run& run : runs)
      if (!run.error_occurred && run.iterations > 0)
        seconds[run.run_name.function_name] = run.real_accumulated_time / static_cast<double>(run.iterations);
    ConsoleReporter::ReportRuns(runs);
  }
};

// Where the two curves cross: linear in log tokens between the neighbours on either side.
void print_crossover(const std::map<std::string, double>& seconds, Index heads, Index head_dim,
                     const std::vector<Index>& tokens) {
  double previous_gap = 0, previous_log = 0;
  for (const Index n : tokens) {
    const Shape s{1, heads, head_dim, n};
    const auto softmax = seconds.find(name("softmax_attention", "full", "f32", 1, s));
    const auto ttt = seconds.find(name("ttt", "swiglu", "f32", 1, s));
    if (softmax == seconds.end() || ttt == seconds.end()) continue;
    const double gap = std::log(softmax->second / ttt->second), here = std::log2(static_cast<double>(n));
    if (gap >= 0 && previous_gap < 0) {
      const double at = previous_log + (here - previous_log) * previous_gap / (previous_gap - gap);
      std::fprintf(
          stderr,
          "head_dim %3td: TTT SwiGlu overtakes softmax at N = %.0f (by arithmetic alone: 4.5 d = %.0f)\n",
          head_dim, std::exp2(at), 4.5 * static_cast<double>(head_dim));
      return;
    }
    previous_gap = gap, previous_log = here;
  }
}

}  // namespace

int main(int argc, char** argv) {
  const Index heads = 8;
  const std::vector<Index> tokens{64, 128, 256, 512, 1024, 4096};
  for (const Index d : {32, 64, 128}) {
    for (const Index n : tokens) {
      softmax<float>({1, heads, d, n}, Serial{});
      ttt<linattn::SwiGlu, float>("swiglu", 18, {1, heads, d, n}, Serial{});
    }
  }
  for (const Index n : {1024, 4096}) {
    const Index side = n == 1024 ? 32 : 64;
    const Shape s{1, 24, 64, n};
    ttt<linattn::SwiGlu, float>("swiglu+norm+conv", 18, s, Serial{}, side);
    ttt<linattn::SwiGlu, float>("swiglu", 18, s, Serial{});
    ttt<linattn::Mlp, float>("mlp", 12, s, Serial{});
    ttt<linattn::Mlp3, float>("mlp3", 20, s, Serial{});
    ttt<linattn::Glu, float>("glu", 12, s, Serial{});
    ttt<linattn::Glu, float, linattn::ColumnClip>("glu+clip", 12, s, Serial{});
    ttt<linattn::Linear, float>("linear", 4, s, Serial{});
    ttt<linattn::SwiGlu, half>("swiglu", 18, s, Serial{});
    ttt<linattn::SwiGlu, bfloat16>("swiglu", 18, s, Serial{});
    softmax<bfloat16>(s, Serial{});
    instance_norm(s, Serial{});
    depthwise_conv(s, side, Serial{});
#if defined(_OPENMP)
    softmax<float>(s, linattn::OpenMp{2});
    ttt<linattn::SwiGlu, float>("swiglu", 18, s, linattn::OpenMp{2});
#endif
  }
  for (const Index n : {64, 1024, 4096}) {
    linear<float, float>({1, 1, 1536, n}, Serial{});
    linear<float, half>({1, 1, 1536, n}, Serial{});
  }

  // A reporter of our own would silence --benchmark_format=json.
  const bool console = std::none_of(argv, argv + argc, [](const char* argument) {
    return std::string_view(argument).starts_with("--benchmark_format=");
  });
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  Recorder recorder;
  if (console) {
    benchmark::RunSpecifiedBenchmarks(&recorder);
  } else {
    benchmark::RunSpecifiedBenchmarks();
  }
  for (const Index d : {32, 64, 128}) print_crossover(recorder.seconds, heads, d, tokens);
  benchmark::Shutdown();
}

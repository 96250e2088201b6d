// Times the ops on a CUDA device at SD3.5 Medium's sizes, bf16: a line of JSON about the device, then one for each op and
// size, which bench/roofline.py prints beside what it predicts. The calls are captured in a graph, so that a time has no
// part of the host's. Exits with 77 where there is no device.

#include <linattn/cuda.cuh>

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

namespace {

using linattn::Cuda;
using linattn::Index;
using linattn::Status;
using linattn::TensorView;
using T = linattn::bfloat16;

void require(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "cuda_bench: %s failed\n", what);
  std::exit(1);
}
#define REQUIRE_CUDA(call) require((call) == cudaSuccess, #call)

// Device memory, never given back: the program ends.
std::byte* allocate(std::size_t bytes) {
  void* memory = nullptr;
  REQUIRE_CUDA(cudaMalloc(&memory, std::max<std::size_t>(bytes, 1)));
  return static_cast<std::byte*>(memory);
}
template <class V>
V* random(Index count, float scale, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<V> host(static_cast<std::size_t>(count));
  for (V& value : host) value = linattn::convert<V>(normal(engine));
  std::byte* const memory = allocate(host.size() * sizeof(V));
  REQUIRE_CUDA(cudaMemcpy(memory, host.data(), host.size() * sizeof(V), cudaMemcpyHostToDevice));
  return reinterpret_cast<V*>(memory);
}

class Bench {
 public:
  Bench() {
    REQUIRE_CUDA(cudaStreamCreate(&stream_));
    REQUIRE_CUDA(cudaEventCreate(&start_));
    REQUIRE_CUDA(cudaEventCreate(&stop_));
    require(cublasLtCreate(&cublas_lt_) == CUBLAS_STATUS_SUCCESS, "cublasLtCreate");
  }

  // Prints the median of the times of one call; the op is captured several times in a row.
  template <class Op>
  void operator()(const char* name, Index tokens, std::size_t workspace, const Op& op) {
    const Cuda ctx{{allocate(workspace), workspace}, stream_, cublas_lt_};
    constexpr int calls = 10, samples = 21;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    REQUIRE_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal));
    for (int call = 0; call < calls; ++call) {
      const Status status = op(ctx);
      require(status.ok(), linattn::message(status).c_str());
    }
    REQUIRE_CUDA(cudaStreamEndCapture(stream_, &graph));
    REQUIRE_CUDA(cudaGraphInstantiate(&exec, graph, 0));
    std::vector<float> times;
    for (int sample = -2; sample < samples; ++sample) {
      REQUIRE_CUDA(cudaEventRecord(start_, stream_));
      REQUIRE_CUDA(cudaGraphLaunch(exec, stream_));
      REQUIRE_CUDA(cudaEventRecord(stop_, stream_));
      REQUIRE_CUDA(cudaEventSynchronize(stop_));
      float milliseconds = 0;
      REQUIRE_CUDA(cudaEventElapsedTime(&milliseconds, start_, stop_));
      if (sample >= 0) times.push_back(milliseconds * 1e3f / calls);
    }
    std::sort(times.begin(), times.end());
    std::printf("{\"op\": \"%s\", \"tokens\": %td, \"us\": %.2f}\n", name, tokens,
                static_cast<double>(times[times.size() / 2]));
    std::fflush(stdout);
    REQUIRE_CUDA(cudaGraphExecDestroy(exec));
    REQUIRE_CUDA(cudaGraphDestroy(graph));
    REQUIRE_CUDA(cudaFree(ctx.workspace.data));
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaEvent_t start_ = nullptr, stop_ = nullptr;
  cublasLtHandle_t cublas_lt_ = nullptr;
};

// The joint tokens of text and image, with the image's grid behind 333 tokens of text.
void measure(Bench& bench, Index tokens, Index side) {
  constexpr Index batch = 2, heads = 24, d = 64, channels = heads * d;
  T* const qkv = random<T>(batch * tokens * 3 * channels, 1, 1);
  T* const y = random<T>(batch * tokens * channels, 1, 2);
  const auto [q, k, v] =
      linattn::unpack_qkv(TensorView<const T, 3>(qkv, {batch, tokens, 3 * channels}), heads);
  const TensorView<T, 4> out(y, {batch, tokens, heads, d});

  bench("softmax_attention", tokens, linattn::softmax_attention_workspace(Cuda{}, q, k, v, out),
        [&, q = q, k = k, v = v](const Cuda& ctx) { return linattn::softmax_attention(ctx, q, k, v, out); });

  const float* const w = random<float>(3 * heads * d * d, 0.125f, 3);
  const auto matrix = [w](Index i) {
    return TensorView<const float, 3>(w + i * heads * d * d, {heads, d, d});
  };
  const linattn::TttWeights<float> weights{matrix(0), matrix(1), matrix(2)};
  const float* const taps = random<float>(channels * 9, 0.1f, 4);
  const float* const bias = random<float>(channels, 0.1f, 5);
  const TensorView<const float, 4> conv(taps, {channels, 1, 3, 3});
  const TensorView<const float, 1> conv_bias(bias, {channels});
  const linattn::TokenGrid grid{tokens - side * side, side, side};
  linattn::TttOptions<float> options;
  const auto ttt = [&, q = q, k = k, v = v](const char* name) {
    bench(name, tokens, linattn::ttt_workspace(Cuda{}, q, k, v, weights, out, options),
          [&](const Cuda& ctx) { return linattn::ttt(ctx, q, k, v, weights, out, options); });
  };
  ttt("ttt");
  options.prologue.key_norm = true;
  ttt("ttt, key norm");
  options.prologue.q_conv = options.prologue.k_conv = conv;
  options.prologue.q_conv_bias = options.prologue.k_conv_bias = conv_bias;
  options.prologue.grid = grid;
  ttt("ttt, key norm and conv");

  bench("instance_norm", tokens, linattn::instance_norm_workspace(Cuda{}, k, out),
        [&, k = k](const Cuda& ctx) { return linattn::instance_norm(ctx, k, out); });
  const TensorView<const float, 1> scale(bias, {d});
  bench("rms_norm", tokens, 0, [&, q = q](const Cuda& ctx) { return linattn::rms_norm(ctx, q, scale, out); });
  bench("depthwise_conv", tokens, 0, [&, q = q](const Cuda& ctx) {
    return linattn::depthwise_conv(ctx, q, conv, conv_bias, out, {.grid = grid});
  });

  const TensorView<const T, 2> projection(random<T>(channels * channels, 0.025f, 6), {channels, channels});
  const TensorView<const T, 1> no_bias;
  const TensorView<const T, 3> x(qkv, {batch, tokens, channels}, {tokens * 3 * channels, 3 * channels, 1});
  const TensorView<T, 3> projected(y, {batch, tokens, channels});
  bench("linear", tokens, linattn::linear_workspace(Cuda{}, x, projection, no_bias, projected),
        [&](const Cuda& ctx) { return linattn::linear(ctx, x, projection, no_bias, projected); });
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fputs("no CUDA device\n", stderr);
    return 77;
  }
  cudaDeviceProp device{};
  REQUIRE_CUDA(cudaGetDeviceProperties(&device, 0));
  std::printf("{\"name\": \"%s\", \"multiprocessors\": %d}\n", device.name, device.multiProcessorCount);
  Bench bench;
  measure(bench, 4429, 64);
  measure(bench, 16717, 128);
}

// What only a real device can show: ops can be captured in a graph, which forbids allocation and synchronisation, and a
// replay gives the bits of a direct call.
#include <cuda_runtime.h>
#include <doctest/doctest.h>

#include <cstring>
#include <vector>

#include <linattn/cuda.cuh>

#include "../device.hpp"

using linattn::Cuda;
using linattn::Index;
using linattn::TensorView;
using support::Buffer;
using support::DeviceScratch;
using support::OnDevice;
using support::require_cuda;

namespace {

constexpr Index batch = 2, tokens = 333, heads = 3, d = 64;

template <class T, int R>
Buffer<T, R> normal(typename Buffer<T, R>::Shape shape, double scale, std::uint64_t seed) {
  Buffer<T, R> buffer(shape);
  support::fill_normal(buffer.view(), seed, scale);
  return buffer;
}

// Runs op(ctx) directly and as a captured graph, on a stream of its own, and compares what they leave in `out`.
template <class T, class Op>
void same_when_captured(Buffer<T, 4>& out, std::size_t workspace, const Op& op) {
  const DeviceScratch scratch(workspace);
  cudaStream_t stream = nullptr;
  require_cuda(cudaStreamCreate(&stream));
  const Cuda ctx{scratch.workspace(), stream};
  const auto bits = [&](const auto& run) {
    out.poison();
    const OnDevice<T, 4> y(out);
    run(y.view());
    require_cuda(cudaStreamSynchronize(stream));
    y.download(out);
    CHECK(out.intact());
    return std::vector<T>(out.memory());
  };
  const auto direct = bits([&](const auto& y) { CHECK(op(ctx, y).ok()); });
  const auto replayed = bits([&](const auto& y) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    require_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    CHECK(op(ctx, y).ok());
    require_cuda(cudaStreamEndCapture(stream, &graph));
    require_cuda(cudaGraphInstantiate(&exec, graph, 0));
    require_cuda(cudaGraphLaunch(exec, stream));
    require_cuda(cudaStreamSynchronize(stream));
    require_cuda(cudaGraphExecDestroy(exec));
    require_cuda(cudaGraphDestroy(graph));
  });
  CHECK(std::memcmp(direct.data(), replayed.data(), direct.size() * sizeof(T)) == 0);
  require_cuda(cudaStreamDestroy(stream));
}

}  // namespace

TEST_CASE_TEMPLATE("a captured graph gives the bits of a direct call", T, float, linattn::half,
                   linattn::bfloat16) {
  const auto tensor = [](std::uint64_t seed) {
    return OnDevice<T, 4>(normal<T, 4>({batch, tokens, heads, d}, 1, seed));
  };
  const OnDevice<T, 4> on_q = tensor(1), on_k = tensor(2), on_v = tensor(3);
  const OnDevice<float, 3> w(normal<float, 3>({heads, d, d}, 0.125, 4));
  const TensorView<const T, 4> q = on_q, k = on_k, v = on_v;
  Buffer<T, 4> out({batch, tokens, heads, d});

  SUBCASE("softmax_attention") {
    same_when_captured(
        out, linattn::softmax_attention_workspace(Cuda{}, q, k, v, out.view()),
        [&](const Cuda& ctx, const auto& y) { return linattn::softmax_attention(ctx, q, k, v, y); });
  }
  SUBCASE("ttt with the key norm") {
    const linattn::TttWeights<float> weights{w, w, w};
    linattn::TttOptions<float> options;
    options.prologue.key_norm = true;
    same_when_captured(
        out, linattn::ttt_workspace(Cuda{}, q, k, v, weights, out.view(), options),
        [&](const Cuda& ctx, const auto& y) { return linattn::ttt(ctx, q, k, v, weights, y, options); });
  }
}

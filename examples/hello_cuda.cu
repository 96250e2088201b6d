#include <linattn/cuda.cuh>

#include <cstdio>
#include <vector>

// Device memory that holds what the host's does.
template <class T>
T* on_device(const std::vector<T>& host) {
  void* memory = nullptr;
  const std::size_t bytes = host.size() * sizeof(T);
  const bool ok = cudaMalloc(&memory, bytes) == cudaSuccess &&
                  cudaMemcpy(memory, host.data(), bytes, cudaMemcpyHostToDevice) == cudaSuccess;
  return ok ? static_cast<T*>(memory) : nullptr;
}

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("no CUDA device");
    return 77;
  }

  constexpr linattn::Index batch = 1, tokens = 1024, heads = 4, head_dim = 64;
  using T = linattn::bfloat16;  // what is stored; arithmetic and fast weights are float
  T* const x = on_device(std::vector<T>(batch * tokens * 3 * heads * head_dim, T(0.1f)));
  T* const y = on_device(std::vector<T>(batch * tokens * heads * head_dim));
  float* const w = on_device(std::vector<float>(heads * head_dim * head_dim, 0.02f));
  const auto [q, k, v] =
      linattn::unpack_qkv(linattn::TensorView<T, 3>(x, {batch, tokens, 3 * heads * head_dim}), heads);
  const linattn::TensorView<T, 4> out(y, {batch, tokens, heads, head_dim});
  const linattn::TensorView<const float, 3> w1(w, {heads, head_dim, head_dim});
  const linattn::TttWeights<float> weights{w1, w1, w1};

  const std::size_t bytes = linattn::ttt_workspace<linattn::SwiGlu>(linattn::Cuda{}, q, k, v, weights, out);
  std::byte* const scratch = on_device(std::vector<std::byte>(bytes));
  const linattn::Cuda cuda{{scratch, bytes}};  // the default stream
  const linattn::Status status = linattn::ttt<linattn::SwiGlu>(cuda, q, k, v, weights, out);

  T first{};
  const cudaError_t error = cudaMemcpy(&first, y, sizeof first, cudaMemcpyDeviceToHost);  // waits
  std::printf("%s, %s: out[0] = %g\n", linattn::message(status).c_str(), cudaGetErrorString(error),
              static_cast<double>(static_cast<float>(first)));
  for (void* memory :
       {static_cast<void*>(x), static_cast<void*>(y), static_cast<void*>(w), static_cast<void*>(scratch)})
    (void)cudaFree(memory);
  return status.ok() && error == cudaSuccess ? 0 : 1;
}

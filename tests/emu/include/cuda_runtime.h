// The part of the CUDA runtime that the library and its tests use, on the host: see ../emu.hpp.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}  // NOLINT: as CUDA's
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// ---- what the engine gives a kernel ----

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emu {

// The place in the source is where the call returns to: callers are always inlined.
void barrier();
[[nodiscard]] bool barrier_any(bool vote);  // whether any thread of the block votes for it
void warp_barrier();
// All lanes of the warp give their arguments; when the last has come, `act` is called once for all of them, with null
// for lanes that the block does not have. Its arguments may be read and written until then.
void collective(void (*act)(void* const (&lanes)[32]), void* arguments);
// One access of 1 to 16 bytes, to or from a variable of the thread.
void load(void* to, const void* from, std::size_t bytes);
void store(void* to, const void* from, std::size_t bytes);
[[nodiscard]] void* shared_memory();
void launch(const void* kernel, dim3 grid, dim3 block, std::size_t shared, void (*body)(void*),
            void* arguments, int& error);

struct Shuffle {
  std::uint64_t value;
  int from;
};
inline void shuffle(void* const (&lanes)[32]) {
  std::uint64_t values[32] = {};
  for (int i = 0; i < 32; ++i)
    if (lanes[i] != nullptr) values[i] = static_cast<Shuffle*>(lanes[i])->value;
  for (int i = 0; i < 32; ++i)
    if (lanes[i] != nullptr) {
      auto& s = *static_cast<Shuffle*>(lanes[i]);
      s.value = values[s.from];
    }
}
template <class T>
__forceinline__ T shuffled(T value, int from) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  Shuffle s{0, from};
  std::memcpy(&s.value, &value, sizeof value);
  collective(shuffle, &s);
  std::memcpy(&value, &s.value, sizeof value);
  return value;
}
__forceinline__ int lane() { return static_cast<int>(threadIdx.x % 32); }

}  // namespace emu

__forceinline__ void __syncthreads() { emu::barrier(); }
__forceinline__ int __syncthreads_or(int predicate) { return emu::barrier_any(predicate != 0) ? 1 : 0; }
__forceinline__ void __syncwarp(unsigned = 0xffffffffu) { emu::warp_barrier(); }
// `width` lanes are a group of their own; a lane that would read beyond it gets its own value.
template <class T>
__forceinline__ T __shfl_sync(unsigned, T value, int from, int width = 32) {
  return emu::shuffled(value, emu::lane() / width * width + (from & (width - 1)));
}
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned, T value, int mask, int width = 32) {
  const int lane = emu::lane(), from = lane ^ mask;
  return emu::shuffled(value, from / width <= lane / width ? from : lane);
}
template <class T>
__forceinline__ T __shfl_down_sync(unsigned, T value, unsigned by, int width = 32) {
  const int lane = emu::lane(), from = lane + static_cast<int>(by);
  return emu::shuffled(value, from / width == lane / width ? from : lane);
}
template <class T>
__forceinline__ T __shfl_up_sync(unsigned, T value, unsigned by, int width = 32) {
  const int lane = emu::lane(), from = lane - static_cast<int>(by);
  return emu::shuffled(value, from >= lane / width * width ? from : lane);
}

using std::max;
using std::min;
__forceinline__ float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }

// ---- the runtime: one device, every stream in order ----

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
using cudaStream_t = struct CUstream_st*;
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

cudaError_t cudaMalloc(void** pointer, std::size_t bytes);
template <class T>
cudaError_t cudaMalloc(T** pointer, std::size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(pointer), bytes);
}
cudaError_t cudaFree(void* pointer);
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaGetLastError();  // of the launches since the last call
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaGetLastError(); }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess              ? "no error"
         : error == cudaErrorLaunchFailure ? "unspecified launch failure"
                                           : "invalid argument or configuration";
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  auto call = [&] { kernel(arguments...); };
  int error = 0;
  emu::launch(
      reinterpret_cast<const void*>(kernel), config->gridDim, config->blockDim, config->dynamicSmemBytes,
      [](void* f) { (*static_cast<decltype(call)*>(f))(); }, &call, error);
  return static_cast<cudaError_t>(error);
}

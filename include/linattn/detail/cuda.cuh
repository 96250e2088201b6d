// What the CUDA forms of the ops share: views as kernels take them, and the one way to launch a kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

// CUDA's, which the host's (detail/simd.hpp) would hide where a unit includes both.
using ::max;
using ::min;

inline constexpr int warp_size = 32;

// Types that activations may have on a device.
template <class T>
inline constexpr bool is_device_storage =
    Storage<std::remove_const_t<T>> && !std::is_same_v<std::remove_const_t<T>, double>;
#define LINATTN_REQUIRE_DEVICE_STORAGE(T)                \
  static_assert(::linattn::detail::is_device_storage<T>, \
                "on Cuda activations are stored as float, half or bfloat16; double runs on Cpu alone")

// An attention view (batch, token, head, channel) with dense channels, as a kernel's parameter.
template <class T>
struct Rows {
  T* data;
  Index batch, token, head;  // strides, in elements

  [[nodiscard]] LINATTN_HD T* at(Index b, Index n, Index h) const {
    return data + b * batch + n * token + h * head;
  }
};
template <class T>
[[nodiscard]] Rows<T> rows(const TensorView<T, 4>& v) {
  return {v.data, v.stride(0), v.stride(1), v.stride(2)};
}

// Whether every row of the view starts at a multiple of 16 bytes, so that 16 bytes go in one instruction.
template <class T>
[[nodiscard]] bool has_aligned_rows(const TensorView<T, 4>& v) {
  constexpr Index elements = 16 / static_cast<Index>(sizeof(T));
  bool aligned = reinterpret_cast<std::uintptr_t>(v.data) % 16 == 0;
  for (int axis = 0; axis < 3; ++axis)
    aligned = aligned && (v.extent(axis) == 1 || v.stride(axis) % elements == 0);
  return aligned;
}

[[nodiscard]] LINATTN_HD constexpr Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }

// The blocks of a launch. CUDA allows 2^31 - 1 along x and 65535 along y and z; ops lay the long axis along x.
struct Grid {
  Index x = 1, y = 1, z = 1;
};

// Puts kernel(parameters...) on the context's stream. `shared`: bytes of dynamic shared memory. `what` names the
// kernel in a Status.
template <class... P>
[[nodiscard]] Status launch(const Cuda& ctx, const char* what, void (*kernel)(P...), Grid grid, int threads,
                            std::size_t shared, const std::type_identity_t<P>&... parameters) {
  constexpr Index max_x = 0x7fffffff, max_yz = 65535;
  if (grid.x > max_x) return fail(Code::option, what, max_x, grid.x);
  if (grid.y > max_yz || grid.z > max_yz)
    return fail(Code::option, what, max_yz, grid.y > max_yz ? grid.y : grid.z);
  const auto native = [what](cudaError_t error) {
    return Status{Code::native, what, 0, 0, static_cast<int>(error)};
  };
  // More than 48 KB need to be asked for. The attribute belongs to the kernel, not to the stream.
  constexpr std::size_t without_asking = 48 * 1024;
  if (shared > without_asking) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return native(error);
  }
  cudaLaunchConfig_t config{};
  config.gridDim =
      dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = ctx.stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, parameters...);
  return error == cudaSuccess ? Status{} : native(error);
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

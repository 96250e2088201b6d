// The linear layer on a CUDA device. Contract: linear.hpp.
//
// cuBLASLt, on tensor cores with 16-bit storage, where x and weight are of one type, out and bias of that type or both
// float, and all rows start at 16 bytes; any other types and views by a kernel of ours, which is not made to be fast.
// Numerics: sums in float, without TF32, one rounding to T at the end. Bitwise equal run to run; as cuBLASLt chooses
// its algorithm for the GPU, not the same on all GPUs.
// Errors beside the contract's: option (no cublas_lt in the context where it is needed), native (a cublasStatus_t).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <type_traits>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/detail/cublas_lt.cuh>
#include <linattn/detail/cuda.cuh>
#include <linattn/detail/ptx.cuh>
#include <linattn/ops/linear.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

// A block has a tile of 64 rows by 64 outputs, 32 inputs at a time; a thread 4 x 4 of the tile, 16 apart.
inline constexpr int linear_tile = 64, linear_depth = 32, linear_threads = 256, linear_own = 4;
inline constexpr int linear_side = linear_tile / linear_own;

template <class X, class W, class B, class T>
struct LinearParams {
  const X* x;
  const W* weight;
  const B* bias;  // null: none
  T* out;
  Index x_batch, x_row, weight_row, out_batch, out_row;  // strides
  Index rows, inputs, outputs;
  int row_tiles;
};

// One more than the tile: neither columns nor rows share a bank.
struct LinearShared {
  float x[linear_depth][linear_tile + 1], weight[linear_depth][linear_tile + 1];
};

template <class S>
[[nodiscard]] __device__ __forceinline__ float widen(S value) {
  if constexpr (std::is_same_v<S, float8_e4m3>) {
    return static_cast<float>(value);
  } else {
    return to_float(value);
  }
}

// Rows [0, rows) and columns [0, columns) of a tile, transposed, zero elsewhere: a warp has a row at a time.
template <class S>
__device__ __forceinline__ void load_linear_tile(const S* from, Index stride, Index rows, Index columns,
                                                 float (&to)[linear_depth][linear_tile + 1]) {
  const int column = static_cast<int>(threadIdx.x) % linear_depth;
#pragma unroll
  for (int i = 0; i < linear_tile; i += linear_threads / linear_depth) {
    const int row = i + static_cast<int>(threadIdx.x) / linear_depth;
    to[column][row] = row < rows && column < columns ? widen(from[row * stride + column]) : 0.0f;
  }
}

template <class X, class W, class B, class T>
static __global__ void __launch_bounds__(linear_threads, 2) linear_kernel(LinearParams<X, W, B, T> p) {
  static_assert(linear_depth == warp_size && linear_side * linear_side == linear_threads);
  LinearShared& shared = dynamic_shared<LinearShared>();
  const Index b = static_cast<int>(blockIdx.x) / p.row_tiles;
  const Index first_row = static_cast<Index>(static_cast<int>(blockIdx.x) % p.row_tiles) * linear_tile,
              first_output = static_cast<Index>(blockIdx.y) * linear_tile;
  const int own_row = static_cast<int>(threadIdx.x) / linear_side,
            own_output = static_cast<int>(threadIdx.x) % linear_side;

  float sums[linear_own][linear_own] = {};
  for (Index first = 0; first < p.inputs; first += linear_depth) {
    load_linear_tile(p.x + b * p.x_batch + first_row * p.x_row + first, p.x_row, p.rows - first_row,
                     p.inputs - first, shared.x);
    load_linear_tile(p.weight + first_output * p.weight_row + first, p.weight_row, p.outputs - first_output,
                     p.inputs - first, shared.weight);
    __syncthreads();
    // Each stretch of the depth has a sum of its own, so that errors grow with the root of both lengths.
    float part[linear_own][linear_own] = {};
#pragma unroll 4
    for (int k = 0; k < linear_depth; ++k) {
      float x[linear_own], weight[linear_own];
#pragma unroll
      for (int i = 0; i < linear_own; ++i) {
        x[i] = shared.x[k][own_row + i * linear_side];
        weight[i] = shared.weight[k][own_output + i * linear_side];
      }
#pragma unroll
      for (int i = 0; i < linear_own; ++i)
#pragma unroll
        for (int j = 0; j < linear_own; ++j) part[i][j] = fmaf(x[i], weight[j], part[i][j]);
    }
#pragma unroll
    for (int i = 0; i < linear_own; ++i)
#pragma unroll
      for (int j = 0; j < linear_own; ++j) sums[i][j] += part[i][j];
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < linear_own; ++i)
#pragma unroll
    for (int j = 0; j < linear_own; ++j) {
      const Index row = first_row + own_row + i * linear_side,
                  output = first_output + own_output + j * linear_side;
      if (row >= p.rows || output >= p.outputs) continue;
      const float bias = p.bias == nullptr ? 0.0f : to_float(p.bias[output]);
      p.out[b * p.out_batch + row * p.out_row + output] = from_float<T>(sums[i][j] + bias);
    }
}

template <class X, class W, class B, class T>
[[nodiscard]] Status plain_linear(const Cuda& ctx, const TensorView<const X, 3>& x,
                                  const TensorView<const W, 2>& weight, const B* bias,
                                  const TensorView<T, 3>& out) {
  const Index row_tiles = ceil_div(x.extent(1), linear_tile);
  const LinearParams<X, W, B, T> p{.x = x.data,
                                   .weight = weight.data,
                                   .bias = bias,
                                   .out = out.data,
                                   .x_batch = x.stride(0),
                                   .x_row = x.stride(1),
                                   .weight_row = weight.stride(0),
                                   .out_batch = out.stride(0),
                                   .out_row = out.stride(1),
                                   .rows = x.extent(1),
                                   .inputs = x.extent(2),
                                   .outputs = weight.extent(0),
                                   .row_tiles = static_cast<int>(row_tiles)};
  return launch(ctx, "linear", linear_kernel<X, W, B, T>,
                Grid{.x = x.extent(0) * row_tiles, .y = ceil_div(p.outputs, linear_tile)}, linear_threads,
                sizeof(LinearShared), p);
}

// Whether a call goes by cuBLASLt; a missing bias is of any type.
template <class X, class W, class B, class T, int R>
[[nodiscard]] bool takes_cublas_lt(const TensorView<X, R>& x, const TensorView<W, 2>& weight,
                                   const TensorView<B, 1>& bias, const TensorView<T, R>& out) {
  using Weight = std::remove_const_t<W>;
  if constexpr (has_cublas_lt<std::remove_const_t<X>, Weight, std::remove_const_t<B>, T>) {
    return fits_cublas_lt(x) && fits_cublas_lt(weight) && fits_cublas_lt(bias) && fits_cublas_lt(out);
  } else {
    return false;
  }
}

template <class X, class W, class B, class T, int R>
[[nodiscard]] std::size_t linear_bytes(const TensorView<X, R>& x, const TensorView<W, 2>& weight,
                                       const TensorView<B, 1>& bias, const TensorView<T, R>& out) {
  if (!takes_cublas_lt(x, weight, bias, out)) return 0;
  Carver carver(Workspace{});
  (void)carver.take<std::byte>(cublas_lt_bytes);
  return carver.used();
}

template <class X, class W, class B, class T, int R>
[[nodiscard]] Status run_linear(const Cuda& ctx, const TensorView<const X, R>& x,
                                const TensorView<W, 2>& weight, const TensorView<B, 1>& bias,
                                const TensorView<T, R>& out) {
  LINATTN_REQUIRE_DEVICE_STORAGE(X);
  LINATTN_REQUIRE_DEVICE_STORAGE(B);
  LINATTN_REQUIRE_DEVICE_STORAGE(T);
  using Weight = std::remove_const_t<W>;
  using Bias = std::remove_const_t<B>;
  static_assert(is_device_storage<Weight> || std::is_same_v<Weight, float8_e4m3>,
                "weights on Cuda are stored as float, half, bfloat16 or float8_e4m3");
  if (const Status status = check_linear(x, weight, bias, out); !status.ok()) return status;
  const Bias* const offset = bias.extent(0) == 0 ? nullptr : bias.data;
  if constexpr (has_cublas_lt<X, Weight, Bias, T>) {
    if (takes_cublas_lt(x, weight, bias, out)) {
      Carver carver(ctx.workspace);
      std::byte* const workspace = carver.take<std::byte>(cublas_lt_bytes);
      if (const Status status = carver.check("linear, workspace"); !status.ok()) return status;
      return cublas_lt_linear<X, T>(ctx, cublas_lt_batch(x), weight, offset, cublas_lt_batch(out), workspace);
    }
  }
  return plain_linear<X, Weight, Bias, T>(ctx, cublas_lt_batch(x), weight, offset, cublas_lt_batch(out));
}

}  // namespace detail::inline LINATTN_TARGET

inline namespace LINATTN_TARGET {

// Bytes of workspace that the same call of `linear` needs: 32 MiB for cuBLASLt, 0 for what goes without it.
template <Storage T, int R, class W, class B>
[[nodiscard]] std::size_t linear_workspace(const Cuda&, const In<T, R>& x, const TensorView<W, 2>& weight,
                                           const TensorView<B, 1>& bias, const TensorView<T, R>& out) {
  return detail::linear_bytes(x, weight, bias, out);
}
template <Storage T, int R, detail::OtherStorage<T> X, class W, class B>
[[nodiscard]] std::size_t linear_workspace(const Cuda&, const TensorView<X, R>& x,
                                           const TensorView<W, 2>& weight, const TensorView<B, 1>& bias,
                                           const TensorView<T, R>& out) {
  return detail::linear_bytes(x, weight, bias, out);
}

// out = x weight^T + bias. See linear.hpp.
template <Storage T, int R, class W, class B>
[[nodiscard]] Status linear(const Cuda& ctx, const In<T, R>& x, const TensorView<W, 2>& weight,
                            const TensorView<B, 1>& bias, const TensorView<T, R>& out) {
  return detail::run_linear(ctx, x, weight, bias, out);
}
template <Storage T, int R, detail::OtherStorage<T> X, class W, class B>
[[nodiscard]] Status linear(const Cuda& ctx, const TensorView<X, R>& x, const TensorView<W, 2>& weight,
                            const TensorView<B, 1>& bias, const TensorView<T, R>& out) {
  return detail::run_linear(ctx, TensorView<const std::remove_const_t<X>, R>(x), weight, bias, out);
}

}  // namespace LINATTN_TARGET
LINATTN_END

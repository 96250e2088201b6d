// The linear layer by cuBLASLt. All of that library that is used is here.
//
// Descriptors live on the stack and the choice of an algorithm asks the host alone, so nothing is allocated and a
// stream that captures a graph will do. Partial sums of a product that is split along its depth are kept in float:
// algorithms that would round them to the output's type are not considered.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/detail/cuda.cuh>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

// What an algorithm may use of the workspace: NVIDIA's recommendation for the largest GPUs.
inline constexpr Index cublas_lt_bytes = Index{32} << 20;

template <class T>
inline constexpr cudaDataType_t cublas_lt_type = std::is_same_v<T, half>       ? CUDA_R_16F
                                                 : std::is_same_v<T, bfloat16> ? CUDA_R_16BF
                                                                               : CUDA_R_32F;

// Products of two matrices of one type, with the sums and the bias in that type or in float.
template <class X, class W, class B, class T>
inline constexpr bool has_cublas_lt = std::is_same_v<X, W>&& std::is_same_v<B, T> &&
                                      (std::is_same_v<T, X> ||
                                       std::is_same_v<T, float>)&&is_device_storage<X>;

// Rows that do not overlap and that start at 16 bytes each, as the faster algorithms need them.
template <class T, int R>
[[nodiscard]] bool fits_cublas_lt(const TensorView<T, R>& v) {
  constexpr Index elements = 16 / static_cast<Index>(sizeof(T));
  bool fits = reinterpret_cast<std::uintptr_t>(v.data) % 16 == 0;
  for (int axis = 0; axis < R - 1; ++axis)
    fits = fits &&
           (v.extent(axis) == 1 || (v.stride(axis) % elements == 0 && v.stride(axis) >= v.extent(R - 1)));
  return fits;
}

// A batch of matrices whose rows are vectors of a view, (batch, rows, columns). Rows that follow each other at one
// distance through the whole batch are one matrix.
template <class T>
[[nodiscard]] TensorView<T, 3> cublas_lt_batch(const TensorView<T, 2>& v) {
  return {v.data, {1, v.extent(0), v.extent(1)}, {0, v.stride(0), 1}};
}
template <class T>
[[nodiscard]] const TensorView<T, 3>& cublas_lt_batch(const TensorView<T, 3>& v) {
  return v;
}
template <class T>
[[nodiscard]] bool is_one_matrix(const TensorView<T, 3>& v) {
  return v.extent(0) == 1 || (v.extent(1) > 1 && v.stride(0) == v.extent(1) * v.stride(1));
}
template <class T>
[[nodiscard]] TensorView<T, 3> merge_batch(const TensorView<T, 3>& v) {
  return {v.data, {1, v.extent(0) * v.extent(1), v.extent(2)}, {0, v.stride(1), 1}};
}

// cuBLASLt counts columns first: (batch, rows, columns) is a batch of columns x rows matrices.
template <class T>
[[nodiscard]] cublasStatus_t init_layout(cublasLtMatrixLayoutOpaque_t& layout, const TensorView<T, 3>& v) {
  constexpr Index elements = 16 / static_cast<Index>(sizeof(T));
  // A single row has no distance to a next one; any aligned one will do.
  const Index step = v.extent(1) == 1 ? ceil_div(v.extent(2), elements) * elements : v.stride(1);
  const auto batch = static_cast<std::int32_t>(v.extent(0));
  const std::int64_t batch_step = v.stride(0);
  cublasStatus_t status = cublasLtMatrixLayoutInit(&layout, cublas_lt_type<std::remove_const_t<T>>,
                                                   static_cast<std::uint64_t>(v.extent(2)),
                                                   static_cast<std::uint64_t>(v.extent(1)), step);
  if (status == CUBLAS_STATUS_SUCCESS)
    status =
        cublasLtMatrixLayoutSetAttribute(&layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch, sizeof batch);
  if (status == CUBLAS_STATUS_SUCCESS)
    status = cublasLtMatrixLayoutSetAttribute(&layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                              &batch_step, sizeof batch_step);
  return status;
}

// out[b, r, o] = bias[o] + sum_i x[b, r, i] weight[o, i], bias null: none. Sums in float, without TF32. `workspace`:
// cublas_lt_bytes.
template <class X, class T>
[[nodiscard]] Status cublas_lt_linear(const Cuda& ctx, TensorView<const X, 3> x,
                                      const TensorView<const X, 2>& weight, const T* bias,
                                      TensorView<T, 3> out, std::byte* workspace) {
  if (ctx.cublas_lt == nullptr) return fail(Code::option, "cublas_lt (a handle, in the context)", 1, 0);
  if (is_one_matrix(x) && is_one_matrix(out)) x = merge_batch(x), out = merge_batch(out);
  TensorView<const X, 3> shared_weight = cublas_lt_batch(weight);
  shared_weight.extents[0] = x.extent(0);  // with a stride of 0

  cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
  const auto also = [&status](const auto& call) {
    if (status == CUBLAS_STATUS_SUCCESS) status = call();
  };
  cublasLtMatmulDescOpaque_t product{};
  const auto describe = [&](cublasLtMatmulDescAttributes_t attribute, const auto& value) {
    also([&] { return cublasLtMatmulDescSetAttribute(&product, attribute, &value, sizeof value); });
  };
  also([&] { return cublasLtMatmulDescInit(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F); });
  describe(CUBLASLT_MATMUL_DESC_TRANSA, std::int32_t{CUBLAS_OP_T});
  if (bias != nullptr) {
    describe(CUBLASLT_MATMUL_DESC_EPILOGUE, std::uint32_t{CUBLASLT_EPILOGUE_BIAS});
    describe(CUBLASLT_MATMUL_DESC_BIAS_POINTER, static_cast<const void*>(bias));
    describe(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, std::int32_t{cublas_lt_type<T>});
  }
  cublasLtMatrixLayoutOpaque_t a{}, b{}, d{};
  also([&] { return init_layout(a, shared_weight); });
  also([&] { return init_layout(b, x); });
  also([&] { return init_layout(d, out); });

  cublasLtMatmulPreferenceOpaque_t preference{};
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    also([&] { return cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof value); });
  };
  also([&] { return cublasLtMatmulPreferenceInit(&preference); });
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, std::uint64_t{cublas_lt_bytes});
  prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, std::uint32_t{CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE});
  for (const auto alignment :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
    prefer(alignment, std::uint32_t{16});

  cublasLtMatmulHeuristicResult_t choice{};
  int choices = 0;
  also([&] {
    return cublasLtMatmulAlgoGetHeuristic(ctx.cublas_lt, &product, &a, &b, &d, &d, &preference, 1, &choice,
                                          &choices);
  });
  if (choices == 0) also([] { return CUBLAS_STATUS_NOT_SUPPORTED; });
  const float one = 1.0f, zero = 0.0f;
  also([&] {
    return cublasLtMatmul(ctx.cublas_lt, &product, &one, weight.data, &a, x.data, &b, &zero, out.data, &d,
                          out.data, &d, &choice.algo, workspace, static_cast<std::size_t>(cublas_lt_bytes),
                          ctx.stream);
  });
  return status == CUBLAS_STATUS_SUCCESS
             ? Status{}
             : Status{Code::native, "linear, cuBLASLt", 0, 0, static_cast<int>(status)};
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

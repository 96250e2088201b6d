// Stand-in for the part of cuBLASLt that the library uses: the same names and meanings (NVIDIA's reference, "Using the
// cuBLASLt API"), one plain algorithm on the emulated device. It refuses what cuBLASLt has no kernels for, and what the
// choice of an algorithm was not told to expect: other types, rows that do not start at 16 bytes, other shapes.
// nvcc takes it, too, where a toolkit came without cuBLASLt and units are only to be compiled.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include <linattn/core/dtype.hpp>
#include <linattn/detail/ptx.cuh>

enum cublasStatus_t {
  CUBLAS_STATUS_SUCCESS = 0,
  CUBLAS_STATUS_INVALID_VALUE = 7,
  CUBLAS_STATUS_EXECUTION_FAILED = 13,
  CUBLAS_STATUS_NOT_SUPPORTED = 15
};
#if !defined(__CUDACC__)
enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_16BF = 14 };
#endif
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68 };
enum cublasOperation_t { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };
enum cublasLtEpilogue_t { CUBLASLT_EPILOGUE_DEFAULT = 1, CUBLASLT_EPILOGUE_BIAS = 4 };
enum cublasLtReductionScheme_t { CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2 };
enum cublasLtMatrixLayoutAttribute_t {
  CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT = 5,
  CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET = 6
};
enum cublasLtMatmulDescAttributes_t {
  CUBLASLT_MATMUL_DESC_TRANSA = 3,
  CUBLASLT_MATMUL_DESC_EPILOGUE = 7,
  CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8,
  CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE = 26
};
enum cublasLtMatmulPreferenceAttributes_t {
  CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
  CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8
};

struct cublasLtContext {};
using cublasLtHandle_t = cublasLtContext*;
struct cublasLtMatrixLayoutOpaque_t {
  cudaDataType_t type;
  std::int64_t rows, columns, step, batch_step;
  std::int32_t batch;
};
struct cublasLtMatmulDescOpaque_t {
  std::int32_t transpose_a;
  std::uint32_t epilogue;
  const void* bias;
  std::int32_t bias_type;
};
struct cublasLtMatmulPreferenceOpaque_t {
  std::uint64_t workspace;
  std::uint32_t reduction, alignment[4];
};
using cublasLtMatrixLayout_t = cublasLtMatrixLayoutOpaque_t*;
using cublasLtMatmulDesc_t = cublasLtMatmulDescOpaque_t*;
using cublasLtMatmulPreference_t = cublasLtMatmulPreferenceOpaque_t*;
struct cublasLtMatmulAlgo_t {
  std::uint64_t workspace;
  std::uint32_t alignment[4];
};
struct cublasLtMatmulHeuristicResult_t {
  cublasLtMatmulAlgo_t algo;
  std::size_t workspaceSize;
  cublasStatus_t state;
};

namespace emu_cublas_lt {

template <class V>
cublasStatus_t set(V& to, const void* from, std::size_t bytes) {
  if (bytes != sizeof to) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(&to, from, bytes);
  return CUBLAS_STATUS_SUCCESS;
}

inline bool fits(const cublasLtMatrixLayoutOpaque_t& m, const void* data, std::uint32_t alignment) {
  const std::int64_t bytes = m.type == CUDA_R_32F ? 4 : 2;
  return m.step >= m.rows && reinterpret_cast<std::uintptr_t>(data) % alignment == 0 &&
         m.step * bytes % alignment == 0 && (m.batch == 1 || m.batch_step * bytes % alignment == 0);
}

__device__ inline float get(const void* data, std::int64_t i, int type) {
  using namespace linattn::detail;
  if (type == CUDA_R_32F) return static_cast<const float*>(data)[i];
  if (type == CUDA_R_16F) return to_float(static_cast<const linattn::half*>(data)[i]);
  return to_float(static_cast<const linattn::bfloat16*>(data)[i]);
}
__device__ inline void put(void* data, std::int64_t i, int type, float value) {
  using namespace linattn::detail;
  if (type == CUDA_R_32F) {
    static_cast<float*>(data)[i] = value;
  } else if (type == CUDA_R_16F) {
    static_cast<linattn::half*>(data)[i] = from_float<linattn::half>(value);
  } else {
    static_cast<linattn::bfloat16*>(data)[i] = from_float<linattn::bfloat16>(value);
  }
}

struct Params {
  cublasLtMatmulDescOpaque_t product;
  cublasLtMatrixLayoutOpaque_t a, b, d;
  const void *data_a, *data_b;
  void* data_d;
  float alpha;
  unsigned char* workspace;
  std::size_t workspace_bytes;
};

// A block has a column of d, a thread the rows thread, thread + 32, ... of it. Sums of 16 products are added up.
static __global__ void __launch_bounds__(32) matmul_kernel(Params p) {
  const std::int64_t column = blockIdx.x, batch = blockIdx.y;
  if (column == 0 && batch == 0 && threadIdx.x == 0) p.workspace[0] = p.workspace[p.workspace_bytes - 1] = 0;
  for (std::int64_t row = threadIdx.x; row < p.d.rows; row += 32) {
    float sum = 0.0f;
    for (std::int64_t first = 0; first < p.a.rows; first += 16) {
      float part = 0.0f;
      for (std::int64_t k = first; k < p.a.rows && k < first + 16; ++k)
        part = fmaf(get(p.data_a, batch * p.a.batch_step + row * p.a.step + k, p.a.type),
                    get(p.data_b, batch * p.b.batch_step + column * p.b.step + k, p.b.type), part);
      sum += part;
    }
    sum *= p.alpha;
    if (p.product.epilogue == CUBLASLT_EPILOGUE_BIAS) sum += get(p.product.bias, row, p.product.bias_type);
    put(p.data_d, batch * p.d.batch_step + column * p.d.step + row, p.d.type, sum);
  }
}

}  // namespace emu_cublas_lt

inline cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  static cublasLtContext context;
  *handle = &context;
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t) { return CUBLAS_STATUS_SUCCESS; }

inline cublasStatus_t cublasLtMatrixLayoutInit(cublasLtMatrixLayout_t layout, cudaDataType_t type,
                                               std::uint64_t rows, std::uint64_t columns, std::int64_t step) {
  *layout = {type, static_cast<std::int64_t>(rows), static_cast<std::int64_t>(columns), step, 0, 1};
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                       cublasLtMatrixLayoutAttribute_t attribute,
                                                       const void* from, std::size_t bytes) {
  return attribute == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT
             ? emu_cublas_lt::set(layout->batch, from, bytes)
             : emu_cublas_lt::set(layout->batch_step, from, bytes);
}

inline cublasStatus_t cublasLtMatmulDescInit(cublasLtMatmulDesc_t product, cublasComputeType_t compute,
                                             cudaDataType_t scale) {
  *product = {CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, nullptr, -1};
  return compute == CUBLAS_COMPUTE_32F && scale == CUDA_R_32F ? CUBLAS_STATUS_SUCCESS
                                                              : CUBLAS_STATUS_NOT_SUPPORTED;
}
inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t product,
                                                     cublasLtMatmulDescAttributes_t attribute,
                                                     const void* from, std::size_t bytes) {
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
      return emu_cublas_lt::set(product->transpose_a, from, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
      return emu_cublas_lt::set(product->epilogue, from, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
      return emu_cublas_lt::set(product->bias, from, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE:
      return emu_cublas_lt::set(product->bias_type, from, bytes);
  }
  return CUBLAS_STATUS_INVALID_VALUE;
}

inline cublasStatus_t cublasLtMatmulPreferenceInit(cublasLtMatmulPreference_t preference) {
  *preference = {0, 7, {256, 256, 256, 256}};
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                           cublasLtMatmulPreferenceAttributes_t attribute,
                                                           const void* from, std::size_t bytes) {
  if (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES)
    return emu_cublas_lt::set(preference->workspace, from, bytes);
  if (attribute == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK)
    return emu_cublas_lt::set(preference->reduction, from, bytes);
  return emu_cublas_lt::set(preference->alignment[attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES],
                            from, bytes);
}

// One choice for each product of the reference's table that is asked for: a and b of one type, d of that or float, the
// bias as d; sums that are not rounded on their way.
inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t product,
                                                     cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                                     cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                                     cublasLtMatmulPreference_t preference, int wanted,
                                                     cublasLtMatmulHeuristicResult_t* results, int* found) {
  *found = 0;
  if (handle == nullptr || wanted < 1 || product->transpose_a != CUBLAS_OP_T)
    return CUBLAS_STATUS_INVALID_VALUE;
  if (a->rows != b->rows || a->columns != d->rows || b->columns != d->columns || a->batch != d->batch ||
      b->batch != d->batch || c->rows != d->rows || c->columns != d->columns)
    return CUBLAS_STATUS_INVALID_VALUE;
  if (a->type != b->type || c->type != d->type || (d->type != a->type && d->type != CUDA_R_32F) ||
      (product->epilogue == CUBLASLT_EPILOGUE_BIAS && product->bias_type != d->type) ||
      preference->reduction != CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE)
    return CUBLAS_STATUS_NOT_SUPPORTED;
  *results = {{preference->workspace, {}}, preference->workspace, CUBLAS_STATUS_SUCCESS};
  std::memcpy(results->algo.alignment, preference->alignment, sizeof preference->alignment);
  *found = 1;
  return CUBLAS_STATUS_SUCCESS;
}

// beta must be 0, and c may be d then.
inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t product, const void* alpha,
                                     const void* data_a, cublasLtMatrixLayout_t a, const void* data_b,
                                     cublasLtMatrixLayout_t b, const void* beta, const void*,
                                     cublasLtMatrixLayout_t, void* data_d, cublasLtMatrixLayout_t d,
                                     const cublasLtMatmulAlgo_t* algo, void* workspace, std::size_t bytes,
                                     cudaStream_t stream) {
  using namespace emu_cublas_lt;
  const bool fit = fits(*a, data_a, algo->alignment[0]) && fits(*b, data_b, algo->alignment[1]) &&
                   fits(*d, data_d, algo->alignment[3]);
  if (handle == nullptr || !fit || bytes < algo->workspace || *static_cast<const float*>(beta) != 0.0f)
    return CUBLAS_STATUS_INVALID_VALUE;
  const Params p{*product,
                 *a,
                 *b,
                 *d,
                 data_a,
                 data_b,
                 data_d,
                 *static_cast<const float*>(alpha),
                 static_cast<unsigned char*>(workspace),
                 bytes};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(d->columns), static_cast<unsigned>(d->batch));
  config.blockDim = dim3(32);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, matmul_kernel, p) == cudaSuccess ? CUBLAS_STATUS_SUCCESS
                                                                      : CUBLAS_STATUS_EXECUTION_FAILED;
}

// One call of softmax attention as its kernels see it, and which keys a query sees.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include <linattn/core/status.hpp>
#include <linattn/detail/cuda.cuh>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

template <class T>
struct SoftmaxProblem {
  Rows<const T> q, k, v;
  Rows<T> out;
  Rows<const float> bias;  // a row of keys for each query; null: none
  Rows<float> lse;         // null: not wanted
  int queries, keys, heads, head_dim, value_dim;
  int diagonal;  // query i sees the keys up to i + diagonal; without a mask that is at least all
  float scale;
  bool quads;  // four neighbouring channels of out may be stored at once

  // Query i sees the keys [0, seen(i)), an empty range included.
  [[nodiscard]] __device__ __forceinline__ int seen(int query) const {
    return max(0, min(keys, query + diagonal + 1));
  }
};

// The running maximum may be that of no key at all; nothing is then subtracted, and exponentials are 0.
[[nodiscard]] __device__ __forceinline__ float softmax_shift(float maximum) {
  return maximum == -INFINITY ? 0.0f : maximum;
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

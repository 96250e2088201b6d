// One call of softmax attention as its kernels see it, and which keys a query sees.
//
// A weight of 0 does not hide a value that is not finite, nor a bias of -infinity a logit that is not: the results are NaN.
// A guarded kernel follows where a mask hides keys. Its blocks look at what is left of their tile, and end where all of that
// is finite; else they compute it anew, so that what is not finite reaches those queries alone that see it.
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
  [[nodiscard]] LINATTN_HD int seen(int query) const { return max(0, min(keys, query + diagonal + 1)); }
  // The same where a bias may hide keys, too; `row` is that of the query, or null.
  [[nodiscard]] __device__ __forceinline__ bool sees(int query, const float* row, int key) const {
    return query < queries && key < seen(query) && (row == nullptr || row[key] != -INFINITY);
  }
  // Whether one of the queries `first` to `last` may not see a key that another sees.
  [[nodiscard]] LINATTN_HD bool hides(int first, int last) const {
    return bias.data != nullptr || seen(first) < seen(last);
  }
};

[[nodiscard]] __device__ __forceinline__ bool is_finite(float value) { return value - value == 0.0f; }

// The running maximum may be that of no key at all; nothing is then subtracted, and exponentials are 0.
[[nodiscard]] __device__ __forceinline__ float softmax_shift(float maximum) {
  return maximum == -INFINITY ? 0.0f : maximum;
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

// Reduction over the threads of a block. All of CUB that the library uses is here.
#pragma once

#include <cub/block/block_reduce.cuh>

#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

template <class T, int Threads>
using BlockReduceScratch = typename cub::BlockReduce<T, Threads>::TempStorage;

// The values of all threads joined by `join`, associative up to rounding, in an order that Threads alone decides. The
// result is thread 0's; a barrier comes before the scratch is used again.
template <int Threads, class T, class Join>
[[nodiscard]] __device__ __forceinline__ T block_reduce(const T& value, const Join& join,
                                                        BlockReduceScratch<T, Threads>& scratch) {
  return cub::BlockReduce<T, Threads>(scratch).Reduce(value, join);
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

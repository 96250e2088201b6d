// Stand-in for CUB's block reduction: the same interface, not the same code or order of joining.
#pragma once

#include <cuda_runtime.h>

namespace cub {

template <class T, int Threads>
class BlockReduce {
 public:
  struct TempStorage {
    T values[Threads];
  };
  explicit BlockReduce(TempStorage& storage) : storage_(storage) {}

  // Valid in thread 0. A barrier comes before the storage is used again.
  template <class Join>
  T Reduce(const T& value, const Join& join) {
    storage_.values[threadIdx.x] = value;
    __syncthreads();
    T result = value;
    if (threadIdx.x == 0)
      for (int i = 1; i < Threads; ++i) result = join(result, storage_.values[i]);
    return result;
  }

 private:
  TempStorage& storage_;
};

}  // namespace cub

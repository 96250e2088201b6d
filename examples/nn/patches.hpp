// Pictures and latents as rows of patches, and back.
#pragma once

#include "runtime.hpp"

namespace nn {

// (batch, channels, height, width), any strides, to (batch, patches, channels p p): patch (r, s) is row r * columns
// + s, its element (ch p + i) p + j is x[ch, r p + i, s p + j], the order of a flattened convolution weight.
// height and width are multiples of p.
template <class T>
[[nodiscard]] Tensor<T> to_patches(const Runtime& rt, const TensorView<const T, 4>& x, Index p) {
  const Index batch = x.extent(0), channels = x.extent(1), rows = x.extent(2) / p, columns = x.extent(3) / p;
  Tensor<T> patches({batch, rows * columns, channels * p * p});
  rt.parallel_rows(batch * rows, columns * channels * p * p, [&](Index begin, Index end) {
    for (Index row = begin; row < end; ++row) {
      T* out = patches.data() + row * columns * channels * p * p;
      for (Index s = 0; s < columns; ++s)
        for (Index ch = 0; ch < channels; ++ch)
          for (Index i = 0; i < p; ++i)
            for (Index j = 0; j < p; ++j) *out++ = x(row / rows, ch, row % rows * p + i, s * p + j);
    }
  });
  return patches;
}

// Dense (batch, patches, p p channels) to (batch, channels, height, width), any strides. The channel is last in a
// patch, unlike above: element (i p + j) channels + ch is x[ch, r p + i, s p + j], as diffusion transformers
// have it.
template <class T>
void from_patches(const Runtime& rt, const TensorView<const T, 3>& patches, Index p,
                  const TensorView<T, 4>& x) {
  const Index batch = x.extent(0), channels = x.extent(1), rows = x.extent(2) / p, columns = x.extent(3) / p;
  rt.parallel_rows(batch * rows, columns * channels * p * p, [&](Index begin, Index end) {
    for (Index row = begin; row < end; ++row) {
      const T* in = patches.data + row * columns * channels * p * p;
      for (Index s = 0; s < columns; ++s)
        for (Index i = 0; i < p; ++i)
          for (Index j = 0; j < p; ++j)
            for (Index ch = 0; ch < channels; ++ch) x(row / rows, ch, row % rows * p + i, s * p + j) = *in++;
    }
  });
}

}  // namespace nn

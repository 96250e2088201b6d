// The linear layer, an element at a time.
#pragma once

#include <linattn/core/tensor.hpp>

namespace reference {

using linattn::Index;
using linattn::TensorView;

// x (batch, rows, in), weight [out, in], bias [out] or empty, out (batch, rows, out).
inline void linear(const TensorView<const double, 3>& x, const TensorView<const double, 2>& weight,
                   const TensorView<const double, 1>& bias, const TensorView<double, 3>& out) {
  for (Index b = 0; b < out.extent(0); ++b)
    for (Index r = 0; r < out.extent(1); ++r)
      for (Index o = 0; o < out.extent(2); ++o) {
        double sum = bias.empty() ? 0.0 : bias(o);
        for (Index i = 0; i < x.extent(2); ++i) sum += x(b, r, i) * weight(o, i);
        out(b, r, o) = sum;
      }
}

}  // namespace reference

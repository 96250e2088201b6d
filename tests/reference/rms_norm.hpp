// Root-mean-square normalisation over the channels of each head.
#pragma once

#include <cmath>

#include <linattn/core/tensor.hpp>

namespace reference {

using linattn::Index;
using linattn::TensorView;

inline void rms_norm(const TensorView<const double, 4>& x, const TensorView<const double, 1>& weight,
                     const TensorView<double, 4>& out, double eps) {
  const auto [batch, tokens, heads, channels] = x.extents;
  for (Index b = 0; b < batch; ++b)
    for (Index n = 0; n < tokens; ++n)
      for (Index h = 0; h < heads; ++h) {
        double squares = 0;
        for (Index c = 0; c < channels; ++c) squares += x(b, n, h, c) * x(b, n, h, c);
        const double root = std::sqrt(squares / static_cast<double>(channels) + eps);
        for (Index c = 0; c < channels; ++c) out(b, n, h, c) = weight(c) * x(b, n, h, c) / root;
      }
}

}  // namespace reference

// Depthwise 3x3 convolution over the token grid, zeros outside; tokens outside the grid pass through.
#pragma once

#include <linattn/core/tensor.hpp>
#include <linattn/ops/depthwise_conv.hpp>

namespace reference {

using linattn::Index;
using linattn::TensorView;

inline void depthwise_conv(const TensorView<const double, 4>& x, const TensorView<const double, 4>& weight,
                           const TensorView<const double, 1>& bias, const TensorView<double, 4>& out,
                           const linattn::TokenGrid& grid, bool residual) {
  const auto [batch, tokens, heads, channels] = x.extents;
  for (Index b = 0; b < batch; ++b)
    for (Index n = 0; n < tokens; ++n)
      for (Index h = 0; h < heads; ++h)
        for (Index c = 0; c < channels; ++c) {
          const Index pixel = n - grid.offset;
          if (pixel < 0 || pixel >= grid.tokens()) {
            out(b, n, h, c) = x(b, n, h, c);
            continue;
          }
          const Index row = pixel / grid.width, column = pixel % grid.width, channel = h * channels + c;
          double sum = residual ? x(b, n, h, c) : 0.0;
          if (bias.extent(0) > 0) sum += bias(channel);
          for (Index i = 0; i < 3; ++i)
            for (Index j = 0; j < 3; ++j) {
              const Index y = row + i - 1, z = column + j - 1;
              if (y >= 0 && y < grid.height && z >= 0 && z < grid.width)
                sum += weight(channel, 0, i, j) * x(b, grid.offset + y * grid.width + z, h, c);
            }
          out(b, n, h, c) = sum;
        }
}

}  // namespace reference

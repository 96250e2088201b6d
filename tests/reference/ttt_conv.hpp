// Test-time training of a depthwise 3x3 convolution by its formulas, in double: the specification of
// ops/ttt_conv.hpp.
#pragma once

#include <cmath>
#include <vector>

#include <linattn/core/tensor.hpp>
#include <linattn/ops/depthwise_conv.hpp>

namespace reference {

using linattn::Index;
using linattn::TensorView;

// q, k, v, out (b, n, h, c), all tokens on the grid; weight [h * c, 1, 3, 3]; updated [b, h * c, 3, 3], or empty.
inline void ttt_conv(const TensorView<const double, 4>& q, const TensorView<const double, 4>& k,
                     const TensorView<const double, 4>& v, const TensorView<const double, 4>& weight,
                     const TensorView<double, 4>& out, const linattn::TokenGrid& grid, double scale,
                     double inner_lr, const TensorView<double, 4>& updated = {}) {
  const auto [batch, tokens, heads, channels] = q.extents;
  // x at tap (i, j) of a token, 0 outside the grid.
  const auto tap = [&grid](const TensorView<const double, 4>& x, Index b, Index token, Index h, Index c,
                           Index i, Index j) {
    const Index row = token / grid.width + i - 1, column = token % grid.width + j - 1;
    const bool inside = row >= 0 && row < grid.height && column >= 0 && column < grid.width;
    return inside ? x(b, row * grid.width + column, h, c) : 0.0;
  };
  for (Index b = 0; b < batch; ++b)
    for (Index h = 0; h < heads; ++h)
      for (Index c = 0; c < channels; ++c) {
        double w[3][3], norm = 0.0;
        for (Index i = 0; i < 3; ++i)
          for (Index j = 0; j < 3; ++j) {
            double sum = 0.0;
            for (Index n = 0; n < tokens; ++n) sum += v(b, n, h, c) * tap(k, b, n, h, c, i, j);
            w[i][j] = -scale / static_cast<double>(tokens) * sum;
            norm += w[i][j] * w[i][j];
          }
        for (Index i = 0; i < 3; ++i)
          for (Index j = 0; j < 3; ++j) {
            w[i][j] = weight(h * channels + c, 0, i, j) - inner_lr * w[i][j] / (std::sqrt(norm) + 1.0);
            if (!updated.empty()) updated(b, h * channels + c, i, j) = w[i][j];
          }
        for (Index n = 0; n < tokens; ++n) {
          double sum = 0.0;
          for (Index i = 0; i < 3; ++i)
            for (Index j = 0; j < 3; ++j) sum += w[i][j] * tap(q, b, n, h, c, i, j);
          out(b, n, h, c) = sum;
        }
      }
}

}  // namespace reference

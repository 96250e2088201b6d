// Neighborhood attention as softmax attention under a mask: all pairs of tokens, those outside the window at
// -infinity.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include <linattn/core/tensor.hpp>
#include <linattn/ops/neighborhood_attention.hpp>

#include "softmax_attention.hpp"

namespace reference {

// Whether the token at (y, x) sees the one at (row, column): the window begins `size / 2` before the token, but not
// before 0, and ends inside the grid.
[[nodiscard]] inline bool sees(Index position, Index other, Index size, Index extent) {
  const Index start = std::clamp(position - size / 2, Index{0}, extent - size);
  return other >= start && other < start + size;
}

// q, k (b, n, h, d), v, out (b, n, h, dv), the tokens of a grid row by row.
inline void neighborhood_attention(const TensorView<const double, 4>& q, const TensorView<const double, 4>& k,
                                   const TensorView<const double, 4>& v, const TensorView<double, 4>& out,
                                   Index height, Index width, const linattn::Window& kernel, double scale) {
  const Index tokens = height * width, heads = q.extent(2);
  std::vector<double> mask(static_cast<std::size_t>(tokens * tokens),
                           -std::numeric_limits<double>::infinity());
  for (Index i = 0; i < tokens; ++i)
    for (Index j = 0; j < tokens; ++j)
      if (sees(i / width, j / width, kernel.height, height) &&
          sees(i % width, j % width, kernel.width, width))
        mask[static_cast<std::size_t>(i * tokens + j)] = 0.0;
  SoftmaxAttention options{.scale = scale};
  options.bias = {mask.data(), {q.extent(0), heads, tokens, tokens}, {0, 0, tokens, 1}};
  softmax_attention(q, k, v, out, options);
}

}  // namespace reference

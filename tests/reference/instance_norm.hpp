// Instance normalisation over the tokens, in two passes, and its statistics.
#pragma once

#include <cmath>
#include <vector>

#include <linattn/core/tensor.hpp>

namespace reference {

using linattn::Index;
using linattn::TensorView;

// mean and biased variance over the tokens: x (b, n, h, c), mean and var (b, h, c).
inline void token_statistics(const TensorView<const double, 4>& x, const TensorView<double, 3>& mean,
                             const TensorView<double, 3>& var) {
  const auto [batch, tokens, heads, channels] = x.extents;
  for (Index b = 0; b < batch; ++b)
    for (Index h = 0; h < heads; ++h)
      for (Index c = 0; c < channels; ++c) {
        long double sum = 0;
        for (Index n = 0; n < tokens; ++n) sum += x(b, n, h, c);
        const long double mu = sum / tokens;
        long double squares = 0;
        for (Index n = 0; n < tokens; ++n) squares += (x(b, n, h, c) - mu) * (x(b, n, h, c) - mu);
        mean(b, h, c) = static_cast<double>(mu);
        var(b, h, c) = static_cast<double>(squares / tokens);
      }
}

inline void instance_norm(const TensorView<const double, 4>& x, const TensorView<double, 4>& out, double eps,
                          bool divide_by_std) {
  const auto [batch, tokens, heads, channels] = x.extents;
  std::vector<double> memory(static_cast<std::size_t>(2 * batch * heads * channels));
  const TensorView<double, 3> mean(memory.data(), {batch, heads, channels});
  const TensorView<double, 3> var(memory.data() + mean.elements(), {batch, heads, channels});
  token_statistics(x, mean, var);
  for (Index b = 0; b < batch; ++b)
    for (Index n = 0; n < tokens; ++n)
      for (Index h = 0; h < heads; ++h)
        for (Index c = 0; c < channels; ++c)
          out(b, n, h, c) =
              (x(b, n, h, c) - mean(b, h, c)) / (divide_by_std ? std::sqrt(var(b, h, c) + eps) : 1.0);
}

}  // namespace reference

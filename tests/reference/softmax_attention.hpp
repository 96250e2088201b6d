// Softmax attention, a row of logits at a time.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include <linattn/core/tensor.hpp>

namespace reference {

using linattn::Index;
using linattn::TensorView;

struct SoftmaxAttention {
  double scale = 1.0;
  bool causal = false;                    // query i sees the keys j <= i + (Nk - Nq)
  TensorView<const double, 4> bias{};     // (b, h, Nq, Nk), or empty
  TensorView<double, 3> lse{};            // (b, Nq, h), or empty
  TensorView<double, 4> probabilities{};  // (b, h, Nq, Nk), or empty

  // Whether query i sees key j; `diagonal`: Nk - Nq.
  [[nodiscard]] bool sees(Index b, Index h, Index i, Index j, Index diagonal) const {
    if (causal && j > i + diagonal) return false;
    return bias.empty() || bias(b, h, i, j) != -std::numeric_limits<double>::infinity();
  }
};

// q (b, Nq, h, d), k (b, Nk, h, d), v (b, Nk, h, dv), out (b, Nq, h, dv). A row that sees no key gives 0.
inline void softmax_attention(const TensorView<const double, 4>& q, const TensorView<const double, 4>& k,
                              const TensorView<const double, 4>& v, const TensorView<double, 4>& out,
                              const SoftmaxAttention& options) {
  const auto [batch, queries, heads, value_dim] = out.extents;
  const Index keys = k.extent(1);
  std::vector<double> row(static_cast<std::size_t>(keys));
  const TensorView<double, 1> p(row.data(), {keys});
  for (Index b = 0; b < batch; ++b)
    for (Index h = 0; h < heads; ++h)
      for (Index i = 0; i < queries; ++i) {
        for (Index j = 0; j < keys; ++j) {
          p(j) = -std::numeric_limits<double>::infinity();
          if (!options.sees(b, h, i, j, keys - queries)) continue;
          double s = 0.0;
          for (Index c = 0; c < q.extent(3); ++c) s += q(b, i, h, c) * k(b, j, h, c);
          s *= options.scale;
          if (!options.bias.empty()) s += options.bias(b, h, i, j);
          p(j) = s;
        }
        double top = row[0];  // the largest; NaN where there is one
        for (const double s : row) top = std::isnan(top) || s <= top ? top : s;
        const bool sees_none = top == -std::numeric_limits<double>::infinity();
        double sum = 0.0;
        for (double& s : row) sum += s = sees_none ? 0.0 : std::exp(s - top);
        for (double& e : row) e = sees_none ? 0.0 : e / sum;
        for (Index c = 0; c < value_dim; ++c) out(b, i, h, c) = 0.0;
        for (Index j = 0; j < keys; ++j)
          if (options.sees(b, h, i, j, keys - queries))
            for (Index c = 0; c < value_dim; ++c) out(b, i, h, c) += p(j) * v(b, j, h, c);
        if (!options.lse.empty()) options.lse(b, i, h) = sees_none ? top : top + std::log(sum);
        if (!options.probabilities.empty())
          for (Index j = 0; j < keys; ++j) options.probabilities(b, h, i, j) = p(j);
      }
}

}  // namespace reference

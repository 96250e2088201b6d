// Attention layers in double: projections, qk-norm, an attention, output projections. The attention is given.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include <linattn/core/tensor.hpp>
#include <linattn/layers/projections.hpp>

#include "rms_norm.hpp"

namespace reference {

using linattn::Index;
using linattn::TensorView;

// A dense (b, n, h, c) that owns its memory.
struct Tokens {
  explicit Tokens(std::array<Index, 4> shape)
      : memory(static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3])), extents(shape) {}
  [[nodiscard]] TensorView<double, 4> view() { return {memory.data(), extents}; }

  std::vector<double> memory;
  std::array<Index, 4> extents;
};

inline void project(const TensorView<const double, 3>& x, const linattn::Projection<double>& p,
                    const TensorView<double, 3>& out) {
  for (Index b = 0; b < x.extent(0); ++b)
    for (Index n = 0; n < x.extent(1); ++n)
      for (Index o = 0; o < p.weight.extent(0); ++o) {
        double sum = p.bias.extent(0) > 0 ? p.bias(o) : 0.0;
        for (Index i = 0; i < x.extent(2); ++i) sum += x(b, n, i) * p.weight(o, i);
        out(b, n, o) = sum;
      }
}

// softmax(scale q k^T) v, a row at a time.
inline void plain_softmax_attention(const TensorView<const double, 4>& q,
                                    const TensorView<const double, 4>& k,
                                    const TensorView<const double, 4>& v, const TensorView<double, 4>& out,
                                    double scale) {
  const Index keys = k.extent(1);
  std::vector<double> row(static_cast<std::size_t>(keys));
  for (Index b = 0; b < q.extent(0); ++b)
    for (Index h = 0; h < q.extent(2); ++h)
      for (Index i = 0; i < q.extent(1); ++i) {
        for (Index j = 0; j < keys; ++j) {
          double dot = 0.0;
          for (Index c = 0; c < q.extent(3); ++c) dot += q(b, i, h, c) * k(b, j, h, c);
          row[static_cast<std::size_t>(j)] = scale * dot;
        }
        const double largest = *std::max_element(row.begin(), row.end());
        double sum = 0.0;
        for (double& z : row) sum += z = std::exp(z - largest);
        for (Index c = 0; c < v.extent(3); ++c) {
          double y = 0.0;
          for (Index j = 0; j < keys; ++j) y += row[static_cast<std::size_t>(j)] * v(b, j, h, c);
          out(b, i, h, c) = y / sum;
        }
      }
}

using Attention =
    std::function<void(const TensorView<const double, 4>& q, const TensorView<const double, 4>& k,
                       const TensorView<const double, 4>& v, const TensorView<double, 4>& out)>;

// Context tokens first, then those of x, both as keys and as queries; context_out may be empty.
inline void attention_layer(const TensorView<const double, 3>& x, const TensorView<const double, 3>& context,
                            const linattn::AttentionWeights<double>& x_weights,
                            const linattn::AttentionWeights<double>& context_weights, Index heads,
                            double qk_norm_eps, const Attention& attention,
                            const TensorView<double, 3>& x_out, const TensorView<double, 3>& context_out) {
  const Index batch = x.extent(0), n = x.extent(1), t = context.extent(1),
              width = x_weights.k.weight.extent(0);
  const std::array<Index, 4> shape = {batch, t + n, heads, width / heads};
  Tokens q(shape), k(shape), v(shape), out(shape);
  const auto rows = [&](Tokens& tokens, Index first, Index count) {
    const TensorView<double, 3> flat(tokens.memory.data(), {batch, t + n, width});
    return slice<1>(flat, first, count);
  };
  const auto fill = [&](Tokens& to, Index first, const TensorView<const double, 3>& from,
                        const linattn::Projection<double>& p, const TensorView<const double, 1>& norm) {
    if (from.extent(1) == 0 || p.weight.extent(0) == 0) return;
    const TensorView<double, 3> target = rows(to, first, from.extent(1));
    project(from, p, target);
    const TensorView<double, 4> split = linattn::split_heads(target, heads);
    if (norm.extent(0) > 0) rms_norm(split, norm, split, qk_norm_eps);
  };
  fill(q, 0, context, context_weights.q, context_weights.q_norm);
  fill(k, 0, context, context_weights.k, context_weights.k_norm);
  fill(v, 0, context, context_weights.v, {});
  fill(q, t, x, x_weights.q, x_weights.q_norm);
  fill(k, t, x, x_weights.k, x_weights.k_norm);
  fill(v, t, x, x_weights.v, {});
  attention(q.view(), k.view(), v.view(), out.view());
  if (context_out.elements() > 0) project(rows(out, 0, t), context_weights.out, context_out);
  if (x_weights.out.weight.extent(0) > 0) {
    project(rows(out, t, n), x_weights.out, x_out);
  } else {
    const TensorView<double, 3> from = rows(out, t, n);
    for (Index b = 0; b < batch; ++b)
      for (Index i = 0; i < n; ++i)
        for (Index c = 0; c < width; ++c) x_out(b, i, c) = from(b, i, c);
  }
}

}  // namespace reference

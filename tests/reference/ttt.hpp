// Test-time training by its formulas, a token at a time, in double: the specification of ops/ttt.hpp.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <vector>

#include <linattn/core/tensor.hpp>

namespace reference {

using linattn::Index;
using linattn::TensorView;

enum class InnerModel {
  linear,  // x W1
  mlp,     // silu(x W1) W2
  swiglu,  // (silu(x W1) * (x W2)) W3
  glu,     // silu(x W1) * (x W2)
  mlp3,    // silu(silu(x W1) W2) W3
};
enum class InnerLoss { inner_product, squared_error };
enum class InnerStep { plain, column_clip };

[[nodiscard]] inline int matrices(InnerModel model) {
  return model == InnerModel::linear ? 1 : model == InnerModel::mlp || model == InnerModel::glu ? 2 : 3;
}

// W1, W2, W3, each [b, h, d, d]; those that the model has not are empty.
template <class T>
using Matrices = std::array<TensorView<T, 4>, 3>;

// Weights [h, d, d] as the same for every batch entry.
[[nodiscard]] inline TensorView<const double, 4> for_each_batch(const TensorView<const double, 3>& w,
                                                                Index batch) {
  return {w.data, {batch, w.extent(0), w.extent(1), w.extent(2)}, {0, w.stride(0), w.stride(1), w.stride(2)}};
}

using Row = std::vector<double>;

// x W and x W^T, one row, the matrix of batch entry b and head h.
[[nodiscard]] inline Row times(const Row& x, const TensorView<const double, 4>& w, Index b, Index h) {
  Row y(static_cast<std::size_t>(w.extent(3)));
  for (Index j = 0; j < w.extent(3); ++j)
    for (Index i = 0; i < w.extent(2); ++i)
      y[static_cast<std::size_t>(j)] += x[static_cast<std::size_t>(i)] * w(b, h, i, j);
  return y;
}
[[nodiscard]] inline Row times_transposed(const Row& x, const TensorView<const double, 4>& w, Index b,
                                          Index h) {
  Row y(static_cast<std::size_t>(w.extent(2)));
  for (Index i = 0; i < w.extent(2); ++i)
    for (Index j = 0; j < w.extent(3); ++j)
      y[static_cast<std::size_t>(i)] += x[static_cast<std::size_t>(j)] * w(b, h, i, j);
  return y;
}

[[nodiscard]] inline Row token(const TensorView<const double, 4>& x, Index b, Index n, Index h) {
  Row row(static_cast<std::size_t>(x.extent(3)));
  for (Index c = 0; c < x.extent(3); ++c) row[static_cast<std::size_t>(c)] = x(b, n, h, c);
  return row;
}

[[nodiscard]] inline double sigmoid(double z) { return 1.0 / (1.0 + std::exp(-z)); }
[[nodiscard]] inline double silu(double z) { return z * sigmoid(z); }
[[nodiscard]] inline double silu_derivative(double z) { return sigmoid(z) * (1.0 + z * (1.0 - sigmoid(z))); }

[[nodiscard]] inline Row silu(Row z) {
  for (double& x : z) x = silu(x);
  return z;
}
[[nodiscard]] inline Row product(Row x, const Row& y) {
  for (std::size_t i = 0; i < x.size(); ++i) x[i] *= y[i];
  return x;
}

// f(x; W)
[[nodiscard]] inline Row inner_model(InnerModel model, const Row& x, const Matrices<const double>& w, Index b,
                                     Index h) {
  const Row z1 = times(x, w[0], b, h);
  switch (model) {
    case InnerModel::linear:
      return z1;
    case InnerModel::mlp:
      return times(silu(z1), w[1], b, h);
    case InnerModel::glu:
      return product(silu(z1), times(x, w[1], b, h));
    case InnerModel::swiglu:
      return times(product(silu(z1), times(x, w[1], b, h)), w[2], b, h);
    case InnerModel::mlp3:
      return times(silu(times(silu(z1), w[1], b, h)), w[2], b, h);
  }
  return {};
}

// l of one batch entry and head: -(scale / N) sum <v, f(k)> or (scale / 2N) sum |f(k) - v|^2.
[[nodiscard]] inline double inner_loss(InnerModel model, InnerLoss loss, const TensorView<const double, 4>& k,
                                       const TensorView<const double, 4>& v, const Matrices<const double>& w,
                                       double scale, Index b, Index h) {
  double sum = 0.0;
  for (Index n = 0; n < k.extent(1); ++n) {
    const Row y = inner_model(model, token(k, b, n, h), w, b, h), target = token(v, b, n, h);
    for (std::size_t c = 0; c < y.size(); ++c)
      sum += loss == InnerLoss::inner_product ? -y[c] * target[c]
                                              : 0.5 * (y[c] - target[c]) * (y[c] - target[c]);
  }
  return sum * scale / static_cast<double>(k.extent(1));
}

// dl/dW[i] of one token, e = dl/df of it, added to g[i].
inline void add_gradients(InnerModel model, const Row& x, const Row& e, const Matrices<const double>& w,
                          Index b, Index h, const Matrices<double>& g) {
  const auto add_outer = [&](std::size_t m, const Row& from, const Row& to) {
    for (std::size_t i = 0; i < from.size(); ++i)
      for (std::size_t j = 0; j < to.size(); ++j)
        g[m](b, h, static_cast<Index>(i), static_cast<Index>(j)) += from[i] * to[j];
  };
  const auto back_through_silu = [](const Row& delta, Row z) {
    for (double& element : z) element = silu_derivative(element);
    return product(delta, z);
  };
  const Row z1 = times(x, w[0], b, h);
  switch (model) {
    case InnerModel::linear:
      return add_outer(0, x, e);
    case InnerModel::mlp:
      add_outer(0, x, back_through_silu(times_transposed(e, w[1], b, h), z1));
      return add_outer(1, silu(z1), e);
    case InnerModel::glu:
    case InnerModel::swiglu: {
      const Row z2 = times(x, w[1], b, h);
      const Row delta = model == InnerModel::glu ? e : times_transposed(e, w[2], b, h);
      add_outer(0, x, back_through_silu(product(delta, z2), z1));
      add_outer(1, x, product(delta, silu(z1)));
      if (model == InnerModel::swiglu) add_outer(2, product(silu(z1), z2), e);
      return;
    }
    case InnerModel::mlp3: {
      const Row z2 = times(silu(z1), w[1], b, h);
      const Row delta = back_through_silu(times_transposed(e, w[2], b, h), z2);
      add_outer(0, x, back_through_silu(times_transposed(delta, w[1], b, h), z1));
      add_outer(1, silu(z1), delta);
      return add_outer(2, silu(z2), e);
    }
  }
}

// g[i] = dl/dW[i], all at W.
inline void ttt_gradients(InnerModel model, InnerLoss loss, const TensorView<const double, 4>& k,
                          const TensorView<const double, 4>& v, const Matrices<const double>& w, double scale,
                          const Matrices<double>& g) {
  const auto [batch, tokens, heads, d] = k.extents;
  for (Index b = 0; b < batch; ++b)
    for (Index h = 0; h < heads; ++h) {
      for (std::size_t m = 0; m < static_cast<std::size_t>(matrices(model)); ++m)
        for (Index i = 0; i < d; ++i)
          for (Index j = 0; j < d; ++j) g[m](b, h, i, j) = 0.0;
      for (Index n = 0; n < tokens; ++n) {
        const Row x = token(k, b, n, h);
        Row e = token(v, b, n, h);
        const Row y = inner_model(model, x, w, b, h);
        for (std::size_t c = 0; c < e.size(); ++c)
          e[c] =
              (loss == InnerLoss::inner_product ? -e[c] : y[c] - e[c]) * scale / static_cast<double>(tokens);
        add_gradients(model, x, e, w, b, h, g);
      }
    }
}

// Each column of a matrix is divided by its norm + 1.
inline void clip_columns(const TensorView<double, 4>& g, Index b, Index h) {
  for (Index j = 0; j < g.extent(3); ++j) {
    double squares = 0.0;
    for (Index i = 0; i < g.extent(2); ++i) squares += g(b, h, i, j) * g(b, h, i, j);
    for (Index i = 0; i < g.extent(2); ++i) g(b, h, i, j) /= std::sqrt(squares) + 1.0;
  }
}

// W' = W - inner_lr * dl/dW, clipped or not
inline void ttt_update(InnerModel model, InnerLoss loss, const TensorView<const double, 4>& k,
                       const TensorView<const double, 4>& v, const Matrices<const double>& w, double scale,
                       double inner_lr, const Matrices<double>& updated, InnerStep step = InnerStep::plain) {
  ttt_gradients(model, loss, k, v, w, scale, updated);
  for (std::size_t m = 0; m < static_cast<std::size_t>(matrices(model)); ++m)
    for (Index b = 0; b < k.extent(0); ++b)
      for (Index h = 0; h < k.extent(2); ++h) {
        if (step == InnerStep::column_clip) clip_columns(updated[m], b, h);
        for (Index i = 0; i < k.extent(3); ++i)
          for (Index j = 0; j < k.extent(3); ++j)
            updated[m](b, h, i, j) = w[m](b, h, i, j) - inner_lr * updated[m](b, h, i, j);
      }
}

// out = f(q; W)
inline void ttt_apply(InnerModel model, const TensorView<const double, 4>& q, const Matrices<const double>& w,
                      const TensorView<double, 4>& out) {
  for (Index b = 0; b < q.extent(0); ++b)
    for (Index n = 0; n < q.extent(1); ++n)
      for (Index h = 0; h < q.extent(2); ++h) {
        const Row y = inner_model(model, token(q, b, n, h), w, b, h);
        for (Index c = 0; c < q.extent(3); ++c) out(b, n, h, c) = y[static_cast<std::size_t>(c)];
      }
}

}  // namespace reference

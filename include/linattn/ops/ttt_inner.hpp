// What a TTT op is made of besides matrix products: inner models, inner losses and inner steps, each stated
// for one element. V is float, double or a SIMD pack of either; the matrix products, tiles and threads around
// them are written once for all policies, in ttt_cpu.hpp.
//
// An inner model projects x by one or two matrices, z1 = x W1 (and z2 = x W2), applies a function a to each
// element, and maps what that gives by the matrices that are chained to it, the function again between two:
//
//   Linear   f(x) = x W1                            matrices: W1
//   Glu      f(x) = silu(x W1) * (x W2)                       W1, W2
//   Mlp      f(x) = silu(x W1) W2                             W1, W2
//   SwiGlu   f(x) = (silu(x W1) * (x W2)) W3                  W1, W2, W3
//   Mlp3     f(x) = silu(silu(x W1) W2) W3                    W1, W2, W3
//
// With A the input of a chained matrix W and E = dl/d(A W), the gradients at the initial weights are
//   dl/dW = A^T E,  and one matrix down  E <- (E W^T) * da/dz;
// those of the projections, with D = E W^T, or dl/df(K) where no matrix is chained, are
//   dl/dW1 = K^T (D * da/dz1),  dl/dW2 = K^T (D * da/dz2).
//
// Source    Transformer-to-TTT: T5 `gradient_silu_glu` (SwiGlu) and `gradient` (Mlp), both with InnerProduct;
//           DiT5 `TTTAttention.gradient` (Mlp with SquaredError). ViTTT `inner_train_simplified_swiglu`: Glu
//           with w1 and w2 swapped, InnerProduct with scale 1/3, and ColumnClip. Glu and Mlp3 are also our
//           reading of the paper's TTT-1Layer-Gate and TTT-3Layer, which no official code has.
#pragma once

#include <cmath>
#include <concepts>

#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail {

// 1 / (1 + e^-z); packs bring theirs, found by argument-dependent lookup.
[[nodiscard]] LINATTN_HD LINATTN_INLINE float sigmoid(float z) { return 1.0f / (1.0f + std::exp(-z)); }
[[nodiscard]] LINATTN_HD LINATTN_INLINE double sigmoid(double z) { return 1.0 / (1.0 + std::exp(-z)); }

}  // namespace detail

// The value of an inner model's function and its derivatives by z1 and z2 (d2 is not used by a model of one
// projection).
template <class V>
struct Activation {
  V value, d1, d2;
};

template <class M>
concept InnerModel = requires {
  // How many matrices read x (1 or 2), whether a function is applied, and how many matrices are chained to
  // it. There are names for three matrices, so only a function of one argument ever stands between two.
  requires M::projections == 1 || M::projections == 2;
  requires std::same_as<decltype(M::has_activation), const bool>;
  requires M::chained >= 0 && M::projections + M::chained <= 3;
  requires M::has_activation ||(M::chained == 0 && M::projections == 1);
}
&&(!M::has_activation || requires(float z) {
  { M::activate(z, z) } -> std::same_as<float>;
  { M::differentiate(z, z) } -> std::same_as<Activation<float>>;
});

// f(x) = x W1: plain linear attention, written as a fast weight. No function of an element: a = z1.
struct Linear {
  static constexpr int projections = 1;
  static constexpr bool has_activation = false;
  static constexpr int chained = 0;
};

// f(x) = silu(x W1) W2, silu(z) = z s(z), silu'(z) = s(z) (1 + z (1 - s(z))).
struct Mlp {
  static constexpr int projections = 1;
  static constexpr bool has_activation = true;
  static constexpr int chained = 1;

  template <class V>
  [[nodiscard]] LINATTN_HD LINATTN_INLINE static V activate(V z1, V) {
    using detail::sigmoid;
    return z1 * sigmoid(z1);
  }
  template <class V>
  [[nodiscard]] LINATTN_HD LINATTN_INLINE static Activation<V> differentiate(V z1, V z2) {
    using detail::sigmoid;
    const V s = sigmoid(z1);
    const V silu = z1 * s;
    return {silu, s + silu - silu * s, z2};
  }
};

// f(x) = silu(silu(x W1) W2) W3: one layer more.
struct Mlp3 : Mlp {
  static constexpr int chained = 2;
};

// f(x) = silu(x W1) * (x W2): a gate, and nothing behind it.
struct Glu {
  static constexpr int projections = 2;
  static constexpr bool has_activation = true;
  static constexpr int chained = 0;

  template <class V>
  [[nodiscard]] LINATTN_HD LINATTN_INLINE static V activate(V z1, V z2) {
    using detail::sigmoid;
    return z1 * sigmoid(z1) * z2;
  }
  template <class V>
  [[nodiscard]] LINATTN_HD LINATTN_INLINE static Activation<V> differentiate(V z1, V z2) {
    using detail::sigmoid;
    const V s = sigmoid(z1);
    const V silu = z1 * s;
    return {silu * z2, (s + silu - silu * s) * z2, silu};
  }
};

// f(x) = (silu(x W1) * (x W2)) W3: the default, the gated unit of most language models.
struct SwiGlu : Glu {
  static constexpr int chained = 1;
};

namespace detail {

// Matrices of a model: those that read x, then those that are chained.
template <InnerModel M>
inline constexpr int matrices = M::projections + M::chained;

}  // namespace detail

// An inner loss states dl/dy for one element, without the factor scale / N that all elements share.
template <class L>
concept InnerLoss = requires(float v) {
  { L::needs_prediction } -> std::convertible_to<bool>;
  { L::error(v, v) } -> std::same_as<float>;
};

// l = -(scale / N) sum_n <v_n, f(k_n)>
struct InnerProduct {
  static constexpr bool needs_prediction = false;

  template <class V>
  [[nodiscard]] LINATTN_HD LINATTN_INLINE static V error(V target, V) {
    return -target;
  }
};

// l = (scale / 2N) sum_n |f(k_n) - v_n|^2
struct SquaredError {
  static constexpr bool needs_prediction = true;

  template <class V>
  [[nodiscard]] LINATTN_HD LINATTN_INLINE static V error(V target, V prediction) {
    return prediction - target;
  }
};

// An inner step says how far each column of each matrix goes down its gradient,
//   W'[:, j] = W[:, j] - rate(inner_lr, factor, norm_j) * G[:, j]
// where factor * G = dl/dW, factor = scale / N, and norm_j = |dl/dW[:, j]|_2, if the step needs it. On Cuda a
// step that does gives its rate in float.
template <class S>
concept InnerStep = requires(double x) {
  { S::needs_column_norm } -> std::convertible_to<bool>;
  { S::rate(x, x, x) } -> std::same_as<double>;
};

// W' = W - inner_lr * dl/dW
struct Plain {
  static constexpr bool needs_column_norm = false;

  template <class V>
  [[nodiscard]] LINATTN_HD LINATTN_INLINE static V rate(V inner_lr, V factor, V) {
    return inner_lr * factor;
  }
};

// W'[:, j] = W[:, j] - inner_lr * g / (|g|_2 + 1), g = dl/dW[:, j]: no column moves by inner_lr or more. It
// is the norm + 1 that divides, so small gradients shrink as well. A column whose squares overflow stays.
struct ColumnClip {
  static constexpr bool needs_column_norm = true;

  template <class V>
  [[nodiscard]] LINATTN_HD LINATTN_INLINE static V rate(V inner_lr, V factor, V norm) {
    return inner_lr * factor / (norm + 1);
  }
};

LINATTN_END

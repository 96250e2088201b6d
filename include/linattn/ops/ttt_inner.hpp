// What a TTT op is made of besides matrix products: inner models, inner losses and inner steps, each stated
// for one element. V is float, double or a SIMD pack of either; the matrix products, tiles and threads around
// them are written once for all policies, in ttt_cpu.hpp.
//
// An inner model projects x by one or two matrices, z1 = x W1 (and z2 = x W2), applies a function
// a(z1[, z2]) to each element, and may map the result by one more matrix, f(x) = a W_out:
//
//   Linear   f(x) = x W1                            matrices: W1
//   Mlp      f(x) = silu(x W1) W2                             W1, W2
//   SwiGlu   f(x) = (silu(x W1) * (x W2)) W3                  W1, W2, W3
//
// With E = dl/df(K) the gradients at the initial weights are, D = E W_out^T (D = E without an output matrix),
//   dl/dW1 = K^T (D * da/dz1),  dl/dW2 = K^T (D * da/dz2),  dl/dW_out = a^T E.
//
// Source    Transformer-to-TTT: T5 `gradient_silu_glu` (SwiGlu) and `gradient` (Mlp), both with InnerProduct;
//           DiT5 `TTTAttention.gradient` (Mlp with SquaredError).
#pragma once

#include <cmath>
#include <concepts>

#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail {

// 1 / (1 + e^-z); packs bring theirs, found by argument-dependent lookup.
[[nodiscard]] LINATTN_HD inline float sigmoid(float z) { return 1.0f / (1.0f + std::exp(-z)); }
[[nodiscard]] LINATTN_HD inline double sigmoid(double z) { return 1.0 / (1.0 + std::exp(-z)); }

}  // namespace detail

// The value of an inner model's function and its derivatives by z1 and z2 (d2 is not used by a model of one
// projection).
template <class V>
struct Activation {
  V value, d1, d2;
};

template <class M>
concept InnerModel = requires {
  // How many matrices read x (1 or 2), whether a function is applied, and whether one more matrix follows it.
  requires M::projections == 1 || M::projections == 2;
  requires std::same_as<decltype(M::has_activation), const bool>;
  requires std::same_as<decltype(M::has_output), const bool>;
}
&&(!M::has_activation || requires(float z) {
  { M::activate(z, z) } -> std::same_as<float>;
  { M::differentiate(z, z) } -> std::same_as<Activation<float>>;
});

// f(x) = x W1: plain linear attention, written as a fast weight. No function of an element: a = z1.
struct Linear {
  static constexpr int projections = 1;
  static constexpr bool has_activation = false;
  static constexpr bool has_output = false;
};

// f(x) = silu(x W1) W2, silu(z) = z s(z), silu'(z) = s(z) (1 + z (1 - s(z))).
struct Mlp {
  static constexpr int projections = 1;
  static constexpr bool has_activation = true;
  static constexpr bool has_output = true;

  template <class V>
  [[nodiscard]] LINATTN_HD static V activate(V z1, V) {
    using detail::sigmoid;
    return z1 * sigmoid(z1);
  }
  template <class V>
  [[nodiscard]] LINATTN_HD static Activation<V> differentiate(V z1, V z2) {
    using detail::sigmoid;
    const V s = sigmoid(z1);
    const V silu = z1 * s;
    return {silu, s + silu - silu * s, z2};
  }
};

// f(x) = (silu(x W1) * (x W2)) W3: the default, the gated unit of most language models.
struct SwiGlu {
  static constexpr int projections = 2;
  static constexpr bool has_activation = true;
  static constexpr bool has_output = true;

  template <class V>
  [[nodiscard]] LINATTN_HD static V activate(V z1, V z2) {
    using detail::sigmoid;
    return z1 * sigmoid(z1) * z2;
  }
  template <class V>
  [[nodiscard]] LINATTN_HD static Activation<V> differentiate(V z1, V z2) {
    using detail::sigmoid;
    const V s = sigmoid(z1);
    const V silu = z1 * s;
    return {silu * z2, (s + silu - silu * s) * z2, silu};
  }
};

namespace detail {

// Matrices of a model: those that read x, then the output matrix.
template <InnerModel M>
inline constexpr int matrices = M::projections + (M::has_output ? 1 : 0);

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
  [[nodiscard]] LINATTN_HD static V error(V target, V) {
    return -target;
  }
};

// l = (scale / 2N) sum_n |f(k_n) - v_n|^2
struct SquaredError {
  static constexpr bool needs_prediction = true;

  template <class V>
  [[nodiscard]] LINATTN_HD static V error(V target, V prediction) {
    return prediction - target;
  }
};

// An inner step says what a weight becomes. The gradient comes without the factor scale / N, which the rate
// holds.
template <class S>
concept InnerStep = requires(float x) {
  { S::step(x, x, x) } -> std::same_as<float>;
};

// W' = W - rate * gradient, rate = inner_lr * scale / N
struct Plain {
  template <class V>
  [[nodiscard]] LINATTN_HD static V step(V weight, V rate, V gradient) {
    return weight - rate * gradient;
  }
};

LINATTN_END

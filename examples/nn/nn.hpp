// The small operations between the library's ops, on dense activations: normalisation, activations, sums; and
// the library's ops with the weights of a checkpoint. Everything is parallel over rows, and no result depends
// on the number of threads. T is float or double, and arithmetic is in T.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <linattn/ops/softmax_attention.hpp>

#include "runtime.hpp"
#include "weight.hpp"

namespace nn {

// Sees an intermediate (batch, rows, channels) as it is computed: for tests.
template <class T>
using Observer = std::function<void(const std::string& name, const TensorView<const T, 3>& values)>;

// out = x weight^T + bias, (batch, rows, in) -> (batch, rows, out). The scale of a scaled weight multiplies the
// sums, in T, before the bias is added.
template <class T>
void linear(Runtime& rt, In<T, 3> x, const LinearWeights<T>& weights, TensorView<T, 3> out);
// The same into new memory.
template <class T>
[[nodiscard]] Tensor<T> linear(Runtime& rt, const TensorView<const T, 3>& x,
                               const LinearWeights<T>& weights) {
  Tensor<T> out({x.extent(0), x.extent(1), weights.out()});
  linear<T>(rt, x, weights, out.template view<3>());
  return out;
}

// linattn::softmax_attention on attention views. `what` begins the message of an error.
template <class T>
void attention(Runtime& rt, std::string_view what, In<T, 4> q, In<T, 4> k, In<T, 4> v, TensorView<T, 4> out,
               const linattn::SoftmaxAttentionOptions<T>& options = {});

// linattn::rms_norm over the channels of (batch, rows, channels); out may be x.
template <class T>
void rms_norm(Runtime& rt, std::string_view what, In<T, 3> x, const std::vector<T>& weight, double eps,
              TensorView<T, 3> out);

// What follows the normalisation of a row: y * weight + bias, then y * (1 + scale) + shift, each where given.
template <class T>
struct LayerNormOptions {
  double eps = 1e-6;
  TensorView<const T, 1> weight{}, bias{};  // [channels]
  TensorView<const T, 2> scale{}, shift{};  // [batch, channels]; a batch stride of 0 shares one
};

// (x - mean) / sqrt(variance + eps) over the channels (biased variance, two passes); out may be x.
template <class T>
void layer_norm(Runtime& rt, In<T, 3> x, const LayerNormOptions<T>& options, TensorView<T, 3> out);

enum class Activation : std::uint8_t {
  silu,        // u sigmoid(u)
  quick_gelu,  // u sigmoid(1.702 u)
  gelu_tanh,   // u / 2 (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3)))
  gelu_erf,    // u / 2 (1 + erf(u / sqrt(2)))
};

// x = act(x)
template <class T>
void activate(Runtime& rt, Activation activation, TensorView<T, 3> x);
// x = act(x) * gate, elementwise
template <class T>
void activate_gated(Runtime& rt, Activation activation, TensorView<T, 3> x, In<T, 3> gate);
// act of n elements, on the thread that calls it; out may be x.
template <class T>
void activate_row(Activation activation, const T* x, T* out, Index n);

// x += y
template <class T>
void add(Runtime& rt, TensorView<T, 3> x, In<T, 3> y);
// x += gate * y, gate [batch, channels]
template <class T>
void add_gated(Runtime& rt, TensorView<T, 3> x, In<T, 2> gate, In<T, 3> y);

// Rows `ids` of an embedding [rows, channels]: out (batch, count, channels), ids batch after batch. An id
// outside the table is an error that names the table, the id and the rows.
template <class T>
[[nodiscard]] Tensor<T> embed(Runtime& rt, const Weight& table, std::span<const std::int32_t> ids,
                              Index batch);

}  // namespace nn

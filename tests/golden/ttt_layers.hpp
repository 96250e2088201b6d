// Golden cases of the softmax, T5 and first T5 (tttv0) layers and of DiT5's test-time training, wherever they run.
#pragma once

#include <linattn/layers/softmax_attention.hpp>
#include <linattn/layers/ttt_attention.hpp>

#include "layers.hpp"

namespace golden {

// Roundings of a result on a device, beside those within the op: q and k, twice where they are convolved or normalised,
// v, what is attended, and the output.
inline constexpr int layer_roundings = 7;

// The softmax layer, and the T5 layer of a model and a loss; without the output projection, its core.
struct SoftmaxLayer {
  // In double, on the host: compiled in ttt_layers.cpp.
  static Buffer<double, 3> exact(const Layer<double>& layer);
  static constexpr int roundings = layer_roundings + 1;
  template <class At, class T>
  static constexpr Tolerance tolerance() {
    return std::is_same_v<T, float> ? At::softmax_in_float : recorded<T>;
  }
  template <class At, class T>
  static Buffer<T, 3> run(const Layer<T>& layer, bool project) {
    Buffer<T, 3> result = layer.output(project);
    At at;
    const TensorView<T, 3> x = at.view(layer.input), out = at.view(result);
    const AttentionWeights<T> w = layer.weights(at, project).projections;
    const SoftmaxLayerOptions options{.heads = layer.heads, .scale = layer.scale};
    at.run([&](const auto& ctx) { return softmax_attention_layer_workspace(ctx, x, w, out, options); },
           [&](const auto& ctx) { return softmax_attention_layer(ctx, x, w, out, options); });
    return result;
  }
};
template <class Model, class Loss>
struct TttLayer {
  static Buffer<double, 3> exact(const Layer<double>& layer);
  static constexpr int roundings = layer_roundings + 8;
  template <class, class T>
  static constexpr Tolerance tolerance() {
    return recorded<T>;
  }
  template <class At, class T>
  static Buffer<T, 3> run(const Layer<T>& layer, bool project) {
    Buffer<T, 3> result = layer.output(project);
    At at;
    const TensorView<T, 3> x = at.view(layer.input), out = at.view(result);
    const TttAttentionWeights<T> w = layer.weights(at, project);
    const TttLayerOptions options = layer.options();
    at.run(
        [&](const auto& ctx) { return ttt_attention_layer_workspace<Model, Loss>(ctx, x, w, out, options); },
        [&](const auto& ctx) { return ttt_attention_layer<Model, Loss>(ctx, x, w, out, options); });
    return result;
  }
};

template <class At>
void run_softmax_layer(Case& c) {
  const Recorded r = read_layer(c, 0, false);
  (void)check_projections<At>(c, Layer<float>(r));
  if constexpr (At::has_double) (void)check_projections<At>(c, Layer<double>(r));
  check_all<At, SoftmaxLayer>(c, r);
}

template <class At, class Model, class Loss, bool conv>
void run_ttt_layer(Case& c) {
  const Recorded r = read_layer(c, linattn::detail::matrices<Model>, conv);
  const auto inner = [&]<class T>(const Layer<T>& layer) {
    check_inner<At, Model, Loss>(c, r, layer, check_projections<At>(c, layer));
  };
  inner(Layer<float>(r));
  if constexpr (At::has_double) inner(Layer<double>(r));
  check_all<At, TttLayer<Model, Loss>>(c, r);
}

}  // namespace golden

// Golden cases of the softmax, T5 and first T5 (tttv0) layers and of DiT5's test-time training.
#include "layers.hpp"

namespace {

using namespace golden;

// The softmax layer, and the T5 layer of a model and a loss; without the output projection, its core.
struct SoftmaxLayer {
  template <class T>
  static Buffer<T, 3> run(const Layer<T>& layer, bool project) {
    Buffer<T, 3> out = layer.output(project);
    const auto w = layer.weights(project).projections;
    const SoftmaxLayerOptions options{.heads = layer.heads, .scale = layer.scale};
    const std::size_t bytes =
        softmax_attention_layer_workspace(Cpu{}, layer.input.view(), w, out.view(), options);
    require(softmax_attention_layer(arena(bytes), layer.input.view(), w, out.view(), options));
    return out;
  }
};
template <class Model, class Loss>
struct TttLayer {
  template <class T>
  static Buffer<T, 3> run(const Layer<T>& layer, bool project) {
    Buffer<T, 3> out = layer.output(project);
    const auto w = layer.weights(project);
    const TttLayerOptions options = layer.options();
    const std::size_t bytes =
        ttt_attention_layer_workspace<Model, Loss>(Cpu{}, layer.input.view(), w, out.view(), options);
    require(ttt_attention_layer<Model, Loss>(arena(bytes), layer.input.view(), w, out.view(), options));
    return out;
  }
};

void run_softmax_layer(Case& c) {
  const Recorded r = read_layer(c, 0, false);
  (void)check_projections(c, Layer<float>(r));
  (void)check_projections(c, Layer<double>(r));
  check_all<SoftmaxLayer>(c, r);
}

template <class Model, class Loss, bool conv>
void run_ttt_layer(Case& c) {
  const Recorded r = read_layer(c, detail::matrices<Model>, conv);
  const auto inner = [&]<class T>(const Layer<T>& layer) {
    check_inner<Model, Loss>(c, r, layer, check_projections(c, layer));
  };
  inner(Layer<float>(r));
  inner(Layer<double>(r));
  check_all<TttLayer<Model, Loss>>(c, r);
}

const Registration registrations[] = {
    {{"layer_softmax"}, run_softmax_layer},
    {{"layer_t5"}, run_ttt_layer<SwiGlu, InnerProduct, true>},
    {{"layer_tttv0"}, run_ttt_layer<Mlp, InnerProduct, false>},
    {{"layer_dit5_ttt"}, run_ttt_layer<Mlp, SquaredError, true>},
};

}  // namespace

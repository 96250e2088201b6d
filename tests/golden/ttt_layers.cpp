// Golden cases of the softmax, T5 and first T5 (tttv0) layers.
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

// What the T5 layer has between its projections: the key norm, the convs, the gradients and W'.
template <class Model, class Loss, class T>
void check_inner(Case& c, const Recorded& r, const Layer<T>& layer, const std::vector<Buffer<T, 3>>& qkv) {
  const std::string run = support::type_name<T>;
  const TensorView<T, 4> q = split_heads(qkv[0].view(), layer.heads),
                         k = split_heads(qkv[1].view(), layer.heads);
  const TensorView<T, 4> v = split_heads(qkv[2].view(), layer.heads);
  const TttAttentionWeights<T> w = layer.weights(false);
  Buffer<T, 4> norm(k.extents), local(k.extents);
  const InstanceNormOptions key_norm{.eps = layer.key_norm_eps};
  require(instance_norm(arena(instance_norm_workspace(Cpu{}, k, norm.view(), key_norm)), k, norm.view(),
                        key_norm));
  c.check("mid.k_norm", run, swap_tokens_heads(norm.view()), recorded<T>);
  if (!layer.conv.empty()) {
    require(depthwise_conv(Cpu{}, q, w.q_conv, w.q_conv_bias, local.view(), {.grid = layer.grid}));
    c.check("mid.q_local", run, swap_tokens_heads(local.view()), recorded<T>);
    require(depthwise_conv(Cpu{}, norm.view(), w.k_conv, w.k_conv_bias, local.view(), {.grid = layer.grid}));
    c.check("mid.k_local", run, swap_tokens_heads(local.view()), recorded<T>);
  }
  TttOptions<T> options{.inner_lr = layer.inner_lr, .scale = layer.scale};
  options.prologue = {true, layer.key_norm_eps, w.q_conv, w.k_conv, w.q_conv_bias, w.k_conv_bias, layer.grid};
  const Updated<T> updated(k.extent(0), k.extent(2), k.extent(3), r.initial.size());
  const std::size_t bytes = ttt_update_workspace<Model, Loss>(Cpu{}, k, v, w.inner, updated.views(), options);
  require(ttt_update<Model, Loss>(arena(bytes), k, v, w.inner, updated.views(), options));
  check_update<T>(c, run, r.initial, updated, layer.inner_lr);
}

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
};

}  // namespace

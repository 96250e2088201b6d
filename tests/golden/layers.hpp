// What the runners of the attention layers share: recorded parameters, rounded to any storage.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ttt.hpp"

namespace golden {

// The parameters of a recorded layer, in double.
struct Recorded {
  Tensor input, qkv_weight, qkv_bias, proj_weight, proj_bias;
  std::vector<Tensor> initial;                           // w1, w2, w3 of a TTT layer
  std::optional<std::array<Tensor, 2>> conv, conv_bias;  // of q and of k
  Index heads = 0;
  TokenGrid grid{};
  double scale = 0, inner_lr = 1, key_norm_eps = 1;
};

inline Recorded read_layer(Case& c, int matrices, bool conv) {
  Recorded r;
  const auto optional = [&](const char* name) { return c.has(name) ? c.read(name) : Tensor{{0}, {}}; };
  r.input = c.read("input");
  r.qkv_weight = c.read("param.qkv.weight");
  r.qkv_bias = optional("param.qkv.bias");
  r.proj_weight = c.read("param.proj.weight");
  r.proj_bias = optional("param.proj.bias");
  r.heads = static_cast<Index>(c.number("heads"));
  r.scale = c.number("scale");
  if (matrices > 0) {
    r.initial = read_matrices(c, "param.", matrices);
    r.inner_lr = c.number("inner_lr");
    r.key_norm_eps = c.number("instance_norm_eps");
  }
  if (conv) {
    r.grid = grid_of(c);
    r.conv = {c.read("param.q_conv2d.weight"), c.read("param.k_conv2d.weight")};
    r.conv_bias = {optional("param.q_conv2d.bias"), optional("param.k_conv2d.bias")};
  }
  return r;
}

// The same, rounded to T: what a layer of that storage runs on.
template <class T>
struct Layer {
  explicit Layer(const Recorded& r)
      : input(rounded<T>(r.input.view<3>())),
        qkv_weight(rounded<T>(r.qkv_weight.view<2>())),
        proj_weight(rounded<T>(r.proj_weight.view<2>())),
        qkv_bias(rounded<T>(r.qkv_bias.view<1>())),
        proj_bias(rounded<T>(r.proj_bias.view<1>())),
        inner(r.initial),
        heads(r.heads),
        grid(r.grid),
        scale(r.scale),
        inner_lr(r.inner_lr),
        key_norm_eps(r.key_norm_eps) {
    if (!r.conv) return;
    for (std::size_t i = 0; i < 2; ++i) {
      conv.push_back(rounded<T>((*r.conv)[i].view<4>()));
      conv_bias.push_back(rounded<T>((*r.conv_bias)[i].view<1>()));
    }
  }
  template <class S>
  explicit Layer(const Layer<S>& o)
      : input(support::to_double(o.input)),
        qkv_weight(support::to_double(o.qkv_weight)),
        proj_weight(support::to_double(o.proj_weight)),
        qkv_bias(support::to_double(o.qkv_bias)),
        proj_bias(support::to_double(o.proj_bias)),
        inner(o.inner),
        heads(o.heads),
        grid(o.grid),
        scale(o.scale),
        inner_lr(o.inner_lr),
        key_norm_eps(o.key_norm_eps) {
    for (const auto& w : o.conv) conv.push_back(support::to_double(w));
    for (const auto& b : o.conv_bias) conv_bias.push_back(support::to_double(b));
  }

  [[nodiscard]] TttAttentionWeights<T> weights(bool project) const {
    TttAttentionWeights<T> w;
    w.projections = split_qkv<T>(qkv_weight.view(), qkv_bias.view());
    if (project) w.projections.out = {proj_weight.view(), proj_bias.view()};
    w.inner = inner.views();
    if (!conv.empty()) {
      w.q_conv = conv[0].view(), w.k_conv = conv[1].view();
      w.q_conv_bias = conv_bias[0].view(), w.k_conv_bias = conv_bias[1].view();
    }
    return w;
  }
  [[nodiscard]] TttLayerOptions options() const {
    TttLayerOptions o;
    o.heads = heads, o.grid = grid, o.inner_lr = inner_lr, o.scale = scale, o.key_norm_eps = key_norm_eps;
    return o;
  }
  // (batch, token, channels of the output)
  [[nodiscard]] Buffer<T, 3> output(bool project) const {
    const Index channels = project ? proj_weight.view().extent(0) : qkv_weight.view().extent(0) / 3;
    return Buffer<T, 3>({input.view().extent(0), input.view().extent(1), channels});
  }

  Buffer<T, 3> input;
  Buffer<T, 2> qkv_weight, proj_weight;
  Buffer<T, 1> qkv_bias, proj_bias;
  Matrices<T> inner;
  std::vector<Buffer<T, 4>> conv;
  std::vector<Buffer<T, 1>> conv_bias;
  Index heads;
  TokenGrid grid;
  double scale, inner_lr, key_norm_eps;
};

// q, k and v of the layer in turn, checked.
template <class T>
std::vector<Buffer<T, 3>> check_projections(Case& c, const Layer<T>& layer) {
  const AttentionWeights<T> w = layer.weights(false).projections;
  std::vector<Buffer<T, 3>> result;
  for (const auto& [name, p] : {std::pair{"mid.q", w.q}, std::pair{"mid.k", w.k}, std::pair{"mid.v", w.v}}) {
    Buffer<T, 3>& y = result.emplace_back(layer.output(false));
    const TensorView<T, 3> out = y.view();
    const std::size_t bytes = linear_workspace(Cpu{}, layer.input.view(), p.weight, p.bias, out);
    require(linear(arena(bytes), layer.input.view(), p.weight, p.bias, out));
    c.check(name, support::type_name<T>, out, recorded<T>);
  }
  return result;
}

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

// A Form runs a layer: Form::run(layer, project), the core alone without `project`.
template <class Form, class T>
void check_layer(Case& c, const Layer<T>& layer) {
  c.check("mid.core_out", support::type_name<T>, Form::run(layer, false).view(), recorded<T>);
  c.check("output", support::type_name<T>, Form::run(layer, true).view(), recorded<T>);
}

template <class Form, class T>
void check_stored(Case& c, const Recorded& r) {
  const Layer<T> layer(r);
  const Layer<double> exact(layer);
  c.compare("output", support::type_name<T>, Form::run(layer, true).view(),
            to_golden<3>(Form::run(exact, true).view()), stored<T>);
}

template <class Form>
void check_all(Case& c, const Recorded& r) {
  check_layer<Form>(c, Layer<float>(r));
  check_layer<Form>(c, Layer<double>(r));
  check_stored<Form, half>(c, r);
  check_stored<Form, bfloat16>(c, r);
}

}  // namespace golden

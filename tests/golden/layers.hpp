// What the runners of the attention layers share: recorded parameters, rounded to any storage.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <linattn/layers/projections.hpp>
#include <linattn/layers/ttt_attention.hpp>

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

  template <class At>
  [[nodiscard]] TttAttentionWeights<T> weights(At&& at, bool project) const {
    TttAttentionWeights<T> w;
    w.projections = split_qkv<T>(at.view(qkv_weight), at.view(qkv_bias));
    if (project) w.projections.out = {at.view(proj_weight), at.view(proj_bias)};
    w.inner = inner.views(at);
    if (!conv.empty()) {
      w.q_conv = at.view(conv[0]), w.k_conv = at.view(conv[1]);
      w.q_conv_bias = at.view(conv_bias[0]), w.k_conv_bias = at.view(conv_bias[1]);
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
template <class At, class T>
std::vector<Buffer<T, 3>> check_projections(Case& c, const Layer<T>& layer) {
  std::vector<Buffer<T, 3>> result;
  const auto project = [&](const char* name, Projection<T> AttentionWeights<T>::*member) {
    Buffer<T, 3>& y = result.emplace_back(layer.output(false));
    At at;
    const Projection<T> p = layer.weights(at, false).projections.*member;
    const TensorView<T, 3> x = at.view(layer.input), out = at.view(y);
    at.run([&](const auto& ctx) { return linear_workspace(ctx, x, p.weight, p.bias, out); },
           [&](const auto& ctx) { return linear(ctx, x, p.weight, p.bias, out); });
    c.check(name, support::type_name<T>, y.view(), recorded<T>);
  };
  project("mid.q", &AttentionWeights<T>::q);
  project("mid.k", &AttentionWeights<T>::k);
  project("mid.v", &AttentionWeights<T>::v);
  return result;
}

// What the T5 layer has between its projections: the key norm, the convs, the gradients and W'.
template <class At, class Model, class Loss, class T>
void check_inner(Case& c, const Recorded& r, const Layer<T>& layer, const std::vector<Buffer<T, 3>>& qkv) {
  const std::string run = support::type_name<T>;
  const auto heads = [&](const TensorView<T, 3>& v) { return split_heads(v, layer.heads); };
  const std::array<Index, 4> shape = heads(qkv[1].view()).extents;
  Buffer<T, 4> norm(shape), local(shape);
  {
    At at;
    const TensorView<T, 4> k = heads(at.view(qkv[1])), out = at.view(norm);
    const InstanceNormOptions options{.eps = layer.key_norm_eps};
    at.run([&](const auto& ctx) { return instance_norm_workspace(ctx, k, out, options); },
           [&](const auto& ctx) { return instance_norm(ctx, k, out, options); });
  }
  c.check("mid.k_norm", run, swap_tokens_heads(norm.view()), recorded<T>);
  if (!layer.conv.empty()) {
    const auto convolve = [&](const char* name, const TensorView<const double, 4>& from, std::size_t which) {
      const Buffer<T, 4> x = rounded<T>(from);
      At at;
      const TensorView<T, 4> in = at.view(x), weight = at.view(layer.conv[which]), out = at.view(local);
      const TensorView<T, 1> bias = at.view(layer.conv_bias[which]);
      at.run(
          [](const auto&) { return std::size_t{0}; },
          [&](const auto& ctx) { return depthwise_conv(ctx, in, weight, bias, out, {.grid = layer.grid}); });
      c.check(name, run, swap_tokens_heads(local.view()), recorded<T>);
    };
    convolve("mid.q_local", support::to_double(heads(qkv[0].view())).view(), 0);
    convolve("mid.k_local", support::to_double(norm).view(), 1);
  }
  Updated<T> updated(shape[0], shape[2], shape[3], r.initial.size());
  {
    At at;
    const TttAttentionWeights<T> w = layer.weights(at, false);
    TttOptions<T> options{.inner_lr = layer.inner_lr, .scale = layer.scale};
    options.prologue = {true,          layer.key_norm_eps, w.q_conv,  w.k_conv,
                        w.q_conv_bias, w.k_conv_bias,      layer.grid};
    const TensorView<T, 4> k = heads(at.view(qkv[1])), v = heads(at.view(qkv[2]));
    const FastWeights<T> fast = updated.views(at);
    at.run(
        [&](const auto& ctx) { return ttt_update_workspace<Model, Loss>(ctx, k, v, w.inner, fast, options); },
        [&](const auto& ctx) { return ttt_update<Model, Loss>(ctx, k, v, w.inner, fast, options); });
  }
  check_update<T>(c, run, r.initial, updated, layer.inner_lr);
}

// A Form runs a layer: Form::run<At>(layer, project), the core alone without `project`.
template <class At, class Form, class T>
void check_layer(Case& c, const Layer<T>& layer) {
  const Tolerance tolerance = Form::template tolerance<At, T>();
  c.check("mid.core_out", support::type_name<T>, Form::template run<At>(layer, false).view(), tolerance);
  c.check("output", support::type_name<T>, Form::template run<At>(layer, true).view(), tolerance);
}

template <class At, class Form, class T>
void check_stored(Case& c, const Recorded& r) {
  const Layer<T> layer(r);
  const Layer<double> exact(layer);
  c.compare("output", support::type_name<T>, Form::template run<At>(layer, true).view(),
            to_golden<3>(Form::exact(exact).view()), At::template stored_after<T>(Form::roundings));
}

template <class At, class Form>
void check_all(Case& c, const Recorded& r) {
  check_layer<At, Form>(c, Layer<float>(r));
  if constexpr (At::has_double) check_layer<At, Form>(c, Layer<double>(r));
  check_stored<At, Form, half>(c, r);
  check_stored<At, Form, bfloat16>(c, r);
}

}  // namespace golden

// Golden cases of the attention ops and layers: softmax_attention, ttt_*, the key norms, the depthwise
// convolution, and the softmax, T5 and first T5 (tttv0) layers.
//
// Core cases run in float and in double on dense, permuted, packed and sliced views; f16 and bf16 storage is
// compared with double on the same rounded inputs.
#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include <linattn/cpu.hpp>

#include "../buffers.hpp"
#include "../reference/instance_norm.hpp"
#include "../reference/ttt.hpp"
#include "golden.hpp"

namespace {

using namespace linattn;
using golden::Case;
using golden::Norm;
using golden::Tolerance;
using support::Buffer;
using support::Layout;

// A float result against a golden rounded to float, and a double one.
template <class T>
inline constexpr Tolerance recorded = {Norm::relative_l2, std::is_same_v<T, double> ? 1.5e-7 : 2e-6};
// 16-bit storage against double on the same rounded inputs.
template <class T>
inline constexpr Tolerance stored = {Norm::relative_l2, std::is_same_v<T, half> ? 5e-4 : 5e-3};

void require(const Status& status) {
  if (!status.ok()) throw std::runtime_error(message(status).c_str());
}

// Scratch memory that grows between calls.
class Arena {
 public:
  Cpu<Serial> operator()(std::size_t bytes) {
    if (memory_.size() < bytes) memory_.resize(bytes);
    return {{memory_.data(), memory_.size()}, {}};
  }

 private:
  std::vector<std::byte> memory_;
};
Arena arena;

template <class T>
std::string variant(Layout layout) {
  return std::string(support::type_name<T>) + " " + support::name(layout);
}

// The recorded tensor rounded to T, in a layout.
template <class T>
Buffer<T, 4> in_layout(const TensorView<const double, 4>& values, Layout layout) {
  Buffer<T, 4> buffer = support::make<T>(layout, values.extents);
  support::copy(values, buffer.view());
  return buffer;
}
template <class T, int R>
Buffer<T, R> rounded(const TensorView<const double, R>& values) {
  Buffer<T, R> buffer(values.extents);
  support::copy(values, buffer.view());
  return buffer;
}
template <int R>
golden::Tensor to_golden(const TensorView<const double, R>& values) {
  golden::Tensor tensor{{values.extents.begin(), values.extents.end()}, {}};
  support::for_each_index(values.extents,
                          [&](const auto& i) { tensor.values.push_back(support::element(values, i)); });
  return tensor;
}

// (batch, head, token, channel) as recorded <-> (batch, token, head, channel).
template <class T>
TensorView<T, 4> swap_tokens_heads(const TensorView<T, 4>& v) {
  return permute<0, 2, 1, 3>(v);
}

// (batch, token, channel) as one head.
TensorView<const double, 4> one_head(const TensorView<const double, 3>& v) { return split_heads(v, 1); }

// Runs f.operator()<T>(layout) for the checks against the file, then for 16-bit storage.
template <class F>
void for_each_layout(const F& f) {
  for (const Layout layout : support::all_layouts) {
    f.template operator()<float>(layout);
    f.template operator()<double>(layout);
  }
}

// ---- softmax ----

template <class T>
Buffer<T, 4> softmax(const std::array<TensorView<const double, 4>, 3>& qkv, double scale, Layout layout,
                     const TensorView<Compute<T>, 3>& lse = {}) {
  const auto q = in_layout<T>(qkv[0], layout), k = in_layout<T>(qkv[1], layout),
             v = in_layout<T>(qkv[2], layout);
  Buffer<T, 4> out = support::make<T>(
      layout, {q.view().extent(0), q.view().extent(1), q.view().extent(2), v.view().extent(3)});
  const SoftmaxAttentionOptions<Compute<T>> options{.scale = scale, .causal = false, .bias = {}, .lse = lse};
  const std::size_t bytes =
      softmax_attention_workspace(Cpu{}, q.view(), k.view(), v.view(), out.view(), options);
  require(softmax_attention(arena(bytes), q.view(), k.view(), v.view(), out.view(), options));
  return out;
}

void run_softmax(Case& c) {
  const golden::Tensor q = c.read("q"), k = c.read("k"), v = c.read("v");
  const std::array<TensorView<const double, 4>, 3> qkv = {
      swap_tokens_heads(q.view<4>()), swap_tokens_heads(k.view<4>()), swap_tokens_heads(v.view<4>())};
  const double scale = c.number("scale");
  for_each_layout([&]<class T>(Layout layout) {
    Buffer<T, 3> lse({qkv[0].extent(0), qkv[0].extent(1), qkv[0].extent(2)});  // (b, n, h)
    const Buffer<T, 4> out = softmax<T>(qkv, scale, layout, lse);
    c.check("output", variant<T>(layout), swap_tokens_heads(out.view()), recorded<T>);
    c.check("mid.lse", variant<T>(layout), permute<0, 2, 1>(lse.view()), recorded<T>);
  });
  const auto in_16_bit = [&]<class T>(T) {
    const auto qr = rounded<T>(qkv[0]), kr = rounded<T>(qkv[1]), vr = rounded<T>(qkv[2]);
    const auto qd = support::to_double(qr), kd = support::to_double(kr), vd = support::to_double(vr);
    const Buffer<double, 4> exact = softmax<double>({qd.view(), kd.view(), vd.view()}, scale, Layout::dense);
    c.compare("output", std::string(support::type_name<T>), softmax<T>(qkv, scale, Layout::dense).view(),
              to_golden<4>(exact.view()), stored<T>);
  };
  in_16_bit(half{});
  in_16_bit(bfloat16{});
}

// ---- the key norms ----

template <class T>
Buffer<T, 4> normalised(const TensorView<const double, 4>& x, const InstanceNormOptions& options,
                        Layout layout) {
  const auto in = in_layout<T>(x, layout);
  Buffer<T, 4> out = support::make<T>(layout, x.extents);
  const std::size_t bytes = instance_norm_workspace(Cpu{}, in.view(), out.view(), options);
  require(instance_norm(arena(bytes), in.view(), out.view(), options));
  return out;
}

void run_norm(Case& c) {
  const golden::Tensor input = c.read("input");
  const TensorView<const double, 4> x = one_head(input.view<3>());
  const bool divide = c.op() == "key_instance_norm";
  const InstanceNormOptions options{.eps = divide ? c.number("eps") : 0.0, .divide_by_std = divide};
  for_each_layout([&]<class T>(Layout layout) {
    c.check("output", variant<T>(layout), normalised<T>(x, options, layout).view(), recorded<T>);
  });
  Buffer<double, 3> mean({x.extent(0), x.extent(2), x.extent(3)}),
      var({x.extent(0), x.extent(2), x.extent(3)});
  reference::token_statistics(x, mean, var);
  c.check("mid.mean", "reference", mean.view(), recorded<double>);
  c.check("mid.var", "reference", var.view(), recorded<double>);
  const auto in_16_bit = [&]<class T>(T) {
    const auto xd = support::to_double(rounded<T>(x));
    const Buffer<double, 4> exact = normalised<double>(xd.view(), options, Layout::dense);
    c.compare("output", std::string(support::type_name<T>), normalised<T>(x, options, Layout::dense).view(),
              to_golden<4>(exact.view()), stored<T>);
  };
  in_16_bit(half{});
  in_16_bit(bfloat16{});
}

// ---- the convolution ----

TokenGrid grid_of(const Case& c) {
  return {0, static_cast<Index>(c.number("grid_h")), static_cast<Index>(c.number("grid_w"))};
}

template <class T>
Buffer<T, 4> convolved(const TensorView<const double, 4>& x, const TensorView<const double, 4>& weight,
                       const TensorView<const double, 1>& bias, const TokenGrid& grid, Layout layout) {
  const auto in = in_layout<T>(x, layout);
  const auto w = rounded<T>(weight);
  const auto b = rounded<T>(bias);
  Buffer<T, 4> out = support::make<T>(layout, x.extents);
  require(depthwise_conv(Cpu{}, in.view(), w.view(), b.view(), out.view(), {.grid = grid}));
  return out;
}

void run_conv(Case& c) {
  const golden::Tensor input = c.read("input"), weight = c.read("param.weight"), bias = c.read("param.bias");
  const TensorView<const double, 4> x = one_head(input.view<3>());
  const TokenGrid grid = grid_of(c);
  for_each_layout([&]<class T>(Layout layout) {
    c.check("output", variant<T>(layout),
            convolved<T>(x, weight.view<4>(), bias.view<1>(), grid, layout).view(), recorded<T>);
  });
  const auto in_16_bit = [&]<class T>(T) {
    const auto xd = support::to_double(rounded<T>(x));
    const auto wd = support::to_double(rounded<T>(weight.view<4>()));
    const auto bd = support::to_double(rounded<T>(bias.view<1>()));
    const auto exact = convolved<double>(xd.view(), wd.view(), bd.view(), grid, Layout::dense);
    c.compare("output", std::string(support::type_name<T>),
              convolved<T>(x, weight.view<4>(), bias.view<1>(), grid, Layout::dense).view(),
              to_golden<4>(exact.view()), stored<T>);
  };
  in_16_bit(half{});
  in_16_bit(bfloat16{});
}

// ---- test-time training ----

// The matrices of a model, one set a head: [h, d, d]; a leading axis of 1 is dropped.
std::vector<golden::Tensor> read_matrices(Case& c, const std::string& prefix, int count) {
  std::vector<golden::Tensor> result;
  for (int m = 1; m <= count; ++m) {
    golden::Tensor w = c.read(prefix + "w" + std::to_string(m));
    if (w.shape.size() == 4 && w.shape[0] == 1) w.shape.erase(w.shape.begin());
    (void)w.view<3>();  // throws where the rank is another
    result.push_back(std::move(w));
  }
  return result;
}

// Rounded to T, and as the op's views.
template <class T>
struct Matrices {
  explicit Matrices(const std::vector<golden::Tensor>& from) {
    for (const golden::Tensor& w : from) memory.push_back(rounded<T>(w.view<3>()));
  }
  template <class S>
  explicit Matrices(const Matrices<S>& from) {
    for (const auto& w : from.memory) memory.push_back(support::to_double(w));
  }
  [[nodiscard]] TttWeights<T> views() const {
    const auto at = [&](std::size_t i) { return i < memory.size() ? memory[i].view() : TensorView<T, 3>{}; };
    return {at(0), at(1), at(2)};
  }
  std::vector<Buffer<T, 3>> memory;
};

// W' as an op leaves it.
template <class C>
struct Updated {
  Updated(Index batch, Index heads, Index d, std::size_t count) {
    for (std::size_t m = 0; m < count; ++m) memory.emplace_back(std::array<Index, 4>{batch, heads, d, d});
  }
  [[nodiscard]] FastWeights<C> views() const {
    const auto at = [&](std::size_t i) { return i < memory.size() ? memory[i].view() : TensorView<C, 4>{}; };
    return {at(0), at(1), at(2)};
  }
  std::vector<Buffer<C, 4>> memory;
};

// mid.w* = W', and mid.g* = (W - W') / inner_lr in double.
template <class T>
void check_update(Case& c, const std::string& run, const std::vector<golden::Tensor>& initial,
                  const Updated<T>& updated, double inner_lr) {
  for (std::size_t m = 0; m < initial.size(); ++m) {
    const std::string number = std::to_string(m + 1);
    const TensorView<T, 4> w = updated.memory[m].view();
    c.check("mid.w" + number, run, w, recorded<T>);
    Buffer<double, 4> g(w.extents);
    const TensorView<const double, 3> w0 = initial[m].view<3>();
    double largest = 0.0, gradient = 0.0;
    support::for_each_index(w.extents, [&](const auto& i) {
      const double after = convert<double>(support::element(w, i));
      support::element(g.view(), i) = (w0(i[1], i[2], i[3]) - after) / inner_lr;
      largest += after * after;
      gradient += support::element(g.view(), i) * support::element(g.view(), i);
    });
    // W' is rounded to T, and W - W' keeps that error whole: what W' may be off by, relative to inner_lr * g.
    Tolerance tolerance = recorded<T>;
    tolerance.value += support::unit_roundoff<T> * std::sqrt(largest / gradient) / std::abs(inner_lr);
    c.check("mid.g" + number, run, g.view(), tolerance);
  }
}

template <class Model, class Loss, class T>
Buffer<T, 4> trained(const std::array<TensorView<const double, 4>, 3>& qkv, const Matrices<T>& w,
                     const TttOptions<T>& options, Layout layout) {
  const auto q = in_layout<T>(qkv[0], layout), k = in_layout<T>(qkv[1], layout),
             v = in_layout<T>(qkv[2], layout);
  Buffer<T, 4> out = support::make<T>(layout, q.view().extents);
  const std::size_t bytes =
      ttt_workspace<Model, Loss>(Cpu{}, q.view(), k.view(), v.view(), w.views(), out.view(), options);
  require(ttt<Model, Loss>(arena(bytes), q.view(), k.view(), v.view(), w.views(), out.view(), options));
  return out;
}

template <class Model, class Loss>
void run_ttt(Case& c) {
  const golden::Tensor q = c.read("q"), k = c.read("k"), v = c.read("v");
  const std::array<TensorView<const double, 4>, 3> qkv = {
      swap_tokens_heads(q.view<4>()), swap_tokens_heads(k.view<4>()), swap_tokens_heads(v.view<4>())};
  const std::vector<golden::Tensor> initial = read_matrices(c, "", detail::matrices<Model>);
  const double scale = c.number("scale"), inner_lr = c.number("inner_lr");
  for_each_layout([&]<class T>(Layout layout) {
    const Matrices<T> w(initial);
    const TttOptions<T> options{.inner_lr = inner_lr, .scale = scale};
    const std::string run = variant<T>(layout);
    c.check("output", run, swap_tokens_heads(trained<Model, Loss>(qkv, w, options, layout).view()),
            recorded<T>);
    const auto kt = in_layout<T>(qkv[1], layout), vt = in_layout<T>(qkv[2], layout);
    const Updated<T> updated(qkv[1].extent(0), qkv[1].extent(2), qkv[1].extent(3), initial.size());
    const std::size_t bytes =
        ttt_update_workspace<Model, Loss>(Cpu{}, kt.view(), vt.view(), w.views(), updated.views(), options);
    require(ttt_update<Model, Loss>(arena(bytes), kt.view(), vt.view(), w.views(), updated.views(), options));
    check_update<T>(c, run, initial, updated, inner_lr);
  });
  const auto in_16_bit = [&]<class T>(T) {
    const Matrices<T> w(initial);
    const Matrices<double> wd(w);
    const auto qd = support::to_double(rounded<T>(qkv[0])), kd = support::to_double(rounded<T>(qkv[1]));
    const auto vd = support::to_double(rounded<T>(qkv[2]));
    const auto exact = trained<Model, Loss, double>({qd.view(), kd.view(), vd.view()}, wd,
                                                    {.inner_lr = inner_lr, .scale = scale}, Layout::dense);
    const auto ours = trained<Model, Loss, T>(qkv, w, {.inner_lr = inner_lr, .scale = scale}, Layout::dense);
    c.compare("output", std::string(support::type_name<T>), ours.view(), to_golden<4>(exact.view()),
              stored<T>);
  };
  in_16_bit(half{});
  in_16_bit(bfloat16{});
}

// ---- layers ----

// The parameters of a recorded layer, in double.
struct Recorded {
  golden::Tensor input, qkv_weight, qkv_bias, proj_weight, proj_bias;
  std::vector<golden::Tensor> initial;                           // w1, w2, w3 of a TTT layer
  std::optional<std::array<golden::Tensor, 2>> conv, conv_bias;  // of q and of k
  Index heads = 0;
  TokenGrid grid{};
  double scale = 0, inner_lr = 1, key_norm_eps = 1;
};

Recorded read_layer(Case& c, int matrices, bool conv) {
  Recorded r;
  const auto optional = [&](const char* name) {
    return c.has(name) ? c.read(name) : golden::Tensor{{0}, {}};
  };
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

const golden::Registration registrations[] = {
    {{"softmax_attention"}, run_softmax},
    {{"key_instance_norm", "key_mean_subtract"}, run_norm},
    {{"dwconv_residual"}, run_conv},
    {{"ttt_swiglu_ip"}, run_ttt<SwiGlu, InnerProduct>},
    {{"ttt_mlp2_ip"}, run_ttt<Mlp, InnerProduct>},
    {{"ttt_mlp2_l2"}, run_ttt<Mlp, SquaredError>},
    {{"ttt_linear_ip"}, run_ttt<Linear, InnerProduct>},
    {{"ttt_linear_l2"}, run_ttt<Linear, SquaredError>},
    {{"layer_softmax"}, run_softmax_layer},
    {{"layer_t5"}, run_ttt_layer<SwiGlu, InnerProduct, true>},
    {{"layer_tttv0"}, run_ttt_layer<Mlp, InnerProduct, false>},
};

}  // namespace

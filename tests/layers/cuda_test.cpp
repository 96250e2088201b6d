// The layers that SD3.5-T5 and T5 are made of, on a CUDA device.
#include <linattn/layers/joint_attention.hpp>
#include <linattn/layers/softmax_attention.hpp>
#include <linattn/layers/ttt_attention.hpp>
#include <linattn/ops/linear_cuda.cuh>
#include <linattn/ops/rms_norm_cuda.cuh>
#include <linattn/ops/softmax_attention_cuda.cuh>
#include <linattn/ops/ttt_cuda.cuh>

#include "../cublas_lt.hpp"
#include "../device.hpp"
#include "layer_cases.hpp"

using namespace layer_cases;
using namespace support;

namespace {

template <class T, int R, std::size_t N>
std::vector<OnDevice<T, R>> on_device(const std::array<Buffer<T, R>, N>& hosts) {
  std::vector<OnDevice<T, R>> devices;
  for (const Buffer<T, R>& host : hosts) devices.emplace_back(host);
  return devices;
}

template <class W>
struct DeviceWeights {
  explicit DeviceWeights(const Weights<W>& host)
      : matrices(on_device(host.matrices)), biases(on_device(host.biases)), norms(on_device(host.norms)) {}
  [[nodiscard]] AttentionWeights<W> views() const {
    const auto p = [&](std::size_t i) { return Projection<W>{matrices[i].view(), biases[i].view()}; };
    return {p(0), p(1), p(2), p(3), norms[0].view(), norms[1].view()};
  }
  std::vector<OnDevice<W, 2>> matrices;
  std::vector<OnDevice<W, 1>> biases, norms;
};

template <class F>
struct DeviceInner {
  explicit DeviceInner(const Inner<F>& host)
      : matrices(on_device(host.matrices)),
        kernels(on_device(host.kernels)),
        biases(on_device(host.biases)) {}
  template <class W>
  [[nodiscard]] TttAttentionWeights<W, F> views(const AttentionWeights<W>& projections) const {
    return {projections,       {matrices[0].view(), matrices[1].view(), matrices[2].view()},
            kernels[0].view(), kernels[1].view(),
            biases[0].view(),  biases[1].view()};
  }
  std::vector<OnDevice<F, 3>> matrices;
  std::vector<OnDevice<F, 4>> kernels;
  std::vector<OnDevice<F, 1>> biases;
};

// What a call of a layer is given.
template <class T, class W>
struct Call {
  TensorView<T, 3> x, context, x_out, context_out;  // the last empty: none
  AttentionWeights<W> x_weights, context_weights;
  TttAttentionWeights<W, W> ttt;
};

// Relative L2 error that 16-bit storage may cause, in unit roundoffs: n roundings of independent factors of a result,
// each wrong by 0.43 unit roundoffs in the mean square, make 0.43 sqrt(n); half as much again is granted. On the way
// are q and k, twice with a norm, v, what is attended, and the output: 7.
double roundings(int n) { return 1.5 * 0.43 * std::sqrt(static_cast<double>(n)); }

struct SoftmaxForm {
  template <class T, class W>
  static std::size_t bytes(const Cuda& ctx, const Shape& s, const Call<T, W>& c) {
    const SoftmaxLayerOptions options{.heads = s.heads};
    if (s.text == 0) return softmax_attention_layer_workspace(ctx, c.x, c.x_weights, c.x_out, options);
    return joint_attention_workspace(ctx, c.x, c.context, c.x_weights, c.context_weights, c.x_out,
                                     c.context_out, options);
  }
  template <class T, class W>
  static Status run(const Cuda& ctx, const Shape& s, const Call<T, W>& c) {
    const SoftmaxLayerOptions options{.heads = s.heads};
    if (s.text == 0) return softmax_attention_layer(ctx, c.x, c.x_weights, c.x_out, options);
    return joint_attention(ctx, c.x, c.context, c.x_weights, c.context_weights, c.x_out, c.context_out,
                           options);
  }
  static reference::Attention attention(const Shape& s, const Inner<double>&) { return softmax_reference(s); }
  static constexpr double in_float = 1e-5;
  static constexpr int roundings_within = 1;  // the probabilities
};

struct TttForm {
  static TttLayerOptions options(const Shape& s) {
    TttLayerOptions result;
    result.heads = s.heads;
    result.grid = s.grid;
    return result;
  }
  template <class T, class W>
  static std::size_t bytes(const Cuda& ctx, const Shape& s, const Call<T, W>& c) {
    if (s.text == 0) return ttt_attention_layer_workspace(ctx, c.x, c.ttt, c.x_out, options(s));
    return joint_ttt_attention_workspace(ctx, c.x, c.context, c.ttt, c.context_weights, c.x_out,
                                         c.context_out, options(s));
  }
  template <class T, class W>
  static Status run(const Cuda& ctx, const Shape& s, const Call<T, W>& c) {
    if (s.text == 0) return ttt_attention_layer(ctx, c.x, c.ttt, c.x_out, options(s));
    return joint_ttt_attention(ctx, c.x, c.context, c.ttt, c.context_weights, c.x_out, c.context_out,
                               options(s));
  }
  static reference::Attention attention(const Shape& s, const Inner<double>& inner) {
    return ttt_reference(s, inner, reference::InnerModel::swiglu, reference::InnerLoss::inner_product,
                         options(s));
  }
  static constexpr double in_float = 2e-6;
  static constexpr int roundings_within = 8;  // ops/ttt.hpp
};

// T5's layer, a layer of SD3.5 whose text has an output, and the last one, whose text has none; and one whose rows
// start anywhere.
struct Case {
  Shape shape;
  bool both;
};
const std::vector<Case> cases = {
    {{.batch = 2, .tokens = 35, .in = 32, .heads = 2, .head_dim = 16, .project = true, .grid = {0, 5, 7}},
     false},
    {{.batch = 1,
      .tokens = 64,
      .text = 9,
      .in = 32,
      .text_in = 48,
      .heads = 1,
      .head_dim = 64,
      .grid = {0, 8, 8}},
     true},
    {{.batch = 2,
      .tokens = 65,
      .text = 5,
      .in = 24,
      .text_in = 40,
      .heads = 3,
      .head_dim = 8,
      .bias = false,
      .qk_norm = false,
      .grid = {0, 5, 13}},
     false},
    {{.batch = 1,
      .tokens = 12,
      .text = 3,
      .in = 10,
      .text_in = 7,
      .heads = 2,
      .head_dim = 5,
      .grid = {0, 3, 4}},
     true},
    {{.batch = 1, .tokens = 20, .in = 32, .heads = 2, .head_dim = 16, .project = false, .grid = {0, 4, 5}},
     false},
};

template <class T>
struct Outputs {
  explicit Outputs(const Shape& s)
      : x({s.batch, s.tokens, s.project ? s.in : s.width()}), context({s.batch, s.text, s.text_in}) {}
  Buffer<T, 3> x, context;
};

template <class Form, class T, class W>
Outputs<T> run(const Case& one, const Buffer<T, 3>& x, const Buffer<T, 3>& context, const Weights<W>& xw,
               const Weights<W>& cw, const Inner<W>& inner) {
  Outputs<T> out(one.shape);
  const OnDevice<T, 3> device_x(x), device_context(context), x_out(out.x), context_out(out.context);
  const DeviceWeights<W> x_weights(xw), context_weights(cw);
  const DeviceInner<W> ttt(inner);
  const Call<T, W> call{device_x.view(),
                        device_context.view(),
                        x_out.view(),
                        one.both ? context_out.view() : TensorView<T, 3>{},
                        x_weights.views(),
                        context_weights.views(),
                        ttt.views(x_weights.views())};
  const Cuda ctx{.cublas_lt = cublas_lt()};
  const DeviceScratch scratch(Form::bytes(ctx, one.shape, call));
  check_ok(Form::run(ctx.with(scratch.workspace()), one.shape, call));
  x_out.download(out.x);
  context_out.download(out.context);
  CHECK(out.x.intact());
  CHECK(out.context.intact());
  CHECK(scratch.intact());
  return out;
}

template <class Form, class T, class W>
void check_layer() {
  for (const Case& one : cases) {
    const Shape& s = one.shape;
    CAPTURE(s.tokens);
    Buffer<T, 3> x({s.batch, s.tokens, s.in}), context({s.batch, s.text, s.text_in});
    fill_normal(x.view(), 101);
    fill_normal(context.view(), 102, 1.0, 0.3);
    const Weights<W> xw(s, s.in, s.in, 1), cw(s, s.text_in, s.text_in, 30);
    const Inner<W> inner(s, 3, true, 50);
    const Outputs<T> out = run<Form>(one, x, context, xw, cw, inner);

    const Weights<double> exact_x(Widened{}, xw), exact_c(Widened{}, cw);
    const Inner<double> exact(Widened{}, inner);
    Outputs<double> expected(s);
    const TensorView<double, 3> no_context_out(nullptr, {s.batch, 0, s.text_in});
    reference::attention_layer(to_double(x).view(), to_double(context).view(), exact_x.views(),
                               exact_c.views(), s.heads, 1e-6, Form::attention(s, exact), expected.x,
                               one.both ? expected.context.view() : no_context_out);
    const double bound =
        sizeof(T) == 4 ? Form::in_float : roundings(7 + Form::roundings_within) * unit_roundoff<T>;
    check_relative(out.x, expected.x, bound);
    if (one.both) check_relative(out.context, expected.context, bound);
  }
}

}  // namespace

TEST_CASE("softmax layers on Cuda are their composition in double") {
  check_layer<SoftmaxForm, float, float>();
  check_layer<SoftmaxForm, float, half>();
  check_layer<SoftmaxForm, half, half>();
  check_layer<SoftmaxForm, bfloat16, bfloat16>();
}
TEST_CASE("TTT layers on Cuda are their composition in double") {
  check_layer<TttForm, float, float>();
  check_layer<TttForm, float, half>();
  check_layer<TttForm, half, half>();
  check_layer<TttForm, bfloat16, bfloat16>();
}

TEST_CASE_TEMPLATE("layers on Cuda give the same bits each time", Form, SoftmaxForm, TttForm) {
  const Case& one = cases[1];
  const Shape& s = one.shape;
  Buffer<half, 3> x({s.batch, s.tokens, s.in}), context({s.batch, s.text, s.text_in});
  fill_normal(x.view(), 101);
  fill_normal(context.view(), 102);
  const Weights<half> xw(s, s.in, s.in, 1), cw(s, s.text_in, s.text_in, 30);
  const Inner<half> inner(s, 3, true, 50);
  const Outputs<half> first = run<Form>(one, x, context, xw, cw, inner),
                      second = run<Form>(one, x, context, xw, cw, inner);
  CHECK(same_bits(first.x, second.x));
  CHECK(same_bits(first.context, second.context));
}

TEST_CASE("layers on Cuda say what they miss") {
  const Case& one = cases[0];
  const Shape& s = one.shape;
  const Buffer<half, 3> x({s.batch, s.tokens, s.in});
  const Weights<half> host(s, s.in, s.in, 1);
  const OnDevice<half, 3> device_x(x), out(x);
  const DeviceWeights<half> weights(host);
  const SoftmaxLayerOptions options{.heads = s.heads};
  const Cuda query{.cublas_lt = cublas_lt()};
  const std::size_t bytes =
      softmax_attention_layer_workspace(query, device_x.view(), weights.views(), out.view(), options);
  const DeviceScratch scratch(bytes);
  const auto run_on = [&](const Cuda& ctx) {
    return softmax_attention_layer(ctx, device_x.view(), weights.views(), out.view(), options);
  };
  CHECK(run_on(query).code == Code::workspace);
  CHECK(run_on(query.with({scratch.workspace().data, bytes - 1})).code == Code::workspace);
  CHECK(run_on(Cuda{scratch.workspace()}).code == Code::option);  // no handle
}

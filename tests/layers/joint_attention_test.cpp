#include <linattn/cpu.hpp>
#include <linattn/layers/joint_attention.hpp>

#include "layer_cases.hpp"

using namespace layer_cases;
using namespace support;

namespace {

struct SoftmaxForm {
  template <class T, class W, class F, class P>
  static Status run(const Cpu<P>& query, const Shape& s, const AttentionWeights<W>& xw,
                    const AttentionWeights<W>& cw, const Inner<F>&, const Data<T>& data,
                    const TensorView<T, 3>& context_out, std::size_t* bytes,
                    const Workspace& workspace = {}) {
    const SoftmaxLayerOptions options{.heads = s.heads};
    const TensorView<T, 3> x = data.x, context = data.context, x_out = data.x_out;
    if (bytes != nullptr)
      *bytes = joint_attention_workspace(query, x, context, xw, cw, x_out, context_out, options);
    return joint_attention(query.with(workspace), x, context, xw, cw, x_out, context_out, options);
  }
  static reference::Attention attention(const Shape& s, const Inner<double>&) { return softmax_reference(s); }
};

template <class Model, class Loss, class Step, reference::InnerModel model, reference::InnerLoss loss,
          reference::InnerStep step>
struct AnyTttForm {
  static TttLayerOptions options(const Shape& s) {
    TttLayerOptions result;
    result.heads = s.heads;
    result.grid = s.grid;
    return result;
  }
  template <class T, class W, class F, class P>
  static Status run(const Cpu<P>& query, const Shape& s, const AttentionWeights<W>& xw,
                    const AttentionWeights<W>& cw, const Inner<F>& inner, const Data<T>& data,
                    const TensorView<T, 3>& context_out, std::size_t* bytes,
                    const Workspace& workspace = {}) {
    const auto w = inner.views(xw);
    const TensorView<T, 3> x = data.x, context = data.context, x_out = data.x_out;
    if (bytes != nullptr)
      *bytes = joint_ttt_attention_workspace<Model, Loss, Step>(query, x, context, w, cw, x_out, context_out,
                                                                options(s));
    return joint_ttt_attention<Model, Loss, Step>(query.with(workspace), x, context, w, cw, x_out,
                                                  context_out, options(s));
  }
  static reference::Attention attention(const Shape& s, const Inner<double>& inner) {
    return ttt_reference(s, inner, model, loss, options(s), step);
  }
};
using TttForm = AnyTttForm<SwiGlu, InnerProduct, Plain, reference::InnerModel::swiglu,
                           reference::InnerLoss::inner_product, reference::InnerStep::plain>;
using ClippedMlp3Form = AnyTttForm<Mlp3, SquaredError, ColumnClip, reference::InnerModel::mlp3,
                                   reference::InnerLoss::squared_error, reference::InnerStep::column_clip>;

template <class Form, class T, class W, class F, class P = Serial>
Status run(const Shape& s, const Weights<W>& xw, const Weights<W>& cw, const Inner<F>& inner, Data<T>& data,
           bool both, const P& policy = {}) {
  const Cpu<P> query{Workspace{}, policy};
  const TensorView<T, 3> context_out = both ? data.context_out.view() : TensorView<T, 3>{};
  std::size_t bytes = 0;
  (void)Form::run(query, s, xw.views(), cw.views(), inner, data, context_out, &bytes);
  Scratch scratch(bytes);
  const Status status =
      Form::run(query, s, xw.views(), cw.views(), inner, data, context_out, nullptr, scratch.workspace());
  CHECK(scratch.intact());
  CHECK(data.x_out.intact());
  CHECK(data.context_out.intact());
  return status;
}

const std::vector<Shape> shapes = {
    {.batch = 2,
     .tokens = 24,
     .text = 5,
     .in = 32,
     .text_in = 32,
     .heads = 2,
     .head_dim = 16,
     .grid = {0, 4, 6}},
    {.batch = 1,
     .tokens = 65,
     .text = 1,
     .in = 24,
     .text_in = 40,
     .heads = 3,
     .head_dim = 8,
     .bias = false,
     .qk_norm = false,
     .grid = {0, 5, 13}},
    {.batch = 2,
     .tokens = 1,
     .text = 70,
     .in = 16,
     .text_in = 16,
     .heads = 1,
     .head_dim = 24,
     .grid = {0, 1, 1}},
};

template <class Form, class T, class W, class F>
void check_types() {
  for (const Shape& s : shapes)
    for (const bool both : {true, false}) {
      CAPTURE(s.tokens);
      CAPTURE(both);
      const Weights<W> xw(s, s.in, s.in, 1), cw(s, s.text_in, s.text_in, 30);
      const Inner<F> inner(s, 3, true, 50);
      Data<T> data(s);
      check_ok(run<Form>(s, xw, cw, inner, data, both));
      const Weights<double> exact_x(Widened{}, xw), exact_c(Widened{}, cw);
      const Inner<double> exact(Widened{}, inner);
      Buffer<double, 3> x_out(data.x_out.view().extents), context_out(data.context_out.view().extents);
      reference::attention_layer(to_double(data.x).view(), to_double(data.context).view(), exact_x.views(),
                                 exact_c.views(), s.heads, 1e-6, Form::attention(s, exact), x_out,
                                 context_out);
      check_relative(data.x_out, x_out, tolerance<T>);
      if (both) check_relative(data.context_out, context_out, tolerance<T>);
    }
}

}  // namespace

TEST_CASE("joint softmax attention is its composition in double") {
  check_types<SoftmaxForm, float, float, float>();
  check_types<SoftmaxForm, float, half, half>();
  check_types<SoftmaxForm, double, double, double>();
  check_types<SoftmaxForm, bfloat16, bfloat16, bfloat16>();
}
TEST_CASE("joint TTT is its composition in double") {
  check_types<TttForm, float, float, float>();
  check_types<TttForm, float, bfloat16, float>();
  check_types<TttForm, double, half, double>();
  check_types<TttForm, half, half, half>();
  check_types<ClippedMlp3Form, float, float, float>();
}

TEST_CASE_TEMPLATE("the image's output does not depend on whether the text has one", Form, SoftmaxForm,
                   TttForm) {
  for (const Shape& s : shapes) {
    const Weights<float> xw(s, s.in, s.in, 1), cw(s, s.text_in, s.text_in, 30);
    const Inner<float> inner(s, 3, true, 50);
    Data<float> both(s), alone(s);
    check_ok(run<Form>(s, xw, cw, inner, both, true));
    check_ok(run<Form>(s, xw, cw, inner, alone, false));
    check_relative(alone.x_out, both.x_out, 1e-6);
  }
}

TEST_CASE("without text the joint forms are the image-only layers, bit for bit") {
  const Shape s{.batch = 2,
                .tokens = 70,
                .text = 0,
                .in = 32,
                .text_in = 32,
                .heads = 2,
                .head_dim = 16,
                .grid = {0, 7, 10}};
  const Weights<half> xw(s, s.in, s.in, 1), cw(s, s.text_in, s.text_in, 30);
  const Inner<float> inner(s, 3, true, 50);
  for (const bool both : {true, false}) {
    Data<float> joint(s), image(s);
    check_ok(run<SoftmaxForm>(s, xw, cw, inner, joint, both));
    Scratch scratch(1 << 22);
    const Cpu ctx{scratch.workspace()};
    check_ok(
        softmax_attention_layer(ctx, image.x.view(), xw.views(), image.x_out.view(), {.heads = s.heads}));
    CHECK(same_bits(joint.x_out, image.x_out));
    joint.x_out.poison();
    check_ok(run<TttForm>(s, xw, cw, inner, joint, both));
    check_ok(ttt_attention_layer(ctx, image.x.view(), inner.views(xw.views()), image.x_out.view(),
                                 TttForm::options(s)));
    CHECK(same_bits(joint.x_out, image.x_out));
  }
}

TEST_CASE("the joint TTT layer learns from the text, and the text's rows see no conv") {
  // With identity convs replaced by large ones the image changes, and the text through W' alone; with a zero
  // conv everything is as without a conv.
  const Shape s = shapes[0];
  const Weights<float> xw(s, s.in, s.in, 1), cw(s, s.text_in, s.text_in, 30);
  Inner<float> inner(s, 3, true, 50);
  Data<float> zero_conv(s), no_conv(s), other_text(s);
  for (auto& k : inner.kernels) fill(k.view(), 0.0);
  for (auto& b : inner.biases) fill(b.view(), 0.0);
  check_ok(run<TttForm>(s, xw, cw, inner, zero_conv, true));
  const Inner<float> bare(s, 3, false, 50);
  check_ok(run<TttForm>(s, xw, cw, bare, no_conv, true));
  CHECK(same_bits(zero_conv.x_out, no_conv.x_out));
  CHECK(same_bits(zero_conv.context_out, no_conv.context_out));
  fill_normal(other_text.context.view(), 999);
  check_ok(run<TttForm>(s, xw, cw, inner, other_text, true));
  CHECK(difference(other_text.x_out, zero_conv.x_out).relative() > 1e-3);
}

TEST_CASE_TEMPLATE("joint layers: any threads give the same bits, nothing is allocated", Form, SoftmaxForm,
                   TttForm) {
  const Shape s{.batch = 2,
                .tokens = 600,
                .text = 77,
                .in = 16,
                .text_in = 16,
                .heads = 2,
                .head_dim = 8,
                .grid = {0, 20, 30}};
  const Weights<half> xw(s, s.in, s.in, 1), cw(s, s.text_in, s.text_in, 30);
  const Inner<float> inner(s, 3, true, 50);
  for (const bool both : {true, false}) {
    Data<float> one(s), other(s);
    check_ok(run<Form>(s, xw, cw, inner, one, both));
    check_ok(run<Form>(s, xw, cw, inner, other, both, Threads{3, 5}));
    CHECK(same_bits(one.x_out, other.x_out));
    if (both) CHECK(same_bits(one.context_out, other.context_out));

    const TensorView<float, 3> context_out = both ? one.context_out.view() : TensorView<float, 3>{};
    std::size_t bytes = 0;
    (void)Form::run(Cpu{}, s, xw.views(), cw.views(), inner, one, context_out, &bytes);
    Scratch scratch(bytes);
    const Allocations allocations;
    const Status status =
        Form::run(Cpu{}, s, xw.views(), cw.views(), inner, one, context_out, nullptr, scratch.workspace());
    CHECK(allocations.count() == 0);
    check_ok(status);
  }
}

TEST_CASE_TEMPLATE("joint layers name what does not fit", Form, SoftmaxForm, TttForm) {
  const Shape s = shapes[0];
  const Weights<float> xw(s, s.in, s.in, 1), cw(s, s.text_in, s.text_in, 30);
  const Inner<float> inner(s, 3, true, 50);
  const Data<float> data(s);
  Scratch scratch(1 << 22);
  const auto call = [&](auto change, Workspace workspace) {
    auto x = xw.views(), c = cw.views();
    TensorView<float, 3> out = data.context_out;
    change(x, c, out);
    return Form::run(Cpu{}, s, x, c, inner, data, out, nullptr, workspace);
  };
  const auto what = [&](auto change) {
    const Status status = call(change, scratch.workspace());
    return std::string(status.ok() ? "ok" : status.what);
  };
  CHECK(what([](auto&, auto&, auto&) {}) == "ok");
  CHECK(what([](auto&, auto& c, auto&) { c.k.weight.extents[0] = 7; }) == "context k weight, out");
  CHECK(what([](auto&, auto& c, auto&) { c.v.weight.extents[1] = 7; }) == "context v weight, in");
  CHECK(what([](auto&, auto& c, auto&) { c.q = {}; }) == "context q weight, out");
  CHECK(what([](auto&, auto& c, auto&) { c.out = {}; }) == "context out weight, out");
  CHECK(what([](auto&, auto& c, auto&) { c.k_norm.extents[0] = 7; }) == "context k_norm, channels");
  CHECK(what([](auto& x, auto&, auto&) { x.out = {}; }) == "out weight, out (two outputs need it)");
  CHECK(what([](auto&, auto&, auto& out) { out.extents[1] = 3; }) == "context_out, tokens");
  CHECK(what([](auto&, auto&, auto& out) { out.data = nullptr; }) == "context_out");
  // Of a context without an output q and out are not looked at.
  CHECK(what([](auto&, auto& c, auto& out) { c.q = {}, c.out = {}, out = {}; }) == "ok");
  std::size_t bytes = 0;
  (void)Form::run(Cpu{}, s, xw.views(), cw.views(), inner, data, data.context_out.view(), &bytes);
  const auto nothing = [](auto&, auto&, auto&) {};
  CHECK(call(nothing, {scratch.workspace().data, bytes}).code == Code::ok);
  CHECK(call(nothing, {scratch.workspace().data, bytes - 1}).code == Code::workspace);
  CHECK(call(nothing, {}).code == Code::workspace);
}

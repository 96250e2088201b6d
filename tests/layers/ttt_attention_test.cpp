#include <linattn/cpu.hpp>
#include <linattn/layers/ttt_attention.hpp>

#include "layer_cases.hpp"

using namespace layer_cases;
using namespace support;

namespace {

TttLayerOptions options_of(const Shape& s) {
  TttLayerOptions options;
  options.heads = s.heads;
  options.grid = s.grid;
  return options;
}

template <class Model, class Loss, class Step = Plain, class T, class W, class F, class P = Serial>
Status run(const Weights<W>& weights, const Inner<F>& inner, const TttLayerOptions& options, Data<T>& data,
           const P& policy = {}) {
  const TttAttentionWeights<W, F> views = inner.views(weights.views());
  const Cpu<P> query{Workspace{}, policy};
  Scratch scratch(ttt_attention_layer_workspace<Model, Loss, Step>(query, data.x.view(), views,
                                                                   data.x_out.view(), options));
  const Status status = ttt_attention_layer<Model, Loss, Step>(query.with(scratch.workspace()), data.x.view(),
                                                               views, data.x_out.view(), options);
  CHECK(scratch.intact());
  CHECK(data.x_out.intact());
  return status;
}

const std::vector<Shape> shapes = {
    {.batch = 1, .tokens = 1, .in = 4, .heads = 1, .head_dim = 3, .grid = {0, 1, 1}},
    {.batch = 2, .tokens = 35, .in = 32, .heads = 2, .head_dim = 16, .qk_norm = false, .grid = {0, 7, 5}},
    {.batch = 1, .tokens = 96, .in = 24, .heads = 3, .head_dim = 40, .bias = false, .grid = {0, 6, 16}},
    {.batch = 2, .tokens = 72, .in = 48, .heads = 1, .head_dim = 64, .project = false, .grid = {4, 8, 8}},
};

template <class Model, class Loss, class T, class W, class F, class Step = Plain>
void check_types(reference::InnerModel model, reference::InnerLoss loss, bool conv,
                 reference::InnerStep step = reference::InnerStep::plain) {
  for (const Shape& s : shapes) {
    CAPTURE(s.tokens);
    const Weights<W> weights(s, s.in, s.in, 1);
    const Inner<F> inner(s, reference::matrices(model), conv, 50);
    TttLayerOptions options = options_of(s);
    options.inner_lr = 0.7;
    Data<T> data(s);
    check_ok(run<Model, Loss, Step>(weights, inner, options, data));
    const Weights<double> exact(Widened{}, weights);
    const Inner<double> exact_inner(Widened{}, inner);
    Buffer<double, 3> expected(data.x_out.view().extents);
    reference::attention_layer(to_double(data.x).view(), {}, exact.views(), {}, s.heads, 1e-6,
                               ttt_reference(s, exact_inner, model, loss, options, step), expected, {});
    check_relative(data.x_out, expected, s.project ? tolerance<T> : unprojected<T>);
  }
}

constexpr auto mlp = reference::InnerModel::mlp, swiglu = reference::InnerModel::swiglu;
constexpr auto product = reference::InnerLoss::inner_product, squared = reference::InnerLoss::squared_error;

}  // namespace

TEST_CASE("the T5 layer is its composition in double: SwiGlu") {
  check_types<SwiGlu, InnerProduct, float, float, float>(swiglu, product, true);
  check_types<SwiGlu, InnerProduct, float, half, float>(swiglu, product, true);
  check_types<SwiGlu, SquaredError, double, double, double>(swiglu, squared, true);
}
TEST_CASE("the T5 layer is its composition in double: Mlp, with and without conv") {
  check_types<Mlp, InnerProduct, float, bfloat16, bfloat16>(mlp, product, false);
  check_types<Mlp, SquaredError, float, float, float>(mlp, squared, true);
  check_types<Mlp, InnerProduct, double, half, double>(mlp, product, false);
}
TEST_CASE("the T5 layer is its composition in double: other models and the column clip") {
  check_types<Glu, InnerProduct, float, float, float, ColumnClip>(reference::InnerModel::glu, product, false,
                                                                  reference::InnerStep::column_clip);
  check_types<Mlp3, InnerProduct, float, half, float>(reference::InnerModel::mlp3, product, true);
  check_types<Mlp3, SquaredError, double, double, double, ColumnClip>(
      reference::InnerModel::mlp3, squared, true, reference::InnerStep::column_clip);
}
TEST_CASE("the T5 layer is its composition in double: 16-bit activations") {
  check_types<SwiGlu, InnerProduct, half, half, half>(swiglu, product, true);
  check_types<Mlp, SquaredError, bfloat16, float, float>(mlp, squared, true);
}

TEST_CASE("the T5 layer: any threads give the same bits, nothing is allocated") {
  const Shape s{.batch = 2, .tokens = 620, .in = 16, .heads = 2, .head_dim = 24, .grid = {0, 31, 20}};
  const Weights<half> weights(s, s.in, s.in, 1);
  const Inner<float> inner(s, 3, true, 50);
  Data<float> one(s), other(s);
  check_ok(run<SwiGlu, InnerProduct>(weights, inner, options_of(s), one));
  check_ok(run<SwiGlu, InnerProduct>(weights, inner, options_of(s), other, Threads{3, 5}));
  CHECK(same_bits(one.x_out, other.x_out));

  const auto views = inner.views(weights.views());
  Scratch scratch(ttt_attention_layer_workspace(Cpu{}, one.x.view(), views, one.x_out.view(), options_of(s)));
  const Cpu ctx{scratch.workspace()};
  const Allocations allocations;
  const Status status = ttt_attention_layer(ctx, one.x.view(), views, one.x_out.view(), options_of(s));
  CHECK(allocations.count() == 0);
  check_ok(status);
}

TEST_CASE("a constant added to all keys changes nothing after the key norm, and does without it") {
  const Shape s{
      .batch = 1, .tokens = 36, .in = 16, .heads = 2, .head_dim = 8, .qk_norm = false, .grid = {0, 6, 6}};
  Weights<float> weights(s, s.in, s.in, 1);
  const Inner<float> inner(s, 3, true, 50);
  Data<float> before(s), after(s);
  for (const bool key_norm : {true, false}) {
    TttLayerOptions options = options_of(s);
    options.key_norm = key_norm;
    check_ok(run<SwiGlu, InnerProduct>(weights, inner, options, before));
    fill_normal(weights.biases[1].view(), key_norm ? 77 : 78, 2.0);
    check_ok(run<SwiGlu, InnerProduct>(weights, inner, options, after));
    const double change = difference(after.x_out, before.x_out).relative();
    if (key_norm)
      CHECK(change < 5e-6);
    else
      CHECK(change > 1e-2);
  }
}

TEST_CASE("the T5 layer names what does not fit") {
  const Shape s{.batch = 2, .tokens = 6, .in = 8, .heads = 2, .head_dim = 4, .grid = {0, 2, 3}};
  const Weights<float> weights(s, s.in, s.in, 1);
  const Inner<float> inner(s, 3, true, 50);
  Data<float> data(s);
  Scratch scratch(1 << 20);
  const auto what = [&](auto change) {
    auto w = inner.views(weights.views());
    TttLayerOptions options = options_of(s);
    change(w, options);
    const Status status =
        ttt_attention_layer(Cpu{scratch.workspace()}, data.x.view(), w, data.x_out.view(), options);
    return std::string(status.ok() ? "ok" : status.what);
  };
  CHECK(what([](auto&, auto&) {}) == "ok");
  CHECK(what([](auto& w, auto&) { w.projections.k.weight.extents[0] = 7; }) == "k weight, out");
  CHECK(what([](auto& w, auto&) { w.inner.w2.extents[0] = 3; }) == "w2, heads");
  CHECK(what([](auto& w, auto&) { w.inner.w3 = {}; }) == "w3, heads");
  CHECK(what([](auto& w, auto&) { w.k_conv.extents[0] = 7; }) == "k_conv, channels");
  CHECK(what([](auto& w, auto&) { w.q_conv_bias.data = nullptr; }) == "q_conv_bias");
  CHECK(what([](auto&, auto& o) { o.grid.height = 3; }) == "grid, height (rows that fit behind the offset)");
  CHECK(what([](auto&, auto& o) { o.key_norm_eps = -1; }) == "key_norm_eps (not negative)");
  const auto views = inner.views(weights.views());
  const std::size_t bytes =
      ttt_attention_layer_workspace(Cpu{}, data.x.view(), views, data.x_out.view(), options_of(s));
  const auto code = [&](Workspace workspace) {
    return ttt_attention_layer(Cpu{workspace}, data.x.view(), views, data.x_out.view(), options_of(s)).code;
  };
  CHECK(code({scratch.workspace().data, bytes}) == Code::ok);
  CHECK(code({scratch.workspace().data, bytes - 1}) == Code::workspace);
  CHECK(code({}) == Code::workspace);
}

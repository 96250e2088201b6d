#include <linattn/cpu.hpp>
#include <linattn/layers/softmax_attention.hpp>

#include "layer_cases.hpp"

using namespace layer_cases;
using namespace support;

namespace {

template <class T, class W, class P = Serial>
Status run(const Shape& s, const Weights<W>& weights, Data<T>& data, const P& policy = {}) {
  const AttentionWeights<W> views = weights.views();
  const SoftmaxLayerOptions options{.heads = s.heads};
  const Cpu<P> query{Workspace{}, policy};
  Scratch scratch(softmax_attention_layer_workspace(query, data.x.view(), views, data.x_out.view(), options));
  const Status status = softmax_attention_layer(query.with(scratch.workspace()), data.x.view(), views,
                                                data.x_out.view(), options);
  CHECK(scratch.intact());
  CHECK(data.x_out.intact());
  return status;
}

const std::vector<Shape> shapes = {
    {.batch = 1, .tokens = 1, .in = 4, .heads = 1, .head_dim = 3},
    {.batch = 2, .tokens = 25, .in = 32, .heads = 2, .head_dim = 16, .qk_norm = false},
    {.batch = 2, .tokens = 67, .in = 24, .heads = 3, .head_dim = 40, .bias = false},
    {.batch = 1, .tokens = 130, .in = 48, .heads = 2, .head_dim = 64, .project = false},
};

template <class T, class W>
void check_types() {
  for (const Shape& s : shapes) {
    CAPTURE(s.tokens);
    const Weights<W> weights(s, s.in, s.in, 1);
    Data<T> data(s);
    check_ok(run(s, weights, data));
    const Weights<double> exact(Widened{}, weights);
    Buffer<double, 3> expected(data.x_out.view().extents);
    reference::attention_layer(to_double(data.x).view(), {}, exact.views(), {}, s.heads, 1e-6,
                               softmax_reference(s), expected, {});
    check_relative(data.x_out, expected, s.project ? tolerance<T> : unprojected<T>);
  }
}

}  // namespace

TEST_CASE("the softmax layer is its composition in double") {
  check_types<float, float>();
  check_types<float, half>();
  check_types<float, bfloat16>();
  check_types<double, double>();
  check_types<double, half>();
  check_types<half, half>();
  check_types<bfloat16, float>();
}

TEST_CASE("a fused qkv projection splits into its three") {
  const Shape s{.batch = 1, .tokens = 5, .in = 8, .heads = 2, .head_dim = 4};
  const Weights<float> weights(s, s.in, s.in, 1);
  Buffer<float, 2> fused({24, 8});
  Buffer<float, 1> fused_bias({24});
  for (std::size_t i = 0; i < 3; ++i) {
    copy(weights.matrices[i].view(), slice<0>(fused.view(), static_cast<Index>(i) * 8, 8));
    copy(weights.biases[i].view(), slice<0>(fused_bias.view(), static_cast<Index>(i) * 8, 8));
  }
  const auto views = split_qkv<float>(fused.view(), fused_bias.view());
  for (std::size_t i = 0; i < 3; ++i) {
    const Projection<float>& p = i == 0 ? views.q : i == 1 ? views.k : views.v;
    CHECK(same_bits(p.weight, weights.matrices[i].view()));
    CHECK(same_bits(p.bias, weights.biases[i].view()));
  }
  CHECK(split_qkv<float>(fused.view(), {}).v.bias.extent(0) == 0);
}

TEST_CASE("the softmax layer: any threads give the same bits, nothing is allocated") {
  const Shape s = shapes[2];
  const Weights<half> weights(s, s.in, s.in, 1);
  Data<float> one(s), other(s);
  check_ok(run(s, weights, one));
  check_ok(run(s, weights, other, Threads{3, 5}));
  CHECK(same_bits(one.x_out, other.x_out));

  const auto views = weights.views();
  const SoftmaxLayerOptions options{.heads = s.heads};
  Scratch scratch(softmax_attention_layer_workspace(Cpu{}, one.x.view(), views, one.x_out.view(), options));
  const Cpu ctx{scratch.workspace()};
  const Allocations allocations;
  const Status status = softmax_attention_layer(ctx, one.x.view(), views, one.x_out.view(), options);
  CHECK(allocations.count() == 0);
  check_ok(status);
}

TEST_CASE("the softmax layer may write over its input") {
  const Shape s{.batch = 2, .tokens = 20, .in = 16, .heads = 2, .head_dim = 8};
  const Weights<float> weights(s, s.in, s.in, 1);
  Data<float> apart(s);
  check_ok(run(s, weights, apart));
  Data<float> same(s);
  const auto views = weights.views();
  const SoftmaxLayerOptions options{.heads = s.heads};
  Scratch scratch(softmax_attention_layer_workspace(Cpu{}, same.x.view(), views, same.x.view(), options));
  check_ok(softmax_attention_layer(Cpu{scratch.workspace()}, same.x.view(), views, same.x.view(), options));
  CHECK(same_bits(same.x, apart.x_out));
}

TEST_CASE("the softmax layer names what does not fit") {
  const Shape s{.batch = 2, .tokens = 6, .in = 8, .heads = 2, .head_dim = 4};
  const Weights<float> weights(s, s.in, s.in, 1);
  Data<float> data(s);
  Scratch scratch(1 << 20);
  const Cpu ctx{scratch.workspace()};
  const auto call = [&](auto change, Index heads = 2) {
    auto w = weights.views();
    TensorView<const float, 3> x = data.x.view();
    TensorView<float, 3> out = data.x_out.view();
    change(w, x, out);
    return softmax_attention_layer(ctx, x, w, out, {.heads = heads});
  };
  const auto what = [&](auto change, Index heads = 2) { return std::string(call(change, heads).what); };
  check_ok(call([](auto&, auto&, auto&) {}));
  CHECK(what([](auto&, auto&, auto&) {}, 0) == "heads");
  CHECK(what([](auto&, auto&, auto&) {}, 3) == "q weight, out (a multiple of heads)");
  CHECK(what([](auto& w, auto&, auto&) { w.k.weight.extents[0] = 7; }) == "k weight, out");
  CHECK(what([](auto& w, auto&, auto&) { w.v.weight.extents[1] = 7; }) == "v weight, in");
  CHECK(what([](auto& w, auto&, auto&) { w.q.weight.data = nullptr; }) == "q weight");
  CHECK(what([](auto& w, auto&, auto&) { w.q.weight.strides[1] = 2; }) == "q weight, stride of in");
  CHECK(what([](auto& w, auto&, auto&) { w.q.bias.extents[0] = 7; }) == "q bias, out");
  CHECK(what([](auto& w, auto&, auto&) { w.out.weight.extents[0] = 7; }) == "out weight, out");
  CHECK(what([](auto& w, auto&, auto&) { w.out.bias.data = nullptr; }) == "out bias");
  CHECK(what([](auto& w, auto&, auto&) {
          w.out = {};
          w.q.weight.extents[0] = 4;
        }) == "x_out, channels (no out projection)");
  CHECK(what([](auto& w, auto&, auto&) { w.q_norm.extents[0] = 3; }) == "q_norm, channels");
  CHECK(what([](auto& w, auto&, auto&) { w.k_norm.data = nullptr; }) == "k_norm");
  CHECK(what([](auto&, auto& x, auto&) { x.extents[0] = 1; }) == "x_out, batch");
  CHECK(what([](auto&, auto& x, auto&) { x.extents[1] = 0; }) == "x, tokens");
  CHECK(what([](auto&, auto& x, auto&) { x.data = nullptr; }) == "x");
  CHECK(what([](auto&, auto&, auto& o) { o.data = nullptr; }) == "x_out");
  CHECK(what([](auto&, auto&, auto& o) { o.strides[2] = 2; }) == "x_out, channel stride");

  const auto views = weights.views();
  const std::size_t bytes =
      softmax_attention_layer_workspace(Cpu{}, data.x.view(), views, data.x_out.view(), {.heads = 2});
  const auto code = [&](Workspace workspace) {
    return softmax_attention_layer(Cpu{workspace}, data.x.view(), views, data.x_out.view(), {.heads = 2})
        .code;
  };
  CHECK(code({scratch.workspace().data, bytes}) == Code::ok);
  CHECK(code({scratch.workspace().data, bytes - 1}) == Code::workspace);
  CHECK(code({}) == Code::workspace);
}

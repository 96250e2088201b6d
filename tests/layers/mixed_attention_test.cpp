#include <linattn/cpu.hpp>
#include <linattn/layers/mixed_attention.hpp>

#include "../reference/neighborhood_attention.hpp"
#include "layer_cases.hpp"

using namespace layer_cases;
using namespace support;

namespace {

MixedLayerOptions options_of(const Shape& s, Window kernel) {
  MixedLayerOptions options;
  options.heads = s.heads;
  options.grid = s.grid;
  options.kernel = kernel;
  return options;
}

// Memory of all that the layer has beside the projections.
template <class F>
struct Mixed {
  Mixed(const Shape& s, int matrices, bool conv)
      : inner(s, matrices, conv, 50), scale({s.width(), 2}), offset({s.width(), 2}) {
    fill_normal(scale.view(), 71, 0.4, 1.0);
    fill_normal(offset.view(), 72, 0.4);
  }
  template <class G>
  Mixed(Widened, const Mixed<G>& o)
      : inner(Widened{}, o.inner), scale(to_double(o.scale)), offset(to_double(o.offset)) {}
  template <class W>
  [[nodiscard]] MixedAttentionWeights<W, F> views(const AttentionWeights<W>& projections) const {
    return {inner.views(projections), scale.view(), offset.view()};
  }

  Inner<F> inner;
  Buffer<F, 2> scale, offset;
};

// The layer's attention from the unfused pieces.
reference::Attention mixed_reference(const Shape& s, const Mixed<double>& mixed,
                                     const MixedLayerOptions& options) {
  return [&, s, options](const auto& q, const auto& k, const auto& v, const auto& out) {
    const double scale = options.scale.value_or(1.0 / std::sqrt(static_cast<double>(s.head_dim)));
    reference::neighborhood_attention(q, k, v, out, s.grid.height, s.grid.width, options.kernel, scale);
    reference::Tokens queries(q.extents), keys(k.extents), trained(out.extents);
    for_each_index(q.extents, [&](const auto& i) {
      const Index c = i[2] * s.head_dim + i[3];
      const auto rescale = [&](const auto& x, Index column) {
        return mixed.scale.view()(c, column) * element(x, i) + mixed.offset.view()(c, column);
      };
      element(queries.view(), i) = rescale(q, 0);
      element(keys.view(), i) = rescale(k, 1);
    });
    TttLayerOptions ttt_options;
    ttt_options.grid = options.grid;
    ttt_options.inner_lr = options.inner_lr;
    ttt_options.scale = options.scale;
    ttt_options.key_norm_eps = options.key_norm_eps;
    ttt_reference(s, mixed.inner, reference::InnerModel::mlp, reference::InnerLoss::squared_error,
                  ttt_options)(queries.view(), keys.view(), v, trained.view());
    for_each_index(out.extents, [&](const auto& i) {
      double& local = element(out, i);
      local = (1 - options.mix) * element(trained.view(), i) + options.mix * local;
    });
  };
}

template <class T, class W, class F, class P = Serial>
Status run(const Weights<W>& weights, const Mixed<F>& mixed, const MixedLayerOptions& options, Data<T>& data,
           const P& policy = {}) {
  const MixedAttentionWeights<W, F> views = mixed.views(weights.views());
  const Cpu<P> query{Workspace{}, policy};
  Scratch scratch(mixed_attention_layer_workspace(query, data.x.view(), views, data.x_out.view(), options));
  const Status status = mixed_attention_layer(query.with(scratch.workspace()), data.x.view(), views,
                                              data.x_out.view(), options);
  CHECK(scratch.intact());
  CHECK(data.x_out.intact());
  return status;
}

struct Case {
  Shape shape;
  Window kernel;
};
const std::vector<Case> cases = {
    {{.batch = 1, .tokens = 1, .in = 4, .heads = 1, .head_dim = 3, .grid = {0, 1, 1}}, {1, 1}},
    {{.batch = 2, .tokens = 35, .in = 32, .heads = 2, .head_dim = 16, .qk_norm = false, .grid = {0, 7, 5}},
     {5, 5}},
    {{.batch = 1, .tokens = 96, .in = 24, .heads = 3, .head_dim = 40, .bias = false, .grid = {0, 6, 16}},
     {3, 7}},
    {{.batch = 2, .tokens = 64, .in = 48, .heads = 1, .head_dim = 64, .project = false, .grid = {0, 8, 8}},
     {5, 5}},
};

// Without an output projection 16-bit storage also rounds both attentions and the rescaled q and k.
template <class T>
constexpr double unmixed = sizeof(T) == 2 ? 4.0 * unit_roundoff<T> : tolerance<T>;

template <class T, class W, class F>
void check_types(bool conv) {
  for (const Case& one : cases) {
    const Shape& s = one.shape;
    CAPTURE(s.tokens);
    const Weights<W> weights(s, s.in, s.in, 1);
    const Mixed<F> mixed(s, 2, conv);
    MixedLayerOptions options = options_of(s, one.kernel);
    options.inner_lr = 0.7;
    options.mix = conv ? 0.5 : 0.3;
    Data<T> data(s);
    check_ok(run(weights, mixed, options, data));
    const Weights<double> exact(Widened{}, weights);
    const Mixed<double> exact_mixed(Widened{}, mixed);
    Buffer<double, 3> expected(data.x_out.view().extents);
    reference::attention_layer(to_double(data.x).view(), {}, exact.views(), {}, s.heads, 1e-6,
                               mixed_reference(s, exact_mixed, options), expected, {});
    check_relative(data.x_out, expected, s.project ? tolerance<T> : unmixed<T>);
  }
}

}  // namespace

TEST_CASE("the DiT5 layer is its composition in double: float") {
  check_types<float, float, float>(true);
  check_types<float, half, float>(false);
}
TEST_CASE("the DiT5 layer is its composition in double: 16 bit") {
  check_types<half, half, half>(true);
  check_types<bfloat16, bfloat16, float>(true);
}
TEST_CASE("the DiT5 layer is its composition in double: double") {
  check_types<double, double, double>(true);
  check_types<double, half, float>(false);
}

TEST_CASE("the DiT5 layer at the ends of its mix is one of its attentions") {
  const Shape s{.batch = 2, .tokens = 35, .in = 16, .heads = 2, .head_dim = 24, .grid = {0, 5, 7}};
  const Weights<float> weights(s, s.in, s.in, 1);
  Mixed<float> mixed(s, 2, true);
  fill(mixed.scale.view(), 1.0);  // the identity
  fill(mixed.offset.view(), 0.0);
  MixedLayerOptions options = options_of(s, {5, 7});
  Data<float> layer(s), alone(s);

  options.mix = 0;
  check_ok(run(weights, mixed, options, layer));
  TttLayerOptions ttt_options;
  ttt_options.heads = s.heads;
  ttt_options.grid = s.grid;
  const auto views = mixed.inner.views(weights.views());
  Scratch scratch(ttt_attention_layer_workspace<Mlp, SquaredError>(Cpu{}, alone.x.view(), views,
                                                                   alone.x_out.view(), ttt_options));
  check_ok(ttt_attention_layer<Mlp, SquaredError>(Cpu{scratch.workspace()}, alone.x.view(), views,
                                                  alone.x_out.view(), ttt_options));
  CHECK(same_bits(layer.x_out, alone.x_out));

  options.mix = 1;  // the window is the grid: softmax
  check_ok(run(weights, mixed, options, layer));
  const SoftmaxLayerOptions softmax_options{.heads = s.heads};
  const auto projections = weights.views();
  Scratch more(softmax_attention_layer_workspace(Cpu{}, alone.x.view(), projections, alone.x_out.view(),
                                                 softmax_options));
  check_ok(softmax_attention_layer(Cpu{more.workspace()}, alone.x.view(), projections, alone.x_out.view(),
                                   softmax_options));
  check_relative(layer.x_out, to_double(alone.x_out), 2.0 * tolerance<float>);
}

TEST_CASE("the DiT5 layer: any threads give the same bits, in place too, nothing is allocated") {
  const Shape s{.batch = 2, .tokens = 620, .in = 16, .heads = 2, .head_dim = 24, .grid = {0, 31, 20}};
  const Weights<half> weights(s, s.in, s.in, 1);
  const Mixed<float> mixed(s, 2, true);
  const MixedLayerOptions options = options_of(s, {5, 5});
  Data<float> one(s), other(s);
  check_ok(run(weights, mixed, options, one));
  check_ok(run(weights, mixed, options, other, Threads{3, 5}));
  CHECK(same_bits(one.x_out, other.x_out));

  const auto views = mixed.views(weights.views());
  Scratch scratch(mixed_attention_layer_workspace(Cpu{}, other.x.view(), views, other.x.view(), options));
  const Cpu ctx{scratch.workspace()};
  const Allocations allocations;
  const Status status = mixed_attention_layer(ctx, other.x.view(), views, other.x.view(), options);
  CHECK(allocations.count() == 0);
  check_ok(status);
  CHECK(same_bits(one.x_out, other.x));
}

TEST_CASE("the DiT5 layer names what does not fit") {
  const Shape s{.batch = 2, .tokens = 15, .in = 8, .heads = 2, .head_dim = 4, .grid = {0, 5, 3}};
  const Weights<float> weights(s, s.in, s.in, 1);
  const Mixed<float> mixed(s, 2, true);
  Data<float> data(s);
  Scratch scratch(1 << 20);
  const auto what = [&](auto change) {
    auto w = mixed.views(weights.views());
    MixedLayerOptions options = options_of(s, {5, 3});
    change(w, options);
    const Status status =
        mixed_attention_layer(Cpu{scratch.workspace()}, data.x.view(), w, data.x_out.view(), options);
    return std::string(status.ok() ? "ok" : status.what);
  };
  CHECK(what([](auto&, auto&) {}) == "ok");
  CHECK(what([](auto& w, auto&) { w.ttt.projections.k.weight.extents[0] = 7; }) == "k weight, out");
  CHECK(what([](auto& w, auto&) { w.ttt.inner.w2.extents[0] = 3; }) == "w2, heads");
  CHECK(what([](auto& w, auto&) { w.ttt.k_conv.extents[0] = 7; }) == "k_conv, channels");
  CHECK(what([](auto& w, auto&) { w.qk_scale.extents[0] = 7; }) == "qk_scale, channels");
  CHECK(what([](auto& w, auto&) { w.qk_scale.extents[1] = 1; }) == "qk_scale, of q and of k");
  CHECK(what([](auto& w, auto&) { w.qk_scale.data = nullptr; }) == "qk_scale");
  CHECK(what([](auto& w, auto&) { w.qk_offset = {}; }) == "qk_offset, channels");
  CHECK(what([](auto& w, auto&) { w.qk_offset.extents[1] = 3; }) == "qk_offset, of q and of k");
  CHECK(what([](auto& w, auto&) { w.qk_offset.data = nullptr; }) == "qk_offset");
  CHECK(what([](auto&, auto& o) { o.kernel = {5, 5}; }) == "kernel, width (at most the grid's)");
  CHECK(what([](auto&, auto& o) { o.kernel = {4, 3}; }) == "kernel, height (odd)");
  CHECK(what([](auto&, auto& o) { o.grid = {0, 4, 3}; }) == "grid, tokens (all are on the grid)");
  CHECK(what([](auto&, auto& o) { o.key_norm_eps = -1; }) == "key_norm_eps (not negative)");
  CHECK(what([](auto&, auto& o) { o.mix = std::numeric_limits<double>::quiet_NaN(); }) == "weight (finite)");
  const auto views = mixed.views(weights.views());
  const MixedLayerOptions options = options_of(s, {5, 3});
  const std::size_t bytes =
      mixed_attention_layer_workspace(Cpu{}, data.x.view(), views, data.x_out.view(), options);
  const auto code = [&](Workspace workspace) {
    return mixed_attention_layer(Cpu{workspace}, data.x.view(), views, data.x_out.view(), options).code;
  };
  CHECK(code({scratch.workspace().data, bytes}) == Code::ok);
  CHECK(code({scratch.workspace().data, bytes - 1}) == Code::workspace);
  CHECK(code({}) == Code::workspace);
}

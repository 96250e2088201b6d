#include <linattn/cpu.hpp>
#include <linattn/layers/vittt_attention.hpp>

#include "../reference/ttt_conv.hpp"
#include "layer_cases.hpp"

using namespace layer_cases;
using namespace support;

namespace {

VitttLayerOptions options_of(const Shape& s) {
  return {.heads = s.heads, .grid = s.grid, .inner_lr = 0.7, .scale = 0.4};
}

// Memory of the parameters.
template <class W, class F>
struct Parameters {
  explicit Parameters(const Shape& s)
      : qkv({3 * (s.heads + 1) * s.head_dim, s.in}),
        out({s.project ? s.in : 0, (s.heads + 1) * s.head_dim}),
        qkv_bias({s.bias ? qkv.view().extent(0) : 0}),
        out_bias({s.bias ? out.view().extent(0) : 0}),
        w1({s.heads, s.head_dim, s.head_dim}),
        w2({s.heads, s.head_dim, s.head_dim}),
        w3({s.head_dim, 1, 3, 3}) {
    const auto deviation = [](Index inputs) { return 1.0 / std::sqrt(static_cast<double>(inputs)); };
    fill_normal(qkv.view(), 1, deviation(s.in));
    fill_normal(out.view(), 2, deviation(out.view().extent(1)));
    fill_normal(qkv_bias.view(), 3, 0.3);
    fill_normal(out_bias.view(), 4, 0.3);
    fill_normal(w1.view(), 5, deviation(s.head_dim));
    fill_normal(w2.view(), 6, deviation(s.head_dim));
    fill_normal(w3.view(), 7, 0.3);
  }
  template <class V, class G>
  Parameters(Widened, const Parameters<V, G>& o)
      : qkv(to_double(o.qkv)),
        out(to_double(o.out)),
        qkv_bias(to_double(o.qkv_bias)),
        out_bias(to_double(o.out_bias)),
        w1(to_double(o.w1)),
        w2(to_double(o.w2)),
        w3(to_double(o.w3)) {}
  [[nodiscard]] VitttAttentionWeights<W, F> views() const {
    return {{qkv.view(), qkv_bias.view()}, {out.view(), out_bias.view()}, w1.view(), w2.view(), w3.view()};
  }

  Buffer<W, 2> qkv, out;
  Buffer<W, 1> qkv_bias, out_bias;
  Buffer<F, 3> w1, w2;
  Buffer<F, 4> w3;
};

// The layer a token and a head at a time.
Buffer<double, 3> expected(const Shape& s, const TensorView<const double, 3>& x,
                           const Parameters<double, double>& p, const VitttLayerOptions& options) {
  const Index width = (s.heads + 1) * s.head_dim, channels = s.heads * s.head_dim;
  Buffer<double, 3> packed({s.batch, s.tokens, 3 * width}), attended({s.batch, s.tokens, width});
  reference::project(x, {p.qkv.view(), p.qkv_bias.view()}, packed);
  const auto heads = [&](Index first, Index count) {
    return split_heads(slice<2>(packed.view(), first, count), count / s.head_dim);
  };

  // silu(x W2) * (x W1): the gated unit of the reference with its matrices the other way round.
  reference::Matrices<const double> w = {
      reference::for_each_batch(p.w2.view(), s.batch), reference::for_each_batch(p.w1.view(), s.batch), {}};
  Buffer<double, 4> first(w[0].extents), second(w[1].extents);
  const reference::Matrices<double> updated = {first.view(), second.view(), {}};
  const auto glu = reference::InnerModel::glu;
  reference::ttt_update(glu, reference::InnerLoss::inner_product, heads(channels, channels),
                        heads(2 * channels, channels), w, options.scale, options.inner_lr, updated,
                        reference::InnerStep::column_clip);
  reference::ttt_apply(glu, heads(0, channels), {updated[0], updated[1], {}},
                       split_heads(slice<2>(attended.view(), 0, channels), s.heads));

  const Index d = s.head_dim;
  reference::ttt_conv(heads(3 * channels, d), heads(3 * channels + d, d), heads(3 * channels + 2 * d, d),
                      p.w3.view(), split_heads(slice<2>(attended.view(), channels, d), 1), s.grid,
                      options.scale, options.inner_lr);
  if (!s.project) return attended;
  Buffer<double, 3> out({s.batch, s.tokens, s.in});
  reference::project(attended.view(), {p.out.view(), p.out_bias.view()}, out);
  return out;
}

// Inputs and outputs; without an output projection there is a head more.
template <class T>
struct Tokens {
  explicit Tokens(const Shape& s)
      : x({s.batch, s.tokens, s.in}, {(s.tokens + 2) * (s.in + 3), s.in + 3, 1}, 5),
        out({s.batch, s.tokens, s.project ? s.in : (s.heads + 1) * s.head_dim}) {
    fill_normal(x.view(), 101);
  }
  Buffer<T, 3> x, out;
};

template <class T, class W, class F, class P = Serial>
Status run(const Parameters<W, F>& p, const VitttLayerOptions& options, Tokens<T>& data,
           const P& policy = {}) {
  const VitttAttentionWeights<W, F> views = p.views();
  const Cpu<P> query{Workspace{}, policy};
  Scratch scratch(vittt_attention_layer_workspace(query, data.x.view(), views, data.out.view(), options));
  const Status status =
      vittt_attention_layer(query.with(scratch.workspace()), data.x.view(), views, data.out.view(), options);
  CHECK(scratch.intact());
  CHECK(data.out.intact());
  return status;
}

const std::vector<Shape> shapes = {
    {.batch = 1, .tokens = 1, .in = 4, .heads = 1, .head_dim = 3, .grid = {0, 1, 1}},
    {.batch = 2, .tokens = 35, .in = 32, .heads = 2, .head_dim = 16, .grid = {0, 7, 5}},
    {.batch = 1, .tokens = 96, .in = 24, .heads = 3, .head_dim = 40, .bias = false, .grid = {0, 6, 16}},
    {.batch = 2, .tokens = 64, .in = 48, .heads = 1, .head_dim = 64, .project = false, .grid = {0, 4, 16}},
};

// Without an output projection 16-bit storage rounds what lies between, too.
template <class T>
constexpr double unmixed = sizeof(T) == 2 ? 4.0 * unit_roundoff<T> : tolerance<T>;

template <class T, class W, class F>
void check_types() {
  for (const Shape& s : shapes) {
    CAPTURE(s.tokens);
    const Parameters<W, F> p(s);
    Tokens<T> data(s);
    check_ok(run(p, options_of(s), data));
    const Parameters<double, double> exact(Widened{}, p);
    check_relative(data.out, expected(s, to_double(data.x).view(), exact, options_of(s)),
                   s.project ? tolerance<T> : unmixed<T>);
  }
}

}  // namespace

TEST_CASE("the ViT3 layer is its composition in double") {
  check_types<float, float, float>();
  check_types<float, half, float>();
  check_types<double, double, double>();
}
TEST_CASE("the ViT3 layer is its composition in double: 16-bit activations") {
  check_types<half, half, half>();
  check_types<bfloat16, bfloat16, float>();
}

TEST_CASE("the ViT3 layer: any threads give the same bits, in place too, nothing is allocated") {
  const Shape s{.batch = 2, .tokens = 620, .in = 16, .heads = 2, .head_dim = 24, .grid = {0, 31, 20}};
  const Parameters<half, float> p(s);
  Tokens<float> one(s), other(s);
  check_ok(run(p, options_of(s), one));
  check_ok(run(p, options_of(s), other, Threads{3, 5}));
  CHECK(same_bits(one.out, other.out));

  const auto views = p.views();
  Scratch scratch(
      vittt_attention_layer_workspace(Cpu{}, other.x.view(), views, other.x.view(), options_of(s)));
  const Cpu ctx{scratch.workspace()};
  const Allocations allocations;
  const Status status = vittt_attention_layer(ctx, other.x.view(), views, other.x.view(), options_of(s));
  CHECK(allocations.count() == 0);
  check_ok(status);
  CHECK(same_bits(one.out, other.x));
}

TEST_CASE("the ViT3 layer names what does not fit") {
  const Shape s{.batch = 2, .tokens = 6, .in = 8, .heads = 2, .head_dim = 4, .grid = {0, 2, 3}};
  const Parameters<float, float> p(s);
  Tokens<float> data(s);
  Scratch scratch(1 << 20);
  const auto what = [&](auto change) {
    auto w = p.views();
    TensorView<const float, 3> x = data.x.view();
    TensorView<float, 3> out = data.out.view();
    VitttLayerOptions options = options_of(s);
    change(w, options, x, out);
    const Status status = vittt_attention_layer(Cpu{scratch.workspace()}, x, w, out, options);
    return std::string(status.ok() ? "ok" : status.what);
  };
  CHECK(what([](auto&, auto&, auto&, auto&) {}) == "ok");
  CHECK(what([](auto&, auto& o, auto&, auto&) { o.heads = 0; }) == "heads");
  CHECK(what([](auto&, auto& o, auto&, auto&) { o.heads = 4; }) ==
        "qkv weight, out (a multiple of 3 heads + 3)");
  CHECK(what([](auto& w, auto&, auto&, auto&) { w.qkv.weight.extents[0] = 0; }) == "qkv weight, out");
  CHECK(what([](auto& w, auto&, auto&, auto&) { w.qkv.weight.extents[1] = 7; }) == "qkv weight, in");
  CHECK(what([](auto& w, auto&, auto&, auto&) { w.qkv.weight.data = nullptr; }) == "qkv weight");
  CHECK(what([](auto& w, auto&, auto&, auto&) { w.qkv.bias.extents[0] = 35; }) == "qkv bias, out");
  CHECK(what([](auto& w, auto&, auto&, auto&) { w.out.weight.extents[1] = 8; }) == "out weight, in");
  CHECK(what([](auto& w, auto&, auto&, auto&) { w.out.bias.data = nullptr; }) == "out bias");
  CHECK(what([](auto& w, auto&, auto&, auto&) { w.out = {}; }) == "out, channels (no out projection)");
  CHECK(what([](auto& w, auto&, auto&, auto&) { w.w1.extents[0] = 3; }) == "w1, heads");
  CHECK(what([](auto& w, auto&, auto&, auto&) { w.w2.extents[2] = 3; }) == "w2, columns");
  CHECK(what([](auto& w, auto&, auto&, auto&) { w.w3.extents[0] = 8; }) == "w3, channels");
  CHECK(what([](auto& w, auto&, auto&, auto&) { w.w3.data = nullptr; }) == "w3");
  CHECK(what([](auto&, auto& o, auto&, auto&) {
          o.grid = {0, 2, 2};
        }) == "grid, tokens (all are on the grid)");
  CHECK(what([](auto&, auto&, auto& x, auto&) { x.extents[1] = 0; }) == "x, tokens");
  CHECK(what([](auto&, auto&, auto& x, auto&) { x.strides[2] = 2; }) == "x, channel stride");
  CHECK(what([](auto&, auto&, auto&, auto& out) { out.extents[0] = 1; }) == "out, batch");
  CHECK(what([](auto&, auto&, auto&, auto& out) { out.data = nullptr; }) == "out");
  const auto views = p.views();
  const std::size_t bytes =
      vittt_attention_layer_workspace(Cpu{}, data.x.view(), views, data.out.view(), options_of(s));
  const auto code = [&](Workspace workspace) {
    return vittt_attention_layer(Cpu{workspace}, data.x.view(), views, data.out.view(), options_of(s)).code;
  };
  CHECK(code({scratch.workspace().data, bytes}) == Code::ok);
  CHECK(code({scratch.workspace().data, bytes - 1}) == Code::workspace);
  CHECK(code({}) == Code::workspace);
}

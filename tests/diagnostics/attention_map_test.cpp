#include <linattn/diagnostics/attention_map_cpu.hpp>

#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "../reference/softmax_attention.hpp"
#include "../support.hpp"

using namespace linattn;
using namespace support;

namespace {

template <class M, class L, class S = Plain>
struct Variant {
  using Model = M;
  using Loss = L;
  using Step = S;
  static constexpr std::size_t matrices = detail::matrices<M>;
};
#define ALL_VARIANTS                                                                             \
  Variant<Linear, InnerProduct>, Variant<Glu, InnerProduct>, Variant<Mlp, InnerProduct>,         \
      Variant<SwiGlu, InnerProduct>, Variant<Mlp3, InnerProduct>, Variant<Linear, SquaredError>, \
      Variant<Glu, SquaredError>, Variant<Mlp, SquaredError>, Variant<SwiGlu, SquaredError>,     \
      Variant<Mlp3, SquaredError>, Variant<Linear, SquaredError, ColumnClip>,                    \
      Variant<Glu, InnerProduct, ColumnClip>, Variant<Mlp, InnerProduct, ColumnClip>,            \
      Variant<SwiGlu, SquaredError, ColumnClip>

// A layer's inputs in T, W, and its map.
template <class V, class T, class W = T>
struct Problem {
  using C = Compute<T>;
  using Model = typename V::Model;
  using Loss = typename V::Loss;
  using Step = typename V::Step;

  Buffer<T, 4> q, k, v;
  Buffer<C, 4> map;
  std::vector<Buffer<W, 3>> w;
  Buffer<W, 4> q_taps, k_taps;
  Buffer<W, 1> q_bias, k_bias;
  TttWeights<W> weights;
  TttMapOptions<W> options;

  Problem(Index batch, Index queries, Index keys, Index heads, Index d, Layout layout = Layout::dense)
      : q(make<T>(layout, {batch, queries, heads, d})),
        k(make<T>(layout, {batch, keys, heads, d})),
        v(make<T>(layout, {batch, keys, heads, d})),
        map({batch, heads, queries, keys}),
        q_taps({heads * d, 1, 3, 3}),
        k_taps({heads * d, 1, 3, 3}),
        q_bias({heads * d}),
        k_bias({heads * d}) {
    fill_normal(q.view(), 1);
    fill_normal(k.view(), 2, 1.0, 0.5);
    fill_normal(v.view(), 3);
    for (std::size_t m = 0; m < V::matrices; ++m) {
      w.push_back(Buffer<W, 3>({heads, d, d}, {d * (d + 3), d + 3, 1}, 0));
      fill_normal(w[m].view(), 4 + m, 1.0 / std::sqrt(static_cast<double>(d)));
    }
    const std::array<TensorView<const W, 3>*, 3> views = {&weights.w1, &weights.w2, &weights.w3};
    for (std::size_t m = 0; m < V::matrices; ++m) *views[m] = w[m].view();
    fill_normal(q_taps.view(), 7, 0.3);
    fill_normal(k_taps.view(), 8, 0.3);
    fill_normal(q_bias.view(), 9, 0.3);
    fill_normal(k_bias.view(), 10, 0.3);
  }

  void prologue(TokenGrid grid) {
    options.ttt.prologue = {.key_norm = true,
                            .key_norm_eps = 0.5,
                            .q_conv = q_taps.view(),
                            .k_conv = k_taps.view(),
                            .q_conv_bias = q_bias.view(),
                            .k_conv_bias = k_bias.view(),
                            .grid = grid};
  }

  template <class P = Serial>
  void run(const TensorView<C, 4>& to, const P& parallel = {}) {
    Cpu<P> ctx{{}, parallel};
    Scratch scratch(
        ttt_attention_map_workspace<Model, Loss, Step>(ctx, q.view(), k, v, weights, to, options));
    ctx.workspace = scratch.workspace();
    check_ok(ttt_attention_map<Model, Loss, Step>(ctx, q.view(), k, v, weights, to, options));
    CHECK(scratch.intact());
  }
  void run() {
    map.poison();
    run(map.view());
    CHECK(map.intact());
  }

  // By central differences of the layer itself in double (which tests/ops/ttt_test.cpp holds to its formulas), from
  // the inputs as they are stored. The error is of the order of step^4 times the fifth derivative.
  [[nodiscard]] Buffer<double, 4> differences() const {
    const auto queries = to_double(q), keys = to_double(k), values = to_double(v);
    const auto q_kernel = to_double(q_taps), k_kernel = to_double(k_taps);
    const auto q_offset = to_double(q_bias), k_offset = to_double(k_bias);
    std::vector<Buffer<double, 3>> wide;
    for (const auto& matrix : w) wide.push_back(to_double(matrix));
    TttWeights<double> matrices;
    const std::array<TensorView<const double, 3>*, 3> views = {&matrices.w1, &matrices.w2, &matrices.w3};
    for (std::size_t m = 0; m < V::matrices; ++m) *views[m] = wide[m].view();
    TttOptions<double> layer{options.ttt.inner_lr, options.ttt.scale, {}};
    if (const auto& p = options.ttt.prologue; p.key_norm)
      layer.prologue = {
          true, p.key_norm_eps, q_kernel.view(), k_kernel.view(), q_offset.view(), k_offset.view(), p.grid};

    const Index batch = q.view().extent(0), rows = q.view().extent(1), heads = q.view().extent(2);
    const Index d = q.view().extent(3), tokens = k.view().extent(1);
    Buffer<double, 4> out({batch, rows, heads, d}), result({batch, heads, rows, tokens});
    fill(result.view(), 0.0);
    Scratch scratch(
        ttt_workspace<Model, Loss, Step>(Cpu{}, queries, keys, values, matrices, out.view(), layer));
    // All heads and batch entries at once: none sees the values of another.
    for (Index j = 0; j < tokens; ++j)
      for (Index c = 0; c < d; ++c)
        for (const double steps : {-2.0, -1.0, 1.0, 2.0}) {
          const double step = 5e-4, weight = steps == 1.0 ? 8.0 : steps == -1.0 ? -8.0 : -steps / 2.0;
          const auto move = [&](double by) {
            for (Index b = 0; b < batch; ++b)
              for (Index h = 0; h < heads; ++h) values.view()(b, j, h, c) += by;
          };
          move(steps * step);
          check_ok(ttt<Model, Loss, Step>(Cpu{scratch.workspace()}, queries, keys, values, matrices,
                                          out.view(), layer));
          move(-steps * step);
          for (Index b = 0; b < batch; ++b)
            for (Index h = 0; h < heads; ++h)
              for (Index i = 0; i < rows; ++i)
                result.view()(b, h, i, j) +=
                    weight * out.view()(b, i, h, c) / (12.0 * step) / static_cast<double>(d);
        }
    return result;
  }
};

// Relative L2 error of a map in float, w ~ d^-1/2.
constexpr double float_tolerance = 2e-6;

}  // namespace

TEST_CASE_TEMPLATE("the closed form is the derivative of the layer", V, ALL_VARIANTS) {
  Problem<V, double> plain(2, 6, 7, 2, 5);
  plain.options.ttt.inner_lr = 1.5;
  if (V::Step::needs_column_norm) plain.options.ttt.scale = 3.0;  // gradients of about 1, where a clip shows
  plain.run();
  check_relative(plain.map, plain.differences(), 1e-10);

  Problem<V, double> whole(1, 12, 12, 2, 4);
  whole.prologue({1, 2, 5});
  whole.options.ttt.scale = 0.8;
  whole.run();
  check_relative(whole.map, whole.differences(), 1e-10);
}

TEST_CASE_TEMPLATE("the map in float is that in double", V, ALL_VARIANTS) {
  for (const Index d : {1, 8, 17, 40, 64}) {
    CAPTURE(d);
    Problem<V, float> single(2, 70, 65, 2, d);
    Problem<V, double> exact(2, 70, 65, 2, d);
    for (Problem<V, float>* p : {&single}) p->prologue({3, 8, 7});
    exact.prologue({3, 8, 7});
    copy(single.q.view(), exact.q.view());
    copy(single.k.view(), exact.k.view());
    copy(single.v.view(), exact.v.view());
    for (std::size_t m = 0; m < V::matrices; ++m) copy(single.w[m].view(), exact.w[m].view());
    copy(single.q_taps.view(), exact.q_taps.view());
    copy(single.k_taps.view(), exact.k_taps.view());
    copy(single.q_bias.view(), exact.q_bias.view());
    copy(single.k_bias.view(), exact.k_bias.view());
    single.run();
    exact.run();
    check_relative(single.map, exact.map, float_tolerance);
  }
}

TEST_CASE_TEMPLATE("every layout and storage type", T, float, half, bfloat16, double) {
  for (const Layout layout : all_layouts) {
    CAPTURE(name(layout));
    Problem<Variant<SwiGlu, InnerProduct>, T, bfloat16> problem(2, 9, 8, 2, 6, layout);
    problem.prologue({1, 2, 3});
    problem.run();
    check_relative(problem.map, problem.differences(), std::is_same_v<T, double> ? 1e-10 : float_tolerance);
  }
}

TEST_CASE("with Linear and the inner product the layer is its map times the values") {
  Problem<Variant<Linear, InnerProduct>, double> p(2, 30, 20, 3, 8);
  p.run();
  Buffer<double, 4> out({2, 30, 3, 8}), expected({2, 30, 3, 8});
  Scratch scratch(ttt_workspace<Linear>(Cpu{}, p.q, p.k, p.v, p.weights, out.view()));
  check_ok(ttt<Linear>(Cpu{scratch.workspace()}, p.q, p.k, p.v, p.weights, out.view()));
  for_each_index(out.view().extents, [&](const auto& index) {
    const auto [b, i, h, c] = index;
    double sum = 0.0;
    for (Index r = 0; r < 8; ++r) sum += p.q.view()(b, i, h, r) * p.w[0].view()(h, r, c);
    for (Index j = 0; j < 20; ++j) sum += p.map.view()(b, h, i, j) * p.v.view()(b, j, h, c);
    element(expected.view(), index) = sum;
  });
  check_relative(out, expected, 1e-14);
}

TEST_CASE_TEMPLATE("chosen rows are those of the whole map, for any number of workers", V, ALL_VARIANTS) {
  Problem<V, float> p(2, 40, 33, 3, 16, Layout::packed);
  p.prologue({2, 5, 6});
  p.run();
  const std::array<Index, 4> tokens = {39, 0, 17, 17};
  p.options.queries = {tokens.data(), {4}};
  Buffer<float, 4> rows({2, 3, 4, 33});
  p.run(rows.view(), Threads{3, 5});
  CHECK(rows.intact());
  for (Index r = 0; r < 4; ++r)
    CHECK(same_bits(slice<2>(rows.view(), r, 1),
                    slice<2>(p.map.view(), tokens[static_cast<std::size_t>(r)], 1)));
}

TEST_CASE_TEMPLATE("the map of softmax attention are its probabilities", T, float, half, double) {
  for (const Layout layout : all_layouts)
    for (const int form : {0, 1, 2}) {
      CAPTURE(name(layout));
      CAPTURE(form);
      const Index batch = 2, queries = 23, keys = 37, heads = 2, d = 20;
      auto q = make<T>(layout, {batch, queries, heads, d}), k = make<T>(layout, {batch, keys, heads, d});
      fill_normal(q.view(), 1, 2.0);
      fill_normal(k.view(), 2);
      Buffer<Compute<T>, 4> bias({batch, heads, queries, keys}), map({batch, heads, queries, keys});
      fill_normal(bias.view(), 3);
      for (Index j = 0; j < keys; ++j) bias.view()(1, 1, 5, j) = -std::numeric_limits<Compute<T>>::infinity();
      SoftmaxMapOptions<Compute<T>> options{.causal = form == 1};
      if (form == 2) options.bias = bias.view(), options.scale = 0.3;
      check_ok(softmax_attention_map(Cpu{}, q.view(), k, map.view(), options));
      CHECK(map.intact());

      Buffer<double, 4> expected({batch, heads, queries, keys}), v({batch, keys, heads, d}),
          out({batch, queries, heads, d});
      fill(v.view(), 0.0);
      const auto wide_bias = to_double(bias);
      reference::softmax_attention(
          to_double(q).view(), to_double(k).view(), v.view(), out.view(),
          {.scale = options.scale.value_or(1.0 / std::sqrt(20.0)),
           .causal = options.causal,
           .bias = form == 2 ? TensorView<const double, 4>(wide_bias.view()) : TensorView<const double, 4>{},
           .probabilities = expected.view()});
      // eps times the largest logit and the terms of its sum, and of the exponential.
      check_rounding<Compute<T>>(map, expected, 40.0);

      const std::array<Index, 2> tokens = {20, 5};
      options.queries = {tokens.data(), {2}};
      Buffer<Compute<T>, 4> rows({batch, heads, 2, keys});
      check_ok(softmax_attention_map(Cpu<Threads>{{}, {3, 5}}, q.view(), k, rows.view(), options));
      CHECK(rows.intact());
      for (Index r = 0; r < 2; ++r)
        CHECK(same_bits(slice<2>(rows.view(), r, 1),
                        slice<2>(map.view(), tokens[static_cast<std::size_t>(r)], 1)));
    }
}

TEST_CASE("maps keep NaN, and allocate nothing") {
  Problem<Variant<SwiGlu, SquaredError>, float> p(1, 9, 9, 2, 8);
  p.prologue({0, 3, 3});
  Scratch scratch(ttt_attention_map_workspace<SwiGlu, SquaredError>(Cpu{}, p.q.view(), p.k, p.v, p.weights,
                                                                    p.map.view(), p.options));
  const Cpu ctx{scratch.workspace()};
  const Allocations allocations;
  check_ok(
      ttt_attention_map<SwiGlu, SquaredError>(ctx, p.q.view(), p.k, p.v, p.weights, p.map.view(), p.options));
  check_ok(softmax_attention_map(ctx, p.q.view(), p.k, p.map.view()));
  CHECK(allocations.count() == 0);

  fill(slice<1>(p.q.view(), 4, 1), std::numeric_limits<double>::quiet_NaN());
  check_ok(softmax_attention_map(ctx, p.q.view(), p.k, p.map.view()));
  for (Index j = 0; j < 9; ++j) {
    CHECK(std::isnan(p.map.view()(0, 1, 4, j)));
    CHECK(!std::isnan(p.map.view()(0, 1, 3, j)));
  }
}

TEST_CASE_TEMPLATE("a hidden key cannot be observed in a softmax map", T, float, bfloat16, double) {
  using C = Compute<T>;
  const Index queries = 9, keys = 12, hidden = 4;
  Buffer<T, 4> q({1, queries, 1, 8}), k({1, keys, 1, 8}), poisoned({1, keys, 1, 8});
  Buffer<C, 4> bias({1, 1, queries, keys}), map({1, 1, queries, keys}), expected({1, 1, queries, keys});
  fill_normal(q.view(), 1);
  fill(bias.view(), 0.0);
  for (Index i = 0; i < queries; ++i) bias.view()(0, 0, i, hidden) = -std::numeric_limits<C>::infinity();
  for (const double poison : {std::nan(""), HUGE_VAL, -HUGE_VAL})
    for (const bool causal : {false, true}) {
      CAPTURE(poison);
      CAPTURE(causal);
      for (const auto* to : {&k, &poisoned}) fill_normal(to->view(), 2);
      for (Index c = 0; c < 8; ++c) {
        const Index last = causal ? keys - 1 : hidden;  // the last query alone sees it
        k.view()(0, hidden, 0, c) = k.view()(0, last, 0, c) = convert<T>(0.0);
        poisoned.view()(0, hidden, 0, c) = poisoned.view()(0, last, 0, c) = convert<T>(poison);
      }
      const SoftmaxMapOptions<C> options{.causal = causal, .bias = bias.view()};
      check_ok(softmax_attention_map(Cpu{}, q.view(), k.view(), expected.view(), options));
      check_ok(softmax_attention_map(Cpu{}, q.view(), poisoned.view(), map.view(), options));
      const Index count = causal ? queries - 1 : queries;
      CHECK(same_bits(slice<2>(map.view(), 0, count), slice<2>(expected.view(), 0, count)));
    }
}

TEST_CASE("every bad argument has its status") {
  Problem<Variant<Mlp, InnerProduct>, float> p(2, 10, 12, 2, 4);
  p.prologue({0, 2, 5});
  Scratch scratch(1 << 20);
  const auto what = [&](const auto& spoil) {
    TensorView<float, 4> q = p.q.view(), k = p.k.view(), v = p.v.view(), out = p.map.view();
    const auto weights = p.weights;
    const auto options = p.options;
    spoil(q, k, v, out);
    const Status status =
        ttt_attention_map<Mlp>(Cpu{scratch.workspace()}, q, k, v, p.weights, out, p.options);
    p.weights = weights;
    p.options = options;
    return std::string(status.what);
  };
  const std::array<Index, 2> tokens = {3, 10};
  using Views = TensorView<float, 4>;
  CHECK(what([](auto&...) {}).empty());
  CHECK(what([](Views& q, auto&...) { q.extents[1] = 0; }) == "q, tokens");
  CHECK(what([](Views&, Views& k, auto&...) { k.extents[3] = 3; }) == "k, channels");
  CHECK(what([](Views&, Views&, Views& v, Views&) { v.extents[1] = 11; }) == "v, tokens");
  CHECK(what([](Views&, Views&, Views&, Views& out) { out.extents[2] = 11; }) == "out, rows");
  CHECK(what([](Views&, Views&, Views&, Views& out) { out.extents[3] = 10; }) == "out, keys");
  CHECK(what([](Views&, Views&, Views&, Views& out) { out.strides[3] = 2; }) == "out, key stride");
  CHECK(what([](Views& q, auto&...) { q.data = nullptr; }) == "q");
  CHECK(what([&](auto&...) { p.weights.w2 = {}; }) == "w2, heads");
  CHECK(what([&](auto&...) { p.weights.w3 = p.weights.w2; }) == "w3, elements (the model has none)");
  CHECK(what([&](auto&...) { p.options.ttt.prologue.q_conv.extents[0] = 7; }) == "q_conv, channels");
  CHECK(what([&](auto&...) { p.options.ttt.scale = std::nan(""); }) == "scale (finite)");
  CHECK(what([&](Views&, Views&, Views&, Views& out) {
          p.options.queries = {tokens.data(), {2}};
          out.extents[2] = 2;
        }) == "queries (below the tokens of q)");
  CHECK(std::string(
            ttt_attention_map<Mlp>(Cpu{}, p.q.view(), p.k, p.v, p.weights, p.map.view(), p.options).what) ==
        "ttt_attention_map, workspace");
  const std::size_t need =
      ttt_attention_map_workspace<Mlp>(Cpu{}, p.q.view(), p.k, p.v, p.weights, p.map.view(), p.options);
  Scratch short_of(need / 2);
  CHECK(ttt_attention_map<Mlp>(Cpu{short_of.workspace()}, p.q.view(), p.k, p.v, p.weights, p.map.view(),
                               p.options)
            .code == Code::workspace);

  const auto softmax = [&](const Views& q, const Views& k, const Views& out,
                           const SoftmaxMapOptions<float>& options) {
    return std::string(softmax_attention_map(Cpu{}, q, k, out, options).what);
  };
  CHECK(softmax(p.q, slice<2>(p.k.view(), 0, 1), p.map, {}) == "k, heads");
  CHECK(softmax(p.q, p.k, slice<3>(p.map.view(), 0, 3), {}) == "out, keys");
  CHECK(softmax(p.q, p.k, p.map, {.scale = INFINITY}) == "scale (finite)");
  CHECK(softmax(p.q, p.k, p.map, {.bias = slice<2>(p.map.view(), 0, 4)}) == "bias, queries");
}

#include <linattn/ops/depthwise_conv_cpu.hpp>
#include <linattn/ops/instance_norm_cpu.hpp>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "ttt_cases.hpp"

using namespace ttt_cases;

TEST_CASE_TEMPLATE("the prologue gives the bits of the ops that it fuses", T, float, double) {
  struct Case {
    Index tokens, head_dim;
    TokenGrid grid;
  };
  for (const Case& c : {Case{64, 32, {0, 8, 8}}, Case{137, 40, {5, 11, 12}}, Case{1000, 16, {0, 1, 1000}},
                        Case{1000, 16, {300, 700, 1}}, Case{1100, 8, {70, 32, 32}}, Case{65, 72, {0, 1, 1}},
                        Case{600, 17, {10, 3, 190}}, Case{1200, 5, {600, 24, 25}}})
    for (const int parts : {1, 2, 3, 4, 5, 6, 7}) {
      CAPTURE(c.tokens);
      CAPTURE(c.head_dim);
      CAPTURE(parts);
      Problem<SwiGluIp, T> fused(
          {.batch = 2, .queries = c.tokens, .keys = c.tokens, .heads = 2, .head_dim = c.head_dim},
          Layout::packed);
      fused.prologue(c.grid);
      if ((parts & 1) == 0) fused.options.prologue.key_norm = false;
      if ((parts & 2) == 0) fused.options.prologue.q_conv = {}, fused.options.prologue.q_conv_bias = {};
      if ((parts & 4) == 0) fused.options.prologue.k_conv = {}, fused.options.prologue.k_conv_bias = {};
      fused.run();

      Problem<SwiGluIp, T> plain(fused.sizes, Layout::packed);
      const auto& p = fused.options.prologue;
      if (p.key_norm) {
        Scratch scratch(instance_norm_workspace(Cpu{}, fused.k, plain.k.view()));
        check_ok(instance_norm(Cpu{scratch.workspace()}, fused.k, plain.k.view(), {.eps = p.key_norm_eps}));
      }
      if (p.k_conv.extent(0) != 0) {
        auto normalized = make<T>(Layout::dense, fused.k.view().extents);
        copy(plain.k.view(), normalized.view());
        check_ok(
            depthwise_conv(Cpu{}, normalized, p.k_conv, p.k_conv_bias, plain.k.view(), {.grid = c.grid}));
      }
      if (p.q_conv.extent(0) != 0)
        check_ok(depthwise_conv(Cpu{}, fused.q, p.q_conv, p.q_conv_bias, plain.q.view(), {.grid = c.grid}));
      plain.run();
      CHECK(same_bits(fused.out, plain.out));
    }
}

TEST_CASE("Linear with the inner product is linear attention beside its weight") {
  // q (W + lr s / N K^T V)
  const Index d = 24, tokens = 90;
  Problem<LinearIp, double> problem({.queries = 31, .keys = tokens, .head_dim = d});
  problem.options.inner_lr = 0.8;
  problem.options.scale = 0.3;
  problem.run();
  Buffer<double, 4> expected(problem.out.view().extents);
  const auto q = problem.q.view(), k = problem.k.view(), v = problem.v.view();
  for (Index n = 0; n < 31; ++n)
    for (Index j = 0; j < d; ++j) {
      double sum = 0.0;
      for (Index i = 0; i < d; ++i) {
        double kv = 0.0;
        for (Index m = 0; m < tokens; ++m) kv += k(0, m, 0, i) * v(0, m, 0, j);
        sum += q(0, n, 0, i) * (problem.w[0].view()(0, i, j) + 0.8 * 0.3 / tokens * kv);
      }
      expected.view()(0, n, 0, j) = sum;
    }
  check_relative(problem.out, expected, tolerance<double>);
}

TEST_CASE("the key norm of a single token gives 0, so nothing is learnt") {
  Problem<LinearIp, float> problem({.queries = 9, .keys = 1, .head_dim = 20});
  problem.options.prologue.key_norm = true;
  problem.run();
  auto learnt = make<float>(Layout::dense, problem.out.view().extents);
  copy(problem.out.view(), learnt.view());
  problem.options.inner_lr = 0.0;
  problem.run();
  CHECK(same_bits(problem.out.view(), learnt.view()));
}

TEST_CASE_TEMPLATE("ttt allocates nothing", V, SwiGluIp, Mlp3L2, Clipped<GluIp>) {
  using Model = typename V::model;
  using Loss = typename V::loss;
  using Step = typename V::step;
  if (!Allocations::counted()) return;
  Problem<V, float> problem({.batch = 2, .queries = 600, .keys = 700, .heads = 2, .head_dim = 40});
  problem.prologue({3, 20, 21});
  const auto fast = problem.update();
  const auto count = [&](auto ctx) {
    Scratch scratch(ttt_workspace<Model, Loss, Step>(ctx, problem.q, problem.k, problem.v, problem.weights,
                                                     problem.out.view(), problem.options));
    ctx.workspace = scratch.workspace();
    const Allocations allocations;
    const bool ok = ttt<Model, Loss, Step>(ctx, problem.q, problem.k, problem.v, problem.weights,
                                           problem.out.view(), problem.options)
                        .ok() &&
                    ttt_update<Model, Loss, Step>(ctx, problem.k.view(), problem.v, problem.weights,
                                                  fast.views, problem.options)
                        .ok() &&
                    ttt_apply<Model>(ctx, problem.q, fast.views, problem.out.view(), problem.options).ok();
    const std::size_t made = allocations.count();
    CHECK(ok);
    CHECK(made == 0);
  };
  struct Claims : Serial {  // the path of many workers, on this thread
    [[nodiscard]] static constexpr Index workers() { return 3; }
  };
  count(Cpu<Serial>{});
  count(Cpu<Claims>{});
}

TEST_CASE("the workspace is what the query says, and does not grow with the tokens") {
  const auto bytes = [](Index tokens, auto parallel) {
    const Problem<SwiGluIp, float> p({.heads = 2, .head_dim = 16});
    TensorView<float, 4> x(nullptr, {1, tokens, 2, 16});
    TttOptions<float> options = p.options;
    options.prologue = {.key_norm = true, .k_conv = p.k_taps.view(), .grid = {0, tokens / 16, 16}};
    return ttt_workspace(Cpu<decltype(parallel)>{{}, parallel}, x, x, x, p.weights, x, options);
  };
  CHECK(bytes(1 << 16, Serial{}) == bytes(1 << 20, Serial{}));
  CHECK(bytes(1 << 16, Threads{8}) == bytes(1 << 20, Threads{8}));

  Problem<SwiGluIp, float> p({.queries = 70, .keys = 600, .heads = 2, .head_dim = 24});
  const std::size_t need = ttt_workspace(Cpu{}, p.q, p.k, p.v, p.weights, p.out.view(), p.options);
  Scratch scratch(need);
  for (const Workspace workspace :
       {Workspace{}, Workspace{nullptr, need}, Workspace{scratch.workspace().data, 0},
        Workspace{scratch.workspace().data, need - 300}}) {
    const Status status = ttt(Cpu{workspace}, p.q, p.k, p.v, p.weights, p.out.view(), p.options);
    CHECK(status.code == Code::workspace);
    CHECK(std::string(status.what) == "ttt, workspace");
  }
  CHECK(p.out.intact());
}

TEST_CASE("every bad argument has its status") {
  using P = Problem<SwiGluIp, float>;
  const Sizes sizes{.batch = 2, .queries = 20, .keys = 30, .heads = 2, .head_dim = 8};
  struct Bad {
    Code code;
    const char* what;
    void (*spoil)(P& p, TensorView<const float, 4>& q, TensorView<const float, 4>& k,
                  TensorView<const float, 4>& v, TensorView<float, 4>& out);
  };
#define SPOIL                                                                                          \
  []([[maybe_unused]] P & p, [[maybe_unused]] TensorView<const float, 4> & q,                          \
     [[maybe_unused]] TensorView<const float, 4> & k, [[maybe_unused]] TensorView<const float, 4> & v, \
     [[maybe_unused]] TensorView<float, 4> & out)
  const std::vector<Bad> table = {{Code::null_data, "q", SPOIL{q.data = nullptr;
}
}
, {Code::null_data, "k", SPOIL{k.data = nullptr;
}
}
, {Code::null_data, "v", SPOIL{v.data = nullptr;
}
}
, {Code::null_data, "out", SPOIL{out.data = nullptr;
}
}
, {Code::null_data, "w2", SPOIL{p.weights.w2.data = nullptr;
}
}
, {Code::null_data, "q_conv", SPOIL{p.options.prologue.q_conv.data = nullptr;
}
}
, {Code::null_data, "k_conv_bias", SPOIL{p.options.prologue.k_conv_bias.data = nullptr;
}
}
, {Code::empty, "q, batch", SPOIL{q.extents[0] = 0;
}
}
, {Code::empty, "q, tokens", SPOIL{q.extents[1] = 0;
}
}
, {Code::empty, "k, tokens", SPOIL{k.extents[1] = 0;
}
}
, {Code::empty, "q, heads", SPOIL{q.extents[2] = 0;
}
}
, {Code::empty, "q, channels", SPOIL{q.extents[3] = 0;
}
}
, {Code::shape, "out, batch", SPOIL{out.extents[0] = 1;
}
}
, {Code::shape, "out, tokens", SPOIL{out.extents[1] = 19;
}
}
, {Code::shape, "out, heads", SPOIL{out.extents[2] = 1;
}
}
, {Code::shape, "out, channels", SPOIL{out.extents[3] = 7;
}
}
, {Code::shape, "v, batch", SPOIL{v.extents[0] = 1;
}
}
, {Code::shape, "v, tokens", SPOIL{v.extents[1] = 31;
}
}
, {Code::shape, "v, heads", SPOIL{v.extents[2] = 1;
}
}
, {Code::shape, "v, channels", SPOIL{v.extents[3] = 7;
}
}
, {Code::shape, "k, batch", SPOIL{k.extents[0] = v.extents[0] = 1;
}
}
, {Code::shape, "k, heads", SPOIL{k.extents[2] = v.extents[2] = 1;
p.options.prologue.k_conv = {};
p.options.prologue.k_conv_bias = {};
}
}
, {Code::shape, "k, channels", SPOIL{k.extents[3] = v.extents[3] = 4;
p.options.prologue.k_conv = {};
p.options.prologue.k_conv_bias = {};
}
}
, {Code::shape, "w1, heads", SPOIL{p.weights.w1.extents[0] = 1;
}
}
, {Code::shape, "w2, rows", SPOIL{p.weights.w2.extents[1] = 7;
}
}
, {Code::shape, "w3, columns", SPOIL{p.weights.w3.extents[2] = 9;
}
}
, {Code::shape, "w3, heads", SPOIL{p.weights.w3 = {};
}
}
, {Code::stride, "q, channel stride", SPOIL{q.strides[3] = 2;
}
}
, {Code::stride, "k, channel stride", SPOIL{k.strides[3] = 2;
}
}
, {Code::stride, "v, channel stride", SPOIL{v.strides[3] = 0;
}
}
, {Code::stride, "out, channel stride", SPOIL{out.strides[3] = 2;
}
}
, {Code::stride, "w1, column stride", SPOIL{p.weights.w1.strides[2] = 8;
}
}
, {Code::alias, "out, apart from q", SPOIL{q.data = out.data;
}
}
, {Code::alias, "out, apart from k", SPOIL{k.data = out.data;
}
}
, {Code::alias, "out, apart from v", SPOIL{v.data = out.data;
}
}
, {Code::shape, "q_conv, channels", SPOIL{p.options.prologue.q_conv.extents[0] = 15;
}
}
, {Code::shape, "k_conv, inputs a channel", SPOIL{p.options.prologue.k_conv.extents[1] = 2;
}
}
, {Code::shape, "k_conv, kernel rows", SPOIL{p.options.prologue.k_conv.extents[2] = 5;
}
}
, {Code::shape, "q_conv, kernel columns", SPOIL{p.options.prologue.q_conv.extents[3] = 1;
}
}
, {Code::stride, "q_conv, kernel column stride", SPOIL{p.options.prologue.q_conv.strides[3] = 9;
}
}
, {Code::shape, "q_conv_bias, channels", SPOIL{p.options.prologue.q_conv_bias.extents[0] = 8;
}
}
, {Code::shape, "k_conv_bias, channels (no k_conv)", SPOIL{p.options.prologue.k_conv = {};
}
}
, {Code::empty, "grid, height", SPOIL{p.options.prologue.grid = {};
}
}
, {Code::empty, "grid, width", SPOIL{p.options.prologue.grid.width = -4;
}
}
, {Code::option, nullptr, SPOIL{p.options.prologue.grid.height = 5;
}
}
, {Code::option, nullptr, SPOIL{p.options.prologue.grid.offset = -1;
}
}
, {Code::option, nullptr, SPOIL{p.options.prologue.grid.offset = 5;
}
}
, {Code::option, nullptr, SPOIL{p.options.prologue.grid.height = Index{1} << 62;
}
}
, {Code::option, nullptr, SPOIL{p.options.prologue.key_norm_eps = -1.0;
}
}
, {Code::option, nullptr, SPOIL{p.options.prologue.key_norm_eps = std::nan("");
}
}
, {Code::option, "inner_lr (finite)", SPOIL{p.options.inner_lr = INFINITY;
}
}
, {Code::option, "scale (finite)", SPOIL{p.options.scale = std::nan("");
}
}
,
}
;
#undef SPOIL
for (const Bad& bad : table) {
  P p(sizes);
  p.prologue({2, 4, 4});
  p.run();  // what is spoilt was good
  p.out.poison();
  TensorView<const float, 4> q = p.q, k = p.k, v = p.v;
  TensorView<float, 4> out = p.out;
  Scratch scratch(ttt_workspace(Cpu{}, q, k, v, p.weights, out, p.options));
  bad.spoil(p, q, k, v, out);
  const Status status = ttt(Cpu{scratch.workspace()}, q, k, v, p.weights, out, p.options);
  CAPTURE(message(status).c_str());
  CHECK(status.code == bad.code);
  if (bad.what != nullptr) CHECK(std::string(status.what) == bad.what);
}

SUBCASE("a matrix that the model has not") {
  Problem<LinearIp, float> p(sizes);
  const Problem<SwiGluIp, float> other(sizes);
  p.weights.w2 = other.weights.w2;
  Scratch scratch(1 << 20);
  const Status status =
      ttt<Linear>(Cpu{scratch.workspace()}, p.q, p.k, p.v, p.weights, p.out.view(), p.options);
  CHECK(status.code == Code::shape);
  CHECK(std::string(status.what) == "w2, elements (the model has none)");
}
SUBCASE("a matrix of one model that another has not") {
  Problem<GluIp, float> p(sizes);
  const Problem<SwiGluIp, float> other(sizes);
  Scratch scratch(1 << 20);
  p.weights.w3 = other.weights.w3;
  CHECK(std::string(ttt<Glu>(Cpu{scratch.workspace()}, p.q, p.k, p.v, p.weights, p.out.view()).what) ==
        "w3, elements (the model has none)");
  p.weights.w3 = {};
  CHECK(std::string(ttt<Mlp3>(Cpu{scratch.workspace()}, p.q, p.k, p.v, p.weights, p.out.view()).what) ==
        "w3, heads");
}
SUBCASE("the halves") {
  P p(sizes);
  Scratch scratch(1 << 20);
  auto fast = p.update();
  const Cpu ctx{scratch.workspace()};
  const auto what = [](const Status& s) { return std::string(s.what); };
  FastWeights<float> bad = fast.views;
  bad.w3.extents[0] = 1;
  CHECK(what(ttt_update(ctx, p.k.view(), p.v, p.weights, bad)) == "fast w3, batch");
  CHECK(what(ttt_apply(ctx, p.q, bad, p.out.view())) == "fast w3, batch");
  bad = fast.views;
  bad.w1.extents[3] = 7;
  CHECK(what(ttt_update(ctx, p.k.view(), p.v, p.weights, bad)) == "fast w1, columns");
  CHECK(what(ttt_apply(ctx, p.q, bad, p.out.view())) == "fast w1, columns");
  bad = fast.views;
  bad.w2.data = nullptr;
  CHECK(ttt_update(ctx, p.k.view(), p.v, p.weights, bad).code == Code::null_data);
  CHECK(ttt_apply(ctx, p.q, bad, p.out.view()).code == Code::null_data);
  CHECK(ttt_update(Cpu{}, p.k.view(), p.v, p.weights, fast.views).code == Code::workspace);
  CHECK(ttt_apply(Cpu{}, p.q, fast.views, p.out.view()).code == Code::workspace);
}
}

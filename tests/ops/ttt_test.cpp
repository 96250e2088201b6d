#include <linattn/ops/depthwise_conv_cpu.hpp>
#include <linattn/ops/instance_norm_cpu.hpp>
#include <linattn/ops/ttt_cpu.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <vector>

#include "../reference/depthwise_conv.hpp"
#include "../reference/instance_norm.hpp"
#include "../reference/ttt.hpp"
#include "../support.hpp"

using namespace linattn;
using namespace support;

namespace {

// ---- what is under test ----

template <class Model, class Loss>
struct Variant {
  using model = Model;
  using loss = Loss;
  static constexpr reference::InnerModel reference_model =
      std::is_same_v<Model, Linear> ? reference::InnerModel::linear
      : std::is_same_v<Model, Mlp>  ? reference::InnerModel::mlp
                                    : reference::InnerModel::swiglu;
  static constexpr reference::InnerLoss reference_loss = std::is_same_v<Loss, InnerProduct>
                                                             ? reference::InnerLoss::inner_product
                                                             : reference::InnerLoss::squared_error;
  static constexpr std::size_t matrices = detail::matrices<Model>;
};
using SwiGluIp = Variant<SwiGlu, InnerProduct>;
using MlpIp = Variant<Mlp, InnerProduct>;
using LinearIp = Variant<Linear, InnerProduct>;
using SwiGluL2 = Variant<SwiGlu, SquaredError>;
using MlpL2 = Variant<Mlp, SquaredError>;
using LinearL2 = Variant<Linear, SquaredError>;
#define ALL_VARIANTS SwiGluIp, MlpIp, LinearIp, SwiGluL2, MlpL2, LinearL2

struct Sizes {
  Index batch = 1, queries = 1, keys = 1, heads = 1, head_dim = 1;
};

// Relative L2 error that results stored as T may have against double on the same inputs.
// The double bound leaves room for W and its step to cancel, as they do in a head of one channel.
template <class T>
constexpr double tolerance = std::is_same_v<T, double>  ? 1e-13
                             : std::is_same_v<T, float> ? 2e-6
                             : std::is_same_v<T, half>  ? 5e-4
                                                        : 5e-3;

// One set of inputs, and the two ways to a result.
template <class V, class T, class W = T>
struct Problem {
  using C = Compute<T>;
  using Model = typename V::model;
  using Loss = typename V::loss;

  Sizes sizes;
  Buffer<T, 4> q, k, v, out;
  std::vector<Buffer<W, 3>> w;
  Buffer<W, 4> q_taps, k_taps;
  Buffer<W, 1> q_bias, k_bias;
  TttWeights<W> weights;
  TttOptions<W> options;

  explicit Problem(Sizes s, Layout layout = Layout::dense, std::uint64_t seed = 1)
      : sizes(s),
        q(make<T>(layout, {s.batch, s.queries, s.heads, s.head_dim})),
        k(make<T>(layout, {s.batch, s.keys, s.heads, s.head_dim})),
        v(make<T>(layout, {s.batch, s.keys, s.heads, s.head_dim})),
        out(make<T>(layout, {s.batch, s.queries, s.heads, s.head_dim})),
        q_taps({s.heads * s.head_dim, 1, 3, 3}),
        k_taps({s.heads * s.head_dim, 1, 3, 3}),
        q_bias({s.heads * s.head_dim}),
        k_bias({s.heads * s.head_dim}) {
    fill_normal(q.view(), seed);
    fill_normal(k.view(), seed + 1, 1.0, 0.5);
    fill_normal(v.view(), seed + 2);
    for (std::size_t m = 0; m < V::matrices; ++m) {
      // Rows with a gap behind each: the strides of a weight count.
      const Index row = s.head_dim + 3;
      w.push_back(Buffer<W, 3>({s.heads, s.head_dim, s.head_dim}, {s.head_dim * row, row, 1}, 0));
      fill_normal(w.back().view(), seed + 3 + m, 1.0 / std::sqrt(static_cast<double>(s.head_dim)));
    }
    const std::array<TensorView<const W, 3>*, 3> views = {&weights.w1, &weights.w2, &weights.w3};
    for (std::size_t m = 0; m < V::matrices; ++m) *views[m] = w[m].view();
    fill_normal(q_taps.view(), seed + 6, 0.3);
    fill_normal(k_taps.view(), seed + 7, 0.3);
    fill_normal(q_bias.view(), seed + 8, 0.3);
    fill_normal(k_bias.view(), seed + 9, 0.3);
  }

  // All of the prologue.
  void prologue(TokenGrid grid) {
    options.prologue = {.key_norm = true,
                        .key_norm_eps = 0.5,
                        .q_conv = q_taps.view(),
                        .k_conv = k_taps.view(),
                        .q_conv_bias = q_bias.view(),
                        .k_conv_bias = k_bias.view(),
                        .grid = grid};
  }

  template <class P = Serial>
  void run(const P& parallel = {}) {
    Cpu<P> ctx{{}, parallel};
    Scratch scratch(ttt_workspace<Model, Loss>(ctx, q, k, v, weights, out.view(), options));
    ctx.workspace = scratch.workspace();
    out.poison();
    check_ok(ttt<Model, Loss>(ctx, q, k, v, weights, out.view(), options));
    CHECK(scratch.intact());
    CHECK(out.intact());
  }

  struct Fast {
    std::vector<Buffer<C, 4>> w;
    FastWeights<C> views;
  };
  template <class P = Serial>
  [[nodiscard]] Fast update(const P& parallel = {}) const {
    Fast fast;
    for (std::size_t m = 0; m < V::matrices; ++m)
      fast.w.push_back(Buffer<C, 4>({sizes.batch, sizes.heads, sizes.head_dim, sizes.head_dim}));
    const std::array<TensorView<C, 4>*, 3> views = {&fast.views.w1, &fast.views.w2, &fast.views.w3};
    for (std::size_t m = 0; m < V::matrices; ++m) *views[m] = fast.w[m].view();
    Cpu<P> ctx{{}, parallel};
    Scratch scratch(ttt_update_workspace<Model, Loss>(ctx, k.view(), v, weights, fast.views, options));
    ctx.workspace = scratch.workspace();
    check_ok(ttt_update<Model, Loss>(ctx, k.view(), v, weights, fast.views, options));
    CHECK(scratch.intact());
    for (const auto& matrix : fast.w) CHECK(matrix.intact());
    return fast;
  }
  template <class P = Serial>
  void apply(const Fast& fast, const P& parallel = {}) {
    Cpu<P> ctx{{}, parallel};
    Scratch scratch(ttt_apply_workspace<Model>(ctx, q, fast.views, out.view(), options));
    ctx.workspace = scratch.workspace();
    out.poison();
    check_ok(ttt_apply<Model>(ctx, q, fast.views, out.view(), options));
    CHECK(scratch.intact());
    CHECK(out.intact());
  }

  [[nodiscard]] double scale() const {
    return options.scale.value_or(1.0 / std::sqrt(static_cast<double>(sizes.head_dim)));
  }

  // The result by the formulas in double, from the inputs as they are stored.
  [[nodiscard]] Buffer<double, 4> expected() const {
    auto queries = to_double(q), keys = to_double(k);
    const auto& p = options.prologue;
    if (p.key_norm) {
      const auto raw = to_double(k);
      reference::instance_norm(raw.view(), keys.view(), p.key_norm_eps, true);
    }
    const auto conv = [&](Buffer<double, 4>& x, const Buffer<W, 4>& taps, const Buffer<W, 1>& bias) {
      const auto raw = to_double(x);
      reference::depthwise_conv(raw.view(), to_double(taps).view(), to_double(bias).view(), x.view(), p.grid,
                                true);
    };
    if (p.q_conv.extent(0) != 0) conv(queries, q_taps, q_bias);
    if (p.k_conv.extent(0) != 0) conv(keys, k_taps, k_bias);
    std::vector<Buffer<double, 3>> initial;
    std::vector<Buffer<double, 4>> updated;
    reference::Matrices<const double> from, use;
    reference::Matrices<double> to;
    for (std::size_t m = 0; m < V::matrices; ++m) {
      initial.push_back(to_double(w[m]));
      updated.push_back(Buffer<double, 4>({sizes.batch, sizes.heads, sizes.head_dim, sizes.head_dim}));
      from[m] = reference::for_each_batch(initial[m].view(), sizes.batch);
      to[m] = updated[m].view();
      use[m] = updated[m].view();
    }
    reference::ttt_update(V::reference_model, V::reference_loss, keys.view(), to_double(v).view(), from,
                          scale(), options.inner_lr, to);
    Buffer<double, 4> result(out.view().extents);
    reference::ttt_apply(V::reference_model, queries.view(), use, result.view());
    return result;
  }

  void check() {
    run();
    check_relative(out, expected(), tolerance<T>);
  }
};

}  // namespace

TEST_CASE("the gradients of the reference are those of its loss") {
  const Index d = 5, tokens = 7, heads = 2, batch = 2;
  for (const auto model :
       {reference::InnerModel::linear, reference::InnerModel::mlp, reference::InnerModel::swiglu})
    for (const auto loss : {reference::InnerLoss::inner_product, reference::InnerLoss::squared_error}) {
      Buffer<double, 4> k({batch, tokens, heads, d}), v({batch, tokens, heads, d});
      fill_normal(k.view(), 1);
      fill_normal(v.view(), 2);
      std::vector<Buffer<double, 4>> w, g;
      reference::Matrices<const double> weights;
      reference::Matrices<double> gradients;
      for (std::size_t m = 0; m < static_cast<std::size_t>(reference::matrices(model)); ++m) {
        w.push_back(Buffer<double, 4>({batch, heads, d, d}));
        g.push_back(Buffer<double, 4>({batch, heads, d, d}));
        fill_normal(w[m].view(), 3 + m, 0.5);
        weights[m] = w[m].view();
        gradients[m] = g[m].view();
      }
      const double scale = 0.7;
      reference::ttt_gradients(model, loss, k, v, weights, scale, gradients);
      for (std::size_t m = 0; m < w.size(); ++m) {
        Buffer<double, 4> numeric({batch, heads, d, d});
        for_each_index(w[m].view().extents, [&](const auto& index) {
          double& element = support::element(w[m].view(), index);
          const double centre = element, step = 1e-3;
          const auto at = [&](double offset) {
            element = centre + offset * step;
            return reference::inner_loss(model, loss, k, v, weights, scale, index[0], index[1]);
          };
          // Fourth order: the error is of the order of step^4.
          support::element(numeric.view(), index) =
              (8.0 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12.0 * step);
          element = centre;
        });
        check_relative(g[m], numeric, 1e-9);
      }
    }
}

TEST_CASE_TEMPLATE("ttt follows its formulas for any number of tokens", V, ALL_VARIANTS) {
  for (const Index tokens : {1, 63, 64, 65, 137, 1000}) {
    CAPTURE(tokens);
    Problem<V, float>({.batch = 2, .queries = tokens, .keys = tokens, .heads = 2, .head_dim = 16}).check();
    Problem<V, double>({.queries = 3, .keys = tokens, .head_dim = 8}).check();
    Problem<V, float>({.queries = tokens, .keys = 66, .head_dim = 8}).check();
  }
}

TEST_CASE_TEMPLATE("ttt follows its formulas for any head size", V, ALL_VARIANTS) {
  for (const Index head_dim : {1, 2, 8, 15, 17, 32, 40, 64, 72, 100, 128, 150}) {
    CAPTURE(head_dim);
    Problem<V, float>({.queries = 33, .keys = 70, .heads = 2, .head_dim = head_dim}).check();
    Problem<V, double>({.queries = 5, .keys = 67, .head_dim = head_dim}).check();
  }
}

TEST_CASE_TEMPLATE("ttt reads and writes every layout in every storage type", T, float, half, bfloat16,
                   double) {
  for (const Layout layout : all_layouts) {
    CAPTURE(name(layout));
    const Sizes sizes{.batch = 2, .queries = 40, .keys = 70, .heads = 3, .head_dim = 40};
    const TokenGrid grid{2, 7, 5};
    const auto check = [&]<class V, class W>() {
      Problem<V, T, W> problem(sizes, layout);
      problem.check();
      problem.prologue(grid);
      problem.check();
    };
    check.template operator()<SwiGluIp, T>();
    check.template operator()<MlpL2, bfloat16>();
    check.template operator()<LinearIp, half>();
    check.template operator()<MlpIp, float>();
  }
}

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

TEST_CASE_TEMPLATE("ttt_update and ttt_apply give the bits of ttt", V, ALL_VARIANTS) {
  for (const Index tokens : {65, 1100}) {
    Problem<V, float> problem({.batch = 2, .queries = tokens, .keys = 900, .heads = 2, .head_dim = 24},
                              Layout::sliced);
    problem.prologue({20, 5, 9});
    problem.run();
    auto whole = make<float>(Layout::dense, problem.out.view().extents);
    copy(problem.out.view(), whole.view());
    problem.apply(problem.update());
    CHECK(same_bits(problem.out.view(), whole.view()));
    problem.apply(problem.update(Threads{3, 5}), Threads{7, 6});
    CHECK(same_bits(problem.out.view(), whole.view()));
  }
}

TEST_CASE_TEMPLATE("results do not depend on workers or on the order of tasks", V, ALL_VARIANTS) {
  for (const Index heads : {1, 3}) {
    Problem<V, float> problem({.batch = 2, .queries = 1500, .keys = 2100, .heads = heads, .head_dim = 16},
                              Layout::packed);
    problem.prologue({10, 30, 40});
    problem.run();
    auto serial = make<float>(Layout::dense, problem.out.view().extents);
    copy(problem.out.view(), serial.view());
    for (const Index workers : {2, 3, 8, 17})
      for (std::uint64_t seed = 1; seed <= 2; ++seed) {
        CAPTURE(workers);
        problem.run(Threads{workers, seed});
        CHECK(same_bits(problem.out.view(), serial.view()));
      }
  }
}

TEST_CASE_TEMPLATE("an inner learning rate of 0 leaves the bare inner model", V, ALL_VARIANTS) {
  Problem<V, double> problem({.batch = 2, .queries = 20, .keys = 30, .heads = 2, .head_dim = 12});
  problem.options.inner_lr = 0.0;
  problem.run();
  std::vector<Buffer<double, 3>> initial;
  reference::Matrices<const double> w;
  for (std::size_t m = 0; m < V::matrices; ++m) {
    initial.push_back(to_double(problem.w[m]));
    w[m] = reference::for_each_batch(initial[m].view(), 2);
  }
  Buffer<double, 4> bare(problem.out.view().extents);
  reference::ttt_apply(V::reference_model, to_double(problem.q).view(), w, bare.view());
  check_relative(problem.out, bare, tolerance<double>);
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

TEST_CASE_TEMPLATE("a common permutation of keys and values changes only rounding", V, ALL_VARIANTS) {
  const Index tokens = 700;
  Problem<V, double> problem({.queries = 20, .keys = tokens, .heads = 2, .head_dim = 16});
  problem.options.prologue.key_norm = true;
  problem.run();
  Problem<V, double> permuted(problem.sizes);
  permuted.options = problem.options;
  for_each_index(problem.k.view().extents, [&](const std::array<Index, 4>& at) {
    const Index to = (at[1] * 333 + 5) % tokens;  // 333 and 700 have no common factor
    permuted.k.view()(at[0], to, at[2], at[3]) = element(problem.k.view(), at);
    permuted.v.view()(at[0], to, at[2], at[3]) = element(problem.v.view(), at);
  });
  permuted.run();
  CHECK_FALSE(same_bits(permuted.k, problem.k));
  check_relative(permuted.out, problem.out, tolerance<double>);
}

TEST_CASE_TEMPLATE("a constant added to all keys changes nothing behind the key norm", V, ALL_VARIANTS) {
  Problem<V, double> problem({.queries = 20, .keys = 65, .heads = 2, .head_dim = 16});
  problem.options.prologue.key_norm = true;
  problem.run();
  Problem<V, double> shifted(problem.sizes);
  shifted.options = problem.options;
  for_each_index(shifted.k.view().extents,
                 [&](const auto& at) { element(shifted.k.view(), at) += 3.0 + static_cast<double>(at[3]); });
  shifted.run();
  check_relative(shifted.out, problem.out, 1e-13);
  // It is the norm that forgives.
  problem.options.prologue.key_norm = shifted.options.prologue.key_norm = false;
  problem.run();
  shifted.run();
  CHECK(difference(shifted.out, problem.out).relative() > 1e-3);
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

TEST_CASE("ttt allocates nothing") {
  if (!Allocations::counted()) return;
  Problem<SwiGluIp, float> problem({.batch = 2, .queries = 600, .keys = 700, .heads = 2, .head_dim = 40});
  problem.prologue({3, 20, 21});
  const auto fast = problem.update();
  const auto count = [&](auto ctx) {
    Scratch scratch(ttt_workspace(ctx, problem.q, problem.k, problem.v, problem.weights, problem.out.view(),
                                  problem.options));
    ctx.workspace = scratch.workspace();
    const Allocations allocations;
    const bool ok =
        ttt(ctx, problem.q, problem.k, problem.v, problem.weights, problem.out.view(), problem.options)
            .ok() &&
        ttt_update(ctx, problem.k.view(), problem.v, problem.weights, fast.views, problem.options).ok() &&
        ttt_apply(ctx, problem.q, fast.views, problem.out.view(), problem.options).ok();
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

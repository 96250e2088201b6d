// ttt on Cuda: the formulas on both ways, with tensor cores and without, and what callers rely on.
#include <linattn/ops/depthwise_conv_cuda.cuh>
#include <linattn/ops/instance_norm_cuda.cuh>
#include <linattn/ops/ttt_cuda.cuh>

#include <array>
#include <cmath>
#include <string>
#include <type_traits>
#include <vector>

#include "../device.hpp"
#include "ttt_problem.hpp"

namespace {

using namespace ttt_cases;
using linattn::half;  // not that of the toolkit

// With tensor cores, operands are rounded to T; see ttt.hpp.
template <class T>
inline constexpr double device_tolerance = std::is_same_v<T, float> ? 2e-6 : 2 * unit_roundoff<T>;

template <class V, class T, class W = T>
struct Problem : Inputs<V, T, W> {
  using Base = Inputs<V, T, W>;
  using Base::Base;
  using Base::options;
  using Base::out;
  using Base::sizes;
  using typename Base::Loss;
  using typename Base::Model;
  using typename Base::Step;

  // The inputs as the device has them.
  struct Mirror {
    OnDevice<T, 4> q, k, v, out;
    std::vector<OnDevice<W, 3>> w;
    OnDevice<W, 4> q_taps, k_taps;
    OnDevice<W, 1> q_bias, k_bias;
    TttWeights<W> weights;
    TttOptions<W> options;

    explicit Mirror(const Problem& p)
        : q(p.q),
          k(p.k),
          v(p.v),
          out(p.out),
          q_taps(p.q_taps),
          k_taps(p.k_taps),
          q_bias(p.q_bias),
          k_bias(p.k_bias),
          options(p.options) {
      for (const auto& matrix : p.w) w.emplace_back(matrix);
      const std::array<TensorView<const W, 3>*, 3> views = {&weights.w1, &weights.w2, &weights.w3};
      for (std::size_t m = 0; m < V::matrices; ++m) *views[m] = w[m].view();
      TttPrologue<W>& prologue = options.prologue;
      const auto move = [](auto& view, const auto& to) {
        if (view.data != nullptr) view.data = to.view().data;
      };
      move(prologue.q_conv, q_taps), move(prologue.k_conv, k_taps);
      move(prologue.q_conv_bias, q_bias), move(prologue.k_conv_bias, k_bias);
    }
  };

  void run() {
    out.poison();
    const Mirror on(*this);
    DeviceScratch scratch(
        ttt_workspace<Model, Loss, Step>(Cuda{}, on.q, on.k, on.v, on.weights, on.out.view(), on.options));
    const Cuda ctx{scratch.workspace()};
    check_ok(ttt<Model, Loss, Step>(ctx, on.q, on.k, on.v, on.weights, on.out.view(), on.options));
    CHECK(scratch.intact());
    on.out.download(out);
    CHECK(out.intact());
  }

  // Fast weights with a gap behind each row.
  using Fast = std::vector<Buffer<float, 4>>;
  [[nodiscard]] Fast make_fast() const {
    Fast fast;
    const Index d = sizes.head_dim, row = d + 5, head = d * row;
    for (std::size_t m = 0; m < V::matrices; ++m)
      fast.push_back(
          Buffer<float, 4>({sizes.batch, sizes.heads, d, d}, {sizes.heads * head, head, row, 1}, 0));
    return fast;
  }
  struct FastMirror {
    std::vector<OnDevice<float, 4>> w;
    FastWeights<float> views;

    explicit FastMirror(const Fast& fast) {
      for (const auto& matrix : fast) w.emplace_back(matrix);
      const std::array<TensorView<float, 4>*, 3> all = {&views.w1, &views.w2, &views.w3};
      for (std::size_t m = 0; m < V::matrices; ++m) *all[m] = w[m].view();
    }
  };
  [[nodiscard]] Fast update() const {
    Fast fast = make_fast();
    const Mirror on(*this);
    const FastMirror to(fast);
    DeviceScratch scratch(
        ttt_update_workspace<Model, Loss, Step>(Cuda{}, on.k.view(), on.v, on.weights, to.views, on.options));
    const Cuda ctx{scratch.workspace()};
    check_ok(ttt_update<Model, Loss, Step>(ctx, on.k.view(), on.v, on.weights, to.views, on.options));
    CHECK(scratch.intact());
    for (std::size_t m = 0; m < V::matrices; ++m) {
      to.w[m].download(fast[m]);
      CHECK(fast[m].intact());
    }
    return fast;
  }
  void apply(const Fast& fast) {
    out.poison();
    const Mirror on(*this);
    const FastMirror from(fast);
    DeviceScratch scratch(ttt_apply_workspace<Model>(Cuda{}, on.q, from.views, on.out.view(), on.options));
    const Cuda ctx{scratch.workspace()};
    check_ok(ttt_apply<Model>(ctx, on.q, from.views, on.out.view(), on.options));
    CHECK(scratch.intact());
    on.out.download(out);
    CHECK(out.intact());
  }

  void check() {
    run();
    check_relative(out, this->expected(), device_tolerance<T>);
  }
};

// A copy of the output, to compare another with.
template <class T>
[[nodiscard]] Buffer<T, 4> kept(const Buffer<T, 4>& out) {
  Buffer<T, 4> copy_of(out.view().extents);
  copy(out.view(), copy_of.view());
  return copy_of;
}

// The whole prologue, and none of it.
template <class P>
void check_both(P&& problem, const TokenGrid& grid) {
  CAPTURE(problem.sizes.keys);
  CAPTURE(problem.sizes.head_dim);
  problem.check();
  problem.prologue(grid);
  problem.check();
}

TEST_CASE_TEMPLATE("float: the formulas, for all models, losses and steps", V, MODELS_AND_LOSSES,
                   Clipped<GluIp>, Clipped<SwiGluL2>) {
  using P = Problem<V, float>;
  check_both(P({.batch = 2, .head_dim = 8}), {0, 1, 1});
  check_both(P({.batch = 2, .queries = 20, .keys = 63, .heads = 2, .head_dim = 17}), {3, 4, 4});
  check_both(P({.queries = 65, .keys = 33, .head_dim = 40}), {1, 2, 15});
}

TEST_CASE("float: the formulas, for other sizes") {
  using P = Problem<SwiGluIp, float>;
  check_both(P({.queries = 65, .keys = 64, .heads = 2, .head_dim = 32}), {0, 8, 8});
  check_both(P({.queries = 137, .keys = 137, .head_dim = 64}), {5, 11, 12});
  check_both(P({.queries = 16, .keys = 40, .heads = 2, .head_dim = 72}), {0, 1, 16});
}

TEST_CASE_TEMPLATE("16 bits: the formulas, where there are tensor cores and where there are none", T, half,
                   bfloat16) {
  using P = Problem<SwiGluIp, T>;
  check_both(P({.batch = 2, .heads = 10, .head_dim = 8}), {0, 1, 1});  // the tolerance speaks of many results
  check_both(P({.queries = 65, .keys = 63, .heads = 2, .head_dim = 32}), {3, 5, 11});
  check_both(P({.queries = 64, .keys = 137, .head_dim = 40}), {0, 4, 16});
  check_both(P({.queries = 137, .keys = 65, .head_dim = 64}), {1, 7, 9});
  check_both(P({.queries = 20, .keys = 33, .head_dim = 36}), {2, 3, 6});
  check_both(P({.queries = 20, .keys = 33, .head_dim = 72}), {1, 4, 4});
}

TEST_CASE("16 bits: other models, and weights in another type") {
  const Sizes sizes{.batch = 2, .queries = 33, .keys = 65, .head_dim = 32};
  check_both(Problem<MlpL2, bfloat16, float>(sizes), {3, 5, 6});
  check_both(Problem<LinearIp, half, bfloat16>(sizes), {3, 5, 6});
  check_both(Problem<Clipped<GluL2>, bfloat16, half>(sizes), {3, 5, 6});
  check_both(Problem<Mlp3L2, half>(sizes), {3, 5, 6});
}

TEST_CASE_TEMPLATE("every layout", T, float, half, bfloat16) {
  for (const Layout layout : all_layouts) {
    CAPTURE(name(layout));
    Problem<SwiGluIp, T> problem({.batch = 2, .queries = 24, .keys = 33, .heads = 2, .head_dim = 40}, layout);
    problem.prologue({2, 4, 5});
    problem.check();

    // Both ways are taken: a gap of three channels behind a head is no multiple of 16 bytes.
    const typename Problem<SwiGluIp, T>::Mirror on(problem);
    const bool fits = sizeof(T) == 2 && layout != Layout::sliced;
    CHECK(detail::ttt_mma_fits(on.k.view(), on.v.view()) == fits);
    CHECK(detail::ttt_mma_fits(on.q.view(), on.out.view()) == fits);
  }
}

TEST_CASE("large heads") {
  const auto check = [](auto problem) {
    problem.prologue({1, 2, 2});
    problem.check();
  };
  check(Problem<SwiGluIp, float>({.queries = 5, .keys = 20, .head_dim = 128}));
  check(Problem<SwiGluIp, bfloat16>({.queries = 5, .keys = 17, .head_dim = 200}));
  check(
      Problem<LinearIp, float>({.queries = 5, .keys = 17, .head_dim = 800}));  // too large for shared memory
}

TEST_CASE_TEMPLATE("many splits", T, float, bfloat16) {
  Problem<SwiGluIp, T> problem({.queries = 1100, .keys = 1300, .head_dim = 16}, Layout::packed);
  problem.prologue({20, 33, 31});
  problem.check();
}

TEST_CASE("more heads than splits are made for") {
  Problem<LinearIp, float>({.batch = 3, .queries = 2, .keys = 3, .heads = 350, .head_dim = 8}).check();
  Problem<LinearIp, half, bfloat16>({.batch = 2, .queries = 2, .keys = 3, .heads = 130, .head_dim = 8})
      .check();
}

TEST_CASE("float: the prologue gives the bits of the ops that it fuses") {
  for (const int parts : {1, 2, 3, 4, 5, 6, 7}) {
    CAPTURE(parts);
    using P = Problem<SwiGluIp, float>;
    P fused({.queries = 137, .keys = 137, .heads = 2, .head_dim = 12}, Layout::packed);
    fused.prologue({5, 10, 13});
    if ((parts & 1) == 0) fused.options.prologue.key_norm = false;
    if ((parts & 2) == 0) fused.options.prologue.q_conv = {}, fused.options.prologue.q_conv_bias = {};
    if ((parts & 4) == 0) fused.options.prologue.k_conv = {}, fused.options.prologue.k_conv_bias = {};
    fused.run();

    P plain(fused.sizes, Layout::packed);
    const auto& p = fused.options.prologue;
    const P::Mirror on(fused);
    const auto op = [](const Buffer<float, 4>& x, Buffer<float, 4>& to, const auto& call) {
      const OnDevice<float, 4> from(x), result(to);
      check_ok(call(from, result.view()));
      result.download(to);
    };
    if (p.key_norm)
      op(fused.k, plain.k, [&](const auto& x, const auto& y) {
        DeviceScratch scratch(instance_norm_workspace(Cuda{}, x, y));
        return instance_norm(Cuda{scratch.workspace()}, x, y, {.eps = p.key_norm_eps});
      });
    const auto normalized = kept(plain.k);
    if (p.k_conv.extent(0) != 0)
      op(normalized, plain.k, [&](const auto& x, const auto& y) {
        return depthwise_conv(Cuda{}, x, on.k_taps.view(), on.k_bias.view(), y, {.grid = p.grid});
      });
    if (p.q_conv.extent(0) != 0)
      op(fused.q, plain.q, [&](const auto& x, const auto& y) {
        return depthwise_conv(Cuda{}, x, on.q_taps.view(), on.q_bias.view(), y, {.grid = p.grid});
      });
    plain.run();
    CHECK(same_bits(fused.out, plain.out));
  }
}

TEST_CASE("ttt_update and ttt_apply give the bits of ttt, twice the same") {
  const auto check = [](auto problem) {
    problem.prologue({20, 5, 9});
    problem.run();
    const auto whole = kept(problem.out);
    problem.run();
    CHECK(same_bits(problem.out, whole));
    const auto fast = problem.update();
    problem.apply(fast);
    CHECK(same_bits(problem.out, whole));
    const auto again = problem.update();
    for (std::size_t m = 0; m < fast.size(); ++m) CHECK(same_bits(again[m], fast[m]));
  };
  const Sizes sizes{.batch = 2, .queries = 90, .keys = 520, .head_dim = 24};
  check(Problem<SwiGluIp, float>(sizes, Layout::sliced));
  check(Problem<SwiGluIp, bfloat16>(sizes, Layout::permuted));
  check(Problem<Clipped<GluIp>, float>(sizes));
}

TEST_CASE_TEMPLATE("an inner learning rate of 0 leaves the bare inner model", T, float, half) {
  Problem<SwiGluIp, T> problem({.batch = 2, .queries = 20, .keys = 30, .heads = 2, .head_dim = 16});
  problem.options.inner_lr = 0.0;
  const auto fast = problem.update();
  for (std::size_t m = 0; m < 3; ++m)
    for_each_index(fast[m].view().extents, [&](const auto& at) {
      CHECK(element(fast[m].view(), at) == convert<float>(problem.w[m].view()(at[1], at[2], at[3])));
    });
}

TEST_CASE_TEMPLATE("a constant added to all keys changes nothing behind the key norm", T, float, bfloat16) {
  Problem<SwiGluIp, T> problem({.queries = 20, .keys = 65, .heads = 2, .head_dim = 16});
  // Keys of few digits, so that the shifted ones are stored exactly.
  for_each_index(problem.k.view().extents, [&](const auto& at) {
    element(problem.k.view(), at) =
        convert<T>(std::round(4 * convert<double>(element(problem.k.view(), at))) / 4);
  });
  problem.options.prologue.key_norm = true;
  problem.run();
  const auto before = kept(problem.out);
  for_each_index(problem.k.view().extents, [&](const auto& at) {
    element(problem.k.view(), at) = convert<T>(convert<double>(element(problem.k.view(), at)) + 16);
  });
  problem.run();
  check_relative(problem.out, to_double(before), std::is_same_v<T, float> ? 1e-6 : unit_roundoff<T>);
  problem.options.prologue.key_norm = false;
  problem.run();
  CHECK(difference(problem.out.view(), to_double(before).view()).relative() > 1e-2);
}

TEST_CASE("a column whose squares overflow stays as it was") {
  Problem<Clipped<GluIp>, float> problem({.keys = 40, .head_dim = 20});
  fill_normal(problem.v.view(), 5, 1e25);
  const auto fast = problem.update();
  for (std::size_t m = 0; m < 2; ++m)
    for_each_index(problem.w[m].view().extents, [&](const auto& at) {
      CHECK(fast[m].view()(0, at[0], at[1], at[2]) == element(problem.w[m].view(), at));
    });
}

TEST_CASE("the workspace is what the query says, and does not grow with the tokens") {
  const auto bytes = [](Index tokens) {
    const TensorView<bfloat16, 4> x(nullptr, {1, tokens, 24, 64});
    return ttt_workspace(Cuda{}, x, x, x, TttWeights<bfloat16>{}, x, {.prologue = {.key_norm = true}});
  };
  CHECK(bytes(1 << 16) == bytes(1 << 20));
  CHECK(bytes(0) < bytes(1));

  Problem<SwiGluIp, float> p({.queries = 70, .keys = 90, .heads = 2, .head_dim = 24});
  const auto fast = p.make_fast();
  const Problem<SwiGluIp, float>::Mirror on(p);
  const Problem<SwiGluIp, float>::FastMirror to(fast);
  const auto short_of = [](std::size_t need, const char* what, const auto& call) {
    DeviceScratch scratch(need);
    for (const Workspace workspace :
         {Workspace{}, Workspace{nullptr, need}, Workspace{scratch.workspace().data, 0},
          Workspace{scratch.workspace().data, need - 300}}) {
      const Status status = call(Cuda{workspace});
      CHECK(status.code == Code::workspace);
      CHECK(std::string(status.what) == what);
    }
    CHECK(scratch.intact());
  };
  short_of(ttt_workspace(Cuda{}, on.q, on.k, on.v, on.weights, on.out.view()), "ttt, workspace",
           [&](const Cuda& ctx) { return ttt(ctx, on.q, on.k, on.v, on.weights, on.out.view()); });
  short_of(ttt_update_workspace(Cuda{}, on.k.view(), on.v, on.weights, to.views), "ttt_update, workspace",
           [&](const Cuda& ctx) { return ttt_update(ctx, on.k.view(), on.v, on.weights, to.views); });
  short_of(ttt_apply_workspace(Cuda{}, on.q, to.views, on.out.view()), "ttt_apply, workspace",
           [&](const Cuda& ctx) { return ttt_apply(ctx, on.q, to.views, on.out.view()); });
  on.out.download(p.out);
  CHECK(p.out.intact());
}

TEST_CASE("bad arguments have the status that they have on the host, and nothing is launched") {
  Problem<SwiGluIp, float> p({.batch = 2, .queries = 20, .keys = 30, .heads = 2, .head_dim = 8});
  p.prologue({2, 4, 4});
  const auto fast = p.make_fast();
  const Problem<SwiGluIp, float>::Mirror on(p);
  const Problem<SwiGluIp, float>::FastMirror to(fast);
  DeviceScratch scratch(1 << 20);
  const Cuda ctx{scratch.workspace()};
  const TensorView<const float, 4> q = on.q, k = on.k, v = on.v;
  const TensorView<float, 4> out = on.out.view();
  const auto check = [](const Status& status, Code code, const char* what) {
    CHECK(status.code == code);
    CHECK(std::string(status.what) == what);
  };
  check(ttt(ctx, without_memory(q), k, v, on.weights, out), Code::null_data, "q");
  check(ttt(ctx, q, without_memory(k), v, on.weights, out), Code::null_data, "k");
  check(ttt(ctx, with_last_stride(q), k, v, on.weights, out), Code::stride, "q, channel stride");
  check(ttt(ctx, q, k, with_extent(v, 1, 31), on.weights, out), Code::shape, "v, tokens");
  check(ttt(ctx, q, with_extent(k, 1, 0), v, on.weights, out), Code::empty, "k, tokens");
  check(ttt(ctx, out, k, v, on.weights, out), Code::alias, "out, apart from q");
  auto weights = on.weights;
  weights.w3 = {};
  check(ttt(ctx, q, k, v, weights, out), Code::shape, "w3, heads");
  auto options = on.options;
  options.inner_lr = INFINITY;
  check(ttt(ctx, q, k, v, on.weights, out, options), Code::option, "inner_lr (finite)");
  options = on.options;
  options.prologue.grid = {};
  check(ttt(ctx, q, k, v, on.weights, out, options), Code::empty, "grid, height");

  FastWeights<float> bad = to.views;
  bad.w3.extents[0] = 1;
  check(ttt_update(ctx, k, v, on.weights, bad), Code::shape, "fast w3, batch");
  check(ttt_apply(ctx, q, bad, out), Code::shape, "fast w3, batch");
  bad = to.views;
  bad.w2.data = nullptr;
  check(ttt_update(ctx, k, v, on.weights, bad), Code::null_data, "fast w2");
  check(ttt_apply(ctx, q, bad, out), Code::null_data, "fast w2");

  // Kernels count tokens in ints.
  constexpr Index many = Index{1} << 31;
  check(ttt(ctx, with_extent(q, 1, many), k, v, on.weights, with_extent(out, 1, many)), Code::option,
        "q, tokens (at most)");
  check(ttt_update(ctx, with_extent(k, 1, many), with_extent(v, 1, many), on.weights, to.views), Code::option,
        "k, tokens (at most)");
  check(ttt_apply(ctx, with_extent(q, 1, many), to.views, with_extent(out, 1, many)), Code::option,
        "q, tokens (at most)");
  on.out.download(p.out);
  CHECK(p.out.intact());
  for (std::size_t i = 0; i < fast.size(); ++i) CHECK(fast[i].intact());
}

}  // namespace

// The tensor-core kernels of TTT by themselves: gradients and answers against the formulas in double.
//
// Tolerances. A rounding to nearest errs by 0.43 u of the value in the mean square (u: the unit roundoff of T, the
// significand distributed as usual, logarithmically). Of a gradient's two factors the larger is made of at most 8
// values so rounded one after the other (the keys twice; features, errors and their products with the derivatives,
// each of which the function's slope may enlarge a little); an answer passes as many (queries, three matrices,
// features, output). Independent errors add in squares: 0.43 sqrt(8) u = 1.2 u; sums in float add less than u / 50.
// Allowed are 2 u.
#include <linattn/detail/ttt_mma.cuh>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "../device.hpp"
#include "ttt_problem.hpp"

namespace {

using namespace ttt_cases;

struct Case {
  Index batch = 1, tokens = 64, heads = 1, head_dim = 64;
  Layout layout = Layout::dense;
  bool norm = false;
  TokenGrid grid{};  // empty: no conv
  Index split_tokens = 128;
  std::uint64_t seed = 1;

  [[nodiscard]] std::array<Index, 4> shape() const { return {batch, tokens, heads, head_dim}; }
};

// Weights, tokens and prologue of one case, on the host and on the device.
template <class V, class T, class W = T>
struct Problem {
  static constexpr int count = static_cast<int>(V::matrices);

  Case c;
  Buffer<T, 4> x, y;                   // k and v, or q and out
  std::vector<Buffer<W, 3>> initial;   // weights to update
  std::vector<Buffer<float, 4>> fast;  // weights to apply
  Buffer<W, 4> taps;
  Buffer<W, 1> bias;
  OnDevice<T, 4> device_x, device_y;
  OnDevice<W, 4> device_taps;
  OnDevice<W, 1> device_bias;

  static Buffer<T, 4> filled(const Case& c, std::uint64_t seed, double mean) {
    auto buffer = make<T>(c.layout, c.shape());
    fill_normal(buffer.view(), c.seed + seed, 1.0, mean);
    return buffer;
  }
  template <int R>
  static Buffer<W, R> filled_parameter(const Case& c, std::array<Index, R> shape, std::uint64_t seed) {
    Buffer<W, R> buffer(shape);
    fill_normal(buffer.view(), c.seed + seed, 0.3);
    return buffer;
  }

  explicit Problem(const Case& which)
      : c(which),
        x(filled(c, 1, 0.5)),
        y(filled(c, 2, 0.0)),
        taps(filled_parameter<4>(c, {c.heads * c.head_dim, 1, 3, 3}, 3)),
        bias(filled_parameter<1>(c, {c.heads * c.head_dim}, 4)),
        device_x(x),
        device_y(y),
        device_taps(taps),
        device_bias(bias) {
    const Index d = c.head_dim, row = d + 3;  // rows with a gap behind each
    const double deviation = 1.0 / std::sqrt(static_cast<double>(d));
    for (int i = 0; i < count; ++i) {
      initial.emplace_back(std::array<Index, 3>{c.heads, d, d}, std::array<Index, 3>{d * row, row, 1}, 0);
      fast.emplace_back(std::array<Index, 4>{c.batch, c.heads, d, d},
                        std::array<Index, 4>{c.heads * d * row, d * row, row, 1}, 0);
      fill_normal(initial.back().view(), c.seed + 10 + static_cast<std::uint64_t>(i), deviation);
      fill_normal(fast.back().view(), c.seed + 20 + static_cast<std::uint64_t>(i), deviation);
    }
  }

  [[nodiscard]] bool convolves() const { return c.grid.height > 0; }

  // The tokens behind the prologue; queries have no norm.
  [[nodiscard]] Buffer<double, 4> prepared(bool norm) const {
    auto tokens = to_double(x);
    if (norm) {
      const auto raw = to_double(x);
      reference::instance_norm(raw.view(), tokens.view(), 0.5, true);
    }
    if (convolves()) {
      const auto raw = to_double(tokens);
      reference::depthwise_conv(raw.view(), to_double(taps).view(), to_double(bias).view(), tokens.view(),
                                c.grid, true);
    }
    return tokens;
  }

  // [matrix, b, h, d, d]: the gradients without the factor, the splits' sums added in double.
  void check_update() {
    const Index groups = c.batch * c.heads, d = c.head_dim, size = count * d * d;
    const Index splits = detail::ceil_div(c.tokens, c.split_tokens);
    TttOptions<W> options;
    if (convolves()) {
      options.prologue.k_conv = device_taps.view();
      options.prologue.k_conv_bias = device_bias.view();
      options.prologue.grid = c.grid;
    }

    Buffer<float, 2> stats({3, groups * d});
    Buffer<double, 3> mean({c.batch, c.heads, d}), variance({c.batch, c.heads, d});
    reference::token_statistics(to_double(x).view(), mean.view(), variance.view());
    for (Index i = 0; i < groups * d; ++i) {
      const double m = mean.view().data[i];
      stats.view()(0, i) = static_cast<float>(m);
      stats.view()(1, i) = static_cast<float>(m - static_cast<double>(static_cast<float>(m)));
      stats.view()(2, i) = static_cast<float>(1.0 / std::sqrt(variance.view().data[i] + 0.5));
    }
    const OnDevice<float, 2> device_stats(stats);
    detail::TokenStats<float> token_stats;
    token_stats.shift = &device_stats.view()(0, 0);
    token_stats.delta = &device_stats.view()(1, 0);
    token_stats.scale = &device_stats.view()(2, 0);

    std::vector<OnDevice<W, 3>> on_device;
    for (const auto& matrix : initial) on_device.emplace_back(matrix);
    TttWeights<W> weights;
    const std::array<TensorView<const W, 3>*, 3> views = {&weights.w1, &weights.w2, &weights.w3};
    for (std::size_t i = 0; i < on_device.size(); ++i) *views[i] = on_device[i].view();

    Buffer<float, 3> partials({splits, groups, size});
    OnDevice<float, 3> device_partials(partials);
    REQUIRE(detail::ttt_mma_fits(x.view(), y.view()));
    check_ok(detail::ttt_mma_update<typename V::model, typename V::loss, T, W>(
        Cuda{}, device_x, device_y, weights, c.norm ? &token_stats : nullptr, splits, c.split_tokens,
        device_partials.view().data, options));
    device_partials.download(partials);
    CHECK(partials.intact());

    reference::Matrices<const double> from;
    reference::Matrices<double> to;
    std::vector<Buffer<double, 3>> exact;
    std::vector<Buffer<double, 4>> expected;
    for (std::size_t i = 0; i < static_cast<std::size_t>(count); ++i) {
      exact.push_back(to_double(initial[i]));
      expected.push_back(Buffer<double, 4>({c.batch, c.heads, d, d}));
      from[i] = reference::for_each_batch(exact[i].view(), c.batch);
      to[i] = expected[i].view();
    }
    reference::ttt_gradients(V::reference_model, V::reference_loss, prepared(c.norm).view(),
                             to_double(y).view(), from, static_cast<double>(c.tokens), to);
    for (std::size_t i = 0; i < static_cast<std::size_t>(count); ++i) {
      Buffer<double, 4> sums({c.batch, c.heads, d, d});
      for_each_index(sums.view().extents, [&](const auto& index) {
        const auto [b, h, r, column] = index;
        double sum = 0;
        for (Index s = 0; s < splits; ++s)
          sum += static_cast<double>(
              partials.view()(s, b * c.heads + h, (static_cast<Index>(i) * d + r) * d + column));
        element(sums.view(), index) = sum;
      });
      CAPTURE(i);
      check_rounding<T>(sums, expected[i], 2.0);
    }
  }

  void check_apply() {
    TttOptions<W> options;
    if (convolves()) {
      options.prologue.q_conv = device_taps.view();
      options.prologue.q_conv_bias = device_bias.view();
      options.prologue.grid = c.grid;
    }
    std::vector<OnDevice<float, 4>> on_device;
    std::vector<Buffer<double, 4>> exact;
    FastWeights<const float> weights;
    reference::Matrices<const double> from;
    const std::array<TensorView<const float, 4>*, 3> views = {&weights.w1, &weights.w2, &weights.w3};
    for (const auto& matrix : fast) on_device.emplace_back(matrix), exact.push_back(to_double(matrix));
    for (std::size_t i = 0; i < on_device.size(); ++i)
      *views[i] = on_device[i].view(), from[i] = exact[i].view();

    REQUIRE(detail::ttt_mma_fits(x.view(), y.view()));
    check_ok(
        detail::ttt_mma_apply<typename V::model, T, W>(Cuda{}, device_x, weights, device_y.view(), options));
    device_y.download(y);
    CHECK(y.intact());
    Buffer<double, 4> expected(c.shape());
    reference::ttt_apply(V::reference_model, prepared(false).view(), from, expected.view());
    check_rounding<T>(y, expected, 2.0);
  }
};

template <class V, class T, class W = T>
void check_both(const Case& c) {
  CAPTURE(c.tokens);
  CAPTURE(c.head_dim);
  CAPTURE(c.grid.width);
  Problem<V, T, W> problem(c);
  problem.check_update();
  problem.check_apply();
}

}  // namespace

TEST_CASE_TEMPLATE("every model and loss", V, SwiGluIp, MlpIp, LinearIp, GluIp, SwiGluL2, MlpL2, LinearL2,
                   GluL2) {
  check_both<V, bfloat16>({.tokens = 137, .norm = true});
  check_both<V, bfloat16>({.tokens = 65, .heads = 2, .head_dim = 40});
}

TEST_CASE("tails, heads, layouts and types") {
  for (const Index tokens : {1, 63, 64, 65})
    check_both<SwiGluIp, linattn::half>({.tokens = tokens, .norm = tokens > 1});
  for (const Index d : {8, 24, 32, 48}) check_both<SwiGluIp, bfloat16>({.tokens = 70, .head_dim = d});
  for (const Layout layout : {Layout::permuted, Layout::packed})
    check_both<SwiGluIp, bfloat16>(
        {.batch = 2, .tokens = 66, .heads = 2, .head_dim = 32, .layout = layout, .norm = true});
  check_both<MlpL2, linattn::half, float>(
      {.batch = 2, .tokens = 70, .heads = 2, .head_dim = 16, .norm = true});
}

TEST_CASE("the conv sees each neighbour once, whatever the width and the split") {
  // Rows longer and shorter than a tile, text before and behind, splits within a row.
  check_both<SwiGluIp, linattn::half>({.tokens = 200, .norm = true, .grid = {5, 11, 16}});
  check_both<LinearIp, bfloat16>({.tokens = 150, .head_dim = 32, .grid = {0, 7, 20}, .split_tokens = 64});
  check_both<LinearIp, bfloat16>({.tokens = 290, .head_dim = 32, .grid = {3, 3, 95}, .split_tokens = 64});
  check_both<LinearIp, bfloat16>(
      {.tokens = 131, .head_dim = 40, .norm = true, .grid = {100, 30, 1}, .split_tokens = 64});
  check_both<LinearIp, bfloat16>(
      {.tokens = 1100, .head_dim = 8, .norm = true, .grid = {50, 30, 33}, .split_tokens = 576});
  // Too wide for the ring.
  check_both<LinearIp, bfloat16>({.tokens = 300, .head_dim = 32, .norm = true, .grid = {7, 2, 140}});
}

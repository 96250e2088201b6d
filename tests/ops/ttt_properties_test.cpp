#include <array>
#include <cmath>
#include <vector>

#include "ttt_cases.hpp"

using namespace ttt_cases;

TEST_CASE_TEMPLATE("an inner learning rate of 0 leaves the bare inner model", V, MODELS_AND_LOSSES) {
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

TEST_CASE_TEMPLATE("a common permutation of keys and values changes only rounding", V, MODELS_AND_LOSSES) {
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

TEST_CASE_TEMPLATE("a constant added to all keys changes nothing behind the key norm", V, MODELS_AND_LOSSES) {
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

TEST_CASE_TEMPLATE("the column clip keeps the direction of each column, and its length below the rate", V,
                   MODELS_AND_LOSSES) {
  // In double, so that W - W' keeps what the step was.
  const Sizes sizes{.keys = 70, .heads = 2, .head_dim = 12};
  Problem<V, double> plain(sizes);
  Problem<Clipped<V>, double> clipped(sizes);
  for (const double size : {1e-3, 1.0, 1e6}) {
    CAPTURE(size);
    fill_normal(plain.v.view(), 5, size);
    fill_normal(clipped.v.view(), 5, size);
    const auto whole = plain.update();
    const auto bounded = clipped.update();
    for (std::size_t m = 0; m < V::matrices; ++m)
      for (Index h = 0; h < sizes.heads; ++h)
        for (Index j = 0; j < sizes.head_dim; ++j) {
          double squares = 0.0, clipped_squares = 0.0, product = 0.0;
          for (Index i = 0; i < sizes.head_dim; ++i) {
            const double w = plain.w[m].view()(h, i, j);
            const double g = w - whole.w[m].view()(0, h, i, j), c = w - bounded.w[m].view()(0, h, i, j);
            squares += g * g, clipped_squares += c * c, product += g * c;
          }
          const double length = std::sqrt(squares), clipped_length = std::sqrt(clipped_squares);
          CHECK(clipped_length < 1.0);
          // What rounding W' leaves of a step: relative to the weights, of norm about 1.
          CHECK(clipped_length == doctest::Approx(length / (length + 1.0)).epsilon(1e-9));
          CHECK(product == doctest::Approx(length * clipped_length).epsilon(1e-9));
        }
  }
}

TEST_CASE("a column whose squares overflow stays as it was") {
  Problem<Clipped<GluIp>, float> problem({.keys = 40, .head_dim = 20});
  fill_normal(problem.v.view(), 5, 1e25);
  const auto fast = problem.update();
  for (std::size_t m = 0; m < 2; ++m)
    for_each_index(problem.w[m].view().extents, [&](const auto& at) {
      CHECK(fast.w[m].view()(0, at[0], at[1], at[2]) == element(problem.w[m].view(), at));
    });
}

TEST_CASE("Glu learns what SwiGlu learns whose last matrix is the identity") {
  Problem<GluIp, float> glu({.batch = 2, .queries = 20, .keys = 600, .heads = 2, .head_dim = 24});
  Problem<SwiGluIp, float> swiglu(glu.sizes);
  for_each_index(swiglu.w[2].view().extents,
                 [&](const auto& at) { element(swiglu.w[2].view(), at) = at[1] == at[2] ? 1.0f : 0.0f; });
  const auto one = glu.update();
  const auto other = swiglu.update();
  for (std::size_t m = 0; m < 2; ++m) check_relative(one.w[m], to_double(other.w[m]), tolerance<float>);
}

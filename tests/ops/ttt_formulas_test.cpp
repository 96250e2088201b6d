#include <cmath>
#include <vector>

#include "ttt_cases.hpp"

using namespace ttt_cases;

TEST_CASE("the gradients of the reference are those of its loss") {
  const Index d = 5, tokens = 7, heads = 2, batch = 2;
  for (const auto model :
       {reference::InnerModel::linear, reference::InnerModel::mlp, reference::InnerModel::swiglu,
        reference::InnerModel::glu, reference::InnerModel::mlp3})
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

TEST_CASE("the clip of the reference divides each column by its norm + 1") {
  const Index d = 3;
  Buffer<double, 4> g({1, 2, d, d});
  for_each_index(g.view().extents, [&](const auto& at) {
    const double x = static_cast<double>(at[2]);
    element(g.view(), at) = at[1] == 0 ? 7.0 : at[3] == 0 ? x - 1.0 : at[3] == 1 ? 2.0 * x : 0.0;
  });
  reference::clip_columns(g.view(), 0, 1);
  for (Index i = 0; i < d; ++i) {
    const double x = static_cast<double>(i);
    CHECK(g.view()(0, 0, i, i) == 7.0);  // another head
    CHECK(g.view()(0, 1, i, 0) == doctest::Approx((x - 1.0) / (std::sqrt(2.0) + 1.0)));
    CHECK(g.view()(0, 1, i, 1) == doctest::Approx(2.0 * x / (std::sqrt(20.0) + 1.0)));
    CHECK(g.view()(0, 1, i, 2) == 0.0);
  }
}

TEST_CASE_TEMPLATE("ttt follows its formulas for any number of tokens", V, MODELS_AND_LOSSES) {
  for (const Index tokens : {1, 63, 64, 65, 137, 1000}) {
    CAPTURE(tokens);
    const auto check = [&]<class U>() {
      Problem<U, float>({.batch = 2, .queries = tokens, .keys = tokens, .heads = 2, .head_dim = 16}).check();
      Problem<U, double>({.queries = 3, .keys = tokens, .head_dim = 8}).check();
      Problem<U, float>({.queries = tokens, .keys = 66, .head_dim = 8}).check();
    };
    check.template operator()<V>();
    check.template operator()<Clipped<V>>();
  }
}

TEST_CASE_TEMPLATE("ttt follows its formulas for any head size", V, MODELS_AND_LOSSES) {
  for (const Index head_dim : {1, 2, 8, 15, 17, 32, 40, 64, 72, 100, 128, 150}) {
    CAPTURE(head_dim);
    const auto check = [&]<class U>() {
      Problem<U, float>({.queries = 33, .keys = 70, .heads = 2, .head_dim = head_dim}).check();
      Problem<U, double>({.queries = 5, .keys = 67, .head_dim = head_dim}).check();
    };
    check.template operator()<V>();
    check.template operator()<Clipped<V>>();
  }
}

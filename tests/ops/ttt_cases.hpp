// Problems of ttt that are solved on the host.
#pragma once

#include <linattn/ops/ttt_cpu.hpp>

#include <array>
#include <vector>

#include "ttt_problem.hpp"

namespace ttt_cases {

template <class V, class T, class W = T>
struct Problem : Inputs<V, T, W> {
  using Base = Inputs<V, T, W>;
  using Base::Base, Base::sizes, Base::q, Base::k, Base::v, Base::out, Base::weights, Base::options;
  using typename Base::C, typename Base::Model, typename Base::Loss, typename Base::Step;

  template <class P = Serial>
  void run(const P& parallel = {}) {
    Cpu<P> ctx{{}, parallel};
    Scratch scratch(ttt_workspace<Model, Loss, Step>(ctx, q, k, v, weights, out.view(), options));
    ctx.workspace = scratch.workspace();
    out.poison();
    check_ok(ttt<Model, Loss, Step>(ctx, q, k, v, weights, out.view(), options));
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
    Scratch scratch(ttt_update_workspace<Model, Loss, Step>(ctx, k.view(), v, weights, fast.views, options));
    ctx.workspace = scratch.workspace();
    check_ok(ttt_update<Model, Loss, Step>(ctx, k.view(), v, weights, fast.views, options));
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

  void check() {
    run();
    check_relative(out, this->expected(), tolerance<T>);
  }
};

}  // namespace ttt_cases

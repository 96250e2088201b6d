#include "ttt_cases.hpp"

using namespace ttt_cases;

TEST_CASE_TEMPLATE("ttt_update and ttt_apply give the bits of ttt", V, MODELS_AND_LOSSES, Clipped<GluIp>) {
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

TEST_CASE_TEMPLATE("results do not depend on workers or on the order of tasks", V, MODELS_AND_LOSSES,
                   Clipped<GluIp>, Clipped<Mlp3L2>) {
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

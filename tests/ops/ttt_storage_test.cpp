#include "ttt_cases.hpp"

using namespace ttt_cases;

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
    check.template operator()<Clipped<GluIp>, T>();
    check.template operator()<Mlp3L2, float>();
    check.template operator()<Clipped<SwiGluL2>, half>();
  }
}

#include <linattn/diagnostics/key_shift_ratio_cpu.hpp>

#include <cmath>
#include <string>
#include <vector>

#include "../support.hpp"

using namespace linattn;
using namespace support;

namespace {

template <class T, class P = Serial>
[[nodiscard]] Buffer<Compute<T>, 2> ratio(const TensorView<T, 4>& k, const P& parallel = {}) {
  Buffer<Compute<T>, 2> out({k.extent(0), k.extent(2)});
  Cpu<P> ctx{{}, parallel};
  Scratch scratch(key_shift_ratio_workspace(ctx, k, out.view()));
  ctx.workspace = scratch.workspace();
  check_ok(key_shift_ratio(ctx, k, out.view()));
  CHECK(scratch.intact());
  CHECK(out.intact());
  return out;
}

[[nodiscard]] Buffer<double, 2> expected(const TensorView<double, 4>& k) {
  const auto [batch, tokens, heads, channels] = k.extents;
  Buffer<double, 2> out({batch, heads});
  for (Index b = 0; b < batch; ++b)
    for (Index h = 0; h < heads; ++h) {
      std::vector<double> mean(static_cast<std::size_t>(channels));
      double length = 0.0;
      for (Index n = 0; n < tokens; ++n) {
        double squares = 0.0;
        for (Index c = 0; c < channels; ++c) {
          mean[static_cast<std::size_t>(c)] += k(b, n, h, c) / static_cast<double>(tokens);
          squares += k(b, n, h, c) * k(b, n, h, c);
        }
        length += std::sqrt(squares) / static_cast<double>(tokens);
      }
      double squares = 0.0;
      for (const double m : mean) squares += m * m;
      out.view()(b, h) = std::sqrt(squares) / length;
    }
  return out;
}

}  // namespace

TEST_CASE_TEMPLATE("the ratio is that of its formula, in every layout", T, float, half, bfloat16, double) {
  for (const Layout layout : all_layouts)
    for (const Index tokens : {1, 2, 63, 137, 1000})
      for (const Index channels : {1, 17, 64, 72}) {
        CAPTURE(name(layout));
        auto k = make<T>(layout, {2, tokens, 3, channels});
        fill_normal(k.view(), 7, 1.0, 0.3);
        const auto got = ratio(k.view());
        // The sums' rounding is far below that of the result, but for the reference's own in double.
        const double n = static_cast<double>(tokens + channels);
        check_rounding<Compute<T>>(got, expected(to_double(k).view()), std::is_same_v<T, double> ? 4 * n : 2);
        CHECK(same_bits(got, ratio(k.view(), Threads{3, 5})));
      }
}

TEST_CASE("the ratio of known keys") {
  Buffer<float, 4> k({1, 64, 1, 8});
  fill(k.view(), 3.0);
  CHECK(ratio(k.view()).view()(0, 0) == doctest::Approx(1.0));  // all alike
  fill(k.view(), 0.0);
  CHECK(ratio(k.view()).view()(0, 0) == 0.0f);
  for (Index n = 0; n < 64; ++n)
    for (Index c = 0; c < 8; ++c) k.view()(0, n, 0, c) = n % 2 == 0 ? 1.0f : -1.0f;
  CHECK(ratio(k.view()).view()(0, 0) == 0.0f);  // centred
  fill_normal(k.view(), 1);
  CHECK(ratio(k.view()).view()(0, 0) < 0.25f);  // about 1 / sqrt(64) at random
}

TEST_CASE("it allocates nothing, and says what is wrong") {
  Buffer<float, 4> k({2, 5, 3, 8});
  fill_normal(k.view(), 1);
  Buffer<float, 2> out({2, 3});
  Scratch scratch(key_shift_ratio_workspace(Cpu{}, k.view(), out.view()));
  const Cpu ctx{scratch.workspace()};
  const Allocations allocations;
  check_ok(key_shift_ratio(ctx, k.view(), out.view()));
  CHECK(allocations.count() == 0);

  const auto what = [&](TensorView<float, 4> keys, TensorView<float, 2> ratios) {
    return std::string(key_shift_ratio(ctx, keys, ratios).what);
  };
  CHECK(std::string(key_shift_ratio(Cpu{}, k.view(), out.view()).what) == "key_shift_ratio, workspace");
  CHECK(what(slice<1>(k.view(), 0, 0), out) == "k, tokens");
  CHECK(what(slice<2>(k.view(), 0, 2), out) == "out, heads");
  CHECK(what(k, slice<0>(out.view(), 0, 1)) == "out, batch");
  CHECK(what({nullptr, k.view().extents}, out) == "k");
  CHECK(what(k, {nullptr, out.view().extents}) == "out");
  CHECK(what(permute<0, 3, 2, 1>(k.view()), out) == "k, channel stride");
}

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include <linattn/weights/random.hpp>

using namespace linattn;

namespace {

// Against values that torch 2.13 printed with nine digits; its own cos and log differ in the last place.
void check_close(const std::vector<float>& values, const std::vector<double>& expected) {
  REQUIRE(values.size() == expected.size());
  for (std::size_t i = 0; i < values.size(); ++i) {
    CAPTURE(i);
    CHECK(std::abs(values[i] - expected[i]) <= 5e-7);
  }
}

std::vector<float> normal(TorchGenerator& generator, std::size_t count) {
  std::vector<float> values(count);
  generator.normal(values);
  return values;
}

}  // namespace

TEST_CASE("random: MT19937 is that of its authors") {
  // The standard requires this number of std::mt19937, whose seed is the same.
  TorchGenerator generator(5489);
  for (int i = 1; i < 10'000; ++i) generator.next();
  CHECK(generator.next() == 4123659995u);
}

TEST_CASE("random: torch.randn and torch.rand from one generator") {
  // torch.manual_seed(1234567890123); randn(20), randn(5), randn(5), rand(1). 20 values: one block, then the
  // last 16 redrawn; 5 values: pairs in double, the sixth of which the next call uses.
  TorchGenerator generator(1234567890123u);
  check_close(normal(generator, 20), {-0.568541527, -0.199217036, 1.03998446,   -0.499563098, 2.34467816,
                                      0.821328104,  0.318775892,  1.1996249,    0.955523431,  -1.06495297,
                                      1.14465332,   1.46470821,   -0.316086978, 0.0572914407, -0.034776099,
                                      0.1027923,    0.499670327,  -0.965200424, -0.438813508, -1.30971515});
  check_close(normal(generator, 5), {0.584647596, 0.973423719, -1.70198739, 0.887402534, -0.109701097});
  check_close(normal(generator, 5), {0.0709795654, 1.35682178, -0.317602485, 1.02046907, -1.09645319});
  CHECK(generator.uniform() == 0.445222199f);

  TorchGenerator seven(7);
  CHECK(seven.uniform() == 0.53492254f);
  CHECK(seven.uniform() == 0.198803186f);
  CHECK(seven.uniform() == 0.659211695f);
}

TEST_CASE("random: only the low 32 bits of a seed count, as in torch") {
  TorchGenerator a(3), b((std::uint64_t{1} << 32) + 3), c(4);
  const std::uint32_t first = a.next();
  CHECK(first == b.next());
  CHECK(first != c.next());
}

TEST_CASE("random: normal values have the moments of a normal distribution") {
  TorchGenerator generator(11);
  const std::vector<float> values = normal(generator, 1'000'003);
  double sum = 0, square = 0, cube = 0, fourth = 0;
  for (const double x : values) sum += x, square += x * x, cube += x * x * x, fourth += x * x * x * x;
  const double n = static_cast<double>(values.size());
  // Five standard deviations of each mean: 1, sqrt(2), sqrt(15), sqrt(96) over sqrt(n).
  CHECK(std::abs(sum / n) < 5e-3);
  CHECK(std::abs(square / n - 1) < 7.1e-3);
  CHECK(std::abs(cube / n) < 19.4e-3);
  CHECK(std::abs(fourth / n - 3) < 49e-3);
}

TEST_CASE("random: the largest uniform value gives no infinity") {
  // 1 - u is at least 2^-24, so |value| <= sqrt(48 ln 2).
  TorchGenerator generator(5);
  for (int round = 0; round < 20; ++round)
    for (const float value : normal(generator, 65'536)) CHECK_MESSAGE(std::abs(value) < 5.77f, value);
}

TEST_CASE("random: seeds of named tensors") {
  // FNV-1a 64 by an independent program, halves combined.
  CHECK(named_seed(42, "joint_blocks.0.x_block.attn2.w1") == 95807501u);
  CHECK(named_seed(0, "") == 2162016759u);
  std::vector<std::uint32_t> seeds;
  for (std::uint64_t seed = 0; seed < 4; ++seed)
    for (int block = 0; block < 38; ++block)
      for (const char* part : {".w1", ".w2", ".w3", ".q_conv2d.weight"})
        seeds.push_back(named_seed(seed, "joint_blocks." + std::to_string(block) + ".x_block.attn" + part));
  std::sort(seeds.begin(), seeds.end());
  CHECK(std::adjacent_find(seeds.begin(), seeds.end()) == seeds.end());
}

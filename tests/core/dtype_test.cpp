#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "../support.hpp"

using namespace linattn;

namespace {

// The value of a bit pattern by the definition of the format, in double.
double decode(unsigned bits, int exponent_bits, int fraction_bits) {
  const unsigned fraction = bits & ((1u << fraction_bits) - 1);
  const int exponent = static_cast<int>((bits >> fraction_bits) & ((1u << exponent_bits) - 1));
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double sign = (bits >> (exponent_bits + fraction_bits)) != 0 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1)
    return fraction != 0 ? std::numeric_limits<double>::quiet_NaN()
                         : sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - fraction_bits);
  return sign * std::ldexp((1u << fraction_bits) + fraction, exponent - bias - fraction_bits);
}

// Rounding to the nearest number of the format, ties to even, from the definition: scale so that the unit of
// the last place is one, round to an integer (the default rounding of the machine is to nearest even).
double round_to_format(double value, int exponent_bits, int fraction_bits) {
  if (!std::isfinite(value) || value == 0.0) return value;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = std::max(std::ilogb(value), 1 - bias);
  const double rounded =
      std::ldexp(std::nearbyint(std::ldexp(value, fraction_bits - exponent)), exponent - fraction_bits);
  const double largest = std::ldexp(2.0 - std::ldexp(1.0, -fraction_bits), bias);
  return std::abs(rounded) > largest ? std::copysign(std::numeric_limits<double>::infinity(), value)
                                     : rounded;
}

// E4M3 has no infinity: the code above its largest number is NaN, and so is what rounds to it.
double decode_e4m3(unsigned bits) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  if ((bits & 0x7f) == 0x7f) return nan;
  const int exponent = static_cast<int>((bits >> 3) & 15);
  const double magnitude =
      exponent == 0 ? std::ldexp(bits & 7, -9) : std::ldexp(8 + (bits & 7), exponent - 10);
  return (bits & 0x80) != 0 ? -magnitude : magnitude;
}

template <class S>
void check_format(int exponent_bits, int fraction_bits) {
  int wrong = 0;
  for (unsigned bits = 0; bits < 0x10000u; ++bits) {
    const S stored = S::from_bits(static_cast<std::uint16_t>(bits));
    const double expected = decode(bits, exponent_bits, fraction_bits);
    const float value = static_cast<float>(stored);
    if (std::isnan(expected)) {
      wrong += !std::isnan(value) || !std::isnan(static_cast<float>(S(value)));
      continue;
    }
    wrong += static_cast<double>(value) != expected || std::signbit(value) != std::signbit(expected);
    wrong += S(value).bits != bits;
    if (std::isinf(expected)) continue;
    // The midpoint towards the next number, and its neighbours in float: where rounding can go wrong.
    const double next = decode(bits + 1, exponent_bits, fraction_bits);
    const double beyond =
        std::isinf(next) ? 2.0 * expected - decode(bits - 1, exponent_bits, fraction_bits) : next;
    const float middle = static_cast<float>(0.5 * (expected + beyond));
    const float direction = std::numeric_limits<float>::infinity();
    for (const float f : {middle, std::nextafter(middle, direction), std::nextafter(middle, -direction)}) {
      const double rounded = round_to_format(f, exponent_bits, fraction_bits);
      const auto result = static_cast<float>(S(f));
      wrong += static_cast<double>(result) != rounded || std::signbit(result) != std::signbit(rounded);
    }
  }
  CHECK(wrong == 0);

  support::Random random(1);
  wrong = 0;
  for (int i = 0; i < 200000; ++i) {
    const float f = std::bit_cast<float>(static_cast<std::uint32_t>(random.bits() >> 32));
    const double rounded = round_to_format(f, exponent_bits, fraction_bits);
    const auto result = static_cast<float>(S(f));
    wrong += std::isnan(f) ? !std::isnan(result) : static_cast<double>(result) != rounded;
  }
  CHECK(wrong == 0);
}

}  // namespace

TEST_CASE("half: every value, every midpoint") { check_format<half>(5, 10); }
TEST_CASE("bfloat16: every value, every midpoint") { check_format<bfloat16>(8, 7); }

TEST_CASE("float8_e4m3: every value, and every float by its two neighbours") {
  std::vector<double> numbers;  // that are not negative, in order
  int wrong = 0;
  for (unsigned bits = 0; bits < 0x100; ++bits) {
    const float value = static_cast<float>(float8_e4m3::from_bits(static_cast<std::uint8_t>(bits)));
    const double expected = decode_e4m3(bits);
    if (std::isnan(expected)) {
      wrong += !std::isnan(value) || std::signbit(value) != (bits >= 0x80);
      continue;
    }
    wrong += static_cast<double>(value) != expected || std::signbit(value) != (bits >= 0x80);
    wrong += float8_e4m3(value).bits != bits;
    if (bits < 0x80) numbers.push_back(expected);
  }
  CHECK(wrong == 0);
  CHECK(numbers.back() == 448);
  numbers.push_back(480);  // where the next number would be

  // The sign, the exponent and the upper 15 bits of the fraction, the rest of it zeros, ones, or one: all ties
  // and what is just beside them.
  wrong = 0;
  for (std::uint64_t upper = 0; upper < (1u << 24); ++upper)
    for (const std::uint32_t lower : {0u, 1u, 0xffu}) {
      const float f = std::bit_cast<float>(static_cast<std::uint32_t>(upper << 8) | lower);
      const float8_e4m3 result(f);
      if (std::isnan(f) || std::abs(f) > 464) {
        wrong += (result.bits & 0x7f) != 0x7f || (result.bits >= 0x80) != std::signbit(f);
        continue;
      }
      const auto above = std::upper_bound(numbers.begin(), numbers.end(), std::abs(static_cast<double>(f)));
      const auto code = static_cast<unsigned>(above - numbers.begin());  // of the number above
      const double down = std::abs(static_cast<double>(f)) - numbers[code - 1];
      const double up = numbers[code] - std::abs(static_cast<double>(f));
      const unsigned nearest = up < down || (up == down && code % 2 == 0) ? code : code - 1;
      wrong += result.bits != (nearest | (std::signbit(f) ? 0x80u : 0u));
    }
  CHECK(wrong == 0);
}

TEST_CASE("16-bit types convert at compile time and are two bytes") {
  static_assert(sizeof(half) == 2 && sizeof(bfloat16) == 2);
  static_assert(half(1.5f).bits == 0x3e00 && bfloat16(1.5f).bits == 0x3fc0);
  static_assert(static_cast<float>(half::from_bits(1)) == 0x1p-24f);
  static_assert(std::is_same_v<Compute<half>, float> && std::is_same_v<Compute<const bfloat16>, float>);
  static_assert(std::is_same_v<Compute<double>, double> && std::is_same_v<Compute<float>, float>);
  static_assert(convert<double>(half(0.25f)) == 0.25 && convert<float>(0.5) == 0.5f);
  static_assert(sizeof(float8_e4m3) == 1 && float8_e4m3(1.5f).bits == 0x3c);
  static_assert(convert<double>(float8_e4m3::from_bits(1)) == 0x1p-9);
  static_assert(WeightStorage<float8_e4m3> && !Storage<float8_e4m3>);
  static_assert(convert<bfloat16>(half(2.0f)).bits == bfloat16(2.0f).bits);
}

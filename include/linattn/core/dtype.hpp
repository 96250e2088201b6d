// 16-bit and 8-bit storage types. Arithmetic is done in float: load, compute, store.
#pragma once

#include <cstdint>
#include <type_traits>

#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail {

// std::bit_cast, callable in device code too.
template <class To, class From>
[[nodiscard]] LINATTN_HD LINATTN_INLINE constexpr To bits_as(From value) {
  return __builtin_bit_cast(To, value);
}

}  // namespace detail

// IEEE 754 binary16: 1 sign, 5 exponent, 10 fraction bits.
struct half {
  std::uint16_t bits = 0;

  half() = default;
  LINATTN_HD LINATTN_INLINE explicit constexpr half(float value);
  LINATTN_HD LINATTN_INLINE explicit constexpr operator float() const;
  [[nodiscard]] LINATTN_HD LINATTN_INLINE static constexpr half from_bits(std::uint16_t bits) {
    half h;
    h.bits = bits;
    return h;
  }
};

// The upper half of a binary32: 1 sign, 8 exponent, 7 fraction bits.
struct bfloat16 {
  std::uint16_t bits = 0;

  bfloat16() = default;
  LINATTN_HD LINATTN_INLINE explicit constexpr bfloat16(float value);
  LINATTN_HD LINATTN_INLINE explicit constexpr operator float() const {
    return detail::bits_as<float>(std::uint32_t{bits} << 16);
  }
  [[nodiscard]] LINATTN_HD LINATTN_INLINE static constexpr bfloat16 from_bits(std::uint16_t bits) {
    bfloat16 b;
    b.bits = bits;
    return b;
  }
};

// OCP 8-bit E4M3: 1 sign, 4 exponent, 3 fraction bits, as weights are stored. No infinity: the largest number is
// 448, and only all ones in exponent and fraction are NaN.
struct float8_e4m3 {
  std::uint8_t bits = 0;

  float8_e4m3() = default;
  LINATTN_HD LINATTN_INLINE explicit constexpr float8_e4m3(float value);
  LINATTN_HD LINATTN_INLINE explicit constexpr operator float() const;
  [[nodiscard]] LINATTN_HD LINATTN_INLINE static constexpr float8_e4m3 from_bits(std::uint8_t bits) {
    float8_e4m3 f;
    f.bits = bits;
    return f;
  }
};

// Round to nearest, ties to even; overflow gives infinity; NaN stays NaN (quiet).
constexpr half::half(float value) {
  const std::uint32_t f = detail::bits_as<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>((f >> 16) & 0x8000u);
  const std::uint32_t magnitude = f & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    bits = static_cast<std::uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x1ffu));
  } else if (magnitude >= 0x47800000u) {  // 2^16 and above, infinity included
    bits = static_cast<std::uint16_t>(sign | 0x7c00u);
  } else if (magnitude < 0x38800000u) {  // below 2^-14: the result is subnormal or zero
    // Adding 0.5 puts the unit of the last place of a subnormal half at the last place of the sum, so the
    // addition itself rounds, to nearest even.
    const float shifted = detail::bits_as<float>(magnitude) + 0.5f;
    bits = static_cast<std::uint16_t>(sign | (detail::bits_as<std::uint32_t>(shifted) - 0x3f000000u));
  } else {
    const std::uint32_t odd = (magnitude >> 13) & 1u;
    bits = static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
  }
}

constexpr half::operator float() const {
  const std::uint32_t sign = (std::uint32_t{bits} & 0x8000u) << 16;
  const std::uint32_t magnitude = std::uint32_t{bits} & 0x7fffu;
  if (magnitude >= 0x7c00u) return detail::bits_as<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x0400u) return detail::bits_as<float>(sign | ((magnitude << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return detail::bits_as<float>(sign | detail::bits_as<std::uint32_t>(subnormal));
}

// Round to nearest, ties to even; NaN stays NaN (quiet).
constexpr bfloat16::bfloat16(float value) {
  const std::uint32_t f = detail::bits_as<std::uint32_t>(value);
  bits = (f & 0x7fffffffu) > 0x7f800000u ? static_cast<std::uint16_t>((f >> 16) | 0x40u)
                                         : static_cast<std::uint16_t>((f + 0x7fffu + ((f >> 16) & 1u)) >> 16);
}

// Round to nearest, ties to even; what rounds beyond 448 gives NaN, as there is no infinity.
constexpr float8_e4m3::float8_e4m3(float value) {
  const std::uint32_t f = detail::bits_as<std::uint32_t>(value);
  const std::uint32_t sign = (f >> 24) & 0x80u, magnitude = f & 0x7fffffffu;
  std::uint32_t rounded = 0;
  if (magnitude > 0x43e80000u) {  // above 464, half way from 448 to what would be 480
    rounded = 0x7fu;
  } else if (magnitude < 0x3c800000u) {  // below 2^-6: as with half, the addition rounds
    rounded = detail::bits_as<std::uint32_t>(detail::bits_as<float>(magnitude) + 0x1p14f) - 0x46800000u;
  } else {
    const std::uint32_t odd = (magnitude >> 20) & 1u;
    rounded = (magnitude - 0x3c000000u + 0x7ffffu + odd) >> 20;
  }
  bits = static_cast<std::uint8_t>(sign | rounded);
}

constexpr float8_e4m3::operator float() const {
  const std::uint32_t sign = (std::uint32_t{bits} & 0x80u) << 24;
  const std::uint32_t magnitude = std::uint32_t{bits} & 0x7fu;
  if (magnitude == 0x7fu) return detail::bits_as<float>(sign | 0x7fc00000u);
  if (magnitude >= 8u) return detail::bits_as<float>(sign | ((magnitude << 20) + 0x3c000000u));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-9f;
  return detail::bits_as<float>(sign | detail::bits_as<std::uint32_t>(subnormal));
}

// Types that an activation or a weight may be stored in.
template <class T>
concept Storage = std::is_same_v<T, float> || std::is_same_v<T, double> || std::is_same_v<T, half> ||
    std::is_same_v<T, bfloat16>;

// Types that the weight of a linear layer may be stored in.
template <class T>
concept WeightStorage = Storage<T> || std::is_same_v<T, float8_e4m3>;

// The type in which an op with storage T computes: double for double, float for all else.
template <class T>
using Compute = std::conditional_t<std::is_same_v<std::remove_const_t<T>, double>, double, float>;

template <class To, class From>
[[nodiscard]] LINATTN_HD LINATTN_INLINE constexpr To convert(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else if constexpr (std::is_arithmetic_v<From> && std::is_arithmetic_v<To>) {
    return static_cast<To>(value);
  } else if constexpr (std::is_arithmetic_v<From>) {
    return To(static_cast<float>(value));
  } else {
    return static_cast<To>(static_cast<float>(value));
  }
}

LINATTN_END

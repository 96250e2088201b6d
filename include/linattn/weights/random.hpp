// The random numbers of torch on the CPU: the same seed gives the same noise and the same new weights.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <optional>
#include <span>
#include <string_view>
#include <utility>

#include <linattn/version.hpp>

LINATTN_BEGIN

// The generator that torch.manual_seed(seed) sets up on the CPU: MT19937 (Matsumoto and Nishimura 1998),
// started from the low 32 bits of the seed, and torch's ways of drawing float32 values from it.
class TorchGenerator {
 public:
  explicit TorchGenerator(std::uint64_t seed) {
    state_[0] = static_cast<std::uint32_t>(seed);
    for (std::uint32_t i = 1; i < size; ++i)
      state_[i] = 1812433253u * (state_[i - 1] ^ (state_[i - 1] >> 30)) + i;
  }

  // 32 random bits.
  std::uint32_t next() {
    if (position_ == size) advance();
    std::uint32_t y = state_[position_++];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
  }

  // Uniform on [0, 1), a multiple of 2^-24, as torch.rand.
  float uniform() { return static_cast<float>(next() & 0xffffffu) * 0x1p-24f; }

  // Standard normal, as torch.randn(out.size()). Box-Muller over blocks of 16: values j and j + 8 of a block
  // come from uniforms j and j + 8. A last partial block is the last 16 values, redrawn. Below 16 values
  // torch draws pair by pair in double. The products are torch's float32 ones; log, cos and sin are rounded
  // from double, so that values agree between C libraries, and with torch's own to 3e-7 (absolute).
  void normal(std::span<float> out) {
    if (out.size() < block) {
      for (float& value : out) value = static_cast<float>(normal_double());
      return;
    }
    for (float& value : out) value = uniform();
    const std::size_t whole = out.size() / block * block;
    for (std::size_t i = 0; i < whole; i += block) box_muller(out.subspan(i, block));
    if (whole == out.size()) return;
    const std::span<float> tail = out.last(block);
    for (float& value : tail) value = uniform();
    box_muller(tail);
  }

 private:
  static constexpr std::uint32_t size = 624, middle = 397;
  static constexpr std::size_t block = 16;

  void advance() {
    for (std::uint32_t i = 0; i < size; ++i) {
      const std::uint32_t y = (state_[i] & 0x80000000u) | (state_[(i + 1) % size] & 0x7fffffffu);
      state_[i] = state_[(i + middle) % size] ^ (y >> 1) ^ ((y & 1u) != 0 ? 0x9908b0dfu : 0u);
    }
    position_ = 0;
  }

  static void box_muller(std::span<float> values) {
    for (std::size_t j = 0; j < block / 2; ++j) {
      const double log = std::log(static_cast<double>(1.0f - values[j]));
      const float radius = std::sqrt(-2.0f * static_cast<float>(log));
      const auto angle = static_cast<double>(2.0f * std::numbers::pi_v<float> * values[j + block / 2]);
      values[j] = radius * static_cast<float>(std::cos(angle));
      values[j + block / 2] = radius * static_cast<float>(std::sin(angle));
    }
  }

  // Uniform on [0, 1) with 53 bits; the first draw is the high word.
  double uniform_double() {
    const std::uint64_t high = next();
    const std::uint64_t bits = (high << 32 | next()) & ((std::uint64_t{1} << 53) - 1);
    return static_cast<double>(bits) * 0x1p-53;
  }

  // Normal values come in pairs; the second one waits for the next call.
  double normal_double() {
    if (spare_) return *std::exchange(spare_, std::nullopt);
    const double angle = 2 * std::numbers::pi * uniform_double();
    const double radius = std::sqrt(-2 * std::log1p(-uniform_double()));
    spare_ = radius * std::sin(angle);
    return radius * std::cos(angle);
  }

  std::array<std::uint32_t, size> state_{};
  std::uint32_t position_ = size;
  std::optional<double> spare_;
};

// The seed of one named tensor: FNV-1a, 64 bits, over the eight little-endian bytes of `seed` and the bytes of
// `name`, its halves combined by exclusive or. New weights do not depend on the order in which they are drawn.
[[nodiscard]] constexpr std::uint32_t named_seed(std::uint64_t seed, std::string_view name) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  const auto add = [&](std::uint64_t byte) { hash = (hash ^ byte) * 0x100000001b3u; };
  for (int shift = 0; shift < 64; shift += 8) add(seed >> shift & 0xffu);
  for (const char c : name) add(static_cast<unsigned char>(c));
  return static_cast<std::uint32_t>(hash ^ hash >> 32);
}

LINATTN_END

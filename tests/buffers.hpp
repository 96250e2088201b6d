// Guarded and poisoned buffers in every layout, seeded data and differences: what the tests and the golden runner
// share.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numbers>
#include <string>
#include <type_traits>
#include <vector>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/tensor.hpp>

namespace support {

using linattn::Index;
using linattn::TensorView;

// ---- numbers ----

// Half the distance of 1 and the next number: the relative error of one rounding to T.
template <class T>
inline constexpr double unit_roundoff = std::is_same_v<T, double>          ? 0x1p-53
                                        : std::is_same_v<T, float>         ? 0x1p-24
                                        : std::is_same_v<T, linattn::half> ? 0x1p-11
                                                                           : 0x1p-8;

template <class T>
inline constexpr const char* type_name = std::is_same_v<T, double>          ? "f64"
                                         : std::is_same_v<T, float>         ? "f32"
                                         : std::is_same_v<T, linattn::half> ? "f16"
                                                                            : "bf16";

// xorshift64*, seeded through splitmix64: the same numbers on every machine.
class Random {
 public:
  explicit Random(std::uint64_t seed) {
    std::uint64_t z = seed + 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    state_ = (z ^ (z >> 31)) | 1u;
  }
  std::uint64_t bits() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1du;
  }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }  // [0, 1)
  double normal() {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
    return radius * std::cos(2.0 * std::numbers::pi * uniform());
  }
  Index below(Index n) { return static_cast<Index>(bits() % static_cast<std::uint64_t>(n)); }

 private:
  std::uint64_t state_;
};

// ---- walking over views ----

// f(index) for every index of the shape, the last axis fastest.
template <std::size_t R, class F>
void for_each_index(const std::array<Index, R>& extents, const F& f) {
  for (const Index e : extents)
    if (e <= 0) return;
  std::array<Index, R> index{};
  while (true) {
    f(index);
    std::size_t axis = R;
    while (axis > 0 && ++index[axis - 1] == extents[axis - 1]) index[--axis] = 0;
    if (axis == 0) return;
  }
}

template <class T, int R>
[[nodiscard]] T& element(const TensorView<T, R>& v,
                         const std::array<Index, static_cast<std::size_t>(R)>& index) {
  Index offset = 0;
  for (std::size_t axis = 0; axis < index.size(); ++axis) offset += index[axis] * v.strides[axis];
  return v.data[offset];
}

template <std::size_t R>
[[nodiscard]] std::string text(const std::array<Index, R>& index) {
  std::string out = "(";
  for (std::size_t i = 0; i < R; ++i) out += (i > 0 ? ", " : "") + std::to_string(index[i]);
  return out + ")";
}

// ---- buffers ----

// Memory layouts of an attention view (batch, token, head, channel).
enum class Layout {
  dense,     // (b, n, h, c)
  permuted,  // (b, h, n, c) in memory
  packed,    // the middle third of rows q | k | v
  sliced,    // the image tokens of a longer text + image sequence, heads with a gap behind each
};
inline constexpr std::array all_layouts = {Layout::dense, Layout::permuted, Layout::packed, Layout::sliced};
[[nodiscard]] inline std::string name(Layout layout) {
  constexpr std::array names = {"dense", "permuted", "packed", "sliced"};
  return names[static_cast<std::size_t>(layout)];
}

// Owns the memory of one view. All of it is poisoned with NaN (all bits set is a NaN in each type), and what
// the view does not cover must stay so: intact() is false when somebody wrote beside the view.
template <class T, int R>
class Buffer {
 public:
  using Shape = std::array<Index, static_cast<std::size_t>(R)>;

  explicit Buffer(Shape extents) : Buffer(extents, TensorView<T, R>(nullptr, extents).strides, 0) {}
  Buffer(Shape extents, Shape strides, Index before) {
    Index last = 0;
    for (std::size_t axis = 0; axis < extents.size(); ++axis)
      last += std::max<Index>(extents[axis] - 1, 0) * strides[axis];
    memory_.resize(static_cast<std::size_t>(guard + before + last + 1 + before + guard));
    poison();
    view_ = {memory_.data() + guard + before, extents, strides};
  }
  Buffer(const Buffer&) = delete;  // the view points into the memory
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&&) noexcept = default;  // a moved vector keeps its memory
  Buffer& operator=(Buffer&&) noexcept = default;

  [[nodiscard]] const TensorView<T, R>& view() const { return view_; }
  operator TensorView<T, R>() const { return view_; }        // NOLINT: implicit on purpose
  operator TensorView<const T, R>() const { return view_; }  // NOLINT: implicit on purpose

  void poison() { std::memset(static_cast<void*>(memory_.data()), 0xff, memory_.size() * sizeof(T)); }

  // All of it, what lies beside the view included.
  [[nodiscard]] std::vector<T>& memory() { return memory_; }
  [[nodiscard]] const std::vector<T>& memory() const { return memory_; }

  [[nodiscard]] bool intact() const {
    std::vector<bool> covered(memory_.size());
    for_each_index(view_.extents, [&](const Shape& index) {
      covered[static_cast<std::size_t>(&element(view_, index) - memory_.data())] = true;
    });
    const std::array<unsigned char, sizeof(T)> poisoned = [] {
      std::array<unsigned char, sizeof(T)> bytes;
      bytes.fill(0xff);
      return bytes;
    }();
    for (std::size_t i = 0; i < memory_.size(); ++i)
      if (!covered[i] && std::memcmp(&memory_[i], poisoned.data(), sizeof(T)) != 0) return false;
    return true;
  }

 private:
  static constexpr Index guard = 64;
  std::vector<T> memory_;
  TensorView<T, R> view_;
};

template <class T>
[[nodiscard]] Buffer<T, 4> make(Layout layout, const std::array<Index, 4>& shape) {
  const auto [b, n, h, c] = shape;
  switch (layout) {
    case Layout::dense:
      break;
    case Layout::permuted:
      return {shape, {h * n * c, c, n * c, 1}, 0};
    case Layout::packed:
      return {shape, {n * 3 * h * c, 3 * h * c, c, 1}, h * c};
    case Layout::sliced: {
      const Index text_tokens = 5, row = h * (c + 3);
      return {shape, {(text_tokens + n) * row, row, c + 3, 1}, text_tokens * row};
    }
  }
  return Buffer<T, 4>(shape);
}

// Scratch memory of exactly `bytes`, poisoned and guarded. Its start is as misaligned as a caller's may be.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes) : memory_(skew + bytes + guard, std::byte{0xff}), bytes_(bytes) {}
  [[nodiscard]] linattn::Workspace workspace() { return {memory_.data() + skew, bytes_}; }
  [[nodiscard]] bool intact() const {
    const auto poisoned = [](std::byte b) { return b == std::byte{0xff}; };
    return std::all_of(memory_.begin(), memory_.begin() + skew, poisoned) &&
           std::all_of(memory_.end() - guard, memory_.end(), poisoned);
  }

 private:
  static constexpr std::ptrdiff_t skew = 16, guard = 256;
  std::vector<std::byte> memory_;
  std::size_t bytes_;
};

// ---- data ----

template <class T, int R>
void fill_normal(const TensorView<T, R>& v, std::uint64_t seed, double deviation = 1.0, double mean = 0.0) {
  Random random(seed);
  for_each_index(v.extents, [&](const auto& index) {
    element(v, index) = linattn::convert<T>(mean + deviation * random.normal());
  });
}

template <class T, int R>
void fill(const TensorView<T, R>& v, double value) {
  for_each_index(v.extents, [&](const auto& index) { element(v, index) = linattn::convert<T>(value); });
}

// The same values in another type, layout, or both.
template <class To, class From, int R>
void copy(const TensorView<From, R>& from, const TensorView<To, R>& to) {
  if (from.extents != to.extents) std::abort();  // a mistake of the test itself
  for_each_index(from.extents,
                 [&](const auto& index) { element(to, index) = linattn::convert<To>(element(from, index)); });
}

// A dense copy in double: the input of a reference.
template <class T, int R>
[[nodiscard]] Buffer<double, R> to_double(const TensorView<T, R>& from) {
  Buffer<double, R> out(from.extents);
  copy(from, out.view());
  return out;
}
template <class T, int R>
[[nodiscard]] Buffer<double, R> to_double(const Buffer<T, R>& from) {
  return to_double(from.view());
}

// ---- comparison ----

struct Difference {
  double error = 0.0;      // L2 norm of actual - expected; infinite where a value is not finite in one only
  double norm = 0.0;       // L2 norm of expected
  double max_error = 0.0;  // largest |actual - expected|
  double max = 0.0;        // largest |expected|
  std::string worst;       // the element with the largest error

  [[nodiscard]] double relative() const { return error == 0.0 ? 0.0 : error / norm; }
};

template <class A, class B, int R>
[[nodiscard]] Difference difference(const TensorView<A, R>& actual, const TensorView<B, R>& expected) {
  Difference d;
  if (actual.extents != expected.extents) {
    d.error = d.max_error = std::numeric_limits<double>::infinity();
    d.worst = "shapes " + text(actual.extents) + " and " + text(expected.extents);
    return d;
  }
  double error2 = 0.0, norm2 = 0.0;
  d.max_error = -1.0;
  for_each_index(expected.extents, [&](const auto& index) {
    const double a = linattn::convert<double>(element(actual, index));
    const double e = linattn::convert<double>(element(expected, index));
    // Equal infinities are equal; any other difference that is not a number is infinitely wrong.
    const double gap = a == e ? 0.0 : std::abs(a - e);
    const double error = std::isnan(gap) ? std::numeric_limits<double>::infinity() : gap;
    error2 += error * error;
    if (std::isfinite(e)) norm2 += e * e, d.max = std::max(d.max, std::abs(e));
    if (error > d.max_error) {
      d.max_error = error;
      d.worst = text(index) + ": got " + std::to_string(a) + ", expected " + std::to_string(e);
    }
  });
  d.max_error = std::max(d.max_error, 0.0);
  d.error = std::sqrt(error2);
  d.norm = std::sqrt(norm2);
  return d;
}
template <class A, class B, int R>
[[nodiscard]] Difference difference(const Buffer<A, R>& actual, const Buffer<B, R>& expected) {
  return difference(actual.view(), expected.view());
}

// Bit for bit: NaNs and signed zeros count.
template <class T, class U, int R>
[[nodiscard]] bool same_bits(const TensorView<T, R>& a, const TensorView<U, R>& b) {
  static_assert(std::is_same_v<std::remove_const_t<T>, std::remove_const_t<U>>);
  bool same = a.extents == b.extents;
  if (same)
    for_each_index(a.extents, [&](const auto& index) {
      same = same && std::memcmp(&element(a, index), &element(b, index), sizeof(T)) == 0;
    });
  return same;
}
template <class T, int R>
[[nodiscard]] bool same_bits(const Buffer<T, R>& a, const Buffer<T, R>& b) {
  return same_bits(a.view(), b.view());
}

// Views as they must not be, for the tests of errors: another extent, a last axis that is not dense, no memory.
template <class View>
[[nodiscard]] View with_extent(View view, std::size_t axis, Index value) {
  view.extents[axis] = value;
  return view;
}
template <class View>
[[nodiscard]] View with_last_stride(View view) {
  view.strides.back() = 2;
  return view;
}
template <class View>
[[nodiscard]] View without_memory(View view) {
  view.data = nullptr;
  return view;
}

}  // namespace support

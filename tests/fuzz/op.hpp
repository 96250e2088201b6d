// Operands of an op from the bytes of an input: memory of exactly the bytes that a view spans, so that ASan sees each access
// beside it; any strides, special values, and workspaces of exactly the size that the op asks for.
#pragma once

#include <fuzzer/FuzzedDataProvider.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>

#include "../buffers.hpp"
#include "fuzz.hpp"

#include <linattn/core/status.hpp>

namespace fuzz {

using linattn::Code;
using linattn::Compute;
using linattn::Index;
using linattn::Status;
using linattn::TensorView;
using support::element;
using support::for_each_index;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Uninitialised memory from malloc itself: no slack behind it.
template <class T>
[[nodiscard]] std::unique_ptr<T, Free> exactly(std::size_t count) {
  return std::unique_ptr<T, Free>(static_cast<T*>(std::malloc(count * sizeof(T))));
}

// How a view may be laid out: an output has no stride that lets two elements meet.
enum class Use { input, output };

template <class T, int R>
class Operand {
 public:
  // Axes but the last in any order, with gaps, backwards, or repeated (a stride of 0); the last is dense.
  Operand(FuzzedDataProvider& in, std::array<Index, static_cast<std::size_t>(R)> extents, Use use) {
    std::array<std::size_t, static_cast<std::size_t>(R)> order;
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    for (std::size_t i = 0; i + 2 < order.size(); ++i)
      std::swap(order[i], order[in.ConsumeIntegralInRange(i, order.size() - 2)]);
    std::array<Index, static_cast<std::size_t>(R)> strides{};
    Index step = 1, first = 0, last = 0;
    for (std::size_t i = order.size(); i-- > 0;) {
      const std::size_t axis = order[i];
      const bool dense = axis + 1 == order.size();
      strides[axis] = step;
      const int kind = dense ? 0 : in.ConsumeIntegralInRange(0, 7);
      if (kind == 1) strides[axis] = -step;
      if (kind == 2 && use == Use::input) strides[axis] = 0;
      const Index reach = std::max<Index>(extents[axis] - 1, 0) * strides[axis];
      (reach < 0 ? first : last) += reach;
      step = last - first + 1 + (kind == 3 ? in.ConsumeIntegralInRange<Index>(1, 7) : 0);
    }
    count_ = static_cast<std::size_t>(last - first + 1);
    memory_ = exactly<T>(count_);
    std::memset(static_cast<void*>(memory_.get()), 0xff, count_ * sizeof(T));
    view_ = {memory_.get() - first, extents, strides};
  }

  [[nodiscard]] const TensorView<T, R>& view() const { return view_; }
  operator TensorView<T, R>() const { return view_; }        // NOLINT: implicit on purpose
  operator TensorView<const T, R>() const { return view_; }  // NOLINT: implicit on purpose

  // Normal values times `size`; with `special`, one in about eight is at an end of the range, or no number.
  void fill(FuzzedDataProvider& in, double size = 1.0, bool special = false) {
    support::Random random(in.ConsumeIntegral<std::uint16_t>());
    for (std::size_t i = 0; i < count_; ++i) {
      double value = size * random.normal();
      if (special && random.below(8) == 0) value = odd(random.below(9));
      memory_.get()[i] = linattn::convert<T>(value);
    }
  }

 private:
  static double odd(Index which) {
    using Limits = std::numeric_limits<double>;
    const double largest = sizeof(T) == 8 ? 1e308 : std::is_same_v<T, linattn::half> ? 65504.0 : 3e38;
    const std::array<double, 9> values{Limits::quiet_NaN(),
                                       Limits::infinity(),
                                       -Limits::infinity(),
                                       largest,
                                       -largest,
                                       std::is_same_v<T, linattn::half> ? 6e-8
                                       : sizeof(T) == 8                 ? 5e-324
                                                                        : 1e-39,
                                       0.0,
                                       -0.0,
                                       -Limits::quiet_NaN()};
    return values[static_cast<std::size_t>(which)];
  }

  std::size_t count_ = 0;
  std::unique_ptr<T, Free> memory_;
  TensorView<T, R> view_;
};

// A copy in double. With `odd_to_nan`, what is not an ordinary number becomes NaN: where the reference of such inputs is a
// number, nothing odd may have reached the result. With `absolute`, the sizes of the values.
struct AsDouble {
  bool odd_to_nan = false, absolute = false;

  template <class T, int R>
  [[nodiscard]] support::Buffer<double, R> operator()(const TensorView<T, R>& from) const {
    support::Buffer<double, R> to(from.extents);
    for_each_index(from.extents, [&](const auto& index) {
      double value = linattn::convert<double>(element(from, index));
      if (odd_to_nan && !(std::abs(value) < 1e4)) value = std::numeric_limits<double>::quiet_NaN();
      element(to.view(), index) = absolute ? std::abs(value) : value;
    });
    return to;
  }
  template <class T, int R>
  [[nodiscard]] support::Buffer<double, R> operator()(const Operand<T, R>& from) const {
    return (*this)(from.view());
  }
};

// Every element of the result that is a number in the reference is within its bound; bound(index) is that of the
// arithmetic, to which the rounding to T comes.
template <class T, int R, class Bound>
void expect_close(const TensorView<T, R>& actual, const TensorView<double, R>& expected, const Bound& bound) {
  for_each_index(expected.extents, [&](const auto& index) {
    const double want = element(expected, index), got = linattn::convert<double>(element(actual, index));
    if (!std::isfinite(want)) return;
    const double allowed = bound(index) + 1.01 * support::unit_roundoff<T> * std::abs(want) +
                           (sizeof(T) == 2 ? 0x1p-24 : 0x1p-140);
    if (!(std::abs(got - want) <= allowed))
      fail(std::string(support::type_name<T>) + " " + support::text(index) + ": got " + std::to_string(got) +
           ", expected " + std::to_string(want) + " within " + std::to_string(allowed));
  });
}

// Calls an op with a workspace of exactly the size that it asked for, at any alignment, and sometimes with less, which it
// must refuse.
template <class Op>
[[nodiscard]] Status run(FuzzedDataProvider& in, std::size_t bytes, const Op& op) {
  const std::size_t skew = in.ConsumeIntegralInRange<std::size_t>(0, 15) * 4;
  if (bytes > 0 && in.ConsumeIntegralInRange(0, 15) == 1) {
    const std::size_t less = in.ConsumeIntegralInRange<std::size_t>(0, bytes - 1);
    const auto memory = exactly<std::byte>(less);
    // Enough of it may be left where the caller's memory is well aligned.
    const Status status = op(linattn::Workspace{memory.get(), less});
    expect(status.ok() || status.code == Code::workspace || !op(linattn::Workspace{nullptr, 0}).ok(),
           "a workspace that is too short is refused");
    if (status.ok()) return status;
  }
  const auto memory = exactly<std::byte>(skew + bytes);
  return op(linattn::Workspace{memory.get() + skew, bytes});
}

// An extent, a stride or the memory of a view as it must not be, or as it was: the op then returns a Status.
template <class T, int R>
[[nodiscard]] TensorView<T, R> spoiled(FuzzedDataProvider& in, TensorView<T, R> view) {
  const auto axis = in.ConsumeIntegralInRange<std::size_t>(0, static_cast<std::size_t>(R) - 1);
  switch (in.ConsumeIntegralInRange(0, 3)) {
    case 0:
      view.extents[axis] = in.PickValueInArray<Index>(
          {0, -1, 1, view.extents[axis] + 1, Index{1} << 40, std::numeric_limits<Index>::max()});
      break;
    case 1:
      view.strides.back() = in.PickValueInArray<Index>({0, -1, 2, std::numeric_limits<Index>::min()});
      break;
    case 2:
      view.data = nullptr;
      break;
    default:
      break;
  }
  return view;
}

}  // namespace fuzz

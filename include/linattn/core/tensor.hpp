// Views of tensors: a pointer, extents and strides. Axes are logical, memory is strides.
#pragma once

#include <array>
#include <cstddef>
#include <limits>
#include <type_traits>

#include <linattn/core/status.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN

namespace detail {

// Of two extents; the largest Index where it is more than that, which no memory holds, and -1 where one is negative.
[[nodiscard]] LINATTN_INLINE constexpr Index product(Index a, Index b) {
  constexpr Index most = std::numeric_limits<Index>::max();
  if (a < 0 || b < 0) return -1;
  return a > 0 && b > most / a ? most : a * b;
}

}  // namespace detail

// A tensor that somebody else owns. Strides count elements. Attention views are (batch, token, head,
// channel). For host code: kernels are given pointers and strides.
template <class T, int Rank>
struct TensorView {
  static_assert(Rank >= 1, "a view has at least one axis");
  using value_type = std::remove_const_t<T>;
  static constexpr int rank = Rank;

  using Axes = std::array<Index, std::size_t{Rank}>;

  T* data = nullptr;
  Axes extents{};
  Axes strides{};

  LINATTN_INLINE constexpr TensorView() {}  // NOLINT: a defaulted one would not be always inlined
  LINATTN_INLINE constexpr TensorView(T* pointer, Axes shape, Axes steps)
      : data(pointer), extents(shape), strides(steps) {}

  // Row-major and dense.
  LINATTN_INLINE constexpr TensorView(T* pointer, Axes shape) : data(pointer), extents(shape) {
    Index step = 1;
    for (std::size_t axis = Rank; axis-- > 0;) {
      strides[axis] = step;
      step = detail::product(step, extents[axis]);
    }
  }

  // A mutable view fits where a const one is asked for.
  template <class U>
  requires(std::is_same_v<T, const U> && !std::is_const_v<U>) LINATTN_INLINE
      constexpr TensorView(const TensorView<U, Rank>& other)  // NOLINT: implicit on purpose
      : data(other.data), extents(other.extents), strides(other.strides) {}

  [[nodiscard]] LINATTN_INLINE constexpr Index extent(int axis) const {
    return extents[static_cast<std::size_t>(axis)];
  }
  [[nodiscard]] LINATTN_INLINE constexpr Index stride(int axis) const {
    return strides[static_cast<std::size_t>(axis)];
  }
  // From one place of the axis to the next; 0 where there is no next, whatever the stride. What walks along an axis
  // takes this, and forms no address outside the memory.
  [[nodiscard]] LINATTN_INLINE constexpr Index step(int axis) const {
    return extent(axis) > 1 ? stride(axis) : 0;
  }

  [[nodiscard]] LINATTN_INLINE constexpr Index elements() const {
    Index n = 1;
    for (const Index e : extents) n = detail::product(n, e);
    return n;
  }
  [[nodiscard]] LINATTN_INLINE constexpr bool empty() const { return elements() == 0; }

  template <class... I>
  [[nodiscard]] LINATTN_INLINE constexpr T* pointer(I... indices) const {
    static_assert(sizeof...(I) <= Rank, "more indices than axes");
    Index offset = 0;
    int axis = 0;
    ((offset += static_cast<Index>(indices) * step(axis++)), ...);
    return data + offset;
  }
  template <class... I>
  [[nodiscard]] LINATTN_INLINE constexpr T& operator()(I... indices) const {
    static_assert(sizeof...(I) == Rank, "one index an axis");
    return *pointer(indices...);
  }
};

// q, k and v of a packed projection.
template <class T>
struct Qkv {
  TensorView<T, 4> q, k, v;
};

// Parameter type of activation inputs: not deduced, so that a mutable view fits and the output fixes the
// type.
template <class T, int Rank>
using In = std::type_identity_t<TensorView<const T, Rank>>;

inline namespace LINATTN_TARGET {

// Axes in another order: permute<0, 2, 1, 3>(v) swaps the middle two. No element moves.
template <int... Axes, class T, int Rank>
[[nodiscard]] constexpr TensorView<T, Rank> permute(const TensorView<T, Rank>& v) {
  static_assert(sizeof...(Axes) == Rank, "name every axis once");
  static_assert(((Axes >= 0 && Axes < Rank) && ...) && ((1u << Axes) | ...) == (1u << Rank) - 1,
                "name every axis once");
  return {v.data, {v.extent(Axes)...}, {v.stride(Axes)...}};
}

// Elements [begin, begin + count) of one axis. The caller keeps the range inside the axis.
template <int Axis, class T, int Rank>
[[nodiscard]] constexpr TensorView<T, Rank> slice(TensorView<T, Rank> v, Index begin, Index count) {
  static_assert(Axis >= 0 && Axis < Rank, "no such axis");
  if (v.data != nullptr) v.data += begin * v.step(Axis);
  v.extents[static_cast<std::size_t>(Axis)] = count;
  return v;
}

// One element of the leading axis, as a view of one rank less.
template <class T, int Rank>
[[nodiscard]] constexpr TensorView<T, Rank - 1> at(const TensorView<T, Rank>& v, Index index) {
  TensorView<T, Rank - 1> out;
  out.data = v.data == nullptr ? nullptr : v.data + index * v.step(0);
  for (int axis = 1; axis < Rank; ++axis) {
    out.extents[static_cast<std::size_t>(axis - 1)] = v.extent(axis);
    out.strides[static_cast<std::size_t>(axis - 1)] = v.stride(axis);
  }
  return out;
}

// (batch, token, heads * head_dim) seen as (batch, token, head, channel): channel c is head c / head_dim.
template <class T>
[[nodiscard]] constexpr TensorView<T, 4> split_heads(const TensorView<T, 3>& v, Index heads) {
  const Index head_dim = heads > 0 ? v.extent(2) / heads : 0;
  return {v.data,
          {v.extent(0), v.extent(1), heads, head_dim},
          {v.stride(0), v.stride(1), head_dim * v.stride(2), v.stride(2)}};
}

// A packed projection (batch, token, 3 * heads * head_dim), rows q | k | v, seen as three attention views.
template <class T>
[[nodiscard]] constexpr Qkv<T> unpack_qkv(const TensorView<T, 3>& packed, Index heads) {
  const Index channels = packed.extent(2) / 3;
  return {split_heads(slice<2>(packed, 0, channels), heads),
          split_heads(slice<2>(packed, channels, channels), heads),
          split_heads(slice<2>(packed, 2 * channels, channels), heads)};
}

}  // namespace LINATTN_TARGET

namespace detail::inline LINATTN_TARGET {

// Memory is there, and the last axis is dense (an extent of one has no stride to speak of).
template <class T, int Rank>
[[nodiscard]] constexpr Status expect_view(const TensorView<T, Rank>& v, const char* null_what,
                                           const char* stride_what) {
  if (!v.empty() && v.data == nullptr) return fail(Code::null_data, null_what, v.elements(), 0);
  if (v.extent(Rank - 1) > 1 && v.stride(Rank - 1) != 1)
    return fail(Code::stride, stride_what, 1, v.stride(Rank - 1));
  return {};
}

// Heads that follow each other without a gap, seen as one: an op that works on each channel alone then walks
// whole rows.
template <class T>
[[nodiscard]] constexpr bool heads_are_dense(const TensorView<T, 4>& v) {
  return v.extent(2) == 1 || v.stride(2) == v.extent(3);
}
template <class T>
[[nodiscard]] constexpr TensorView<T, 4> merge_heads(TensorView<T, 4> v) {
  v.extents[3] *= v.extents[2];
  v.extents[2] = 1;
  v.strides[3] = 1;
  return v;
}

}  // namespace detail::inline LINATTN_TARGET

LINATTN_END

#include <linattn/core/tensor.hpp>

#include <limits>

#include "../support.hpp"

using namespace linattn;

namespace {

// Element i of the memory holds i, so that an element tells where it lies.
struct Counting {
  explicit Counting(std::size_t count) : memory(count) {
    for (std::size_t i = 0; i < count; ++i) memory[i] = static_cast<float>(i);
  }
  std::vector<float> memory;
};

}  // namespace

TEST_CASE("a dense view is row-major") {
  Counting c(24);
  const TensorView<float, 3> v(c.memory.data(), {2, 3, 4});
  CHECK(v.strides == std::array<Index, 3>{12, 4, 1});
  CHECK(v(1, 2, 3) == 23.0f);
  CHECK(v.pointer(1, 0) == c.memory.data() + 12);
  CHECK(v.elements() == 24);
  CHECK_FALSE(v.empty());
  CHECK(TensorView<float, 2>(nullptr, {3, 0}).empty());
  CHECK(TensorView<float, 4>{}.empty());
}

TEST_CASE("a shape that no memory holds has the most elements there can be, and is not empty") {
  constexpr Index most = std::numeric_limits<Index>::max();
  for (const std::array<Index, 4>& shape :
       {std::array<Index, 4>{most, 2, 3, 4}, {Index{1} << 32, Index{1} << 32, 1, 1}, {1, most, 1, most}}) {
    const TensorView<float, 4> v(nullptr, shape);
    CHECK(v.elements() == most);
    CHECK_FALSE(v.empty());
    CHECK(detail::expect_view(v, "v", "v, stride").code == Code::null_data);
  }
  CHECK(TensorView<float, 3>(nullptr, {most, most, 0}).empty());
  CHECK_FALSE(TensorView<float, 2>(nullptr, {-2, most}).empty());
  // Strides of the axes before it stay in range as well.
  CHECK(TensorView<float, 3>(nullptr, {1, most, most}).strides == std::array<Index, 3>{most, most, 1});
}

TEST_CASE("permute renames axes and moves nothing") {
  Counting c(120);
  const TensorView<float, 4> bhnd(c.memory.data(), {2, 3, 4, 5});  // (batch, head, token, channel)
  const auto v = permute<0, 2, 1, 3>(bhnd);
  CHECK(v.extents == std::array<Index, 4>{2, 4, 3, 5});
  for (Index b = 0; b < 2; ++b)
    for (Index n = 0; n < 4; ++n)
      for (Index h = 0; h < 3; ++h) CHECK(v.pointer(b, n, h) == bhnd.pointer(b, h, n));
}

TEST_CASE("slice, at and split_heads address the same memory") {
  Counting c(2 * 6 * 8);
  const TensorView<float, 3> rows(c.memory.data(), {2, 6, 8});
  const auto image = slice<1>(rows, 2, 4);
  CHECK(image.extents == std::array<Index, 3>{2, 4, 8});
  CHECK(&image(1, 0, 3) == &rows(1, 2, 3));
  CHECK(&at(rows, 1)(5, 7) == &rows(1, 5, 7));
  const auto heads = split_heads(rows, 2);
  CHECK(heads.extents == std::array<Index, 4>{2, 6, 2, 4});
  CHECK(&heads(1, 5, 1, 2) == &rows(1, 5, 6));
  // Views without memory stay without memory: workspace queries pass them around.
  const TensorView<float, 3> nothing(nullptr, {2, 6, 8});
  CHECK(slice<1>(nothing, 2, 4).data == nullptr);
  CHECK(at(nothing, 1).data == nullptr);
  CHECK(split_heads(rows, 0).extent(3) == 0);
}

TEST_CASE("unpack_qkv finds q, k and v in the rows of a packed projection") {
  Counting c(2 * 3 * 24);
  const TensorView<float, 3> packed(c.memory.data(), {2, 3, 24});
  const Qkv<float> qkv = unpack_qkv(packed, 2);
  for (const auto* v : {&qkv.q, &qkv.k, &qkv.v}) CHECK(v->extents == std::array<Index, 4>{2, 3, 2, 4});
  CHECK(&qkv.q(1, 2, 1, 3) == &packed(1, 2, 7));
  CHECK(&qkv.k(1, 2, 1, 3) == &packed(1, 2, 15));
  CHECK(&qkv.v(1, 2, 1, 3) == &packed(1, 2, 23));
}

TEST_CASE("mutable views fit const parameters, not the reverse") {
  static_assert(std::is_convertible_v<TensorView<float, 4>, TensorView<const float, 4>>);
  static_assert(!std::is_convertible_v<TensorView<const float, 4>, TensorView<float, 4>>);
  static_assert(!std::is_convertible_v<TensorView<float, 4>, TensorView<const double, 4>>);
  static_assert(std::is_same_v<TensorView<const float, 2>::value_type, float>);
}

TEST_CASE("expect_view asks for memory and a dense last axis") {
  Counting c(12);
  const TensorView<float, 2> good(c.memory.data(), {3, 4});
  CHECK(detail::expect_view(good, "null", "stride").ok());
  const TensorView<float, 2> null(nullptr, {3, 4});
  CHECK(detail::expect_view(null, "null", "stride").code == Code::null_data);
  CHECK(detail::expect_view(null, "null", "stride").expected == 12);
  CHECK(detail::expect_view(TensorView<float, 2>(nullptr, {3, 0}), "null", "stride").ok());
  const TensorView<float, 2> columns(c.memory.data(), {3, 4}, {1, 3});
  CHECK(detail::expect_view(columns, "null", "stride").code == Code::stride);
  CHECK(detail::expect_view(columns, "null", "stride").actual == 3);
  CHECK(detail::expect_view(TensorView<float, 2>(c.memory.data(), {3, 1}, {1, 3}), "null", "stride").ok());
}

#include <linattn/ops/elementwise_cpu.hpp>

#include "../support.hpp"

using namespace linattn;
using namespace support;

namespace {

using Extents = std::array<Index, 4>;
const std::vector<Extents> shapes = {
    {1, 1, 1, 1}, {2, 65, 2, 16}, {1, 130, 3, 40}, {2, 13, 1, 300}, {1, 64, 2, 129}};

template <class T>
[[nodiscard]] double value(const Buffer<T, 4>& buffer, const Extents& index) {
  return convert<double>(element(buffer.view(), index));
}

// In 16-bit storage one rounding; otherwise that of a fused multiply-add, or of a product and a sum.
template <class T>
constexpr double roundoffs = sizeof(T) == 2 ? 1.01 : 2.0;

template <class T, class W>
void check_affine() {
  for (const Extents& shape : shapes)
    for (const Layout layout : all_layouts) {
      CAPTURE(text(shape));
      CAPTURE(name(layout));
      const auto x = make<T>(layout, shape), out = make<T>(layout, shape);
      const Index channels = shape[2] * shape[3];
      const Buffer<W, 2> both({channels, 2});  // scales and offsets in turn
      fill_normal(x.view(), 1);
      fill_normal(both.view(), 2);
      const TensorView<W, 1> scale(both.view().data, {channels}, {2}),
          offset(both.view().data + 1, {channels}, {2});
      check_ok(affine(Cpu{}, x.view(), scale, offset, out.view()));
      Buffer<double, 4> expected(shape), terms(shape);
      for_each_index(shape, [&](const auto& i) {
        const double s = convert<double>(scale(i[2] * shape[3] + i[3])),
                     o = convert<double>(offset(i[2] * shape[3] + i[3]));
        element(expected.view(), i) = s * value(x, i) + o;
        element(terms.view(), i) = std::abs(s * value(x, i)) + std::abs(o);
      });
      check_rounding<T>(out, expected, roundoffs<T>, difference(terms, terms).norm);
      CHECK(out.intact());
    }
}

}  // namespace

TEST_CASE("affine follows its formula in every layout") {
  check_affine<float, float>();
  check_affine<float, half>();
  check_affine<half, float>();
  check_affine<bfloat16, bfloat16>();
  check_affine<double, double>();
  check_affine<double, half>();
}

TEST_CASE_TEMPLATE("mix follows its formula in every layout", T, float, half, bfloat16, double) {
  for (const Extents& shape : shapes)
    for (const Layout layout : all_layouts)
      for (const double weight : {0.5, 0.3, 0.0, 1.0}) {
        CAPTURE(text(shape));
        CAPTURE(name(layout));
        CAPTURE(weight);
        const auto a = make<T>(layout, shape), b = make<T>(layout, shape), out = make<T>(layout, shape);
        fill_normal(a.view(), 1);
        fill_normal(b.view(), 2);
        check_ok(mix(Cpu{}, a.view(), b.view(), weight, out.view()));
        Buffer<double, 4> expected(shape), terms(shape);
        for_each_index(shape, [&](const auto& i) {
          element(expected.view(), i) = (1 - weight) * value(a, i) + weight * value(b, i);
          element(terms.view(), i) = (1 - weight) * std::abs(value(a, i)) + weight * std::abs(value(b, i));
        });
        check_rounding<T>(out, expected, roundoffs<T>, difference(terms, terms).norm);
        CHECK(out.intact());
      }
}

TEST_CASE("mix of 0 and of 1 is one of the two, to the bit") {
  const Extents shape = {1, 20, 2, 24};
  const Buffer<float, 4> a(shape), b(shape), out(shape);
  fill_normal(a.view(), 1);
  fill_normal(b.view(), 2);
  check_ok(mix(Cpu{}, a.view(), b.view(), 0.0, out.view()));
  CHECK(same_bits(out, a));
  check_ok(mix(Cpu{}, a.view(), b.view(), 1.0, out.view()));
  CHECK(same_bits(out, b));
}

TEST_CASE_TEMPLATE("elementwise ops: in place, any layout and any threads give the same bits", T, float, half,
                   double) {
  const Extents shape = {2, 137, 2, 40};
  const Buffer<T, 4> x(shape), y(shape), scaled(shape), mixed(shape);
  const Buffer<half, 1> scale({80}), offset({80});
  fill_normal(x.view(), 1);
  fill_normal(y.view(), 2);
  fill_normal(scale.view(), 3);
  fill_normal(offset.view(), 4);
  check_ok(affine(Cpu{}, x.view(), scale.view(), offset.view(), scaled.view()));
  check_ok(mix(Cpu{}, x.view(), y.view(), 0.3, mixed.view()));
  for (const Layout layout : all_layouts) {
    const Cpu<Threads> ctx{Workspace{}, Threads{3, 9}};
    const auto a = make<T>(layout, shape), b = make<T>(layout, shape);
    copy(x.view(), a.view());
    copy(y.view(), b.view());
    check_ok(mix(ctx, a.view(), b.view(), 0.3, b.view()));
    check_ok(affine(ctx, a.view(), scale.view(), offset.view(), a.view()));
    CHECK(same_bits(a, scaled));
    CHECK(same_bits(b, mixed));
    CHECK(a.intact());
    CHECK(b.intact());
  }
}

TEST_CASE("elementwise ops allocate nothing") {
  const Buffer<half, 4> x({1, 30, 2, 24});
  const Buffer<float, 1> scale({48});
  fill_normal(x.view(), 1);
  fill_normal(scale.view(), 2);
  const Allocations allocations;
  const Status scaled = affine(Cpu{}, x.view(), scale.view(), scale.view(), x.view());
  const Status mixed = mix(Cpu{}, x.view(), x.view(), 0.5, x.view());
  CHECK(allocations.count() == 0);
  check_ok(scaled);
  check_ok(mixed);
}

TEST_CASE("elementwise ops refuse what they cannot do") {
  const Buffer<float, 4> x_memory({2, 3, 2, 4}), y_memory({2, 3, 2, 4}), out_memory({2, 3, 2, 4});
  const Buffer<float, 1> s_memory({8}), o_memory({8});
  const TensorView<float, 4> x = x_memory, y = y_memory, out = out_memory;
  const TensorView<float, 1> s = s_memory, o = o_memory;
  const auto null = [](auto view) {
    view.data = nullptr;
    return view;
  };
  const auto strided = [](auto view) {
    view.strides[3] = 2;
    return view;
  };
  for (std::size_t axis = 0; axis < 4; ++axis) {
    TensorView<float, 4> nothing = x, other = x;
    nothing.extents[axis] = 0;
    other.extents[axis] = 9;
    CHECK(affine(Cpu{}, nothing, s, o, nothing).code == Code::empty);
    CHECK(mix(Cpu{}, nothing, nothing, 0.5, nothing).code == Code::empty);
    CHECK(affine(Cpu{}, x, s, o, other).code == Code::shape);
    CHECK(mix(Cpu{}, x, other, 0.5, out).code == Code::shape);
    CHECK(mix(Cpu{}, x, y, 0.5, other).code == Code::shape);
  }
  CHECK(affine(Cpu{}, x, TensorView<float, 1>(s.data, {7}), o, out).code == Code::shape);
  CHECK(affine(Cpu{}, x, s, TensorView<float, 1>(o.data, {9}), out).code == Code::shape);
  CHECK(affine(Cpu{}, x, null(s), o, out).code == Code::null_data);
  CHECK(affine(Cpu{}, x, s, null(o), out).code == Code::null_data);
  CHECK(affine(Cpu{}, null(x), s, o, out).code == Code::null_data);
  CHECK(affine(Cpu{}, x, s, o, null(out)).code == Code::null_data);
  CHECK(affine(Cpu{}, strided(x), s, o, out).code == Code::stride);
  CHECK(affine(Cpu{}, x, s, o, strided(out)).code == Code::stride);
  CHECK(mix(Cpu{}, null(x), y, 0.5, out).code == Code::null_data);
  CHECK(mix(Cpu{}, x, null(y), 0.5, out).code == Code::null_data);
  CHECK(mix(Cpu{}, x, y, 0.5, null(out)).code == Code::null_data);
  CHECK(mix(Cpu{}, strided(x), y, 0.5, out).code == Code::stride);
  CHECK(mix(Cpu{}, x, strided(y), 0.5, out).code == Code::stride);
  CHECK(mix(Cpu{}, x, y, 0.5, strided(out)).code == Code::stride);
  CHECK(mix(Cpu{}, x, y, std::numeric_limits<double>::quiet_NaN(), out).code == Code::option);
}

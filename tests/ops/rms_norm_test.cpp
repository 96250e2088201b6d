#include <linattn/ops/rms_norm_cpu.hpp>

#include "../reference/rms_norm.hpp"
#include "../support.hpp"

using namespace linattn;
using namespace support;

namespace {

template <class T, class W>
void check_types() {
  for (const Layout layout : all_layouts)
    for (const std::array<Index, 4> shape :
         {std::array<Index, 4>{1, 1, 1, 1}, {2, 7, 3, 5}, {1, 20, 2, 64}, {2, 33, 1, 40}, {1, 5, 2, 1000}})
      for (const double eps : {1e-6, 0.5}) {
        CAPTURE(name(layout));
        CAPTURE(text(shape));
        auto x = make<T>(layout, shape), out = make<T>(layout, shape);
        Buffer<W, 1> weight({shape[3]});
        fill_normal(x.view(), 1, 1.5, 0.5);
        fill_normal(weight.view(), 2, 0.3, 1.0);
        check_ok(rms_norm(Cpu{}, x.view(), weight.view(), out.view(), {.eps = eps}));
        Buffer<double, 4> expected(shape);
        reference::rms_norm(to_double(x).view(), to_double(weight).view(), expected, eps);
        const double sum = static_cast<double>(shape[3]) / 16.0;  // additions in each SIMD lane
        check_rounding<T>(out, expected, sizeof(T) == 2 ? 1.0 : 4.0 + sum);
        CHECK(out.intact());
      }
}

}  // namespace

TEST_CASE("rms_norm follows its formula for every pair of types") {
  check_types<float, float>();
  check_types<float, half>();
  check_types<float, bfloat16>();
  check_types<half, half>();
  check_types<bfloat16, float>();
  check_types<bfloat16, bfloat16>();
  check_types<double, double>();
  check_types<double, half>();
}

TEST_CASE("rms_norm: a scaled row gives the same row") {
  auto x = make<float>(Layout::dense, {1, 4, 2, 24}), out = make<float>(Layout::dense, {1, 4, 2, 24});
  auto scaled = make<float>(Layout::dense, {1, 4, 2, 24}), other = make<float>(Layout::dense, {1, 4, 2, 24});
  Buffer<float, 1> weight({24});
  fill(weight.view(), 1.0);
  fill_normal(x.view(), 3);
  for_each_index(x.view().extents,
                 [&](const auto& i) { element(scaled.view(), i) = 1024.0f * element(x.view(), i); });
  check_ok(rms_norm(Cpu{}, x.view(), weight.view(), out.view(), {.eps = 0.0}));
  check_ok(rms_norm(Cpu{}, scaled.view(), weight.view(), other.view(), {.eps = 0.0}));
  CHECK(same_bits(out, other));
}

TEST_CASE_TEMPLATE("rms_norm: in place, any layout and any threads give the same bits", T, float, half,
                   double) {
  const std::array<Index, 4> shape = {2, 100, 3, 24};
  auto x = make<T>(Layout::dense, shape), first = make<T>(Layout::dense, shape);
  Buffer<float, 1> weight({24});
  fill_normal(weight.view(), 2);
  fill_normal(x.view(), 5);
  check_ok(rms_norm(Cpu{}, x.view(), weight.view(), first.view()));
  for (const Layout layout : all_layouts) {
    auto in = make<T>(layout, shape);
    copy(x.view(), in.view());
    const Cpu<Threads> ctx{Workspace{}, Threads{3, 9}};
    check_ok(rms_norm(ctx, in.view(), weight.view(), in.view()));
    CHECK(same_bits(in, first));
    CHECK(in.intact());
  }
}

TEST_CASE("rms_norm allocates nothing") {
  auto x = make<float>(Layout::dense, {1, 50, 2, 24});
  Buffer<half, 1> weight({24});
  fill_normal(x.view(), 6);
  fill_normal(weight.view(), 7);
  const Allocations allocations;
  const Status status = rms_norm(Cpu{}, x.view(), weight.view(), x.view());
  CHECK(allocations.count() == 0);
  check_ok(status);
}

TEST_CASE("rms_norm refuses what it cannot do") {
  auto x = make<float>(Layout::dense, {2, 3, 2, 4});
  Buffer<float, 1> weight({4});
  const TensorView<float, 4> good = x;
  const auto code = [&](const TensorView<const float, 4>& in, const TensorView<float, 1>& w,
                        const TensorView<float, 4>& to, const RmsNormOptions& options = {}) {
    return rms_norm(Cpu{}, in, w, to, options).code;
  };
  for (int axis = 0; axis < 4; ++axis) {
    TensorView<float, 4> other = good;
    other.extents[static_cast<std::size_t>(axis)] += 1;
    CHECK(code(good, weight, other) == Code::shape);
    TensorView<float, 4> nothing = good;
    nothing.extents[static_cast<std::size_t>(axis)] = 0;
    CHECK(code(nothing, weight, nothing) == Code::empty);
  }
  Buffer<float, 1> longer({5});
  CHECK(code(good, longer, good) == Code::shape);
  TensorView<float, 4> strided = good;
  strided.strides[3] = 2;
  CHECK(code(strided, weight, good) == Code::stride);
  CHECK(code(good, weight, strided) == Code::stride);
  CHECK(code(good, TensorView<float, 1>(weight.view().data, {4}, {2}), good) == Code::stride);
  CHECK(code(TensorView<float, 4>(nullptr, good.extents), weight, good) == Code::null_data);
  CHECK(code(good, TensorView<float, 1>(nullptr, {4}), good) == Code::null_data);
  CHECK(code(good, weight, TensorView<float, 4>(nullptr, good.extents)) == Code::null_data);
  CHECK(code(good, weight, good, {.eps = -1.0}) == Code::option);
}

#include <linattn/ops/depthwise_conv_cpu.hpp>

#include "depthwise_conv_problem.hpp"

using namespace depthwise_conv_cases;

namespace {

const std::vector<Case> cases = {
    {{1, 1, 1, 1}, {0, 1, 1}},       {{2, 35, 2, 16}, {0, 7, 5}},     {{1, 35, 2, 40}, {0, 5, 7}},
    {{1, 64, 3, 5}, {0, 8, 8}},      {{2, 13, 1, 72}, {4, 3, 2}},     {{1, 12, 2, 24}, {0, 12, 1}},
    {{1, 12, 2, 24}, {0, 1, 12}},    {{1, 40, 2, 130}, {5, 5, 6}},    {{1, 137, 1, 7}, {0, 17, 8}},
    {{1, 700, 1, 3}, {100, 2, 300}}, {{1, 1330, 1, 70}, {0, 70, 19}},
};

template <class T, class W, class B>
void check_types() {
  for (const Layout layout : all_layouts)
    for (const Case& one : cases)
      for (const bool residual : {true, false}) {
        const std::array<Index, 4>& shape = one.shape;
        const TokenGrid& grid = one.grid;
        CAPTURE(name(layout));
        CAPTURE(text(shape));
        CAPTURE(residual);
        auto x = make<T>(layout, shape), out = make<T>(layout, shape);
        Buffer<W, 4> weight({shape[2] * shape[3], 1, 3, 3});
        Buffer<B, 1> bias({residual ? shape[2] * shape[3] : 0});  // the empty bias, too
        fill_normal(x.view(), 1);
        fill_normal(weight.view(), 2, 0.3);
        fill_normal(bias.view(), 3, 0.3);
        check_ok(depthwise_conv(Cpu{}, x.view(), weight.view(), bias.view(), out.view(), {grid, residual}));
        Buffer<double, 4> expected(shape);
        const auto xd = to_double(x), wd = to_double(weight);
        const auto bd = to_double(bias);
        reference::depthwise_conv(xd.view(), wd.view(), bd.view(), expected, grid, residual);
        const double rounding = sizeof(T) == 2 ? difference(expected, expected).norm * unit_roundoff<T> : 0.0;
        const double bound = rounding + 11.0 * unit_roundoff<Compute<T>> * terms(xd, wd, bd, grid);
        const Difference d = difference(out, expected);
        CHECK_MESSAGE(d.error <= bound, d.error, " over ", bound, " worst ", d.worst);
        CHECK(out.intact());
      }
}

}  // namespace

TEST_CASE("depthwise_conv follows its formula: float") {
  check_types<float, float, float>();
  check_types<float, half, half>();
  check_types<float, bfloat16, float>();
}
TEST_CASE("depthwise_conv follows its formula: 16 bit") {
  check_types<half, half, float>();
  check_types<bfloat16, bfloat16, bfloat16>();
}
TEST_CASE("depthwise_conv follows its formula: double") {
  check_types<double, double, double>();
  check_types<double, half, bfloat16>();
}

TEST_CASE("a kernel with one tap moves the picture, and text stays") {
  const TokenGrid grid{2, 4, 5};
  auto x = make<float>(Layout::dense, {1, 25, 1, 3}), out = make<float>(Layout::dense, {1, 25, 1, 3});
  fill_normal(x.view(), 1);
  for (Index i = 0; i < 3; ++i)
    for (Index j = 0; j < 3; ++j) {
      Buffer<float, 4> weight({3, 1, 3, 3});
      fill(weight.view(), 0.0);
      for (Index c = 0; c < 3; ++c) weight.view()(c, 0, i, j) = 1.0f;
      check_ok(
          depthwise_conv(Cpu{}, x.view(), weight.view(), TensorView<float, 1>{}, out.view(), {grid, false}));
      for (Index n = 0; n < 25; ++n)
        for (Index c = 0; c < 3; ++c) {
          const Index row = (n - 2) / 5 + i - 1, column = (n - 2) % 5 + j - 1;
          const bool text = n < 2 || n >= 22;
          const bool inside = row >= 0 && row < 4 && column >= 0 && column < 5;
          CHECK(out.view()(0, n, 0, c) == (text     ? x.view()(0, n, 0, c)
                                           : inside ? x.view()(0, 2 + row * 5 + column, 0, c)
                                                    : 0.0f));
        }
    }
}

TEST_CASE_TEMPLATE("depthwise_conv: any layout and any threads give the same bits", T, float, half, double) {
  const std::array<Index, 4> shape = {2, 1037, 3, 24};
  const DepthwiseConvOptions options{{7, 103, 10}};
  auto x = make<T>(Layout::dense, shape), first = make<T>(Layout::dense, shape);
  Buffer<half, 4> weight({72, 1, 3, 3});
  Buffer<half, 1> bias({72});
  fill_normal(x.view(), 1);
  fill_normal(weight.view(), 2);
  fill_normal(bias.view(), 3);
  check_ok(depthwise_conv(Cpu{}, x.view(), weight.view(), bias.view(), first.view(), options));
  for (const Layout layout : all_layouts) {
    auto in = make<T>(layout, shape), out = make<T>(layout, shape);
    copy(x.view(), in.view());
    const Cpu<Threads> ctx{Workspace{}, Threads{3, 9}};
    check_ok(depthwise_conv(ctx, in.view(), weight.view(), bias.view(), out.view(), options));
    CHECK(same_bits(out, first));
    CHECK(out.intact());
  }
}

TEST_CASE("conv_tokens, the form for fused prologues, gives the bits of depthwise_conv") {
  using P = detail::Pack<float>;
  const Index lanes = P::size;
  const TokenGrid grid{3, 9, 11};
  auto x = make<float>(Layout::dense, {1, 110, 1, lanes}),
       out = make<float>(Layout::dense, {1, 110, 1, lanes});
  auto fused = make<float>(Layout::dense, {1, 110, 1, lanes});
  Buffer<float, 4> weight({lanes, 1, 3, 3});
  Buffer<float, 1> bias({lanes});
  fill_normal(x.view(), 1);
  fill_normal(weight.view(), 2);
  fill_normal(bias.view(), 3);
  for (const bool residual : {true, false}) {
    check_ok(depthwise_conv(Cpu{}, x.view(), weight.view(), bias.view(), out.view(), {grid, residual}));
    copy(x.view(), fused.view());
    const auto taps = detail::load_conv_taps<float>(weight.view(), bias.view(), 0, static_cast<int>(lanes));
    for (Index first = 0; first < grid.tokens(); first += 13)
      detail::conv_tokens<float>(
          grid, first, std::min<Index>(13, grid.tokens() - first), taps, residual,
          [&](Index t) { return P::load(x.view().pointer(0, 3 + t)); },
          [&](Index t, P y) { y.store(fused.view().pointer(0, 3 + t)); });
    CHECK(same_bits(fused, out));
  }
}

TEST_CASE("depthwise_conv allocates nothing") {
  auto x = make<float>(Layout::dense, {1, 36, 2, 24}), out = make<float>(Layout::dense, {1, 36, 2, 24});
  Buffer<half, 4> weight({48, 1, 3, 3});
  Buffer<half, 1> bias({48});
  fill_normal(x.view(), 6);
  fill_normal(weight.view(), 7);
  fill_normal(bias.view(), 8);
  const Allocations allocations;
  const Status status = depthwise_conv(Cpu{}, x.view(), weight.view(), bias.view(), out.view(), {{0, 6, 6}});
  CHECK(allocations.count() == 0);
  check_ok(status);
}

TEST_CASE("depthwise_conv refuses what it cannot do") {
  auto x = make<float>(Layout::dense, {2, 6, 2, 4}), out = make<float>(Layout::dense, {2, 6, 2, 4});
  Buffer<float, 4> w({8, 1, 3, 3});
  Buffer<float, 1> b({8});
  const TensorView<float, 4> good = x, to = out;
  const auto code = [&](const TensorView<const float, 4>& in, const TensorView<float, 4>& weight,
                        const TensorView<float, 1>& bias, const TensorView<float, 4>& target,
                        TokenGrid grid) {
    return depthwise_conv(Cpu{}, in, weight, bias, target, {grid}).code;
  };
  const TokenGrid grid{0, 2, 3};
  for (int axis = 0; axis < 4; ++axis) {
    TensorView<float, 4> other = to;
    other.extents[static_cast<std::size_t>(axis)] += 1;
    CHECK(code(good, w, b, other, grid) == Code::shape);
    TensorView<float, 4> nothing = to;
    nothing.extents[static_cast<std::size_t>(axis)] = 0;
    CHECK(code(nothing, w, b, nothing, grid) == Code::empty);
    TensorView<float, 4> kernel = w.view();
    kernel.extents[static_cast<std::size_t>(axis)] += 1;
    CHECK(code(good, kernel, b, to, grid) == Code::shape);
  }
  CHECK(code(good, w, TensorView<float, 1>(b.view().data, {7}), to, grid) == Code::shape);
  TensorView<float, 4> strided = to;
  strided.strides[3] = 2;
  CHECK(code(strided, w, b, to, grid) == Code::stride);
  CHECK(code(good, w, b, strided, grid) == Code::stride);
  CHECK(code(good, w, TensorView<float, 1>(b.view().data, {8}, {2}), to, grid) == Code::stride);
  CHECK(code(TensorView<float, 4>(nullptr, good.extents), w, b, to, grid) == Code::null_data);
  CHECK(code(good, TensorView<float, 4>(nullptr, {8, 1, 3, 3}), b, to, grid) == Code::null_data);
  CHECK(code(good, w, TensorView<float, 1>(nullptr, {8}), to, grid) == Code::null_data);
  CHECK(code(good, w, b, TensorView<float, 4>(nullptr, good.extents), grid) == Code::null_data);
  CHECK(code(good, w, b, good, grid) == Code::alias);
  CHECK(code(good, w, b, to, {0, 0, 3}) == Code::empty);
  CHECK(code(good, w, b, to, {0, 2, 0}) == Code::empty);
  CHECK(code(good, w, b, to, {0, 7, 1}) == Code::option);
  CHECK(code(good, w, b, to, {1, 2, 3}) == Code::option);
  CHECK(code(good, w, b, to, {-1, 2, 3}) == Code::option);
  CHECK(code(good, w, b, to, {7, 1, 1}) == Code::option);
  const Index huge = Index{1} << 62;
  CHECK(code(good, w, b, to, {0, huge, huge}) == Code::option);
}

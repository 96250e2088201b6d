#include <linattn/ops/depthwise_conv_cuda.cuh>

#include <cstring>

#include "../device.hpp"
#include "depthwise_conv_problem.hpp"
#if __has_include("emu.hpp")
#include "emu.hpp"
#endif

using namespace depthwise_conv_cases;

namespace {

const std::vector<Case> cases = {
    {{1, 1, 1, 1}, {0, 1, 1}},      {{2, 35, 2, 16}, {0, 7, 5}},  {{1, 64, 3, 5}, {0, 8, 8}},
    {{2, 13, 1, 72}, {4, 3, 2}},    {{1, 12, 2, 24}, {0, 12, 1}}, {{1, 12, 2, 24}, {0, 1, 12}},
    {{1, 40, 2, 64}, {5, 5, 6}},    {{1, 137, 1, 7}, {0, 17, 8}}, {{1, 200, 1, 8}, {90, 2, 40}},
    {{1, 630, 1, 16}, {0, 33, 19}},
};

template <class T, class W, class B>
void run(const Buffer<T, 4>& x, const Buffer<W, 4>& weight, const Buffer<B, 1>& bias, Buffer<T, 4>& out,
         const DepthwiseConvOptions& options) {
  const OnDevice<T, 4> from(x), to(out);
  const OnDevice<W, 4> kernel(weight);
  const OnDevice<B, 1> offset(bias);
  check_ok(depthwise_conv(Cuda{}, from.view(), kernel.view(), offset.view(), to.view(), options));
  to.download(out);
  CHECK(out.intact());
}

template <class T, class W, class B>
void check_types() {
  for (const Layout layout : all_layouts)
    for (const Case& one : cases)
      for (const bool residual : {true, false}) {
        const std::array<Index, 4>& shape = one.shape;
        CAPTURE(name(layout));
        CAPTURE(text(shape));
        CAPTURE(residual);
        auto x = make<T>(layout, shape), out = make<T>(layout, shape);
        Buffer<W, 4> weight({shape[2] * shape[3], 1, 3, 3});
        Buffer<B, 1> bias({residual ? shape[2] * shape[3] : 0});  // the empty bias, too
        fill_normal(x.view(), 1);
        fill_normal(weight.view(), 2, 0.3);
        fill_normal(bias.view(), 3, 0.3);
        run(x, weight, bias, out, {one.grid, residual});
        Buffer<double, 4> expected(shape);
        const auto xd = to_double(x), wd = to_double(weight);
        const auto bd = to_double(bias);
        reference::depthwise_conv(xd.view(), wd.view(), bd.view(), expected, one.grid, residual);
        const double rounding = sizeof(T) == 2 ? difference(expected, expected).norm * unit_roundoff<T> : 0.0;
        const double bound = rounding + 11.0 * unit_roundoff<float> * terms(xd, wd, bd, one.grid);
        const Difference d = difference(out, expected);
        CHECK_MESSAGE(d.error <= bound, d.error, " over ", bound, " worst ", d.worst);
      }
}

}  // namespace

TEST_CASE("depthwise_conv on Cuda follows its formula: float") { check_types<float, half, float>(); }
TEST_CASE("depthwise_conv on Cuda follows its formula: half") { check_types<half, half, float>(); }
TEST_CASE("depthwise_conv on Cuda follows its formula: bfloat16") {
  check_types<bfloat16, float, bfloat16>();
}

TEST_CASE("depthwise_conv on Cuda is one chain of fused multiply-adds, and text passes bit by bit") {
  const std::array<Index, 4> shape = {1, 60, 2, 8};
  const TokenGrid grid{6, 7, 7};
  auto x = make<float>(Layout::dense, shape), out = make<float>(Layout::dense, shape);
  Buffer<float, 4> weight({16, 1, 3, 3});
  Buffer<float, 1> bias({16});
  fill_normal(x.view(), 1);
  fill_normal(weight.view(), 2);
  fill_normal(bias.view(), 3);
  const std::uint32_t odd_nan = 0x7fc01234u;
  std::memcpy(&x.view()(0, 2, 1, 3), &odd_nan, sizeof odd_nan);
  run(x, weight, bias, out, {grid});
  for_each_index(shape, [&](const auto& i) {
    const Index token = i[1] - grid.offset, channel = i[2] * 8 + i[3];
    float sum = bias.view()(channel);
    for (int tap = 0; tap < 9; ++tap) {
      const Index row = token / grid.width + tap / 3 - 1, column = token % grid.width + tap % 3 - 1;
      const bool there = row >= 0 && row < grid.height && column >= 0 && column < grid.width;
      const float tapped = there ? x.view()(0, grid.offset + row * grid.width + column, i[2], i[3]) : 0.0f;
      sum = std::fma(weight.view()(channel, 0, tap / 3, tap % 3), tapped, sum);
    }
    const bool on_grid = token >= 0 && token < grid.tokens();
    const float expected = on_grid ? element(x.view(), i) + sum : element(x.view(), i);
    CHECK(std::memcmp(&expected, &element(out.view(), i), sizeof expected) == 0);
  });
}

TEST_CASE_TEMPLATE("depthwise_conv on Cuda: again and in any layout give the same bits", T, float, half) {
  const std::array<Index, 4> shape = {2, 337, 3, 24};
  const DepthwiseConvOptions options{{7, 33, 10}};
  auto x = make<T>(Layout::dense, shape), first = make<T>(Layout::dense, shape);
  Buffer<half, 4> weight({72, 1, 3, 3});
  Buffer<half, 1> bias({72});
  fill_normal(x.view(), 1);
  fill_normal(weight.view(), 2);
  fill_normal(bias.view(), 3);
  run(x, weight, bias, first, options);
  for (const Layout layout : all_layouts) {
    CAPTURE(name(layout));
    auto in = make<T>(layout, shape), out = make<T>(layout, shape);
    copy(x.view(), in.view());
    run(in, weight, bias, out, options);
    CHECK(same_bits(out, first));
  }
}

TEST_CASE("depthwise_conv on Cuda refuses what it cannot do") {
  auto x = make<float>(Layout::dense, {2, 6, 2, 4}), out = make<float>(Layout::dense, {2, 6, 2, 4});
  const Buffer<float, 4> w({8, 1, 3, 3});
  const Buffer<float, 1> b({8});
  const OnDevice<float, 4> device_x(x), device_out(out), device_weight(w);
  const OnDevice<float, 1> device_bias(b);
  const TensorView<float, 4> good = device_x.view(), to = device_out.view(), weight = device_weight.view();
  const TensorView<float, 1> bias = device_bias.view();
  const TokenGrid grid{0, 2, 3};
  const auto code = [&](const TensorView<const float, 4>& in, const TensorView<float, 4>& kernel,
                        const TensorView<float, 1>& offset, const TensorView<float, 4>& target,
                        TokenGrid on) {
    return depthwise_conv(Cuda{}, in, kernel, offset, target, {on}).code;
  };
  for (std::size_t axis = 0; axis < 4; ++axis) {
    CHECK(code(good, weight, bias, with_extent(to, axis, 1), grid) == Code::shape);
    CHECK(code(with_extent(good, axis, 0), weight, bias, with_extent(to, axis, 0), grid) == Code::empty);
    CHECK(code(good, with_extent(weight, axis, 2), bias, to, grid) == Code::shape);
  }
  CHECK(code(good, weight, with_extent(bias, 0, 7), to, grid) == Code::shape);
  CHECK(code(with_last_stride(good), weight, bias, to, grid) == Code::stride);
  CHECK(code(good, weight, bias, with_last_stride(to), grid) == Code::stride);
  CHECK(code(good, weight, with_last_stride(bias), to, grid) == Code::stride);
  CHECK(code(without_memory(good), weight, bias, to, grid) == Code::null_data);
  CHECK(code(good, without_memory(weight), bias, to, grid) == Code::null_data);
  CHECK(code(good, weight, without_memory(bias), to, grid) == Code::null_data);
  CHECK(code(good, weight, bias, without_memory(to), grid) == Code::null_data);
  CHECK(code(good, weight, bias, good, grid) == Code::alias);
  CHECK(code(good, weight, bias, to, {0, 0, 3}) == Code::empty);
  CHECK(code(good, weight, bias, to, {1, 2, 3}) == Code::option);
  CHECK(code(good, weight, bias, to, {-1, 2, 3}) == Code::option);
  CHECK(code(good, weight, bias, to, grid) == Code::ok);
}

#if __has_include("emu.hpp")
TEST_CASE_TEMPLATE("depthwise_conv on Cuda: whole sectors", T, float, bfloat16) {
  if (!emu::checked()) return;
  for (const Layout layout : {Layout::dense, Layout::permuted, Layout::packed}) {
    const std::array<Index, 4> shape = {1, 330, 2, 64};
    auto x = make<T>(layout, shape), out = make<T>(layout, shape);
    Buffer<T, 4> weight({128, 1, 3, 3});
    Buffer<T, 1> bias({128});
    fill_normal(x.view(), 1);
    fill_normal(weight.view(), 2);
    fill_normal(bias.view(), 3);
    const emu::Count count;
    run(x, weight, bias, out, {{10, 16, 20}});
    CHECK(count.worst(emu::Kind::global_load, "channel_tiles.cuh") == 1.0);
    CHECK(count.worst(emu::Kind::global_store, "channel_tiles.cuh") == 1.0);
    CHECK(count.global_bytes_stored() == sizeof(T) * 330 * 128);
  }
}
#endif

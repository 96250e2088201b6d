#include <linattn/ops/rms_norm_cuda.cuh>

#include "../device.hpp"
#include "../reference/rms_norm.hpp"
#include "../support.hpp"
#if __has_include("emu.hpp")
#include "emu.hpp"
#endif

using namespace linattn;
using namespace support;

namespace {

template <class T, class W>
void run(const Buffer<T, 4>& x, const Buffer<W, 1>& weight, Buffer<T, 4>& out,
         const RmsNormOptions& options = {}) {
  const OnDevice<T, 4> from(x), to(out);
  const OnDevice<W, 1> scale(weight);
  check_ok(rms_norm(Cuda{}, from.view(), scale.view(), to.view(), options));
  to.download(out);
  CHECK(out.intact());
}

template <class T, class W>
void check_types() {
  for (const Layout layout : all_layouts)
    for (const std::array<Index, 4> shape : {std::array<Index, 4>{1, 1, 1, 1},
                                             {2, 7, 3, 5},
                                             {1, 65, 2, 64},
                                             {2, 33, 1, 40},
                                             {1, 63, 5, 8},
                                             {1, 5, 2, 1000}})
      for (const double eps : {1e-6, 0.5}) {
        CAPTURE(name(layout));
        CAPTURE(text(shape));
        auto x = make<T>(layout, shape), out = make<T>(layout, shape);
        Buffer<W, 1> weight({shape[3]});
        fill_normal(x.view(), 1, 1.5, 0.5);
        fill_normal(weight.view(), 2, 0.3, 1.0);
        run(x, weight, out, {.eps = eps});
        Buffer<double, 4> expected(shape);
        reference::rms_norm(to_double(x).view(), to_double(weight).view(), expected, eps);
        const double sum = static_cast<double>(shape[3]) / 64.0;  // half the additions of a lane
        check_rounding<T>(out, expected, sizeof(T) == 2 ? 1.0 : 4.0 + sum);
      }
}

}  // namespace

TEST_CASE("rms_norm on Cuda follows its formula for every pair of types") {
  check_types<float, float>();
  check_types<float, half>();
  check_types<half, half>();
  check_types<bfloat16, float>();
  check_types<bfloat16, bfloat16>();
}

TEST_CASE_TEMPLATE("rms_norm on Cuda: in place and again give the same bits", T, float, half) {
  for (const Index channels : {24, 300}) {
    const std::array<Index, 4> shape = {2, 50, 3, channels};
    auto x = make<T>(Layout::dense, shape), first = make<T>(Layout::dense, shape);
    Buffer<float, 1> weight({channels});
    fill_normal(weight.view(), 2);
    fill_normal(x.view(), 5);
    run(x, weight, first);
    // Layouts whose rows do not start at 16 bytes have other lanes, and so other sums.
    for (const Layout layout : {Layout::dense, Layout::permuted, Layout::packed}) {
      CAPTURE(name(layout));
      auto in = make<T>(layout, shape);
      copy(x.view(), in.view());
      const OnDevice<T, 4> both(in);
      const OnDevice<float, 1> scale(weight);
      check_ok(rms_norm(Cuda{}, both.view(), scale.view(), both.view()));
      both.download(in);
      CHECK(same_bits(in, first));
      CHECK(in.intact());
    }
  }
}

TEST_CASE("rms_norm on Cuda refuses what it cannot do") {
  auto x = make<float>(Layout::dense, {2, 3, 2, 4});
  const Buffer<float, 1> w({4});
  const OnDevice<float, 4> device(x);
  const OnDevice<float, 1> device_weight(w);
  const TensorView<float, 4> good = device.view();
  const TensorView<float, 1> weight = device_weight.view();
  const auto code = [&](const TensorView<const float, 4>& in, const TensorView<float, 1>& scale,
                        const TensorView<float, 4>& to, const RmsNormOptions& options = {}) {
    return rms_norm(Cuda{}, in, scale, to, options).code;
  };
  for (std::size_t axis = 0; axis < 4; ++axis) {
    CHECK(code(good, weight, with_extent(good, axis, 1)) == Code::shape);
    CHECK(code(with_extent(good, axis, 0), weight, with_extent(good, axis, 0)) == Code::empty);
  }
  CHECK(code(good, with_extent(weight, 0, 5), good) == Code::shape);
  CHECK(code(with_last_stride(good), weight, good) == Code::stride);
  CHECK(code(good, with_last_stride(weight), good) == Code::stride);
  CHECK(code(good, weight, with_last_stride(good)) == Code::stride);
  CHECK(code(without_memory(good), weight, good) == Code::null_data);
  CHECK(code(good, without_memory(weight), good) == Code::null_data);
  CHECK(code(good, weight, without_memory(good)) == Code::null_data);
  CHECK(code(good, weight, good, {.eps = -1.0}) == Code::option);
  CHECK(code(good, weight, good) == Code::ok);
}

#if __has_include("emu.hpp")
TEST_CASE_TEMPLATE("rms_norm on Cuda: whole sectors, each row once", T, float, bfloat16) {
  if (!emu::checked()) return;
  for (const Layout layout : {Layout::dense, Layout::permuted, Layout::packed}) {
    const std::array<Index, 4> shape = {1, 96, 2, 64};
    auto x = make<T>(layout, shape), out = make<T>(layout, shape);
    Buffer<T, 1> weight({64});
    fill_normal(x.view(), 1);
    fill_normal(weight.view(), 2);
    const emu::Count count;
    run(x, weight, out);
    CHECK(count.worst(emu::Kind::global_load, "channel_tiles.cuh") == 1.0);
    CHECK(count.worst(emu::Kind::global_store, "channel_tiles.cuh") == 1.0);
    // The weight comes from the cache, once for four rows.
    const std::uint64_t rows = sizeof(T) * 96 * 128;
    CHECK(count.global_bytes_loaded() == rows + rows / 4);
    CHECK(count.global_bytes_stored() == rows);
  }
}
#endif

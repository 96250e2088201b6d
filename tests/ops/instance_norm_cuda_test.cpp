#include <linattn/ops/instance_norm_cuda.cuh>

#include "../device.hpp"
#include "../reference/instance_norm.hpp"
#include "../support.hpp"
#if __has_include("emu.hpp")
#include "emu.hpp"
#endif

using namespace linattn;
using namespace support;

namespace {

template <class T>
void run(const Buffer<T, 4>& x, Buffer<T, 4>& out, const InstanceNormOptions& options = {}) {
  const OnDevice<T, 4> from(x), to(out);
  const DeviceScratch scratch(instance_norm_workspace(Cuda{}, from.view(), to.view(), options));
  check_ok(instance_norm(Cuda{scratch.workspace()}, from.view(), to.view(), options));
  to.download(out);
  CHECK(out.intact());
  CHECK(scratch.intact());
}

template <class T>
Buffer<double, 4> expected(const Buffer<T, 4>& x, const InstanceNormOptions& options) {
  Buffer<double, 4> out(x.view().extents);
  reference::instance_norm(to_double(x).view(), out, options.eps, options.divide_by_std);
  return out;
}

}  // namespace

TEST_CASE_TEMPLATE("instance_norm on Cuda follows its formula in every layout", T, float, half, bfloat16) {
  for (const Layout layout : all_layouts)
    for (const std::array<Index, 4> shape : {std::array<Index, 4>{1, 1, 1, 1},
                                             {2, 7, 3, 5},
                                             {1, 63, 1, 40},
                                             {1, 64, 2, 64},
                                             {1, 65, 3, 24},
                                             {2, 137, 2, 33},
                                             {1, 1000, 1, 72}})
      for (const InstanceNormOptions options :
           {InstanceNormOptions{}, {.eps = 0.0, .divide_by_std = false}}) {
        CAPTURE(name(layout));
        CAPTURE(text(shape));
        auto x = make<T>(layout, shape), out = make<T>(layout, shape);
        fill_normal(x.view(), 1, 1.5, 0.5);
        run(x, out, options);
        // Statistics and normalisation round a handful of times in float; 16-bit storage once more.
        check_rounding<T>(out, expected(x, options), sizeof(T) == 2 ? 1.0 : 4.0);
      }
}

TEST_CASE("instance_norm on Cuda keeps its digits under a large common offset") {
  for (const double offset : {1e2, 1e4, -1e6})
    for (const Index tokens : {50, 700, 4203}) {
      CAPTURE(offset);
      CAPTURE(tokens);
      auto x = make<float>(Layout::dense, {1, tokens, 2, 8}),
           out = make<float>(Layout::packed, {1, tokens, 2, 8});
      fill_normal(x.view(), 2, 1.3, offset);
      run(x, out);
      check_relative(out, expected(x, {}), 2e-7);
    }
}

TEST_CASE("instance_norm on Cuda is not misled by a first token far from the rest") {
  auto x = make<float>(Layout::dense, {1, 2000, 1, 16}), out = make<float>(Layout::dense, {1, 2000, 1, 16});
  fill_normal(x.view(), 3);
  for (Index c = 0; c < 16; ++c) x.view()(0, 0, 0, c) = 300.0f;
  run(x, out);
  check_relative(out, expected(x, {}), 4e-7);
}

TEST_CASE_TEMPLATE("on Cuda one token, and constant channels, give 0", T, float, half, bfloat16) {
  for (const Index tokens : {1, 2, 200})
    for (const double eps : {1.0, 0.0}) {
      auto x = make<T>(Layout::dense, {2, tokens, 2, 5}), out = make<T>(Layout::dense, {2, tokens, 2, 5});
      fill(x.view(), 3.3);
      run(x, out, {.eps = eps});
      for_each_index(out.view().extents,
                     [&](const auto& i) { CHECK(convert<double>(element(out.view(), i)) == 0.0); });
    }
}

TEST_CASE_TEMPLATE("instance_norm on Cuda: in place, again and in any layout give the same bits", T, float,
                   bfloat16) {
  const std::array<Index, 4> shape = {2, 333, 3, 24};
  auto x = make<T>(Layout::dense, shape), first = make<T>(Layout::dense, shape);
  fill_normal(x.view(), 5);
  run(x, first);
  for (const Layout layout : all_layouts) {
    CAPTURE(name(layout));
    auto in = make<T>(layout, shape);
    copy(x.view(), in.view());
    const OnDevice<T, 4> both(in);
    const DeviceScratch scratch(instance_norm_workspace(Cuda{}, both.view(), both.view()));
    check_ok(instance_norm(Cuda{scratch.workspace()}, both.view(), both.view()));
    both.download(in);
    CHECK(same_bits(in, first));
    CHECK(in.intact());
  }
}

TEST_CASE("instance_norm on Cuda refuses what it cannot do") {
  auto x = make<float>(Layout::dense, {2, 3, 2, 4});
  const OnDevice<float, 4> device(x);
  const TensorView<float, 4> good = device.view();
  const std::size_t bytes = instance_norm_workspace(Cuda{}, good, good);
  const DeviceScratch scratch(bytes);
  const auto code = [&](const TensorView<const float, 4>& in, const TensorView<float, 4>& to,
                        const InstanceNormOptions& options = {}) {
    return instance_norm(Cuda{scratch.workspace()}, in, to, options).code;
  };
  for (std::size_t axis = 0; axis < 4; ++axis) {
    CHECK(code(good, with_extent(good, axis, 1)) == Code::shape);
    CHECK(code(with_extent(good, axis, 0), with_extent(good, axis, 0)) == Code::empty);
  }
  CHECK(code(with_last_stride(good), good) == Code::stride);
  CHECK(code(good, with_last_stride(good)) == Code::stride);
  CHECK(code(without_memory(good), good) == Code::null_data);
  CHECK(code(good, without_memory(good)) == Code::null_data);
  CHECK(code(good, good, {.eps = -1.0}) == Code::option);
  CHECK(instance_norm(Cuda{}, good, good).code == Code::workspace);
  const Workspace shorter{scratch.workspace().data, bytes - Carver::alignment};
  CHECK(instance_norm(Cuda{shorter}, good, good).code == Code::workspace);
  CHECK(code(good, good) == Code::ok);
}

#if __has_include("emu.hpp")
TEST_CASE_TEMPLATE("instance_norm on Cuda: whole sectors, each token twice", T, float, bfloat16) {
  if (!emu::checked()) return;
  for (const Layout layout : {Layout::dense, Layout::permuted, Layout::packed}) {
    const std::array<Index, 4> shape = {1, 300, 2, 64};
    auto x = make<T>(layout, shape), out = make<T>(layout, shape);
    fill_normal(x.view(), 1);
    const emu::Count count;
    run(x, out);
    CHECK(count.worst(emu::Kind::global_load, "channel_tiles.cuh") == 1.0);
    CHECK(count.worst(emu::Kind::global_store, "channel_tiles.cuh") == 1.0);
    // Beside the tokens 3 numbers a channel and chunk, and 3 a channel for each 16 threads that walk down its tokens.
    const std::uint64_t tokens = sizeof(T) * 300 * 128, partial = 4 * 3 * 128 * 3, stats = 4 * 3 * 128;
    CHECK(count.global_bytes_loaded() == 2 * tokens + partial + 2 * 16 * stats);
    CHECK(count.global_bytes_stored() == tokens + partial + stats);
  }
}
#endif

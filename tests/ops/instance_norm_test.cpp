#include <linattn/ops/instance_norm_cpu.hpp>

#include "../reference/instance_norm.hpp"
#include "../support.hpp"

using namespace linattn;
using namespace support;

namespace {

template <class T>
Status run(const TensorView<const T, 4>& x, const TensorView<T, 4>& out,
           const InstanceNormOptions& options = {}) {
  Scratch scratch(instance_norm_workspace(Cpu{}, x, out, options));
  const Status status = instance_norm(Cpu{scratch.workspace()}, x, out, options);
  CHECK(scratch.intact());
  return status;
}

template <class T>
Buffer<double, 4> expected(const Buffer<T, 4>& x, const InstanceNormOptions& options) {
  Buffer<double, 4> out(x.view().extents);
  reference::instance_norm(to_double(x).view(), out, options.eps, options.divide_by_std);
  return out;
}

}  // namespace

TEST_CASE_TEMPLATE("instance_norm follows its formula in every layout", T, float, half, bfloat16, double) {
  for (const Layout layout : all_layouts)
    for (const std::array<Index, 4> shape : {std::array<Index, 4>{1, 1, 1, 1},
                                             {2, 7, 3, 5},
                                             {1, 8, 2, 16},
                                             {2, 63, 1, 40},
                                             {1, 64, 2, 64},
                                             {1, 65, 3, 72},
                                             {2, 137, 2, 33},
                                             {1, 1000, 1, 128},
                                             {1, 4203, 2, 17}})
      for (const InstanceNormOptions options :
           {InstanceNormOptions{}, {.eps = 1e-5}, {.eps = 0.0, .divide_by_std = false}}) {
        CAPTURE(name(layout));
        CAPTURE(text(shape));
        auto x = make<T>(layout, shape), out = make<T>(layout, shape);
        fill_normal(x.view(), 1, 1.5, 0.5);
        check_ok(run<T>(x, out, options));
        // Statistics and normalisation round a handful of times in Compute<T>; 16-bit storage once more.
        check_rounding<T>(out, expected(x, options), sizeof(T) == 2 ? 1.0 : 4.0);
        CHECK(out.intact());
      }
}

TEST_CASE("instance_norm keeps its digits under a large common offset") {
  for (const double offset : {1e2, 1e4, -1e6})
    for (const Index tokens : {50, 700, 5000}) {
      CAPTURE(offset);
      CAPTURE(tokens);
      auto x = make<float>(Layout::dense, {1, tokens, 2, 24}),
           out = make<float>(Layout::packed, {1, tokens, 2, 24});
      fill_normal(x.view(), 2, 1.3, offset);
      check_ok(run<float>(x, out));
      check_relative(out, expected(x, {}), 2e-7);
    }
}

TEST_CASE("instance_norm is not misled by a first token far from the rest") {
  auto x = make<float>(Layout::dense, {1, 2000, 1, 16}), out = make<float>(Layout::dense, {1, 2000, 1, 16});
  fill_normal(x.view(), 3);
  for (Index c = 0; c < 16; ++c) x.view()(0, 0, 0, c) = 300.0f;
  check_ok(run<float>(x, out));
  check_relative(out, expected(x, {}), 4e-7);
}

TEST_CASE_TEMPLATE("one token, and constant channels, give 0", T, float, half, bfloat16, double) {
  for (const Index tokens : {1, 2, 100})
    for (const double eps : {1.0, 0.0}) {
      auto x = make<T>(Layout::dense, {2, tokens, 2, 5}), out = make<T>(Layout::dense, {2, tokens, 2, 5});
      fill(x.view(), 3.25);
      check_ok(run<T>(x, out, {.eps = eps}));
      for_each_index(out.view().extents,
                     [&](const auto& i) { CHECK(convert<double>(element(out.view(), i)) == 0.0); });
    }
}

TEST_CASE("a constant added to all tokens changes only rounding, a permutation of them too") {
  auto x = make<float>(Layout::dense, {1, 300, 1, 8}), shifted = make<float>(Layout::dense, {1, 300, 1, 8});
  auto a = make<float>(Layout::dense, {1, 300, 1, 8}), b = make<float>(Layout::dense, {1, 300, 1, 8});
  auto reversed = make<float>(Layout::dense, {1, 300, 1, 8});
  fill_normal(x.view(), 4);
  for_each_index(x.view().extents, [&](const auto& i) {
    element(x.view(), i) = std::round(element(x.view(), i) * 1024.0f) / 1024.0f;  // so that + 64 is exact
    element(shifted.view(), i) = element(x.view(), i) + 64.0f;
    element(reversed.view(), {i[0], 299 - i[1], i[2], i[3]}) = element(x.view(), i);
  });
  check_ok(run<float>(x, a));
  check_ok(run<float>(shifted, b));
  check_relative(b, a, 2e-7);
  check_ok(run<float>(reversed, b));
  double worst = 0.0;
  for_each_index(a.view().extents, [&](const auto& i) {
    const float other = element(b.view(), {i[0], 299 - i[1], i[2], i[3]});
    worst = std::max(worst, static_cast<double>(std::abs(element(a.view(), i) - other)));
  });
  CHECK(worst < 1e-6);
}

TEST_CASE_TEMPLATE("instance_norm: in place, any layout and any threads give the same bits", T, float,
                   bfloat16, double) {
  const std::array<Index, 4> shape = {2, 1000, 3, 24};
  auto x = make<T>(Layout::dense, shape), first = make<T>(Layout::dense, shape);
  fill_normal(x.view(), 5);
  check_ok(run<T>(x, first));
  for (const Layout layout : all_layouts) {
    auto in = make<T>(layout, shape);
    copy(x.view(), in.view());
    Scratch scratch(instance_norm_workspace(Cpu{}, in.view(), in.view()));
    check_ok(instance_norm(Cpu{scratch.workspace(), Threads{3, 9}}, in.view(), in.view()));
    CHECK(same_bits(in, first));
    CHECK(in.intact());
  }
}

TEST_CASE("instance_norm allocates nothing and its scratch does not grow with the tokens") {
  auto x = make<float>(Layout::dense, {1, 500, 2, 24}), out = make<float>(Layout::dense, {1, 500, 2, 24});
  fill_normal(x.view(), 6);
  Scratch scratch(instance_norm_workspace(Cpu{}, x.view(), out.view()));
  const Cpu ctx{scratch.workspace()};
  const Allocations allocations;
  const Status status = instance_norm(ctx, x.view(), out.view());
  CHECK(allocations.count() == 0);
  check_ok(status);
  const auto bytes = [](Index tokens) {
    const TensorView<float, 4> v(nullptr, {1, tokens, 2, 24});
    return instance_norm_workspace(Cpu{}, v, v);
  };
  CHECK(bytes(1000000) == bytes(5000));
}

TEST_CASE("instance_norm refuses what it cannot do") {
  auto x = make<float>(Layout::dense, {2, 3, 2, 4}), out = make<float>(Layout::dense, {2, 3, 2, 4});
  fill_normal(x.view(), 7);
  const TensorView<float, 4> good = out;
  const auto code = [&](const TensorView<const float, 4>& in, const TensorView<float, 4>& to,
                        const InstanceNormOptions& options = {}) {
    return instance_norm(Cpu{Scratch(1 << 16).workspace()}, in, to, options).code;
  };
  for (int axis = 0; axis < 4; ++axis) {
    TensorView<float, 4> other = good;
    other.extents[static_cast<std::size_t>(axis)] += 1;
    CHECK(code(x, other) == Code::shape);
    TensorView<float, 4> nothing = good;
    nothing.extents[static_cast<std::size_t>(axis)] = 0;
    CHECK(code(nothing, nothing) == Code::empty);
  }
  TensorView<float, 4> strided = good;
  strided.strides[3] = 2;
  CHECK(code(strided, good) == Code::stride);
  CHECK(code(x, strided) == Code::stride);
  TensorView<float, 4> null = good;
  null.data = nullptr;
  CHECK(code(null, good) == Code::null_data);
  CHECK(code(x, null) == Code::null_data);
  CHECK(code(x, good, {.eps = -1.0}) == Code::option);
  CHECK(code(x, good, {.eps = std::numeric_limits<double>::quiet_NaN()}) == Code::option);
  const std::size_t bytes = instance_norm_workspace(Cpu{}, x.view(), good);
  Scratch scratch(bytes);
  CHECK(instance_norm(Cpu{}, x.view(), good).code == Code::workspace);
  const Workspace shorter{scratch.workspace().data, bytes - Carver::alignment};
  CHECK(instance_norm(Cpu{shorter}, x.view(), good).code == Code::workspace);
}

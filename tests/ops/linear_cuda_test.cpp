#include <linattn/ops/linear_cuda.cuh>

#include "../cublas_lt.hpp"
#include "../device.hpp"
#include "../reference/linear.hpp"
#include "../support.hpp"
#if __has_include("emu.hpp")
#include "emu.hpp"
#endif

using namespace linattn;
using namespace support;

namespace {

// Rows that lie apart: a gap behind each row and each sample.
template <class T>
Buffer<T, 3> rows_apart(const std::array<Index, 3>& shape, Index gap) {
  const Index row = shape[2] + gap;
  return {shape, {shape[1] * row + 2 * gap, row, 1}, gap};
}

// Runs calls, which must go by cuBLASLt or not as `fast` says, all on one workspace.
class Runner {
 public:
  ~Runner() { CHECK(scratch_.intact()); }

  template <class X, class W, class B, class T>
  void run(const Buffer<X, 3>& x, const Buffer<W, 2>& weight, const Buffer<B, 1>& bias, Buffer<T, 3>& out,
           bool fast) const {
    const OnDevice<X, 3> from(x);
    const OnDevice<T, 3> to(out);
    const OnDevice<W, 2> matrix(weight);
    const OnDevice<B, 1> offset(bias);
    CHECK(linear_workspace(Cuda{}, from.view(), matrix.view(), offset.view(), to.view()) ==
          (fast ? bytes : 0));
    const Cuda ctx = fast ? Cuda{.workspace = scratch_.workspace(), .cublas_lt = cublas_lt()} : Cuda{};
    check_ok(linear(ctx, from.view(), matrix.view(), offset.view(), to.view()));
    to.download(out);
    CHECK(out.intact());
  }
  [[nodiscard]] Workspace workspace() const { return scratch_.workspace(); }

  static constexpr std::size_t bytes = (std::size_t{32} << 20) + Carver::alignment - 1;

 private:
  DeviceScratch scratch_{bytes};
};

template <class X, class W, class B>
Buffer<double, 3> expected(const Buffer<X, 3>& x, const Buffer<W, 2>& weight, const Buffer<B, 1>& bias) {
  Buffer<double, 3> out({x.view().extent(0), x.view().extent(1), weight.view().extent(0)});
  reference::linear(to_double(x), to_double(weight), to_double(bias), out);
  return out;
}

template <class T, int R>
void fill_integers(const TensorView<T, R>& v, std::uint64_t seed, Index largest) {
  Random random(seed);
  for_each_index(v.extents, [&](const auto& i) {
    element(v, i) = convert<T>(static_cast<double>(random.below(2 * largest + 1) - largest));
  });
}

// Storage of x, weight, bias and out, and whether cuBLASLt takes it.
template <class Input, class Weight, class Bias, class Output, bool Fast>
struct Types {
  using X = Input;
  using W = Weight;
  using B = Bias;
  using T = Output;
  static constexpr bool fast = Fast;
};

// {batch, rows, in, out}
constexpr std::array<std::array<Index, 4>, 4> shapes = {
    {{1, 1, 1, 1}, {2, 1, 40, 5}, {3, 5, 33, 65}, {1, 65, 100, 16}}};

}  // namespace

TEST_CASE_TEMPLATE("linear on Cuda is exact where every sum is", S, Types<float, float, float, float, true>,
                   Types<half, half, half, half, true>, Types<bfloat16, bfloat16, bfloat16, bfloat16, true>,
                   Types<bfloat16, bfloat16, float, float, true>, Types<half, half, float, half, false>,
                   Types<float, bfloat16, bfloat16, bfloat16, false>, Types<float, half, half, float, false>,
                   Types<bfloat16, float8_e4m3, bfloat16, bfloat16, false>) {
  using X = typename S::X;
  using W = typename S::W;
  using B = typename S::B;
  using T = typename S::T;
  const Runner runner;
  // Rows that start at 16 bytes, those behind each other and those with gaps, and rows that do not.
  for (const Index gap : {0, 8, 3})
    for (const auto& shape : shapes)
      for (const bool biased : {true, false}) {
        const auto [batch, rows, in, outputs] = shape;
        CAPTURE(text(shape));
        CAPTURE(gap);
        CAPTURE(biased);
        // Whole 16 bytes where the gap allows it.
        const Index wide = gap == 3 ? in : (in + 7) / 8 * 8,
                    high = gap == 3 ? outputs : (outputs + 7) / 8 * 8;
        auto x = rows_apart<X>({batch, rows, wide}, gap);
        auto out = rows_apart<T>({batch, rows, high}, gap);
        Buffer<W, 2> weight({high, wide}, {wide + gap, 1}, gap);
        Buffer<B, 1> bias({biased ? high : 0});
        fill_integers(x.view(), 1, 8);
        fill_integers(weight.view(), 2, 8);
        fill_integers(bias.view(), 3, 100);
        runner.run(x, weight, bias, out, S::fast && gap != 3);
        // Sums of at most 104 products of at most 64: integers that float holds. One rounding to T is left.
        Buffer<T, 3> exact(out.view().extents);
        copy(expected(x, weight, bias).view(), exact.view());
        CHECK(same_bits(out.view(), exact.view()));
      }
}

TEST_CASE_TEMPLATE("linear on Cuda rounds as its sums do, and alike each time", S,
                   Types<float, float, float, float, true>,
                   Types<bfloat16, bfloat16, bfloat16, bfloat16, true>,
                   Types<float, float, half, float, false>, Types<half, float, float, half, false>,
                   Types<float, float8_e4m3, float, float, false>) {
  using T = typename S::T;
  const Runner runner;
  for (const std::array<Index, 4>& shape : {std::array<Index, 4>{2, 17, 64, 24}, {1, 5, 1000, 8}}) {
    const auto [batch, rows, in, outputs] = shape;
    CAPTURE(text(shape));
    Buffer<typename S::X, 3> x({batch, rows, in});
    Buffer<T, 3> out({batch, rows, outputs}), again({batch, rows, outputs});
    Buffer<typename S::W, 2> weight({outputs, in});
    Buffer<typename S::B, 1> bias({outputs});
    fill_normal(x.view(), 4);
    fill_normal(weight.view(), 5);
    fill_normal(bias.view(), 6);
    runner.run(x, weight, bias, out, S::fast);
    // n rounded additions of independent terms, chained: sqrt(n / 6) eps of the result. Twice that bounds any order of
    // them, and the last rounding comes on top.
    const double chain =
        2.0 * std::sqrt(static_cast<double>(in) / 6.0) * unit_roundoff<float> / unit_roundoff<T>;
    check_rounding<T>(out, expected(x, weight, bias), chain + 1.0);
    runner.run(x, weight, bias, again, S::fast);
    CHECK(same_bits(out, again));
  }
}

TEST_CASE("linear on Cuda takes lists of rows, and samples of one row") {
  Buffer<half, 2> x({40, 24}), out({40, 16});
  const Buffer<half, 2> weight({16, 24});
  const Buffer<half, 1> bias({16});
  fill_normal(x.view(), 1);
  fill_normal(weight.view(), 2);
  fill_normal(bias.view(), 3);
  const OnDevice<half, 2> from(x), to(out), matrix(weight);
  const OnDevice<half, 1> offset(bias);
  const Runner runner;
  const Cuda ctx{.workspace = runner.workspace(), .cublas_lt = cublas_lt()};
  check_ok(linear(ctx, from.view(), matrix.view(), offset.view(), to.view()));
  to.download(out);
  Buffer<half, 3> single({40, 1, 24}), answers({40, 1, 16});
  copy(x.view(), TensorView<half, 2>(single.view().data, {40, 24}));
  runner.run(single, weight, bias, answers, true);
  CHECK(same_bits(TensorView<half, 2>(answers.view().data, {40, 16}), out.view()));
  check_rounding<half>(answers, expected(single, weight, bias), 1.1);
}

TEST_CASE("linear on Cuda refuses what it cannot do") {
  const Buffer<float, 3> x({2, 3, 4}), o({2, 3, 8});
  const Buffer<float, 2> w({8, 4});
  const Buffer<float, 1> b({8});
  const OnDevice<float, 3> device_x(x), device_out(o);
  const OnDevice<float, 2> device_weight(w);
  const OnDevice<float, 1> device_bias(b);
  const TensorView<float, 3> good = device_x.view(), to = device_out.view();
  const TensorView<float, 2> weight = device_weight.view();
  const TensorView<float, 1> bias = device_bias.view();
  const Runner runner;
  const Cuda ctx{.workspace = runner.workspace(), .cublas_lt = cublas_lt()};
  const auto code = [&](const TensorView<const float, 3>& in, const TensorView<float, 2>& matrix,
                        const TensorView<float, 1>& offset, const TensorView<float, 3>& out) {
    return linear(ctx, in, matrix, offset, out).code;
  };
  for (std::size_t axis = 0; axis < 3; ++axis)
    CHECK(code(good, weight, bias, with_extent(to, axis, 1)) == Code::shape);
  for (std::size_t axis = 0; axis < 2; ++axis)
    CHECK(code(with_extent(good, axis, 0), weight, bias, with_extent(to, axis, 0)) == Code::empty);
  CHECK(code(good, with_extent(weight, 1, 3), bias, to) == Code::shape);
  CHECK(code(good, weight, with_extent(bias, 0, 7), to) == Code::shape);
  CHECK(code(with_last_stride(good), weight, bias, to) == Code::stride);
  CHECK(code(good, with_last_stride(weight), bias, to) == Code::stride);
  CHECK(code(good, weight, with_last_stride(bias), to) == Code::stride);
  CHECK(code(good, weight, bias, with_last_stride(to)) == Code::stride);
  CHECK(code(without_memory(good), weight, bias, to) == Code::null_data);
  CHECK(code(good, without_memory(weight), bias, to) == Code::null_data);
  CHECK(code(good, weight, without_memory(bias), to) == Code::null_data);
  CHECK(code(good, weight, bias, without_memory(to)) == Code::null_data);
  CHECK(code(with_extent(to, 2, 4), weight, bias, to) == Code::alias);
  CHECK(linear(ctx.with({}), good, weight, bias, to).code == Code::workspace);
  const Workspace shorter{runner.workspace().data, Runner::bytes - Carver::alignment};
  CHECK(linear(ctx.with(shorter), good, weight, bias, to).code == Code::workspace);
  const Status without_handle = linear(Cuda{runner.workspace()}, good, weight, bias, to);
  CHECK(without_handle.code == Code::option);
  CHECK(std::string(without_handle.what) == "cublas_lt (a handle, in the context)");
  CHECK(code(good, weight, bias, to) == Code::ok);
}

#if __has_include("emu.hpp")
TEST_CASE("our linear kernel reads whole sectors and different banks") {
  if (!emu::checked()) return;
  Buffer<half, 3> x({1, 64, 64}), out({1, 64, 64});
  Buffer<half, 2> weight({64, 64});
  Buffer<float, 1> bias({64});
  fill_normal(x.view(), 1);
  fill_normal(weight.view(), 2);
  fill_normal(bias.view(), 3);
  const Runner runner;
  const emu::Count count;
  runner.run(x, weight, bias, out, false);
  CHECK(count.ratio(emu::Kind::global_load) == 1.0);
  CHECK(count.ratio(emu::Kind::global_store) == 1.0);
  CHECK(count.worst_bank_conflict() == 1.0);
}
#endif

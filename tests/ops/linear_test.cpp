#include <linattn/ops/linear_cpu.hpp>

#include "../reference/linear.hpp"
#include "../support.hpp"

using namespace linattn;
using namespace support;

namespace {

// Rows that lie apart: a gap behind each row and each sample.
template <class T>
Buffer<T, 3> rows_apart(const std::array<Index, 3>& shape, Index gap) {
  const Index row = shape[2] + gap;
  return {shape, {shape[1] * row + 2 * gap, row, 1}, gap};
}

template <class T, class W, class B, class Parallel = Serial>
Status run(const TensorView<const T, 3>& x, const TensorView<const W, 2>& weight,
           const TensorView<const B, 1>& bias, const TensorView<T, 3>& out, Parallel parallel = {}) {
  const Cpu<Parallel> query{{}, parallel};
  Scratch scratch(linear_workspace(query, x, weight, bias, out));
  const Status status = linear(Cpu<Parallel>{scratch.workspace(), parallel}, x, weight, bias, out);
  CHECK(scratch.intact());
  return status;
}

template <class T, class W, class B>
Buffer<double, 3> expected(const TensorView<T, 3>& x, const TensorView<W, 2>& weight,
                           const TensorView<B, 1>& bias) {
  Buffer<double, 3> out({x.extent(0), x.extent(1), weight.extent(0)});
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

// Storage of activations, weight and bias.
template <class Activation, class Weight, class Bias>
struct Types {
  using T = Activation;
  using W = Weight;
  using B = Bias;
};

// {batch, rows, in, out}: both ways through the weight, on and beside the edges of blocks, tiles and packs.
constexpr std::array<std::array<Index, 4>, 17> shapes = {{{1, 1, 1, 1},
                                                          {1, 1, 1536, 77},
                                                          {2, 1, 7, 5},
                                                          {1, 2, 2049, 31},
                                                          {3, 5, 63, 33},
                                                          {1, 16, 64, 64},
                                                          {1, 17, 65, 65},
                                                          {1, 17, 511, 40},
                                                          {1, 13, 512, 66},
                                                          {2, 48, 515, 9},
                                                          {1, 97, 513, 130},
                                                          {1, 137, 16, 1000},
                                                          {1, 259, 300, 40},
                                                          {3, 100, 257, 31},
                                                          {1, 1000, 40, 32},
                                                          {2, 64, 1, 3},
                                                          {1, 77, 2500, 72}}};

}  // namespace

TEST_CASE_TEMPLATE("linear is exact where every sum is", S, Types<float, float, float>,
                   Types<float, half, float>, Types<float, bfloat16, half>, Types<float, double, bfloat16>,
                   Types<half, half, half>, Types<half, float, double>, Types<half, bfloat16, float>,
                   Types<bfloat16, bfloat16, bfloat16>, Types<bfloat16, half, float>,
                   Types<bfloat16, float, float>, Types<double, double, double>, Types<double, float, half>,
                   Types<double, half, float>, Types<double, bfloat16, double>,
                   Types<float, float8_e4m3, float>, Types<double, float8_e4m3, float>) {
  using T = typename S::T;
  using W = typename S::W;
  using B = typename S::B;
  for (const auto& [batch, rows, in, outputs] : shapes)
    for (const bool biased : {true, false}) {
      CAPTURE(text(std::array<Index, 4>{batch, rows, in, outputs}));
      CAPTURE(biased);
      auto x = rows_apart<T>({batch, rows, in}, 3);
      auto out = rows_apart<T>({batch, rows, outputs}, 5);
      Buffer<W, 2> weight({outputs, in}, {in + 2, 1}, 1);
      Buffer<B, 1> bias({biased ? outputs : 0});
      fill_integers(x.view(), 1, 8);
      fill_integers(weight.view(), 2, 8);
      fill_integers(bias.view(), 3, 100);
      check_ok(run<T, W, B>(x, weight, bias, out));
      // Sums of at most 2500 products of at most 64: integers that float holds. One rounding to T is left.
      Buffer<T, 3> exact(out.view().extents);
      copy(expected(x.view(), weight.view(), bias.view()).view(), exact.view());
      CHECK(same_bits(out.view(), exact.view()));
      CHECK(out.intact());
    }
}

TEST_CASE_TEMPLATE("linear rounds as its sums do", S, Types<float, float, float>, Types<float, half, half>,
                   Types<half, half, half>, Types<bfloat16, bfloat16, float>,
                   Types<float, float8_e4m3, float>, Types<double, double, double>) {
  using T = typename S::T;
  using W = typename S::W;
  using B = typename S::B;
  for (const auto& [batch, rows, in, outputs] : shapes) {
    CAPTURE(text(std::array<Index, 4>{batch, rows, in, outputs}));
    Buffer<T, 3> x({batch, rows, in}), out({batch, rows, outputs});
    Buffer<W, 2> weight({outputs, in});
    Buffer<B, 1> bias({outputs});
    fill_normal(x.view(), 4);
    fill_normal(weight.view(), 5);
    fill_normal(bias.view(), 6);
    check_ok(run<T, W, B>(x, weight, bias, out));
    // n rounded additions of independent terms, chained: the partial sums grow as sqrt(k), their errors of
    // eps / sqrt(3) each add up to sqrt(n / 6) eps of the result. Twice that, and the last rounding.
    const double chain = 2.0 * std::sqrt(static_cast<double>(in) / 6.0) + 2.0;
    check_rounding<T>(out, expected(x.view(), weight.view(), bias.view()), sizeof(T) == 2 ? 1.01 : chain);
  }
}

TEST_CASE_TEMPLATE("linear gives the same bits for any layout and any threads", T, float, bfloat16) {
  for (const auto& [batch, rows, in, outputs] :
       {std::array<Index, 4>{2, 300, 300, 700}, {1, 5, 1536, 1100}, {1, 90, 700, 600}}) {
    Buffer<T, 3> x({batch, rows, in}), first({batch, rows, outputs});
    Buffer<half, 2> weight({outputs, in});
    Buffer<float, 1> bias({outputs});
    fill_normal(x.view(), 7);
    fill_normal(weight.view(), 8);
    fill_normal(bias.view(), 9);
    check_ok(run<T, half, float>(x, weight, bias, first));
    for (const Index workers : {1, 2, 3, 7}) {
      auto again = rows_apart<T>({batch, rows, in}, workers);
      auto out = rows_apart<T>({batch, rows, outputs}, 1);
      copy(x.view(), again.view());
      check_ok(run<T, half, float>(again, weight, bias, out,
                                   Threads{workers, static_cast<std::uint64_t>(workers)}));
      CHECK(same_bits(out.view(), first.view()));
      CHECK(out.intact());
    }
  }
}

TEST_CASE("linear takes rows without a batch") {
  Buffer<float, 2> x({50, 20}), weight({30, 20}), out({50, 30});
  Buffer<float, 3> batched({1, 50, 30});
  fill_normal(x.view(), 10);
  fill_normal(weight.view(), 11);
  const TensorView<const float, 1> none;
  const TensorView<const float, 3> as_batch(x.view().data, {1, 50, 20});
  Scratch scratch(linear_workspace(Cpu{}, x.view(), weight.view(), none, out.view()));
  check_ok(linear(Cpu{scratch.workspace()}, x.view(), weight.view(), none, out.view()));
  check_ok(run<float, float, float>(as_batch, weight, none, batched));
  CHECK(same_bits(out.view(), at(batched.view(), 0)));
}

TEST_CASE("a row of linear does not see the others") {
  Buffer<float, 3> x({1, 120, 70}), out({1, 120, 50}), first({1, 120, 50});
  Buffer<float, 2> weight({50, 70});
  fill_normal(x.view(), 12);
  fill_normal(weight.view(), 13);
  check_ok(run<float, float, float>(x, weight, {}, first));
  x.view()(0, 31, 5) = std::numeric_limits<float>::quiet_NaN();
  check_ok(run<float, float, float>(x, weight, {}, out));
  for (Index r = 0; r < 120; ++r)
    for (Index o = 0; o < 50; ++o)
      if (r == 31) {
        CHECK(std::isnan(out.view()(0, r, o)));
      } else {
        CHECK(out.view()(0, r, o) == first.view()(0, r, o));
      }
}

TEST_CASE("linear allocates nothing and its scratch does not grow with the rows") {
  for (const Index rows : {4, 200}) {
    Buffer<float, 3> x({1, rows, 600}), out({1, rows, 40});
    Buffer<half, 2> weight({40, 600});
    fill_normal(x.view(), 14);
    fill_normal(weight.view(), 15);
    const TensorView<const half, 1> none;
    Scratch scratch(linear_workspace(Cpu{}, x.view(), weight.view(), none, out.view()));
    const Cpu ctx{scratch.workspace()};
    const Allocations allocations;
    const Status status = linear(ctx, x.view(), weight.view(), none, out.view());
    CHECK(allocations.count() == 0);
    check_ok(status);
  }
  const auto bytes = [](Index rows) {
    const TensorView<float, 2> x(nullptr, {rows, 1536}), weight(nullptr, {1536, 1536});
    return linear_workspace(Cpu{}, x, weight, TensorView<float, 1>{}, x);
  };
  CHECK(bytes(1 << 20) == bytes(1 << 12));
}

TEST_CASE("linear refuses what it cannot do") {
  const Buffer<float, 3> x_memory({2, 3, 4}), out_memory({2, 3, 5});
  const Buffer<half, 2> weight_memory({5, 4});
  const Buffer<float, 1> bias_memory({5});
  const TensorView<float, 3> x = x_memory, out = out_memory;
  const TensorView<half, 2> weight = weight_memory;
  const TensorView<float, 1> bias = bias_memory;
  fill(x, 1.0);
  fill(weight, 1.0);
  fill(bias, 1.0);
  Scratch scratch(linear_workspace(Cpu{}, x, weight, bias, out));
  const auto code = [&](const TensorView<const float, 3>& x_, const TensorView<half, 2>& weight_,
                        const TensorView<float, 1>& bias_, const TensorView<float, 3>& out_) {
    return linear(Cpu{scratch.workspace()}, x_, weight_, bias_, out_).code;
  };
  CHECK(code(x, weight, bias, out) == Code::ok);
  for (std::size_t axis = 0; axis < 3; ++axis) {
    CHECK(code(support::with_extent(x, axis, 0), weight, bias, out) == Code::empty);
    CHECK(code(support::with_extent(x, axis, 9), weight, bias, out) == Code::shape);
    CHECK(code(x, weight, bias, support::with_extent(out, axis, 9)) == Code::shape);
  }
  CHECK(code(x, support::with_extent(weight, 0, 0), bias, out) == Code::empty);
  CHECK(code(x, support::with_extent(weight, 0, 6), bias, out) == Code::shape);
  CHECK(code(x, support::with_extent(weight, 1, 3), bias, out) == Code::shape);
  CHECK(code(x, weight, support::with_extent(bias, 0, 4), out) == Code::shape);
  CHECK(code(support::with_last_stride(x), weight, bias, out) == Code::stride);
  CHECK(code(x, support::with_last_stride(weight), bias, out) == Code::stride);
  CHECK(code(x, weight, support::with_last_stride(bias), out) == Code::stride);
  CHECK(code(x, weight, bias, support::with_last_stride(out)) == Code::stride);
  CHECK(code(support::without_memory(x), weight, bias, out) == Code::null_data);
  CHECK(code(x, support::without_memory(weight), bias, out) == Code::null_data);
  CHECK(code(x, weight, support::without_memory(bias), out) == Code::null_data);
  CHECK(code(x, weight, bias, support::without_memory(out)) == Code::null_data);
  const TensorView<float, 3> square(x.data, {2, 3, 4});
  CHECK(code(square, support::with_extent(weight, 0, 4), support::with_extent(bias, 0, 4), square) ==
        Code::alias);

  const Workspace all = scratch.workspace();
  const Status none = linear(Cpu{}, x, weight, bias, out);
  CHECK(none.code == Code::workspace);
  CHECK(none.expected == static_cast<Index>(all.size));
  CHECK(linear(Cpu{Workspace{all.data, all.size - Carver::alignment}}, x, weight, bias, out).code ==
        Code::workspace);
}

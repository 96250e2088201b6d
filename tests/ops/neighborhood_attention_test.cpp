#include <linattn/ops/neighborhood_attention_cpu.hpp>
#include <linattn/ops/softmax_attention_cpu.hpp>

#include "../reference/neighborhood_attention.hpp"
#include "../support.hpp"

using namespace linattn;
using namespace support;

namespace {

struct Shape {
  Index batch, height, width, heads, head_dim, value_dim;
  Window kernel;
};

[[nodiscard]] std::string text(const Shape& s) {
  return support::text(std::array<Index, 8>{s.batch, s.height, s.width, s.heads, s.head_dim, s.value_dim,
                                            s.kernel.height, s.kernel.width});
}

// One token, rows and columns alone, windows as large as the grid and of one key; grids beside the edges of tiles
// and of rows of tiles; windows that take several blocks of keys; heads beside the width of packs.
const std::vector<Shape> shapes = {
    {1, 1, 1, 1, 1, 1, {1, 1}},     {2, 1, 37, 2, 8, 8, {1, 5}},      {1, 63, 1, 2, 8, 16, {7, 1}},
    {2, 7, 9, 2, 32, 32, {3, 3}},   {1, 8, 6, 3, 40, 40, {5, 5}},     {1, 5, 5, 1, 64, 64, {5, 5}},
    {1, 9, 13, 2, 72, 72, {3, 7}},  {1, 13, 9, 1, 16, 33, {7, 3}},    {1, 16, 17, 2, 64, 8, {1, 1}},
    {1, 4, 65, 1, 24, 24, {3, 5}},  {1, 33, 35, 1, 8, 8, {5, 5}},     {1, 25, 31, 1, 24, 40, {25, 31}},
    {1, 21, 40, 1, 8, 8, {19, 39}}, {1, 10, 12, 1, 128, 128, {5, 5}}, {1, 9, 9, 1, 320, 300, {9, 7}},
    {1, 2, 700, 1, 4, 4, {1, 601}},
};

// Inputs and outputs of one call.
template <class T>
struct Case {
  Shape shape;
  Buffer<T, 4> q, k, v, out;

  Case(const Shape& s, Layout layout, double deviation = 1.0)
      : shape(s),
        q(make<T>(layout, {s.batch, s.height * s.width, s.heads, s.head_dim})),
        k(make<T>(layout, {s.batch, s.height * s.width, s.heads, s.head_dim})),
        v(make<T>(layout, {s.batch, s.height * s.width, s.heads, s.value_dim})),
        out(make<T>(layout, {s.batch, s.height * s.width, s.heads, s.value_dim})) {
    fill_normal(q.view(), 1, deviation);
    fill_normal(k.view(), 2, deviation);
    fill_normal(v.view(), 3);
  }

  [[nodiscard]] NeighborhoodAttentionOptions options() const {
    return {.grid = {0, shape.height, shape.width}, .kernel = shape.kernel, .scale = {}};
  }
  template <class Parallel = Serial>
  [[nodiscard]] Status run(const NeighborhoodAttentionOptions& o, Parallel parallel = {}) const {
    const Cpu<Parallel> query{{}, parallel};
    Scratch scratch(neighborhood_attention_workspace(query, q.view(), k.view(), v.view(), out.view(), o));
    const Status status =
        neighborhood_attention(query.with(scratch.workspace()), q.view(), k.view(), v.view(), out.view(), o);
    CHECK(scratch.intact());
    CHECK(out.intact());
    return status;
  }
  [[nodiscard]] Status run() const { return run(options()); }

  [[nodiscard]] Buffer<double, 4> expected(double scale) const {
    Buffer<double, 4> result(out.view().extents);
    reference::neighborhood_attention(to_double(q), to_double(k), to_double(v), result, shape.height,
                                      shape.width, shape.kernel, scale);
    return result;
  }
  [[nodiscard]] double default_scale() const { return 1.0 / std::sqrt(static_cast<double>(shape.head_dim)); }
};

// Units of roundoff, as for softmax attention: logits of unit variance err by sqrt(d / 6) eps at most of 512
// channels, and by one more for the scale that the queries take in; exponentials by 2 eps, and the sums of a block
// of 512 keys by sqrt(512 / 6) eps at most. 16-bit storage rounds once more, by far the most.
template <class T>
constexpr double roundoffs = sizeof(T) == 2 ? 1.01 : 16.0;

// The token at (row, column), of a grid that lies the other way round: (column, row).
[[nodiscard]] Index transposed(Index token, Index height, Index width) {
  return token % width * height + token / width;
}

}  // namespace

TEST_CASE_TEMPLATE("neighborhood_attention follows its formula in every layout", T, float, half, bfloat16,
                   double) {
  for (const Shape& shape : shapes) {
    CAPTURE(text(shape));
    const Case<T> dense(shape, Layout::dense);
    const Buffer<double, 4> expected = dense.expected(dense.default_scale());
    for (const Layout layout : all_layouts) {
      CAPTURE(name(layout));
      const Case<T> c(shape, layout);
      check_ok(c.run());
      check_rounding<T>(c.out, expected, roundoffs<T>);
    }
  }
}

TEST_CASE_TEMPLATE("neighborhood_attention takes a scale", T, float, double) {
  const Case<T> c({1, 7, 11, 2, 24, 24, {5, 3}}, Layout::packed);
  NeighborhoodAttentionOptions options = c.options();
  options.scale = 0.7;
  check_ok(c.run(options));
  // Logits have a deviation of 0.7 sqrt(24), the largest are three times as large, and each errs by sqrt(d / 6) + 1
  // units of that.
  check_rounding<T>(c.out, c.expected(0.7), 8.0 + 3.0 * 0.7 * std::sqrt(24.0) * 3.0);
}

TEST_CASE_TEMPLATE("a kernel of the size of the grid is softmax attention", T, float, half, double) {
  for (const Shape& shape : {Shape{2, 5, 7, 2, 40, 24, {5, 7}}, Shape{1, 31, 33, 1, 16, 16, {31, 33}}}) {
    CAPTURE(text(shape));
    const Case<T> c(shape, Layout::packed);
    check_ok(c.run());
    const Buffer<T, 4> dense(c.out.view().extents);
    Scratch scratch(softmax_attention_workspace(Cpu{}, c.q.view(), c.k.view(), c.v.view(), dense.view()));
    check_ok(softmax_attention(Cpu{scratch.workspace()}, c.q.view(), c.k.view(), c.v.view(), dense.view()));
    check_rounding<T>(c.out, dense, 2.0 * roundoffs<T>);
  }
}

TEST_CASE_TEMPLATE("a kernel of one key gives the values", T, float, half, bfloat16, double) {
  const Case<T> c({2, 6, 21, 2, 24, 40, {1, 1}}, Layout::permuted);
  check_ok(c.run());
  for_each_index(c.v.view().extents, [&](const auto& i) {
    CHECK(convert<double>(element(c.out.view(), i)) == convert<double>(element(c.v.view(), i)));
  });
}

TEST_CASE_TEMPLATE("transposing the grid and the kernel transposes the result", T, float, double) {
  for (const Shape& shape : {Shape{1, 13, 18, 2, 24, 24, {5, 3}}, Shape{1, 6, 40, 1, 16, 16, {3, 9}}}) {
    CAPTURE(text(shape));
    const Case<T> c(shape, Layout::dense);
    const Case<T> turned({shape.batch,
                          shape.width,
                          shape.height,
                          shape.heads,
                          shape.head_dim,
                          shape.value_dim,
                          {shape.kernel.width, shape.kernel.height}},
                         Layout::dense);
    const auto turn = [&](const Buffer<T, 4>& from, const Buffer<T, 4>& to) {
      for_each_index(from.view().extents, [&](const auto& i) {
        element(to.view(), {i[0], transposed(i[1], shape.height, shape.width), i[2], i[3]}) =
            element(from.view(), i);
      });
    };
    turn(c.q, turned.q);
    turn(c.k, turned.k);
    turn(c.v, turned.v);
    check_ok(c.run());
    check_ok(turned.run());
    const Buffer<T, 4> expected(turned.out.view().extents);
    turn(c.out, expected);
    check_rounding<T>(turned.out, expected, 2.0 * roundoffs<T>);
  }
}

TEST_CASE_TEMPLATE("a token sees its window and nothing else, be it NaN or infinite", T, float, half,
                   double) {
  const Shape shape = {1, 11, 19, 1, 24, 24, {5, 3}};
  for (const bool of_keys : {true, false}) {
    CAPTURE(of_keys);
    for (const Index poisoned : {0, 3 * 19 + 7, 10 * 19 + 18}) {
      CAPTURE(poisoned);
      const Case<T> c(shape, Layout::dense), other(shape, Layout::dense);
      const float bits = poisoned == 0 ? HUGE_VALF : std::numeric_limits<float>::quiet_NaN();
      for (Index i = 0; i < 24; ++i)
        (of_keys ? other.k : other.v).view()(0, poisoned, 0, i) = convert<T>(i % 2 == 0 ? bits : -bits);
      check_ok(c.run());
      check_ok(other.run());
      for (Index token = 0; token < 11 * 19; ++token) {
        CAPTURE(token);
        const bool sees = reference::sees(token / 19, poisoned / 19, 5, 11) &&
                          reference::sees(token % 19, poisoned % 19, 3, 19);
        for (Index i = 0; i < 24; ++i) {
          const double now = convert<double>(other.out.view()(0, token, 0, i));
          if (poisoned != 0) CHECK(std::isnan(now) == sees);
          if (!sees) CHECK(now == convert<double>(c.out.view()(0, token, 0, i)));
        }
      }
    }
  }
}

TEST_CASE("neighborhood_attention: logits far from 0 neither overflow nor lose the small ones") {
  // A few windows of logits of standard deviation 50, and one in several blocks of keys.
  for (const Shape& shape : {Shape{1, 12, 20, 2, 32, 32, {5, 5}}, Shape{1, 30, 40, 1, 32, 32, {29, 39}}}) {
    CAPTURE(text(shape));
    const Case<float> c(shape, Layout::permuted, std::sqrt(50.0));
    check_ok(c.run());
    // As for softmax attention: eps times the largest logits, where the second largest is near.
    check_relative(c.out, c.expected(c.default_scale()), 4e-6);
    const Case<double> d(shape, Layout::permuted, std::sqrt(50.0));
    check_ok(d.run());
    check_relative(d.out, d.expected(d.default_scale()), 1e-14);
  }
}

TEST_CASE_TEMPLATE("neighborhood_attention gives the same bits for any layout and any threads", T, float,
                   bfloat16, double) {
  const Shape shape = {2, 37, 45, 3, 40, 24, {5, 7}};
  const Case<T> first(shape, Layout::dense);
  check_ok(first.run());
  for (const Layout layout : all_layouts)
    for (const Index workers : {1, 2, 3, 7}) {
      const Case<T> c(shape, layout);
      check_ok(c.run(c.options(), Threads{workers, static_cast<std::uint64_t>(workers)}));
      CHECK(same_bits(c.out, first.out));
    }
}

TEST_CASE("neighborhood_attention allocates nothing and its scratch does not grow with the tokens") {
  const Case<half> c({1, 20, 24, 2, 64, 64, {5, 5}}, Layout::packed);
  const NeighborhoodAttentionOptions options = c.options();
  Scratch scratch(
      neighborhood_attention_workspace(Cpu{}, c.q.view(), c.k.view(), c.v.view(), c.out.view(), options));
  const Cpu ctx{scratch.workspace()};
  const Allocations allocations;
  const Status status =
      neighborhood_attention(ctx, c.q.view(), c.k.view(), c.v.view(), c.out.view(), options);
  CHECK(allocations.count() == 0);
  check_ok(status);
  const auto bytes = [](Index side, Index kernel) {
    const TensorView<float, 4> v(nullptr, {4, side * side, 24, 64});
    return neighborhood_attention_workspace(Cpu{}, v, v, v, v, {{0, side, side}, {kernel, kernel}, {}});
  };
  CHECK(bytes(2048, 5) == bytes(64, 5));
  CHECK(bytes(2048, 2047) < 2 * bytes(64, 63));
}

TEST_CASE("neighborhood_attention refuses what it cannot do") {
  const Case<float> c({2, 5, 6, 2, 4, 6, {3, 5}}, Layout::dense);
  const TensorView<float, 4> q = c.q, k = c.k, v = c.v, out = c.out;
  const NeighborhoodAttentionOptions good = c.options();
  Scratch scratch(neighborhood_attention_workspace(Cpu{}, q, k, v, out, good));
  const auto call = [&](const TensorView<float, 4>& q_, const TensorView<float, 4>& k_,
                        const TensorView<float, 4>& v_, const TensorView<float, 4>& out_,
                        const NeighborhoodAttentionOptions& options) {
    const Status status = neighborhood_attention(Cpu{scratch.workspace()}, q_, k_, v_, out_, options);
    // The size query does not look at the memory, and survives what the call refuses.
    (void)neighborhood_attention_workspace(Cpu{}, q_, k_, v_, out_, options);
    return status;
  };
  const auto code = [&](const TensorView<float, 4>& q_, const TensorView<float, 4>& k_,
                        const TensorView<float, 4>& v_,
                        const TensorView<float, 4>& out_) { return call(q_, k_, v_, out_, good).code; };
  const auto with = [&](TokenGrid grid, Window kernel) { return call(q, k, v, out, {grid, kernel, {}}); };
  CHECK(code(q, k, v, out) == Code::ok);
  for (std::size_t axis = 0; axis < 4; ++axis) {
    CHECK(code(support::with_extent(q, axis, 0), k, v, out) == Code::empty);
    CHECK(code(support::with_extent(q, axis, 9), k, v, out) == Code::shape);
    CHECK(code(q, support::with_extent(k, axis, 9), v, out) == Code::shape);
    CHECK(code(q, k, support::with_extent(v, axis, 9), out) == Code::shape);
    CHECK(code(q, k, v, support::with_extent(out, axis, 9)) == Code::shape);
  }
  CHECK(code(q, k, support::with_extent(v, 3, 0), support::with_extent(out, 3, 0)) == Code::empty);
  CHECK(code(support::with_last_stride(q), k, v, out) == Code::stride);
  CHECK(code(q, support::with_last_stride(k), v, out) == Code::stride);
  CHECK(code(q, k, support::with_last_stride(v), out) == Code::stride);
  CHECK(code(q, k, v, support::with_last_stride(out)) == Code::stride);
  CHECK(code(support::without_memory(q), k, v, out) == Code::null_data);
  CHECK(code(q, support::without_memory(k), v, out) == Code::null_data);
  CHECK(code(q, k, support::without_memory(v), out) == Code::null_data);
  CHECK(code(q, k, v, support::without_memory(out)) == Code::null_data);

  CHECK(std::string(with({0, 5, 6}, {2, 5}).what) == "kernel, height (odd)");
  CHECK(std::string(with({0, 5, 6}, {3, 0}).what) == "kernel, width (odd)");
  CHECK(with({0, 5, 6}, {-3, 5}).code == Code::option);
  CHECK(with({0, 5, 6}, {3, -1}).code == Code::option);
  CHECK(std::string(with({0, 5, 6}, {7, 5}).what) == "kernel, height (at most the grid's)");
  CHECK(std::string(with({0, 5, 6}, {3, 7}).what) == "kernel, width (at most the grid's)");
  CHECK(with({0, 0, 6}, {1, 1}).code == Code::empty);
  CHECK(with({0, 5, -6}, {1, 1}).code == Code::empty);
  CHECK(with({1, 5, 6}, {3, 5}).code == Code::option);
  CHECK(with({0, 5, 5}, {3, 5}).code == Code::shape);
  CHECK(with({0, 6, 6}, {3, 5}).code == Code::option);
  CHECK(with({0, Index{1} << 62, Index{1} << 62}, {3, 5}).code == Code::option);
  for (const double scale :
       {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()})
    CHECK(call(q, k, v, out, {good.grid, good.kernel, scale}).code == Code::option);

  const TensorView<float, 4> square(q.data, {1, 30, 1, 4});
  const Buffer<float, 4> apart_memory({1, 30, 1, 4});
  const TensorView<float, 4> apart = apart_memory;
  CHECK(code(square, apart, apart, square) == Code::alias);
  CHECK(code(apart, square, apart, square) == Code::alias);
  CHECK(code(apart, apart, square, square) == Code::alias);

  const Workspace all = scratch.workspace();
  const Status none = neighborhood_attention(Cpu{}, q, k, v, out, good);
  CHECK(none.code == Code::workspace);
  CHECK(none.expected == static_cast<Index>(all.size));
  CHECK(neighborhood_attention(Cpu{Workspace{all.data, all.size - Carver::alignment}}, q, k, v, out, good)
            .code == Code::workspace);
}

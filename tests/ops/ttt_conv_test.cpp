#include <linattn/ops/ttt_conv_cpu.hpp>

#include "../reference/ttt_conv.hpp"
#include "../support.hpp"

using namespace linattn;
using namespace support;

namespace {

struct Shape {
  Index batch, height, width, heads, channels;
};

[[nodiscard]] std::string text(const Shape& s) {
  return support::text(std::array<Index, 5>{s.batch, s.height, s.width, s.heads, s.channels});
}

// One token, one row, one column; beside the edges of strips (16), of bands (8 rows, or a 32nd of them) and of
// blocks of channels (64).
const std::vector<Shape> shapes = {
    {1, 1, 1, 1, 1},   {2, 7, 5, 2, 16},   {1, 1, 35, 1, 8},   {1, 35, 1, 2, 40},  {2, 8, 16, 1, 64},
    {1, 9, 17, 3, 24}, {1, 16, 15, 1, 65}, {2, 6, 33, 1, 130}, {1, 270, 3, 1, 24}, {1, 257, 18, 1, 5}};

// Inputs and output of one call. The target resembles the keys, as otherwise g is close to 0.
template <class T, class W>
struct Case {
  Shape shape;
  Buffer<T, 4> q, k, v, out;
  Buffer<W, 4> weight;

  Case(const Shape& s, Layout layout)
      : shape(s),
        q(tokens(layout)),
        k(tokens(layout)),
        v(tokens(layout)),
        out(tokens(layout)),
        weight({s.heads * s.channels, 1, 3, 3}) {
    fill_normal(q.view(), 1);
    fill_normal(k.view(), 2);
    fill_normal(v.view(), 3);
    fill_normal(weight.view(), 4, 0.3);
    for_each_index(v.view().extents, [&](const auto& i) {
      const double towards =
          convert<double>(element(v.view(), i)) + 2.0 * convert<double>(element(k.view(), i));
      element(v.view(), i) = convert<T>(towards);
    });
  }
  [[nodiscard]] Buffer<T, 4> tokens(Layout layout) const {
    return make<T>(layout, {shape.batch, shape.height * shape.width, shape.heads, shape.channels});
  }
  [[nodiscard]] TttConvOptions options() const { return {.grid = {0, shape.height, shape.width}}; }

  template <class Parallel = Serial>
  [[nodiscard]] Status run(const TttConvOptions& o, Parallel parallel = {}) const {
    const Cpu<Parallel> query{{}, parallel};
    Scratch scratch(ttt_conv_workspace(query, q.view(), k.view(), v.view(), weight.view(), out.view(), o));
    const Status status =
        ttt_conv(query.with(scratch.workspace()), q.view(), k.view(), v.view(), weight.view(), out.view(), o);
    CHECK(scratch.intact());
    CHECK(out.intact());
    return status;
  }
  [[nodiscard]] Status run() const { return run(options()); }

  [[nodiscard]] Buffer<double, 4> expected(const TttConvOptions& o) const {
    Buffer<double, 4> result(out.view().extents);
    reference::ttt_conv(to_double(q), to_double(k), to_double(v), to_double(weight), result, o.grid, o.scale,
                        o.inner_lr);
    return result;
  }
};

// Units of roundoff: w' is rounded once and errs by a few units of scale |v k| / tokens besides, and a chain of 9
// products by 10 of what it adds up, which its sum falls short of where the terms cancel.
template <class T>
constexpr double roundoffs = sizeof(T) == 2 ? 1.01 : 16.0;

template <class T, class W>
void check_types() {
  for (const Shape& shape : shapes) {
    CAPTURE(text(shape));
    for (const Layout layout : all_layouts) {
      CAPTURE(name(layout));
      const Case<T, W> c(shape, layout);
      TttConvOptions options = c.options();
      options.inner_lr = layout == Layout::sliced ? 0.7 : 1.0;
      options.scale = layout == Layout::packed ? 0.8 : options.scale;
      check_ok(c.run(options));
      check_rounding<T>(c.out, c.expected(options), roundoffs<T>);
    }
  }
}

}  // namespace

TEST_CASE("ttt_conv follows its formula in every layout: float") {
  check_types<float, float>();
  check_types<float, half>();
}
TEST_CASE("ttt_conv follows its formula in every layout: 16 bit") {
  check_types<half, bfloat16>();
  check_types<bfloat16, float>();
}
TEST_CASE("ttt_conv follows its formula in every layout: double") {
  check_types<double, double>();
  check_types<double, half>();
}

TEST_CASE_TEMPLATE("without a step ttt_conv is depthwise_conv", T, float, half, double) {
  const Case<T, T> c({2, 9, 17, 2, 40}, Layout::packed);
  Buffer<T, 4> bare(c.out.view().extents);
  const TensorView<T, 1> no_bias;
  check_ok(depthwise_conv(Cpu{}, c.q.view(), c.weight.view(), no_bias, bare.view(),
                          {.grid = c.options().grid, .residual = false}));
  TttConvOptions no_rate = c.options(), no_scale = c.options();
  no_rate.inner_lr = 0;
  no_scale.scale = 0;
  for (const TttConvOptions& options : {no_rate, no_scale}) {
    check_ok(c.run(options));
    for_each_index(bare.view().extents, [&](const auto& i) {
      CHECK(convert<double>(element(c.out.view(), i)) == convert<double>(element(bare.view(), i)));
    });
  }
  check_ok(c.run());
  CHECK(difference(c.out, bare).relative() > 0.05);
}

TEST_CASE("the clip keeps the step of a channel below the inner learning rate") {
  // A single 1 among the queries reads the kernel: out around it is w', turned by half a circle.
  for (const double strength : {1e-3, 1.0, 1e6}) {
    CAPTURE(strength);
    const Case<float, float> c({1, 7, 7, 1, 20}, Layout::dense);
    fill(c.q.view(), 0.0);
    for (Index i = 0; i < 20; ++i) c.q.view()(0, 24, 0, i) = 1.0f;
    TttConvOptions options = c.options();
    options.scale = strength;
    options.inner_lr = 0.5;
    check_ok(c.run(options));
    for (Index i = 0; i < 20; ++i) {
      double step2 = 0;
      for (Index row = 0; row < 3; ++row)
        for (Index column = 0; column < 3; ++column) {
          const double now = c.out.view()(0, (4 - row) * 7 + 4 - column, 0, i);
          const double step = now - static_cast<double>(c.weight.view()(i, 0, row, column));
          step2 += step * step;
        }
      // |g| is about 2 strength here, for v is about 2 k.
      const double step = std::sqrt(step2) / options.inner_lr;
      CHECK(step < 1.0 + 1e-5);
      CHECK(step > 0.3 * strength / (1.0 + strength));
    }
  }
}

TEST_CASE_TEMPLATE("ttt_conv gives the same bits for any layout and any threads", T, float, bfloat16,
                   double) {
  const Shape shape = {2, 41, 23, 3, 72};
  const Case<T, half> first(shape, Layout::dense);
  check_ok(first.run());
  for (const Layout layout : all_layouts)
    for (const Index workers : {1, 3, 7}) {
      const Case<T, half> c(shape, layout);
      check_ok(c.run(c.options(), Threads{workers, static_cast<std::uint64_t>(workers)}));
      CHECK(same_bits(c.out, first.out));
    }
}

TEST_CASE("ttt_conv allocates nothing and its scratch does not grow with the tokens") {
  const Case<half, half> c({1, 20, 24, 2, 40}, Layout::packed);
  const TttConvOptions options = c.options();
  Scratch scratch(
      ttt_conv_workspace(Cpu{}, c.q.view(), c.k.view(), c.v.view(), c.weight.view(), c.out.view(), options));
  const Cpu ctx{scratch.workspace()};
  const Allocations allocations;
  const Status status =
      ttt_conv(ctx, c.q.view(), c.k.view(), c.v.view(), c.weight.view(), c.out.view(), options);
  CHECK(allocations.count() == 0);
  check_ok(status);
  const auto bytes = [](Index side) {
    const TensorView<float, 4> v(nullptr, {4, side * side, 2, 64}), w(nullptr, {128, 1, 3, 3});
    return ttt_conv_workspace(Cpu{}, v, v, v, w, v, {.grid = {0, side, side}});
  };
  CHECK(bytes(2048) == bytes(256));
}

TEST_CASE("ttt_conv refuses what it cannot do") {
  const Case<float, float> c({2, 2, 3, 2, 4}, Layout::dense);
  const TensorView<float, 4> q = c.q, k = c.k, v = c.v, out = c.out, w = c.weight;
  const TttConvOptions good = c.options();
  Scratch scratch(ttt_conv_workspace(Cpu{}, q, k, v, w, out, good));
  using View = TensorView<float, 4>;
  const auto call = [&](const View& q_, const View& k_, const View& v_, const View& w_, const View& out_,
                        const TttConvOptions& options) {
    // The size query does not look at the memory, and survives what the call refuses.
    (void)ttt_conv_workspace(Cpu{}, q_, k_, v_, w_, out_, options);
    return ttt_conv(Cpu{scratch.workspace()}, q_, k_, v_, w_, out_, options).code;
  };
  const auto code = [&](const View& q_, const View& k_, const View& v_, const View& w_, const View& out_) {
    return call(q_, k_, v_, w_, out_, good);
  };
  const auto with = [&](const TttConvOptions& options) { return call(q, k, v, w, out, options); };
  const auto extent = [](View view, std::size_t axis, Index value) {
    view.extents[axis] = value;
    return view;
  };
  const auto strided = [](View view) {
    view.strides[3] = 2;
    return view;
  };
  const auto null = [](View view) {
    view.data = nullptr;
    return view;
  };
  CHECK(code(q, k, v, w, out) == Code::ok);
  for (std::size_t axis = 0; axis < 4; ++axis) {
    CHECK(code(extent(q, axis, 0), k, v, w, out) == Code::empty);
    CHECK(code(extent(q, axis, 9), k, v, w, out) == Code::shape);
    CHECK(code(q, extent(k, axis, 9), v, w, out) == Code::shape);
    CHECK(code(q, k, extent(v, axis, 9), w, out) == Code::shape);
    CHECK(code(q, k, v, extent(w, axis, 9), out) == Code::shape);
    CHECK(code(q, k, v, w, extent(out, axis, 9)) == Code::shape);
  }
  CHECK(code(strided(q), k, v, w, out) == Code::stride);
  CHECK(code(q, strided(k), v, w, out) == Code::stride);
  CHECK(code(q, k, strided(v), w, out) == Code::stride);
  CHECK(code(q, k, v, strided(w), out) == Code::stride);
  CHECK(code(q, k, v, w, strided(out)) == Code::stride);
  CHECK(code(null(q), k, v, w, out) == Code::null_data);
  CHECK(code(q, null(k), v, w, out) == Code::null_data);
  CHECK(code(q, k, null(v), w, out) == Code::null_data);
  CHECK(code(q, k, v, null(w), out) == Code::null_data);
  CHECK(code(q, k, v, w, null(out)) == Code::null_data);
  CHECK(code(q, k, v, w, q) == Code::alias);
  CHECK(code(q, k, v, w, k) == Code::alias);
  CHECK(code(q, k, v, w, v) == Code::alias);
  CHECK(with({.grid = {0, 2, 2}}) == Code::shape);
  CHECK(with({.grid = {0, 3, 3}}) == Code::option);
  CHECK(with({.grid = {1, 2, 2}}) == Code::option);
  CHECK(with({.grid = {0, 0, 3}}) == Code::empty);
  CHECK(with({.grid = {0, 2, -3}}) == Code::empty);
  for (const double bad :
       {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
    CHECK(with({.grid = good.grid, .scale = bad}) == Code::option);
    CHECK(with({.grid = good.grid, .inner_lr = bad}) == Code::option);
  }
  const Workspace all = scratch.workspace();
  const Status none = ttt_conv(Cpu{}, q, k, v, w, out, good);
  CHECK(none.code == Code::workspace);
  CHECK(none.expected == static_cast<Index>(all.size));
  CHECK(ttt_conv(Cpu{Workspace{all.data, all.size - Carver::alignment}}, q, k, v, w, out, good).code ==
        Code::workspace);
}

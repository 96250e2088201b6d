#include <linattn/ops/softmax_attention_cpu.hpp>

#include "../reference/softmax_attention.hpp"
#include "../support.hpp"
#include "hidden_keys.hpp"

using namespace linattn;
using namespace support;

namespace {

struct Shape {
  Index batch, queries, keys, heads, head_dim, value_dim;
};

[[nodiscard]] std::string text(const Shape& s) {
  return support::text(std::array<Index, 6>{s.batch, s.queries, s.keys, s.heads, s.head_dim, s.value_dim});
}

// On and beside the edges of packs, panels of queries, blocks of keys and blocks of queries.
constexpr std::array<Shape, 13> shapes = {{{1, 1, 1, 1, 1, 1},
                                           {2, 63, 63, 2, 8, 8},
                                           {1, 64, 64, 3, 64, 64},
                                           {1, 65, 1, 1, 40, 40},
                                           {2, 1, 137, 2, 72, 72},
                                           {1, 77, 77, 2, 64, 64},
                                           {1, 137, 65, 1, 1, 33},
                                           {1, 33, 1000, 2, 64, 8},
                                           {1, 1000, 64, 1, 40, 16},
                                           {1, 137, 129, 1, 128, 128},
                                           {1, 70, 200, 1, 32, 300},
                                           {1, 290, 137, 1, 130, 130},
                                           {1, 40, 65, 1, 512, 512}}};

// Inputs and outputs of one call.
template <class T>
struct Case {
  using C = Compute<T>;
  Shape shape;
  Buffer<T, 4> q, k, v, out;

  Case(const Shape& s, Layout layout, double deviation = 1.0)
      : shape(s),
        q(make<T>(layout, {s.batch, s.queries, s.heads, s.head_dim})),
        k(make<T>(layout, {s.batch, s.keys, s.heads, s.head_dim})),
        v(make<T>(layout, {s.batch, s.keys, s.heads, s.value_dim})),
        out(make<T>(layout, {s.batch, s.queries, s.heads, s.value_dim})) {
    fill_normal(q.view(), 1, deviation);
    fill_normal(k.view(), 2, deviation);
    fill_normal(v.view(), 3);
  }

  template <class Parallel = Serial>
  [[nodiscard]] Status run(const SoftmaxAttentionOptions<C>& options = {}, Parallel parallel = {}) const {
    const Cpu<Parallel> query{{}, parallel};
    Scratch scratch(softmax_attention_workspace(query, q.view(), k.view(), v.view(), out.view(), options));
    const Status status = softmax_attention(Cpu<Parallel>{scratch.workspace(), parallel}, q.view(), k.view(),
                                            v.view(), out.view(), options);
    CHECK(scratch.intact());
    CHECK(out.intact());
    return status;
  }

  [[nodiscard]] Buffer<double, 4> expected(reference::SoftmaxAttention options) const {
    Buffer<double, 4> result(out.view().extents);
    reference::softmax_attention(to_double(q), to_double(k), to_double(v), result, options);
    return result;
  }
  [[nodiscard]] double default_scale() const { return 1.0 / std::sqrt(static_cast<double>(shape.head_dim)); }
};

// Units of roundoff: logits of unit variance err by sqrt(d / 6) eps at most of 512 channels, exponentials by
// 2 eps, and the sums of a block of 128 keys by sqrt(128 / 6) eps; 16-bit storage rounds once more, by far
// the most.
template <class T>
constexpr double roundoffs = sizeof(T) == 2 ? 1.01 : 16.0;

}  // namespace

TEST_CASE_TEMPLATE("softmax_attention follows its formula in every layout", T, float, half, bfloat16,
                   double) {
  for (const Shape& shape : shapes)
    for (const Layout layout : all_layouts) {
      CAPTURE(text(shape));
      CAPTURE(name(layout));
      const Case<T> c(shape, layout);
      check_ok(c.run());
      check_rounding<T>(c.out, c.expected({.scale = c.default_scale()}), roundoffs<T>);
    }
}

TEST_CASE_TEMPLATE("softmax_attention with causal mask, bias, scale and log-sum-exp", T, float, half,
                   bfloat16, double) {
  using C = Compute<T>;
  for (const Shape& shape : shapes)
    for (const bool causal : {false, true})
      for (const bool biased : {false, true}) {
        CAPTURE(text(shape));
        CAPTURE(causal);
        CAPTURE(biased);
        const Case<T> c(shape, Layout::packed);
        // One bias for all samples, its rows apart; some entries forbid a pair.
        Buffer<C, 4> bias({shape.batch, shape.heads, shape.queries, shape.keys},
                          {0, shape.queries * (shape.keys + 3), shape.keys + 3, 1}, 2);
        fill_normal(bias.view(), 4, 2.0);
        for (Index h = 0; h < shape.heads; ++h)
          for (Index i = 0; i < shape.queries; i += 3)
            for (Index j = i % 2; j < shape.keys; j += 5)
              bias.view()(0, h, i, j) = -std::numeric_limits<C>::infinity();
        Buffer<C, 3> lse({shape.batch, shape.queries, shape.heads},
                         {shape.heads * shape.queries, 1, shape.queries}, 1);
        SoftmaxAttentionOptions<C> options{.scale = 0.3, .causal = causal, .bias = {}, .lse = lse.view()};
        if (biased) options.bias = bias.view();
        check_ok(c.run(options));

        Buffer<double, 3> expected_lse(lse.view().extents);
        const auto double_bias = to_double(bias.view());
        reference::SoftmaxAttention same{.scale = 0.3, .causal = causal, .lse = expected_lse.view()};
        if (biased) same.bias = double_bias.view();
        const auto expected = c.expected(same);
        // Logits have a deviation of 0.3 sqrt(d), and a chain of d additions errs by sqrt(d / 6) eps of that;
        // it is the absolute error of a logit that counts. The largest logits are three times as large.
        const double d = static_cast<double>(shape.head_dim);
        const double logit = 3.0 * 0.3 * std::sqrt(d) * (std::sqrt(d / 6.0) + 1.0);
        check_rounding<T>(c.out, expected, sizeof(T) == 2 ? 1.02 : 8.0 + logit);
        check_rounding<C>(lse, expected_lse, 1.0,
                          2.0 * difference(lse, expected_lse).norm +
                              logit * std::sqrt(static_cast<double>(lse.view().elements())));
        CHECK(lse.intact());
      }
}

TEST_CASE_TEMPLATE("a query that sees no key gives 0, and a log-sum-exp of -infinity", T, float, half,
                   double) {
  using C = Compute<T>;
  const C infinity = std::numeric_limits<C>::infinity();
  const Case<T> c({1, 50, 20, 2, 16, 24}, Layout::dense);
  Buffer<C, 3> lse({1, 50, 2});
  // Causal with more queries than keys: the first 30 queries come before every key.
  check_ok(c.run({.scale = {}, .causal = true, .bias = {}, .lse = lse.view()}));
  for_each_index(lse.view().extents,
                 [&](const auto& i) { CHECK((element(lse.view(), i) == -infinity) == (i[1] < 30)); });
  for_each_index(c.out.view().extents, [&](const auto& i) {
    if (i[1] < 30) CHECK(convert<float>(element(c.out.view(), i)) == 0.0f);
  });
  check_rounding<T>(c.out, c.expected({.scale = 0.25, .causal = true}), roundoffs<T>);

  Buffer<C, 4> bias({1, 2, 50, 20});
  fill(bias.view(), 0.0);
  for (Index j = 0; j < 20; ++j) bias.view()(0, 1, 7, j) = -infinity;
  check_ok(c.run({.scale = {}, .causal = false, .bias = bias.view(), .lse = lse.view()}));
  for_each_index(lse.view().extents, [&](const auto& i) {
    CHECK((element(lse.view(), i) == -infinity) == (i[1] == 7 && i[2] == 1));
  });
  const auto double_bias = to_double(bias);
  check_rounding<T>(c.out, c.expected({.scale = 0.25, .bias = double_bias.view()}), roundoffs<T>);
}

TEST_CASE("logits far from 0 neither overflow nor lose the small ones") {
  // Logits of standard deviation 50: most rows see one key, and the running maximum moves by hundreds.
  for (const Index keys : {24, 1000}) {
    CAPTURE(keys);
    const Case<float> c({1, 70, keys, 2, 32, 32}, Layout::permuted, std::sqrt(50.0));
    Buffer<float, 3> lse({1, 70, 2});
    Buffer<double, 3> expected_lse({1, 70, 2});
    check_ok(c.run({.scale = {}, .causal = false, .bias = {}, .lse = lse.view()}));
    const auto expected = c.expected({.scale = c.default_scale(), .lse = expected_lse.view()});
    // The error of a probability is the absolute error of its logit: eps times some 150, where the second
    // largest logit is near the first; that is in a few rows.
    check_relative(c.out, expected, 4e-6);
    check_relative(lse, expected_lse, 2e-7);
  }
  const Case<double> d({1, 70, 1000, 2, 32, 32}, Layout::permuted, std::sqrt(50.0));
  check_ok(d.run());
  check_relative(d.out, d.expected({.scale = d.default_scale()}), 1e-14);
}

TEST_CASE_TEMPLATE("softmax_attention is shift invariant, to the bit where the logits are exact", T, float,
                   double) {
  Case<T> c({1, 40, 300, 1, 16, 16}, Layout::dense), shifted({1, 40, 300, 1, 16, 16}, Layout::dense);
  for (const auto* view : {&c.q.view(), &c.k.view()})
    for_each_index(view->extents, [&](const auto& i) { element(*view, i) = std::round(element(*view, i)); });
  copy(c.q.view(), shifted.q.view());
  copy(c.k.view(), shifted.k.view());
  Buffer<T, 4> bias({1, 1, 40, 300});
  for_each_index(bias.view().extents, [&](const auto& i) {
    element(bias.view(), i) = static_cast<T>(64 * (i[2] % 5 - 2));  // one constant a query
  });
  check_ok(c.run({.scale = 0.5, .causal = false, .bias = {}, .lse = {}}));
  check_ok(shifted.run({.scale = 0.5, .causal = false, .bias = bias.view(), .lse = {}}));
  CHECK(same_bits(c.out, shifted.out));
}

TEST_CASE("a common permutation of keys and values changes only rounding") {
  Case<float> c({1, 60, 500, 2, 40, 40}, Layout::dense), reversed({1, 60, 500, 2, 40, 40}, Layout::dense);
  copy(c.q.view(), reversed.q.view());
  for_each_index(c.k.view().extents, [&](const auto& i) {
    element(reversed.k.view(), {i[0], 499 - i[1], i[2], i[3]}) = element(c.k.view(), i);
    element(reversed.v.view(), {i[0], 499 - i[1], i[2], i[3]}) = element(c.v.view(), i);
  });
  check_ok(c.run());
  check_ok(reversed.run());
  check_rounding<float>(reversed.out, c.out, roundoffs<float>);
}

TEST_CASE("equal values come out, whatever the weights") {
  Case<float> c({1, 130, 700, 1, 64, 24}, Layout::dense);
  fill(c.v.view(), 3.0);
  check_ok(c.run());
  for_each_index(c.out.view().extents,
                 [&](const auto& i) { CHECK(std::abs(element(c.out.view(), i) - 3.0f) < 2e-6f); });
}

TEST_CASE_TEMPLATE("a query does not see the others, and a causal one not the later keys", T, float, half) {
  for (const bool causal : {false, true}) {
    CAPTURE(causal);
    const SoftmaxAttentionOptions<float> options{.scale = {}, .causal = causal, .bias = {}, .lse = {}};
    Case<T> c({1, 90, 90, 1, 24, 24}, Layout::dense), other({1, 90, 90, 1, 24, 24}, Layout::dense);
    check_ok(c.run(options));
    for (Index i = 0; i < 24; ++i) {
      other.q.view()(0, 37, 0, i) = convert<T>(std::numeric_limits<float>::quiet_NaN());
      if (causal) other.k.view()(0, 60, 0, i) = convert<T>(2.5f);
    }
    check_ok(other.run(options));
    for (Index i = 0; i < 90; ++i)
      for (Index x = 0; x < 24; ++x) {
        const float now = convert<float>(other.out.view()(0, i, 0, x));
        const float before = convert<float>(c.out.view()(0, i, 0, x));
        if (i == 37) {
          CHECK(std::isnan(now));
        } else if (!causal || i < 60) {
          CHECK(now == before);
        }
      }
    if (causal)
      CHECK(convert<float>(other.out.view()(0, 70, 0, 0)) != convert<float>(c.out.view()(0, 70, 0, 0)));
  }
}

TEST_CASE_TEMPLATE("a hidden key cannot be observed, whatever its bits", T, float, half, bfloat16, double) {
  const auto run = [](const hidden_keys::Problem<T>& p) {
    const auto options = p.options(p.bias.view(), p.lse.view());
    Scratch scratch(
        softmax_attention_workspace(Cpu{}, p.q.view(), p.k.view(), p.v.view(), p.out.view(), options));
    check_ok(softmax_attention(Cpu{scratch.workspace()}, p.q.view(), p.k.view(), p.v.view(), p.out.view(),
                               options));
  };
  // On and beside the edges of panels and of blocks, fewer queries than keys and more.
  for (const hidden_keys::Shape& shape : {hidden_keys::Shape{1, 3, 2, 1, 1, 1},
                                          {1, 100, 100, 1, 8, 8},
                                          {2, 33, 137, 2, 64, 40},
                                          {1, 150, 70, 1, 16, 64},
                                          {1, 1, 129, 2, 40, 9},
                                          {1, 300, 300, 1, 8, 16},
                                          {1, 40, 65, 1, 130, 300}})
    hidden_keys::check<T>(shape, run);
  hidden_keys::check_blind<T>({1, 70, 150, 2, 24, 24}, run);
  hidden_keys::check_bias<T>(run);
}

TEST_CASE_TEMPLATE("softmax_attention gives the same bits for any layout and any threads", T, float, bfloat16,
                   double) {
  using C = Compute<T>;
  const Shape shape = {2, 700, 300, 3, 40, 24};
  const Case<T> first(shape, Layout::dense);
  Buffer<C, 3> first_lse({2, 700, 3});
  check_ok(first.run({.scale = {}, .causal = true, .bias = {}, .lse = first_lse.view()}));
  for (const Layout layout : all_layouts)
    for (const Index workers : {1, 2, 3, 7}) {
      const Case<T> c(shape, layout);
      Buffer<C, 3> lse({2, 700, 3});
      check_ok(c.run({.scale = {}, .causal = true, .bias = {}, .lse = lse.view()},
                     Threads{workers, static_cast<std::uint64_t>(workers)}));
      CHECK(same_bits(c.out, first.out));
      CHECK(same_bits(lse, first_lse));
    }
}

TEST_CASE("softmax_attention allocates nothing and its scratch does not grow with the tokens") {
  const Case<half> c({1, 300, 300, 2, 64, 64}, Layout::packed);
  Scratch scratch(softmax_attention_workspace(Cpu{}, c.q.view(), c.k.view(), c.v.view(), c.out.view()));
  const Cpu ctx{scratch.workspace()};
  const Allocations allocations;
  const Status status = softmax_attention(ctx, c.q.view(), c.k.view(), c.v.view(), c.out.view());
  CHECK(allocations.count() == 0);
  check_ok(status);
  const auto bytes = [](Index tokens) {
    const TensorView<float, 4> v(nullptr, {4, tokens, 24, 64});
    return softmax_attention_workspace(Cpu{}, v, v, v, v);
  };
  CHECK(bytes(1 << 20) == bytes(1 << 10));
}

TEST_CASE("softmax_attention refuses what it cannot do") {
  const Case<float> c({2, 3, 5, 2, 4, 6}, Layout::dense);
  const Buffer<float, 4> bias_memory({2, 2, 3, 5});
  const Buffer<float, 3> lse_memory({2, 3, 2});
  const TensorView<float, 4> q = c.q, k = c.k, v = c.v, out = c.out, bias = bias_memory;
  const TensorView<float, 3> lse = lse_memory;
  fill(bias, 0.0);
  Scratch scratch(softmax_attention_workspace(Cpu{}, q, k, v, out));
  using Options = SoftmaxAttentionOptions<float>;
  const auto code = [&](const TensorView<float, 4>& q_, const TensorView<float, 4>& k_,
                        const TensorView<float, 4>& v_, const TensorView<float, 4>& out_,
                        const Options& options = {}) {
    return softmax_attention(Cpu{scratch.workspace()}, q_, k_, v_, out_, options).code;
  };
  const auto with_bias = [&](const TensorView<float, 4>& b) {
    return code(q, k, v, out, {.scale = {}, .causal = false, .bias = b, .lse = {}});
  };
  const auto with_lse = [&](const TensorView<float, 3>& l) {
    return code(q, k, v, out, {.scale = {}, .causal = false, .bias = {}, .lse = l});
  };
  CHECK(code(q, k, v, out, {.scale = 1.0, .causal = true, .bias = bias, .lse = lse}) == Code::ok);
  for (std::size_t axis = 0; axis < 4; ++axis) {
    CHECK(code(support::with_extent(q, axis, 0), k, v, out) == Code::empty);
    CHECK(code(support::with_extent(q, axis, 9), k, v, out) == Code::shape);
    CHECK(code(q, support::with_extent(k, axis, 9), v, out) == Code::shape);
    CHECK(code(q, k, support::with_extent(v, axis, 9), out) == Code::shape);
    CHECK(code(q, k, v, support::with_extent(out, axis, 9)) == Code::shape);
    CHECK(with_bias(support::with_extent(bias, axis, 9)) == Code::shape);
  }
  CHECK(code(q, support::with_extent(k, 1, 0), support::with_extent(v, 1, 0), out) == Code::empty);
  CHECK(code(q, k, support::with_extent(v, 3, 0), support::with_extent(out, 3, 0)) == Code::empty);
  for (std::size_t axis = 0; axis < 3; ++axis)
    CHECK(with_lse(support::with_extent(lse, axis, 9)) == Code::shape);
  CHECK(code(support::with_last_stride(q), k, v, out) == Code::stride);
  CHECK(code(q, support::with_last_stride(k), v, out) == Code::stride);
  CHECK(code(q, k, support::with_last_stride(v), out) == Code::stride);
  CHECK(code(q, k, v, support::with_last_stride(out)) == Code::stride);
  CHECK(with_bias(support::with_last_stride(bias)) == Code::stride);
  CHECK(code(support::without_memory(q), k, v, out) == Code::null_data);
  CHECK(code(q, support::without_memory(k), v, out) == Code::null_data);
  CHECK(code(q, k, support::without_memory(v), out) == Code::null_data);
  CHECK(code(q, k, v, support::without_memory(out)) == Code::null_data);
  CHECK(with_bias(support::without_memory(bias)) == Code::null_data);
  CHECK(with_lse(support::without_memory(lse)) == Code::null_data);
  for (const double scale :
       {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()})
    CHECK(code(q, k, v, out, {.scale = scale, .causal = false, .bias = {}, .lse = {}}) == Code::option);
  const TensorView<float, 4> square(q.data, {1, 3, 1, 4});
  const Buffer<float, 4> apart_memory({1, 3, 1, 4});
  const TensorView<float, 4> apart = apart_memory;
  CHECK(code(square, apart, apart, square) == Code::alias);
  CHECK(code(apart, square, apart, square) == Code::alias);
  CHECK(code(apart, apart, square, square) == Code::alias);

  const Workspace all = scratch.workspace();
  const Status none = softmax_attention(Cpu{}, q, k, v, out);
  CHECK(none.code == Code::workspace);
  CHECK(none.expected == static_cast<Index>(all.size));
  CHECK(softmax_attention(Cpu{Workspace{all.data, all.size - Carver::alignment}}, q, k, v, out).code ==
        Code::workspace);
}

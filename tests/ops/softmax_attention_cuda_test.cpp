// Softmax attention on a device against its formula in double, on the same rounded inputs.
//
// Tolerances. A rounding to nearest errs by 0.43 u of the value in the mean square (u: the unit roundoff of T, the
// significand distributed as usual, logarithmically). On tensor cores the weights and the result are so rounded:
// independent errors, that add in squares to 0.43 sqrt(2) u = 0.6 u, of the L2 norm of the terms that are added where
// these are independent of each other, which is then that of the result. Allowed is 1 u. The plain kernels round the
// result alone; in float 1e-5 is allowed, for any length of the sums.
#include <linattn/ops/softmax_attention_cuda.cuh>

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>

#include "../device.hpp"
#include "../reference/softmax_attention.hpp"
#include "../support.hpp"
#include "hidden_keys.hpp"
#if !defined(__CUDACC__)
#include "../emu/emu.hpp"
#endif

using namespace linattn;
using namespace support;

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

struct Shape {
  Index batch, queries, keys, heads, head_dim, value_dim;
};
[[nodiscard]] std::string text(const Shape& s) {
  return support::text(std::array<Index, 6>{s.batch, s.queries, s.keys, s.heads, s.head_dim, s.value_dim});
}

// Inputs and results of one call, on the host.
template <class T>
struct Case {
  Shape shape;
  Buffer<T, 4> q, k, v, out;
  Buffer<float, 3> lse;

  Case(const Shape& s, Layout layout, double deviation = 1.0)
      : shape(s),
        q(make<T>(layout, {s.batch, s.queries, s.heads, s.head_dim})),
        k(make<T>(layout, {s.batch, s.keys, s.heads, s.head_dim})),
        v(make<T>(layout, {s.batch, s.keys, s.heads, s.value_dim})),
        out(make<T>(layout, {s.batch, s.queries, s.heads, s.value_dim})),
        lse({s.batch, s.queries, s.heads}, {s.heads * s.queries, 1, s.queries}, 1) {
    fill_normal(q.view(), 1, deviation);
    fill_normal(k.view(), 2, deviation);
    fill_normal(v.view(), 3);
  }

  void run(double scale, bool causal = false, const Buffer<float, 4>* bias = nullptr) {
    const OnDevice<T, 4> device_q(q), device_k(k), device_v(v), device_out(out);
    const OnDevice<float, 3> device_lse(lse);
    SoftmaxAttentionOptions<float> options{
        .scale = scale, .causal = causal, .bias = {}, .lse = device_lse.view()};
    const Buffer<float, 4> none({1, 1, 1, 1});
    const OnDevice<float, 4> device_bias(bias == nullptr ? none : *bias);
    if (bias != nullptr) options.bias = device_bias.view();
    CHECK(softmax_attention_workspace<T>(Cuda{}, device_q.view(), device_k.view(), device_v.view(),
                                         device_out.view(), options) == 0);
    check_ok(softmax_attention<T>(Cuda{}, device_q.view(), device_k.view(), device_v.view(),
                                  device_out.view(), options));
    device_out.download(out);
    device_lse.download(lse);
    CHECK(out.intact());
    CHECK(lse.intact());
  }

  // out and lse are those of the formula; `logit`: the root mean square of the logits' products.
  void check(double scale, bool causal = false, const Buffer<float, 4>* bias = nullptr) const {
    Buffer<double, 4> expected(out.view().extents);
    Buffer<double, 3> expected_lse(lse.view().extents);
    const Buffer<double, 4> double_bias =
        bias == nullptr ? Buffer<double, 4>({1, 1, 1, 1}) : to_double(bias->view());
    reference::SoftmaxAttention options{.scale = scale, .causal = causal, .lse = expected_lse.view()};
    if (bias != nullptr) options.bias = double_bias.view();
    reference::softmax_attention(to_double(q), to_double(k), to_double(v), expected, options);
    if constexpr (sizeof(T) == 2) {
      check_rounding<T>(out, expected, 1.0);
    } else {
      check_relative(out, expected, 1e-5);
    }
    // A logit's sum of d products errs by some sqrt(d / 6) roundings of float at most, as tall as the largest few
    // of Nk logits, 4 deviations; the exponential and the logarithm by 4 more.
    const double d = static_cast<double>(shape.head_dim);
    const double logit = 4.0 * std::abs(scale) * std::sqrt(d) * (std::sqrt(d / 6.0) + 2.0) + 4.0;
    const double count = static_cast<double>(lse.view().elements());
    const Difference gap = difference(lse, expected_lse);
    check_rounding<float>(lse, expected_lse, 1.0, 2.0 * gap.norm + logit * std::sqrt(count));
  }
};

[[nodiscard]] double default_scale(const Shape& s) {
  return 1.0 / std::sqrt(static_cast<double>(s.head_dim));
}

}  // namespace

TEST_CASE_TEMPLATE("softmax_attention on Cuda follows its formula for every length", T, float, half) {
  for (const Index queries : {1, 63, 64, 65, 137})
    for (const Index keys : {1, 63, 64, 65, 137}) {
      const Shape shape = {1, queries, keys, 1, 64, 64};
      CAPTURE(text(shape));
      Case<T> c(shape, Layout::packed);
      c.run(default_scale(shape));
      c.check(default_scale(shape));
    }
}

TEST_CASE_TEMPLATE("softmax_attention on Cuda follows its formula for every head and layout", T, float, half,
                   bfloat16) {
  // Rows of the last two do not start at 16 bytes, or are too long for the tensor cores.
  for (const Shape& shape : {Shape{2, 33, 70, 2, 64, 64},
                             {1, 130, 65, 1, 32, 32},
                             {1, 20, 70, 2, 128, 128},
                             {1, 65, 70, 1, 40, 40},
                             {1, 17, 64, 1, 72, 72},
                             {1, 17, 65, 1, 80, 80},
                             {1, 140, 65, 1, 8, 8},
                             {1, 17, 66, 1, 64, 24},
                             {1, 17, 66, 1, 8, 72},
                             {2, 9, 70, 2, 7, 13},
                             {1, 5, 66, 1, 136, 130}}) {
    CAPTURE(text(shape));
    for (const Layout layout : all_layouts) {
      // Other heads differ from the first in no stride's treatment.
      if (shape.head_dim != 64 && (layout == Layout::permuted || layout == Layout::packed)) continue;
      CAPTURE(name(layout));
      Case<T> c(shape, layout);
      c.run(default_scale(shape));
      c.check(default_scale(shape));
    }
  }
}

TEST_CASE_TEMPLATE("softmax_attention on Cuda: heads of 512 channels and more", T, float, bfloat16) {
  for (const Shape shape : {Shape{1, 66, 65, 1, 512, 512}, {1, 3, 20, 1, 16, 530}}) {
    CAPTURE(text(shape));
    Case<T> c(shape, Layout::dense);
    c.run(default_scale(shape));
    c.check(default_scale(shape));
  }
}

TEST_CASE_TEMPLATE("softmax_attention on Cuda with causal mask, bias and any scale", T, float, bfloat16) {
  for (const Shape& shape : {Shape{2, 70, 137, 2, 32, 32},
                             {1, 65, 137, 1, 64, 64},
                             {1, 200, 70, 1, 64, 64},
                             {1, 40, 150, 1, 72, 128},
                             {1, 70, 66, 1, 24, 9}})
    for (const bool causal : {false, true})
      for (const bool biased : {false, true})
        for (const double scale : {0.3, -0.2, 0.0}) {
          if (scale != 0.3 && (causal == biased || shape.keys != 137)) continue;
          CAPTURE(text(shape));
          CAPTURE(causal);
          CAPTURE(biased);
          CAPTURE(scale);
          // One bias for all samples, its rows apart; some entries forbid a pair.
          Buffer<float, 4> bias({shape.batch, shape.heads, shape.queries, shape.keys},
                                {0, shape.queries * (shape.keys + 3), shape.keys + 3, 1}, 2);
          fill_normal(bias.view(), 4, 2.0);
          for (Index h = 0; h < shape.heads; ++h)
            for (Index i = 0; i < shape.queries; i += 3)
              for (Index j = i % 2; j < shape.keys; j += 5) bias.view()(0, h, i, j) = -infinity;
          Case<T> c(shape, Layout::permuted);
          c.run(scale, causal, biased ? &bias : nullptr);
          c.check(scale, causal, biased ? &bias : nullptr);
        }
}

TEST_CASE_TEMPLATE("on Cuda a query that sees no key gives 0, and a log-sum-exp of -infinity", T, float,
                   half) {
  // Causal with more queries than keys: the first 130 queries, a whole tile of them, come before every key.
  Case<T> c({1, 150, 20, 2, 16, 24}, Layout::dense);
  c.run(0.25, true);
  for_each_index(c.lse.view().extents,
                 [&](const auto& i) { CHECK((element(c.lse.view(), i) == -infinity) == (i[1] < 130)); });
  for_each_index(c.out.view().extents, [&](const auto& i) {
    if (i[1] < 130) CHECK(convert<float>(element(c.out.view(), i)) == 0.0f);
  });
  c.check(0.25, true);

  Buffer<float, 4> bias({1, 2, 150, 20});
  fill(bias.view(), 0.0);
  for (Index j = 0; j < 20; ++j) bias.view()(0, 1, 7, j) = -infinity;
  c.run(0.25, false, &bias);
  for_each_index(c.lse.view().extents, [&](const auto& i) {
    CHECK((element(c.lse.view(), i) == -infinity) == (i[1] == 7 && i[2] == 1));
  });
  c.check(0.25, false, &bias);
}

TEST_CASE_TEMPLATE("on Cuda logits far from 0 neither overflow nor lose the small ones", T, float, half,
                   bfloat16) {
  // Logits of standard deviation 50: most rows see one key, and the running maximum moves by hundreds.
  const Shape shape = {1, 40, 300, 1, 32, 32};
  Case<T> c(shape, Layout::dense, std::sqrt(50.0));
  c.run(default_scale(shape));
  Buffer<double, 4> expected(c.out.view().extents);
  Buffer<double, 3> expected_lse(c.lse.view().extents);
  reference::softmax_attention(to_double(c.q), to_double(c.k), to_double(c.v), expected,
                               {.scale = default_scale(shape), .lse = expected_lse.view()});
  // The error of a weight is the absolute error of its logit: the roundoff of float times some 150.
  if constexpr (sizeof(T) == 2) {
    check_rounding<T>(c.out, expected, 1.0);
  } else {
    check_relative(c.out, expected, 1e-5);
  }
  check_relative(c.lse, expected_lse, 2e-7);
}

TEST_CASE_TEMPLATE("on Cuda equal values come out, whatever the weights", T, float, half, bfloat16) {
  Case<T> c({1, 130, 200, 1, 64, 24}, Layout::dense);
  fill(c.v.view(), 3.0);
  c.run(0.125);
  // Here the weights' errors do not cancel out by sign; each is below u.
  const double allowed = 3.0 * (sizeof(T) == 2 ? unit_roundoff<T> : 16.0 * unit_roundoff<T>);
  for_each_index(c.out.view().extents, [&](const auto& i) {
    CHECK(std::abs(convert<double>(element(c.out.view(), i)) - 3.0) <= allowed);
  });
}

TEST_CASE_TEMPLATE("on Cuda a query does not see the others, and a causal one not the later keys", T, float,
                   half) {
  for (const bool causal : {false, true}) {
    CAPTURE(causal);
    Case<T> c({1, 90, 90, 1, 24, 24}, Layout::dense), other({1, 90, 90, 1, 24, 24}, Layout::dense);
    c.run(0.2, causal);
    for (Index i = 0; i < 24; ++i) {
      other.q.view()(0, 37, 0, i) = convert<T>(std::numeric_limits<float>::quiet_NaN());
      if (causal) other.k.view()(0, 60, 0, i) = convert<T>(2.5f);
    }
    other.run(0.2, causal);
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

TEST_CASE_TEMPLATE("on Cuda a hidden key cannot be observed, whatever its bits", T, float, half, bfloat16) {
  const auto run = [](hidden_keys::Problem<T>& p) {
    const OnDevice<T, 4> q(p.q), k(p.k), v(p.v), out(p.out);
    const OnDevice<float, 4> bias(p.bias);
    const OnDevice<float, 3> lse(p.lse);
    check_ok(softmax_attention<T>(Cuda{}, q.view(), k.view(), v.view(), out.view(),
                                  p.options(bias.view(), lse.view())));
    out.download(p.out);
    lse.download(p.lse);
  };
  using hidden_keys::Shape;
  // With tensor cores, but in float, and without; fewer queries than keys and more.
  const std::span all(hidden_keys::poisons);
  hidden_keys::check<T>(Shape{1, 100, 100, 1, 8, 16}, run, all);
  hidden_keys::check<T>(Shape{1, 20, 66, 2, 7, 13}, run, all.first(2));
  if constexpr (std::is_same_v<T, half>) {
    hidden_keys::check<T>(Shape{2, 35, 70, 1, 40, 64}, run, all.first(3));
    hidden_keys::check<T>(Shape{1, 150, 70, 1, 64, 8}, run, all.first(3));
    hidden_keys::check<T>(Shape{1, 20, 66, 1, 72, 128}, run, all.first(1));
  }
  if constexpr (std::is_same_v<T, float>)
    hidden_keys::check<T>(Shape{1, 10, 70, 1, 8, 530}, run, all.first(1));
  hidden_keys::check_blind<T>({1, 70, 150, 2, 24, 24}, run);
  hidden_keys::check_bias<T>(run);
}

TEST_CASE_TEMPLATE("softmax_attention on Cuda gives the same bits again, in any layout", T, float, bfloat16) {
  // Rows of 64 channels start at 16 bytes in each of these; those of 7 in none.
  for (const Index head_dim : {64, 7}) {
    const Shape shape = {2, 70, 130, 2, head_dim, head_dim};
    CAPTURE(text(shape));
    Case<T> first(shape, Layout::dense);
    first.run(0.2, true);
    for (const Layout layout : {Layout::dense, Layout::permuted, Layout::packed}) {
      CAPTURE(name(layout));
      Case<T> c(shape, layout);
      c.run(0.2, true);
      CHECK(same_bits(c.out, first.out));
      CHECK(same_bits(c.lse, first.lse));
    }
  }
}

TEST_CASE("softmax_attention on Cuda refuses what it cannot do") {
  const Case<half> c({2, 3, 5, 2, 8, 16}, Layout::dense);
  const Buffer<float, 4> bias_memory({2, 2, 3, 5});
  const OnDevice<half, 4> device_q(c.q), device_k(c.k), device_v(c.v), device_out(c.out);
  const OnDevice<float, 4> device_bias(bias_memory);
  const OnDevice<float, 3> device_lse(c.lse);
  const TensorView<half, 4> q = device_q.view(), k = device_k.view(), v = device_v.view(),
                            out = device_out.view();
  const TensorView<float, 4> bias = device_bias.view();
  const TensorView<float, 3> lse = device_lse.view();
  using Options = SoftmaxAttentionOptions<float>;
  const auto status = [&](const TensorView<half, 4>& q_, const TensorView<half, 4>& k_,
                          const TensorView<half, 4>& v_, const TensorView<half, 4>& out_,
                          const Options& options = {}) {
    return softmax_attention<half>(Cuda{}, q_, k_, v_, out_, options);
  };
  const auto with_bias = [&](const TensorView<float, 4>& b) {
    return status(q, k, v, out, {.scale = {}, .causal = false, .bias = b, .lse = {}}).code;
  };
  for (std::size_t axis = 0; axis < 4; ++axis) {
    CHECK(status(with_extent(q, axis, 0), k, v, out).code == Code::empty);
    CHECK(status(q, with_extent(k, axis, 9), v, out).code == Code::shape);
    CHECK(status(q, k, with_extent(v, axis, 9), out).code == Code::shape);
    CHECK(status(q, k, v, with_extent(out, axis, 9)).code == Code::shape);
    CHECK(with_bias(with_extent(bias, axis, 9)) == Code::shape);
  }
  CHECK(status(with_last_stride(q), k, v, out).code == Code::stride);
  CHECK(status(q, k, v, with_last_stride(out)).code == Code::stride);
  CHECK(with_bias(with_last_stride(bias)) == Code::stride);
  CHECK(status(q, without_memory(k), v, out).code == Code::null_data);
  CHECK(status(q, k, v, out, {.scale = {}, .causal = false, .bias = {}, .lse = without_memory(lse)}).code ==
        Code::null_data);
  CHECK(status(q, k, v, out, {.scale = std::nan(""), .causal = false, .bias = {}, .lse = {}}).code ==
        Code::option);
  CHECK(status(q, k, k, q).code != Code::ok);
  const Index too_many = (Index{1} << 29) + 1;
  const Status many = status(q, with_extent(k, 1, too_many), with_extent(v, 1, too_many), out);
  CHECK(many.code == Code::option);
  CHECK(many.actual == too_many);
}

#if !defined(__CUDACC__)  // a device does not count
TEST_CASE(
    "on tensor cores q is read and out written once, k and v once a tile of queries, without conflicts") {
  if (!emu::checked()) return;
  const Shape shape = {1, 256, 320, 1, 64, 64};
  Case<bfloat16> c(shape, Layout::packed);
  const OnDevice<bfloat16, 4> q(c.q), k(c.k), v(c.v), out(c.out);
  const emu::Count count;
  check_ok(softmax_attention<bfloat16>(Cuda{}, q.view(), k.view(), v.view(), out.view()));
  const auto row = static_cast<std::uint64_t>(shape.head_dim) * sizeof(bfloat16);
  const auto queries = static_cast<std::uint64_t>(shape.queries),
             keys = static_cast<std::uint64_t>(shape.keys);
  const std::uint64_t tiles = queries / detail::FlashTile<64>::queries;
  CHECK(count.global_bytes_loaded() == row * (queries + 2 * keys * tiles));
  CHECK(count.global_bytes_stored() == row * queries);
  CHECK(count.ratio(emu::Kind::global_load) == 1.0);
  CHECK(count.ratio(emu::Kind::global_store) == 1.0);
  CHECK(count.worst_bank_conflict() == 1.0);
  CHECK(count.mma() == 2 * (queries / 16) * (keys / 8) * (64 / 16));
}

TEST_CASE(
    "without tensor cores shared memory is read without conflicts, and global memory in whole sectors") {
  if (!emu::checked()) return;
  const Case<float> c({1, 64, 128, 1, 64, 64}, Layout::packed);
  const OnDevice<float, 4> q(c.q), k(c.k), v(c.v), out(c.out);
  const emu::Count count;
  check_ok(softmax_attention<float>(Cuda{}, q.view(), k.view(), v.view(), out.view()));
  CHECK(count.ratio(emu::Kind::global_load) == 1.0);
  CHECK(count.ratio(emu::Kind::global_store) == 1.0);
  CHECK(count.worst_bank_conflict() == 1.0);
}

TEST_CASE("on tensor cores a causal mask spares the keys behind the diagonal") {
  if (!emu::checked()) return;
  const Case<half> c({1, 256, 256, 1, 32, 32}, Layout::dense);
  const OnDevice<half, 4> q(c.q), k(c.k), v(c.v), out(c.out);
  const emu::Count count;
  check_ok(softmax_attention<half>(Cuda{}, q.view(), k.view(), v.view(), out.view(),
                                   {.scale = {}, .causal = true, .bias = {}, .lse = {}}));
  // The guarded kernel reads what is left, and ends.
  CHECK(count.global_bytes_loaded() == 32 * sizeof(half) * (256 + 2 * (128 + 256) + 256));
  // Of 8 x 4 pairs of 32 queries and 64 keys 20 hold a key that is seen; each has 2 x 8 x 2 products and 2 x 4 x 4.
  CHECK(count.mma() == 20 * (32 + 32));
}
#endif

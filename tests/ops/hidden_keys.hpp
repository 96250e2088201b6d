// A key that a query does not see has no influence on it, whatever the bits of the key and of its value: what the tests of
// softmax attention on the host and on a device require.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include <linattn/ops/softmax_attention.hpp>

#include "../reference/softmax_attention.hpp"
#include "../support.hpp"

namespace hidden_keys {

using linattn::Compute;
using linattn::convert;
using linattn::Index;
using namespace support;

struct Shape {
  Index batch, queries, keys, heads, head_dim, value_dim;
};
struct Mask {
  bool causal, biased;
};
inline constexpr std::array masks = {Mask{true, false}, Mask{false, true}, Mask{true, true}};

enum class Poison { nan, infinity, minus_infinity, largest, subnormal };
inline constexpr std::array poisons = {Poison::nan, Poison::infinity, Poison::minus_infinity, Poison::largest,
                                       Poison::subnormal};
template <class T>
[[nodiscard]] T value(Poison poison) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  constexpr int fraction = std::is_same_v<T, double>          ? 52
                           : std::is_same_v<T, float>         ? 23
                           : std::is_same_v<T, linattn::half> ? 10
                                                              : 7;
  constexpr int exponent = std::is_same_v<T, double> ? 1023 : std::is_same_v<T, linattn::half> ? 15 : 127;
  switch (poison) {
    case Poison::nan:
      break;
    case Poison::infinity:
      return convert<T>(infinity);
    case Poison::minus_infinity:
      return convert<T>(-infinity);
    case Poison::largest:
      return convert<T>(std::ldexp(2.0 - std::ldexp(1.0, -fraction), exponent));
    case Poison::subnormal:
      return convert<T>(std::ldexp(1.0, 1 - exponent - fraction));
  }
  return convert<T>(std::numeric_limits<double>::quiet_NaN());
}

// What an op is given, and what it leaves.
template <class T>
struct Problem {
  using C = Compute<T>;
  Shape shape;
  Mask mask;
  Buffer<T, 4> q, k, v, out;
  Buffer<C, 4> bias;
  Buffer<C, 3> lse;
  std::vector<std::array<Index, 3>> poisoned;  // keys (b, j, h)

  Problem(const Shape& s, Mask m)
      : shape(s),
        mask(m),
        q({s.batch, s.queries, s.heads, s.head_dim}),
        k({s.batch, s.keys, s.heads, s.head_dim}),
        v({s.batch, s.keys, s.heads, s.value_dim}),
        out({s.batch, s.queries, s.heads, s.value_dim}),
        bias({s.batch, s.heads, s.queries, s.keys}),
        lse({s.batch, s.queries, s.heads}) {
    fill_normal(q.view(), 1);
    fill_normal(k.view(), 2);
    fill_normal(v.view(), 3);
    fill_normal(bias.view(), 4);
    // Forbidden are a quarter of the pairs, a fifth of the queries and a third of the keys.
    Random random(5);
    for_each_index(bias.view().extents, [&](const auto& i) {
      const auto [b, h, query, key] = i;
      if (random.below(4) == 0 || (query * 7 + h + b) % 5 == 0 || (key * 5 + h) % 3 == 0)
        element(bias.view(), i) = -std::numeric_limits<C>::infinity();
    });
  }

  [[nodiscard]] double scale() const { return 1.0 / std::sqrt(static_cast<double>(shape.head_dim)); }
  // Those of the op, with views of these buffers or of copies of them.
  [[nodiscard]] linattn::SoftmaxAttentionOptions<C> options(const linattn::TensorView<C, 4>& b,
                                                            const linattn::TensorView<C, 3>& l) const {
    linattn::SoftmaxAttentionOptions<C> result{.scale = {}, .causal = mask.causal, .bias = {}, .lse = l};
    if (mask.biased) result.bias = b;
    return result;
  }
  [[nodiscard]] bool sees(Index b, Index h, Index i, Index j) const {
    if (mask.causal && j > i + shape.keys - shape.queries) return false;
    return !mask.biased || bias.view()(b, h, i, j) != -std::numeric_limits<C>::infinity();
  }
  [[nodiscard]] bool sees_any(Index b, Index h, Index i) const {
    for (Index j = 0; j < shape.keys; ++j)
      if (sees(b, h, i, j)) return true;
    return false;
  }
  [[nodiscard]] bool sees_poison(Index b, Index h, Index i) const {
    for (const auto& [pb, j, ph] : poisoned)
      if (pb == b && ph == h && sees(b, h, i, j)) return true;
    return false;
  }

  // The poison takes the place of whole keys and values, and of single channels; `with` zero, of the same.
  void put(T with, std::uint64_t seed) {
    Random random(seed);
    poisoned.clear();
    for (Index b = 0; b < shape.batch; ++b)
      for (Index h = 0; h < shape.heads; ++h)
        for (Index n = 0; n < 1 + shape.keys / 40; ++n) {
          const Index j = random.below(shape.keys), where = random.below(4);
          poisoned.push_back({b, j, h});
          for (const auto& [view, extent] :
               {std::pair{k.view(), shape.head_dim}, std::pair{v.view(), shape.value_dim}}) {
            const Index channel = random.below(extent);
            const bool whole = random.below(2) == 0;
            if (where == (view.data == k.view().data ? 0 : 1)) continue;
            for (Index c = 0; c < extent; ++c)
              if (whole || c == channel) view(b, j, h, c) = with;
          }
        }
  }
};

// The bits of a row of out and of its log-sum-exp are those of another.
template <class T>
[[nodiscard]] bool same_row(const Problem<T>& x, const Problem<T>& y, Index b, Index i, Index h) {
  using linattn::TensorView;
  const std::array<Index, 1> size{x.shape.value_dim}, one{1};
  return same_bits(TensorView<T, 1>(x.out.view().pointer(b, i, h), size),
                   TensorView<T, 1>(y.out.view().pointer(b, i, h), size)) &&
         same_bits(TensorView<Compute<T>, 1>(x.lse.view().pointer(b, i, h), one),
                   TensorView<Compute<T>, 1>(y.lse.view().pointer(b, i, h), one));
}

// run(problem) computes out and lse. Rows that see no poison have the bits that they have with zeros in its place; where
// others see a NaN or an infinity, they are finite or not as the formula is.
template <class T, class Run>
void check(const Shape& shape, const Run& run, std::span<const Poison> kinds = poisons) {
  CAPTURE(text(std::array<Index, 6>{shape.batch, shape.queries, shape.keys, shape.heads, shape.head_dim,
                                    shape.value_dim}));
  Index spared = 0;
  for (const Mask mask : masks)
    for (const Poison poison : kinds) {
      CAPTURE(mask.causal);
      CAPTURE(mask.biased);
      CAPTURE(static_cast<int>(poison));
      Problem<T> with(shape, mask), without(shape, mask);
      with.put(value<T>(poison), 6);
      without.put(convert<T>(0.0), 6);
      run(with);
      run(without);

      Buffer<double, 4> expected(with.out.view().extents);
      Buffer<double, 3> expected_lse(with.lse.view().extents);
      const auto bias = to_double(with.bias);
      reference::SoftmaxAttention same{
          .scale = with.scale(), .causal = mask.causal, .lse = expected_lse.view()};
      if (mask.biased) same.bias = bias.view();
      reference::softmax_attention(to_double(with.q), to_double(with.k), to_double(with.v), expected, same);

      const bool follows =
          poison == Poison::nan || poison == Poison::infinity || poison == Poison::minus_infinity;
      const auto alike = [&](auto got, double formula) {
        const auto wide = convert<double>(got);
        return poison == Poison::nan ? std::isnan(wide) == std::isnan(formula)
                                     : std::isfinite(wide) == std::isfinite(formula);
      };
      Index other_bits = 0, unlike = 0, not_zero = 0;
      for_each_index(with.lse.view().extents, [&](const auto& at) {
        const auto [b, i, h] = at;
        const bool seen = with.sees_poison(b, h, i), blind = !with.sees_any(b, h, i);
        spared += !seen;
        other_bits += !seen && !same_row(with, without, b, i, h);
        not_zero += blind && with.lse.view()(b, i, h) != -std::numeric_limits<Compute<T>>::infinity();
        unlike += seen && follows && !alike(with.lse.view()(b, i, h), expected_lse.view()(b, i, h));
        for (Index c = 0; c < shape.value_dim; ++c) {
          not_zero += blind && convert<double>(with.out.view()(b, i, h, c)) != 0.0;
          unlike += seen && follows && !alike(with.out.view()(b, i, h, c), expected.view()(b, i, h, c));
        }
      });
      CHECK(other_bits == 0);
      CHECK(unlike == 0);
      CHECK(not_zero == 0);
    }
  CHECK(spared > 0);
}

// Nothing but what is not a number, and no key that anybody sees.
template <class T, class Run>
void check_blind(const Shape& shape, const Run& run) {
  Problem<T> p(shape, {false, true});
  for (const auto& view : {p.q.view(), p.k.view(), p.v.view()})
    fill(view, std::numeric_limits<double>::quiet_NaN());
  fill(p.bias.view(), -std::numeric_limits<double>::infinity());
  run(p);
  Index not_zero = 0;
  for_each_index(p.out.view().extents,
                 [&](const auto& i) { not_zero += convert<double>(element(p.out.view(), i)) != 0.0; });
  for_each_index(p.lse.view().extents, [&](const auto& i) {
    not_zero += element(p.lse.view(), i) != -std::numeric_limits<Compute<T>>::infinity();
  });
  CHECK(not_zero == 0);
}

// A bias that is NaN is seen with its key, and hidden with it.
template <class T, class Run>
void check_bias(const Run& run) {
  const Shape shape{1, 70, 70, 1, 16, 16};
  Problem<T> p(shape, {true, true}), clean(shape, {true, true});
  for (const Problem<T>* each : {&p, &clean}) fill(each->bias.view(), 0.0);
  p.bias.view()(0, 0, 40, 20) = std::numeric_limits<Compute<T>>::quiet_NaN();
  p.bias.view()(0, 0, 10, 20) = std::numeric_limits<Compute<T>>::quiet_NaN();
  run(p);
  run(clean);
  for (Index i = 0; i < shape.queries; ++i) {
    CAPTURE(i);
    if (i != 40) CHECK(same_row(p, clean, 0, i, 0));
    for (Index c = 0; c < shape.value_dim; ++c)
      CHECK(std::isnan(convert<double>(p.out.view()(0, i, 0, c))) == (i == 40));
  }
}

}  // namespace hidden_keys

// What the kernels rely on in Pack, and Pack in Eigen: an Eigen that differs shows here first.

#include <linattn/detail/gemm.hpp>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../support.hpp"

using namespace linattn;
using namespace support;
using linattn::detail::Pack;
using linattn::detail::Tile;

namespace {

template <class T>
constexpr T infinity = std::numeric_limits<T>::infinity();
template <class T>
constexpr T not_a_number = std::numeric_limits<T>::quiet_NaN();

// f of a pack of equal values, which must be equal in every lane.
template <class T, class F>
T apply(const F& f, T value) {
  T out[Pack<T>::size];
  f(Pack<T>(value)).store(out);
  bool equal = true;
  for (const T& lane : out) equal = equal && std::memcmp(&lane, out, sizeof(T)) == 0;
  if (!equal) FAIL("lanes differ at ", value);
  return out[0];
}
template <class T>
T exp_of(T x) {
  return apply([](Pack<T> p) { return detail::exp(p); }, x);
}

}  // namespace

TEST_CASE_TEMPLATE("packs load, store and compute lane by lane", T, float, double) {
  using P = Pack<T>;
  constexpr int n = P::size;
  T a[n + 1], b[n], c[n], out[n + 1];
  for (int i = 0; i < n; ++i) {
    a[i + 1] = static_cast<T>(3 * i + 1);  // one off any alignment
    b[i] = static_cast<T>(i - 2) / T(4);
    c[i] = static_cast<T>(7 - i);
  }
  const P x = P::load(a + 1), y = P::load(b), z = P::load(c);
  const auto check = [&](P value, auto expected) {
    value.store(out + 1);
    for (int i = 0; i < n; ++i) CHECK(out[i + 1] == expected(a[i + 1], b[i], c[i]));
  };
  check(x, [](T p, T, T) { return p; });
  check(x + y, [](T p, T q, T) { return p + q; });
  check(x - y, [](T p, T q, T) { return p - q; });
  check(x * y, [](T p, T q, T) { return p * q; });
  check(y / x, [](T p, T q, T) { return q / p; });
  check(-y, [](T, T q, T) { return -q; });
  check(detail::fma(x, y, z), [](T p, T q, T r) { return p * q + r; });  // exact here
  check(detail::max(y, z), [](T, T q, T r) { return std::max(q, r); });
  check(detail::min(y, z), [](T, T q, T r) { return std::min(q, r); });
  check(detail::select_less(y, z, x, z), [](T p, T q, T r) { return q < r ? p : r; });
  const P zero = P::zero(), one(T(1)), nan(not_a_number<T>);
  check(detail::select_less(zero, one, y, nan), [](T, T q, T) { return q; });
  check(detail::select_less(one, zero, nan, y), [](T, T q, T) { return q; });
  check(P::zero(), [](T, T, T) { return T(0); });
  T sum = 0, top = b[0];
  for (const T v : b) sum += v, top = std::max(top, v);
  CHECK(detail::reduce_add(y) == sum);
  CHECK(detail::reduce_max(y) == top);
}

TEST_CASE_TEMPLATE("partial loads read, and partial stores write, no more than they say", T, float, double,
                   half, bfloat16) {
  using C = Compute<T>;
  constexpr int n = Pack<C>::size;
  for (int count = 0; count <= n; ++count) {
    Buffer<T, 1> from({count}), to({count});
    fill_normal(from.view(), 1);
    const Pack<C> pack = detail::load_partial<C>(from.view().data, count);
    C wide[n];
    pack.store(wide);
    for (int i = 0; i < n; ++i)
      CHECK(wide[i] == (i < count ? convert<C>(from.view()(i)) : C(0)));  // poison lies beyond
    detail::store_partial(to.view().data, pack, count);
    CHECK(same_bits(from, to));
    CHECK(to.intact());
  }
}

TEST_CASE_TEMPLATE("a transpose swaps rows and lanes", T, float, double) {
  constexpr int n = Pack<T>::size;
  Pack<T> rows[n];
  T values[n];
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) values[j] = static_cast<T>(100 * i + j);
    rows[i] = Pack<T>::load(values);
  }
  detail::transpose(rows);
  for (int i = 0; i < n; ++i) {
    rows[i].store(values);
    for (int j = 0; j < n; ++j) CHECK(values[j] == static_cast<T>(100 * j + i));
  }
}

TEST_CASE_TEMPLATE("a NaN in the first argument of max and min stays", T, float, double) {
  CHECK(std::isnan(apply<T>([](Pack<T> p) { return detail::max(p, Pack<T>(T(1))); }, not_a_number<T>)));
  CHECK(std::isnan(apply<T>([](Pack<T> p) { return detail::min(p, Pack<T>(T(1))); }, not_a_number<T>)));
}

TEST_CASE("every 16-bit value widens as its type says, and comes back") {
  const auto all = []<class S>(S) {
    using P = Pack<float>;
    S from[P::size], back[P::size];
    float wide[P::size];
    Index wrong = 0;
    for (std::uint32_t first = 0; first < 65536; first += P::size) {
      for (std::uint32_t i = 0; i < P::size; ++i)
        from[i] = S::from_bits(static_cast<std::uint16_t>(first + i));
      detail::load<float>(from).store(wide);
      detail::store(back, detail::load<float>(from));
      for (int i = 0; i < P::size; ++i) {
        const float value = static_cast<float>(from[i]);
        if (std::isnan(value)) {
          wrong += !std::isnan(wide[i]) || !std::isnan(static_cast<float>(back[i]));
        } else {
          wrong += std::bit_cast<std::uint32_t>(wide[i]) != std::bit_cast<std::uint32_t>(value);
          wrong += back[i].bits != from[i].bits;
        }
      }
    }
    CHECK(wrong == 0);
  };
  all(half{});
  all(bfloat16{});
}

TEST_CASE("floats narrow to 16 bits as the types' constructors do") {
  const auto sweep = []<class S>(S) {
    using P = Pack<float>;
    float from[P::size];
    S to[P::size];
    Index wrong = 0;
    // A stride that is prime to the powers of two visits all exponents and many roundings, ties among them.
    for (std::uint64_t first = 0; first < (std::uint64_t{1} << 32); first += 4099) {
      for (std::uint32_t i = 0; i < P::size; ++i)
        from[i] = std::bit_cast<float>(static_cast<std::uint32_t>(first + i));
      detail::store(to, P::load(from));
      for (int i = 0; i < P::size; ++i) wrong += to[i].bits != S(from[i]).bits;
    }
    for (std::uint32_t upper = 0; upper < 65536; ++upper) {  // the ties and their neighbours
      for (std::uint32_t i = 0; i < P::size; ++i)
        from[i] = std::bit_cast<float>((upper << 16) + (i % 2 == 0 ? 0x8000u : 0x1000u) + i / 2 % 3 - 1);
      detail::store(to, P::load(from));
      for (int i = 0; i < P::size; ++i) wrong += to[i].bits != S(from[i]).bits;
    }
    CHECK(wrong == 0);
  };
  sweep(half{});
  sweep(bfloat16{});
}

TEST_CASE("exp is exact to one rounding and a little, and to the ends of the range") {
  double worst = 0.0;
  for (float x = -87.3f; x < 88.7f; x += 0.000917f) {
    const double exact = std::exp(static_cast<double>(x));
    worst = std::max(worst, std::abs(static_cast<double>(exp_of(x)) / exact - 1.0));
  }
  CHECK(worst < 1.2e-7);
  CHECK(worst > 1e-8);  // the sweep did sweep
  worst = 0.0;
  for (double x = -708.3; x < 709.7; x += 0.00917) {
    const long double exact = std::exp(static_cast<long double>(x));
    worst = std::max(worst, static_cast<double>(std::abs(static_cast<long double>(exp_of(x)) / exact - 1)));
  }
  CHECK(worst < 2.5e-16);
  for (const float x : {-90.0f, -95.5f, -100.0f, -103.0f})  // subnormal
    CHECK(std::abs(exp_of(x) - std::exp(x)) <= std::numeric_limits<float>::denorm_min());
  for (const double x : {-710.0, -725.5, -740.0, -745.0})
    CHECK(std::abs(exp_of(x) - std::exp(x)) <= std::numeric_limits<double>::denorm_min());
}

TEST_CASE_TEMPLATE("exp and sigmoid at 0, infinity and NaN", T, float, double) {
  CHECK(exp_of(T(0)) == T(1));
  CHECK(exp_of(-T(0)) == T(1));
  CHECK(exp_of(-infinity<T>) == T(0));
  CHECK(exp_of(std::numeric_limits<T>::lowest()) == T(0));
  CHECK(exp_of(infinity<T>) == infinity<T>);
  CHECK(exp_of(std::numeric_limits<T>::max()) == infinity<T>);
  CHECK(std::isnan(exp_of(not_a_number<T>)));
  const auto sigmoid = [](Pack<T> p) { return detail::sigmoid(p); };
  CHECK(apply<T>(sigmoid, T(0)) == T(0.5));
  CHECK(apply<T>(sigmoid, infinity<T>) == T(1));
  CHECK(apply<T>(sigmoid, -infinity<T>) == T(0));
  CHECK(std::isnan(apply<T>(sigmoid, not_a_number<T>)));
  for (const double x : {-80.0, -20.0, -1.5, -1e-3, 0.3, 7.0, 40.0}) {
    const double exact = 1.0 / (1.0 + std::exp(-static_cast<double>(static_cast<T>(x))));
    CHECK(std::abs(static_cast<double>(apply<T>(sigmoid, static_cast<T>(x))) / exact - 1.0) <
          4.0 * std::numeric_limits<T>::epsilon());
  }
}

TEST_CASE_TEMPLATE("the register tile multiplies, for any strides, rows and columns", T, float, double) {
  constexpr Index width = Tile<T>::columns, pack = Pack<T>::size;
  const auto integer = [](Index i, Index salt) { return static_cast<T>((i * 37 + salt) % 17 - 8); };
  for (const Index rows : {1, 2, 3, 5, 7, 8, 23})
    for (const Index depth : {1, 5, 64})
      for (const bool transposed : {false, true})
        for (const Index columns : {width, width - 1, pack, Index{1}}) {
          CAPTURE(rows);
          CAPTURE(depth);
          CAPTURE(columns);
          Buffer<T, 2> a(transposed ? std::array<Index, 2>{depth, rows} : std::array<Index, 2>{rows, depth});
          Buffer<T, 2> b({depth, columns}), b_transposed({columns, depth});
          Buffer<T, 2> panel({depth, width}), other({depth, width}), c({rows, width});
          for_each_index(a.view().extents, [&](const auto& i) {
            element(a.view(), i) =
                transposed ? integer(i[1] * depth + i[0], 1) : integer(i[0] * depth + i[1], 1);
          });
          for_each_index(b.view().extents, [&](const auto& i) {
            element(b.view(), i) = b_transposed.view()(i[1], i[0]) = integer(i[0] * columns + i[1], 5);
          });
          for (Index half_panel = 0; half_panel < 2; ++half_panel) {
            const Index first = half_panel * pack;
            detail::pack_rows(b.view().data + first, columns, depth, columns - first,
                              panel.view().data + first);
            detail::pack_transposed(b_transposed.view().data + first * depth, depth, depth, columns - first,
                                    other.view().data + first);
          }
          CHECK(same_bits(panel, other));
          CHECK(panel.intact());
          const Index row_stride = transposed ? 1 : depth, depth_stride = transposed ? rows : 1;
          detail::multiply_panel(a.view().data, row_stride, depth_stride, rows, panel.view().data, depth,
                                 detail::StoreTile<T>{c.view().data, width});
          detail::multiply_panel(a.view().data, row_stride, depth_stride, rows, panel.view().data, depth,
                                 detail::AddTile<T>{c.view().data, width});
          CHECK(c.intact());
          Index wrong = 0;
          for (Index r = 0; r < rows; ++r)
            for (Index j = 0; j < width; ++j) {
              T sum = 0;
              for (Index k = 0; j < columns && k < depth; ++k)
                sum += integer(r * depth + k, 1) * integer(k * columns + j, 5);
              wrong += c.view()(r, j) != 2 * sum;
            }
          CHECK(wrong == 0);
        }
}

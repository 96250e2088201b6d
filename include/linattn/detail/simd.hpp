// A SIMD pack of floats or doubles: Eigen's packets behind the few operations that the kernels use.
// Eigen names its packets internal; this header is the only one that does, and tests/detail pins what it
// relies on. Packets are all that the library takes of Eigen: what Eigen runs on threads, its products, is not among
// them.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__GNUC__)
#pragma GCC diagnostic push
// GCC 12 takes the undefined operand of its own AVX-512 intrinsics for a mistake of the caller (GCC bug
// 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
// A packet type as a template argument loses its alignment attribute, which the stored type restores.
#pragma GCC diagnostic ignored "-Wignored-attributes"
#endif

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <Eigen/Core>

#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

#if defined(__GNUC__)
// Stages of a kernel stay functions of their own: inlined into one, the compiler keeps the constants of one
// stage in registers through the product of another.
#define LINATTN_NOINLINE __attribute__((noinline))
#else
#define LINATTN_NOINLINE
#endif

#if defined(__GNUC__)
#define LINATTN_INLINE_LAMBDA __attribute__((always_inline))
#else
#define LINATTN_INLINE_LAMBDA
#endif

// f(0), f(1), ... f(N - 1), each index a constant of its own type: an array that is indexed by nothing else
// stays in registers, while a loop that the compiler unrolls (late, or not at all) may leave it in memory.
template <int N, class F>
LINATTN_INLINE void unroll(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) LINATTN_INLINE_LAMBDA {
    (f(std::integral_constant<int, I>{}), ...);
  }
  (std::make_integer_sequence<int, N>{});
}

template <class T>
struct Pack {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>, "packs hold float or double");
  using Raw = typename Eigen::internal::packet_traits<T>::type;
  static constexpr int size = Eigen::internal::unpacket_traits<Raw>::size;

  Raw raw;

  Pack() = default;
  LINATTN_INLINE Pack(Raw r) : raw(r) {}  // NOLINT: implicit on purpose
  // Without SIMD a packet is the scalar itself, and the constructor above is this one.
  template <class S>
  requires(std::is_same_v<S, T> && !std::is_same_v<S, Raw>) LINATTN_INLINE Pack(S value)
      : raw(Eigen::internal::pset1<Raw>(value)) {}  // NOLINT: implicit on purpose

  [[nodiscard]] static LINATTN_INLINE Pack zero() { return Pack(Eigen::internal::pset1<Raw>(T(0))); }
  [[nodiscard]] static LINATTN_INLINE Pack load(const T* p) { return Eigen::internal::ploadu<Raw>(p); }
  LINATTN_INLINE void store(T* p) const { Eigen::internal::pstoreu(p, raw); }

  friend LINATTN_INLINE Pack operator+(Pack a, Pack b) { return Eigen::internal::padd(a.raw, b.raw); }
  friend LINATTN_INLINE Pack operator-(Pack a, Pack b) { return Eigen::internal::psub(a.raw, b.raw); }
  friend LINATTN_INLINE Pack operator*(Pack a, Pack b) { return Eigen::internal::pmul(a.raw, b.raw); }
  friend LINATTN_INLINE Pack operator/(Pack a, Pack b) { return Eigen::internal::pdiv(a.raw, b.raw); }
  friend LINATTN_INLINE Pack operator-(Pack a) { return Eigen::internal::pnegate(a.raw); }
  LINATTN_INLINE Pack& operator+=(Pack b) { return *this = *this + b; }
  LINATTN_INLINE Pack& operator*=(Pack b) { return *this = *this * b; }
};

// a * b + c, rounded once where the machine can.
template <class T>
[[nodiscard]] LINATTN_INLINE Pack<T> fma(Pack<T> a, Pack<T> b, Pack<T> c) {
  return Eigen::internal::pmadd(a.raw, b.raw, c.raw);
}
[[nodiscard]] LINATTN_INLINE float fma(float a, float b, float c) { return a * b + c; }
[[nodiscard]] LINATTN_INLINE double fma(double a, double b, double c) { return a * b + c; }

// A NaN in the first argument stays.
template <class T>
[[nodiscard]] LINATTN_INLINE Pack<T> max(Pack<T> a, Pack<T> b) {
  return Eigen::internal::pmax(a.raw, b.raw);
}
template <class T>
[[nodiscard]] LINATTN_INLINE Pack<T> min(Pack<T> a, Pack<T> b) {
  return Eigen::internal::pmin(a.raw, b.raw);
}
// x where a < b, y elsewhere; what is not taken may be NaN.
template <class T>
[[nodiscard]] LINATTN_INLINE Pack<T> select_less(Pack<T> a, Pack<T> b, Pack<T> x, Pack<T> y) {
  return Eigen::internal::pselect(Eigen::internal::pcmp_lt(a.raw, b.raw), x.raw, y.raw);
}
template <class T>
[[nodiscard]] LINATTN_INLINE T reduce_add(Pack<T> a) {
  return Eigen::internal::predux(a.raw);
}
template <class T>
[[nodiscard]] LINATTN_INLINE T reduce_max(Pack<T> a) {
  return Eigen::internal::predux_max(a.raw);
}

#if defined(__AVX512F__)
// Eigen's own leaves half of its steps in memory.
LINATTN_INLINE void transpose(__m512 (&r)[16]) {
  __m512 t[16];
  unroll<8>([&](auto i) LINATTN_INLINE_LAMBDA {  // rows 2 i and 2 i + 1 in turn
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  });
  unroll<4>([&](auto i) LINATTN_INLINE_LAMBDA {  // column c of each 128-bit lane, rows 4 i to 4 i + 3
    unroll<2>([&](auto c) LINATTN_INLINE_LAMBDA {
      const __m512d a = _mm512_castps_pd(t[4 * i + c]), b = _mm512_castps_pd(t[4 * i + c + 2]);
      r[4 * i + 2 * c] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[4 * i + 2 * c + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    });
  });
  unroll<4>([&](auto c) LINATTN_INLINE_LAMBDA {  // 4 x 4 lanes change places
    const __m512 even01 = _mm512_shuffle_f32x4(r[c], r[c + 4], 0x88);
    const __m512 even23 = _mm512_shuffle_f32x4(r[c + 8], r[c + 12], 0x88);
    const __m512 odd01 = _mm512_shuffle_f32x4(r[c], r[c + 4], 0xdd);
    const __m512 odd23 = _mm512_shuffle_f32x4(r[c + 8], r[c + 12], 0xdd);
    t[c] = _mm512_shuffle_f32x4(even01, even23, 0x88);
    t[c + 4] = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
    t[c + 8] = _mm512_shuffle_f32x4(even01, even23, 0xdd);
    t[c + 12] = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
  });
  unroll<16>([&](auto i) LINATTN_INLINE_LAMBDA { r[i] = t[i]; });
}
#endif

// Rows become columns: rows[i] lane j <-> rows[j] lane i.
template <class T>
LINATTN_INLINE void transpose(Pack<T> (&rows)[Pack<T>::size]) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float> && Pack<T>::size == 16) {
    __m512 r[16];
    unroll<16>([&](auto i) LINATTN_INLINE_LAMBDA { r[i] = rows[i].raw; });
    transpose(r);
    unroll<16>([&](auto i) LINATTN_INLINE_LAMBDA { rows[i].raw = r[i]; });
    return;
  }
#endif
  if constexpr (Pack<T>::size > 1) {
    Eigen::internal::PacketBlock<typename Pack<T>::Raw, Pack<T>::size> block;
    for (int i = 0; i < Pack<T>::size; ++i) block.packet[i] = rows[i].raw;
    Eigen::internal::ptranspose(block);
    for (int i = 0; i < Pack<T>::size; ++i) rows[i].raw = block.packet[i];
  }
}

// ---- loads and stores that widen and narrow ----

// Pack<C>::size consecutive elements of storage S.
template <class C, class S>
requires std::is_floating_point_v<C>
[[nodiscard]] LINATTN_INLINE Pack<C> load(const S* p) {
  using P = Pack<C>;
  if constexpr (std::is_same_v<C, S>) {
    return P::load(p);
  } else {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<C, float> && P::size == 16 && std::is_same_v<S, half>)
      return P(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
    if constexpr (std::is_same_v<C, float> && P::size == 16 && std::is_same_v<S, bfloat16>)
      return P(_mm512_castsi512_ps(_mm512_slli_epi32(
          _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16)));
#endif
#if defined(__AVX2__) && defined(__F16C__)
    if constexpr (std::is_same_v<C, float> && P::size == 8 && std::is_same_v<S, half>)
      return P(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    if constexpr (std::is_same_v<C, float> && P::size == 8 && std::is_same_v<S, bfloat16>)
      return P(_mm256_castsi256_ps(_mm256_slli_epi32(
          _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16)));
#endif
    C wide[P::size];
    for (int i = 0; i < P::size; ++i) wide[i] = convert<C>(p[i]);
    return P::load(wide);
  }
}

template <class C, class S>
LINATTN_INLINE void store(S* p, Pack<C> value) {
  using P = Pack<C>;
  if constexpr (std::is_same_v<C, S>) {
    value.store(p);
  } else {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<C, float> && P::size == 16 && std::is_same_v<S, half>) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                          _mm512_cvtps_ph(value.raw, _MM_FROUND_TO_NEAREST_INT));
      return;
    }
    if constexpr (std::is_same_v<C, float> && P::size == 16 && std::is_same_v<S, bfloat16>) {
      // As bfloat16's own constructor; the machine's conversion would flush subnormal numbers.
      const __m512i bits = _mm512_castps_si512(value.raw), upper = _mm512_srli_epi32(bits, 16);
      const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
      const __m512i rounded =
          _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
      const __mmask16 nan = _mm512_cmp_ps_mask(value.raw, value.raw, _CMP_UNORD_Q);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(
                                                             rounded, nan, upper, _mm512_set1_epi32(0x40))));
      return;
    }
#endif
#if defined(__AVX2__) && defined(__F16C__)
    if constexpr (std::is_same_v<C, float> && P::size == 8 && std::is_same_v<S, half>) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(value.raw, _MM_FROUND_TO_NEAREST_INT));
      return;
    }
#endif
    C wide[P::size];
    value.store(wide);
    for (int i = 0; i < P::size; ++i) p[i] = convert<S>(wide[i]);
  }
}

// The first `count` elements; the lanes beyond are zero, and nothing beyond is read.
template <class C, class S>
[[nodiscard]] LINATTN_INLINE Pack<C> load_partial(const S* p, int count) {
  C wide[Pack<C>::size] = {};
  for (int i = 0; i < count; ++i) wide[i] = convert<C>(p[i]);
  return Pack<C>::load(wide);
}
template <class C, class S>
LINATTN_INLINE void store_partial(S* p, Pack<C> value, int count) {
  C wide[Pack<C>::size];
  value.store(wide);
  for (int i = 0; i < count; ++i) p[i] = convert<S>(wide[i]);
}

// Asks for the cache line at p to come into the second-level cache. Only a hint: p need not be valid.
LINATTN_INLINE void prefetch(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 2);
#else
  (void)p;
#endif
}

// ---- elementary functions, for a scalar or a pack ----

[[nodiscard]] LINATTN_INLINE float exp(float x) { return std::exp(x); }
[[nodiscard]] LINATTN_INLINE double exp(double x) { return std::exp(x); }

// e^x as 2^n e^r with x = n ln 2 + r, |r| <= ln(2) / 2, and e^r by a polynomial. NaN stays; what lies beyond
// the type's range gives 0 and infinity, also for x infinite.

// Relative error of a normal result: 9.5e-8 with FMA, 1.1e-7 without; 2e-8 of it is the polynomial's (minimax
// for the relative error, its first two coefficients held at 1).
[[nodiscard]] LINATTN_INLINE Pack<float> exp(Pack<float> x) {
  using P = Pack<float>;
  x = min(max(x, P(-104.0f)), P(89.0f));
  const P n = Eigen::internal::pfloor(fma(x, P(1.44269504f), P(0.5f)).raw);
  P r = fma(n, P(-0.693359375f), x);  // ln 2 in two parts, the first exact in few bits
  r = fma(n, P(2.12194440e-4f), r);
  P y = P(1.3428172e-3f);
  y = fma(y, r, P(8.357128e-3f));
  y = fma(y, r, P(4.1672576e-2f));
  y = fma(y, r, P(1.6666667e-1f));
  y = fma(y, r, P(0.5f));
  y = fma(y, r, P(1.0f));
  y = fma(y, r, P(1.0f));
#if defined(__AVX512F__)
  if constexpr (P::size == 16) return P(_mm512_scalef_ps(y.raw, n.raw));
#endif
  return Eigen::internal::pldexp(y.raw, n.raw);
}

// Relative error of a normal result: 2e-16, rounding alone. Taylor's polynomial of degree 13.
[[nodiscard]] LINATTN_INLINE Pack<double> exp(Pack<double> x) {
  using P = Pack<double>;
  x = min(max(x, P(-746.0)), P(710.0));
  const P n = Eigen::internal::pfloor(fma(x, P(1.44269504088896341), P(0.5)).raw);
  P r = fma(n, P(-0.693145751953125), x);
  r = fma(n, P(-1.42860682030941723e-6), r);
  P y = P(1.6059043836821614599e-10);
  y = fma(y, r, P(2.0876756987868098979e-9));
  y = fma(y, r, P(2.5052108385441718775e-8));
  y = fma(y, r, P(2.7557319223985890653e-7));
  y = fma(y, r, P(2.7557319223985890653e-6));
  y = fma(y, r, P(2.4801587301587301587e-5));
  y = fma(y, r, P(1.9841269841269841270e-4));
  y = fma(y, r, P(1.3888888888888888889e-3));
  y = fma(y, r, P(8.3333333333333333333e-3));
  y = fma(y, r, P(4.1666666666666666667e-2));
  y = fma(y, r, P(1.6666666666666666667e-1));
  y = fma(y, r, P(0.5));
  y = fma(y, r, P(1.0));
  y = fma(y, r, P(1.0));
#if defined(__AVX512F__)
  if constexpr (P::size == 8) return P(_mm512_scalef_pd(y.raw, n.raw));
#endif
  return Eigen::internal::pldexp(y.raw, n.raw);
}

// 1 / (1 + e^-z)
template <class V>
[[nodiscard]] LINATTN_INLINE V sigmoid(V z) {
  using Scalar =
      std::conditional_t<std::is_same_v<V, double> || std::is_same_v<V, Pack<double>>, double, float>;
  return V(Scalar(1)) / (V(Scalar(1)) + exp(-z));
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif

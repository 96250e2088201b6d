// The twin of include/linattn/detail/ptx.cuh on the host: what each instruction means, in C++.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <linattn/core/dtype.hpp>
#include <linattn/version.hpp>

namespace emu {

void copy_async(void* shared, const void* global, bool valid);
void copy_commit();
void copy_wait(int pending);
void count_mma();
// Four rows of 16 bytes each, given by lanes 0-7, 8-15, ...: word or halfword `lane` of them to all lanes.
struct Ldmatrix {
  const void* row;
  std::uint32_t r[4];
};
void ldmatrix(void* const (&lanes)[32]);
void ldmatrix_transposed(void* const (&lanes)[32]);

}  // namespace emu

LINATTN_BEGIN
namespace detail {

// ---- shared memory ----

template <class S>
[[nodiscard]] __forceinline__ S& dynamic_shared() {
  static_assert(alignof(S) <= 1024 && std::is_trivially_default_constructible_v<S>);
  return *static_cast<S*>(emu::shared_memory());
}

// ---- loads and stores of one instruction ----

template <class V>
[[nodiscard]] __forceinline__ V load(const void* from) {
  V value;
  emu::load(&value, from, sizeof value);
  return value;
}
template <class V>
__forceinline__ void store(void* to, const V& value) {
  emu::store(to, &value, sizeof value);
}

// ---- asynchronous copies ----

__forceinline__ void cp_async_16(void* shared, const void* global) { emu::copy_async(shared, global, true); }
__forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  emu::copy_async(shared, global, valid);
}
__forceinline__ void cp_async_commit() { emu::copy_commit(); }
template <int Pending>
__forceinline__ void cp_async_wait() {
  emu::copy_wait(Pending);
}

// ---- matrix fragments ----

__forceinline__ void ldmatrix_x4(std::uint32_t (&r)[4], const void* shared) {
  emu::Ldmatrix arguments{shared, {}};
  emu::collective(emu::ldmatrix, &arguments);
  for (int i = 0; i < 4; ++i) r[i] = arguments.r[i];
}
__forceinline__ void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* shared) {
  emu::Ldmatrix arguments{shared, {}};
  emu::collective(emu::ldmatrix_transposed, &arguments);
  for (int i = 0; i < 4; ++i) r[i] = arguments.r[i];
}

// ---- conversions ----

[[nodiscard]] __forceinline__ float to_float(float value) { return value; }
[[nodiscard]] __forceinline__ float to_float(half value) { return static_cast<float>(value); }
[[nodiscard]] __forceinline__ float to_float(bfloat16 value) { return static_cast<float>(value); }
template <class T>
[[nodiscard]] __forceinline__ T from_float(float value) {
  return T(value);
}
template <class T>
[[nodiscard]] __forceinline__ std::uint32_t pack(float first, float second) {
  return std::uint32_t{T(first).bits} | std::uint32_t{T(second).bits} << 16;
}
template <class T>
[[nodiscard]] __forceinline__ float2 unpack(std::uint32_t bits) {
  return {static_cast<float>(T::from_bits(static_cast<std::uint16_t>(bits & 0xffffu))),
          static_cast<float>(T::from_bits(static_cast<std::uint16_t>(bits >> 16)))};
}

// D += A B, one warp's fragments put together to matrices and taken apart again. The products of T are exact in float;
// how a tensor core rounds their sum is not modelled: each is added by fma, in order.
struct EmulatedMma {
  float* d;
  std::uint32_t a[4], b[2];
};
template <class T>
void emulated_mma(void* const (&lanes)[32]) {
  emu::count_mma();
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& fragment = *static_cast<const EmulatedMma*>(lanes[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const float2 x = unpack<T>(fragment.a[i]);
      const int row = group + i % 2 * 8, column = pair + i / 2 * 8;
      a[row][column] = x.x;
      a[row][column + 1] = x.y;
    }
    for (int i = 0; i < 2; ++i) {
      const float2 x = unpack<T>(fragment.b[i]);
      b[pair + i * 8][group] = x.x;
      b[pair + i * 8 + 1][group] = x.y;
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto& fragment = *static_cast<EmulatedMma*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = fragment.d[i];
      for (int k = 0; k < 16; ++k) sum = std::fma(a[row][k], b[k][column], sum);
      fragment.d[i] = sum;
    }
  }
}
template <class T>
__forceinline__ void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                  std::uint32_t b1) {
  static_assert(std::is_same_v<T, half> || std::is_same_v<T, bfloat16>);
  EmulatedMma arguments{d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emu::collective(emulated_mma<T>, &arguments);
}

// A product of its own, never part of a fused multiply-add.
[[nodiscard]] __forceinline__ float multiply_rounded(float a, float b) { return a * b; }

// ---- the special function unit: exactly rounded here, but subnormal numbers become 0 ----

[[nodiscard]] __forceinline__ float flush_subnormal(float x) { return std::fabs(x) < 0x1p-126f ? 0.0f : x; }
[[nodiscard]] __forceinline__ float exp2_approx(float x) { return flush_subnormal(std::exp2(x)); }
[[nodiscard]] __forceinline__ float reciprocal_approx(float x) {
  return flush_subnormal(1.0f / (std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x));
}

}  // namespace detail
LINATTN_END

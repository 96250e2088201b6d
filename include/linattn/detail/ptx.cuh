// The instructions that CUDA C++ has no name for, one function each, and the loads and stores whose width matters.
// All inline PTX of the library is here, for sm_80 and newer. Each function is a warp's or a thread's instruction
// as the PTX manual states it (PTX ISA 8.x, sections "mma", "ldmatrix", "cp.async", "ex2", "rcp", "cvt").
//
// tests/emu has a twin of this header that runs on the host; include it with angle brackets.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include <linattn/core/dtype.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

// ---- shared memory ----

// The block's dynamic shared memory, seen as the one struct that the kernel keeps there. Its content is undefined.
template <class S>
[[nodiscard]] __device__ __forceinline__ S& dynamic_shared() {
  static_assert(alignof(S) <= 1024 && std::is_trivially_default_constructible_v<S>);
  // Says in the PTX what the kernel keeps there, for the table of resources (tests/cuda/compile.py).
  asm volatile("// dynamic_shared %0" ::"n"(sizeof(S)));
  extern __shared__ __align__(1024) unsigned char linattn_dynamic_shared[];
  return *reinterpret_cast<S*>(linattn_dynamic_shared);
}

__device__ __forceinline__ std::uint32_t shared_address(const void* shared) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}

// ---- loads and stores of one instruction: V of 4, 8 or 16 bytes (float, float2, float4, uint2, uint4, ...) ----

// From global or shared memory, aligned to V.
template <class V>
[[nodiscard]] __device__ __forceinline__ V load(const void* from) {
  return *static_cast<const V*>(from);
}
template <class V>
__device__ __forceinline__ void store(void* to, const V& value) {
  *static_cast<V*>(to) = value;
}

// ---- asynchronous copies, global to shared memory ----

// 16 bytes, both addresses aligned to 16. The bytes are there for this thread after cp_async_wait, for others after
// a barrier behind that.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global)
               : "memory");
}
// The same where `valid`; else 16 bytes of zero, and `global` is not read.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
// Closes a group of the copies that this thread has issued since the last one.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the `Pending` youngest groups of this thread are under way.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ---- matrix fragments (a whole warp, converged) ----

// Four 8 x 8 matrices of 16-bit elements; lane 8 i + r gives the address of row r (16 bytes) of matrix i. Lane l
// receives elements (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1) of matrix i in r[i]; transposed: of its transpose.
__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}

// D (16 x 8, float) += A (16 x 16, row) B (16 x 8, column), A and B of T = half or bfloat16. With g = lane / 4 and
// t = lane % 4: a[0] = A(g, 2t..), a[1] = A(g + 8, 2t..), a[2] = A(g, 2t + 8..), a[3] = A(g + 8, 2t + 8..);
// b[0] = B(2t.., g), b[1] = B(2t + 8.., g); d[0], d[1] = D(g, 2t..), d[2], d[3] = D(g + 8, 2t..).
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                             std::uint32_t b1) {
  static_assert(std::is_same_v<T, half> || std::is_same_v<T, bfloat16>);
  if constexpr (std::is_same_v<T, half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// ---- conversions, round to nearest even ----

[[nodiscard]] __device__ __forceinline__ float to_float(float value) { return value; }
[[nodiscard]] __device__ __forceinline__ float to_float(half value) {
  float wide = 0.0f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}
[[nodiscard]] __device__ __forceinline__ float to_float(bfloat16 value) {
  return __uint_as_float(static_cast<std::uint32_t>(value.bits) << 16);
}
template <class T>
[[nodiscard]] __device__ __forceinline__ T from_float(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else {
    std::uint16_t bits = 0;
    if constexpr (std::is_same_v<T, half>) {
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    } else {
      static_assert(std::is_same_v<T, bfloat16>);
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    }
    return T::from_bits(bits);
  }
}
// Two values of T = half or bfloat16 in a register, the first in the lower half.
template <class T>
[[nodiscard]] __device__ __forceinline__ std::uint32_t pack(float first, float second) {
  std::uint32_t bits = 0;
  if constexpr (std::is_same_v<T, half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  } else {
    static_assert(std::is_same_v<T, bfloat16>);
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  }
  return bits;
}
template <class T>
[[nodiscard]] __device__ __forceinline__ float2 unpack(std::uint32_t bits) {
  if constexpr (std::is_same_v<T, half>) {
    return {to_float(half::from_bits(static_cast<std::uint16_t>(bits & 0xffffu))),
            to_float(half::from_bits(static_cast<std::uint16_t>(bits >> 16)))};
  } else {
    static_assert(std::is_same_v<T, bfloat16>);
    return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
  }
}

// ---- rounding ----

// a * b, rounded by itself: no compiler makes it a part of a fused multiply-add.
[[nodiscard]] __device__ __forceinline__ float multiply_rounded(float a, float b) { return __fmul_rn(a, b); }

// ---- the special function unit ----

// 2^x: error 2 ulp over the full range, -infinity gives 0; subnormal results are flushed to 0.
[[nodiscard]] __device__ __forceinline__ float exp2_approx(float x) {
  float y = 0.0f;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x: error 1 ulp; subnormal inputs and results are flushed to 0, 1 / infinity is 0.
[[nodiscard]] __device__ __forceinline__ float reciprocal_approx(float x) {
  float y = 0.0f;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

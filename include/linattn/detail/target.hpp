// LINATTN_TARGET names what the compiler generates code for: "avx2_fma", "sse2_clang". Two units of one program may
// be compiled for different machines; what they compile from the same header must then have different names, or
// the linker keeps one of the two for both. So functions, and types that are not shared between units, lie in an
// inline namespace of this name. It tells apart what changes a type, a width or the arithmetic of the kernels:
// instruction sets, Eigen's switches, relaxed arithmetic, the compiler, and for nvcc the architectures, as a function
// that launches holds the address of its own unit's kernel. Units that differ in anything else (-mbmi2,
// -ffp-contract=off) need names of their own: -DLINATTN_TARGET=name.
#pragma once

#ifndef LINATTN_TARGET

#if defined(__AVX512F__)
#define LINATTN_TARGET_SET avx512f
#elif defined(__AVX2__)
#define LINATTN_TARGET_SET avx2
#elif defined(__AVX__)
#define LINATTN_TARGET_SET avx
#elif defined(__SSE4_2__)
#define LINATTN_TARGET_SET sse4_2
#elif defined(__SSE4_1__)
#define LINATTN_TARGET_SET sse4_1
#elif defined(__SSSE3__)
#define LINATTN_TARGET_SET ssse3
#elif defined(__SSE3__)
#define LINATTN_TARGET_SET sse3
#elif defined(__SSE2__)
#define LINATTN_TARGET_SET sse2
#elif defined(__ARM_FEATURE_SVE)
#define LINATTN_TARGET_WIDTH(bits) sve##bits
#define LINATTN_TARGET_SIZED(bits) LINATTN_TARGET_WIDTH(bits)
#define LINATTN_TARGET_SET LINATTN_TARGET_SIZED(__ARM_FEATURE_SVE_BITS)
#elif defined(__ARM_NEON)
#define LINATTN_TARGET_SET neon
#elif defined(__VSX__)
#define LINATTN_TARGET_SET vsx
#else
#define LINATTN_TARGET_SET generic
#endif

#if defined(__AVX512DQ__)
#define LINATTN_TARGET_DQ _dq
#else
#define LINATTN_TARGET_DQ
#endif
#if defined(__AVX512BW__)
#define LINATTN_TARGET_BW _bw
#else
#define LINATTN_TARGET_BW
#endif
#if defined(__AVX512VL__)
#define LINATTN_TARGET_VL _vl
#else
#define LINATTN_TARGET_VL
#endif
#if defined(__AVX512VBMI__)
#define LINATTN_TARGET_VBMI _vbmi
#else
#define LINATTN_TARGET_VBMI
#endif
#if defined(__AVX512BF16__) || defined(__AVX512FP16__)  // Eigen converts by them
#define LINATTN_TARGET_16 _16
#else
#define LINATTN_TARGET_16
#endif
#if defined(__FMA__)
#define LINATTN_TARGET_FMA _fma
#elif defined(__FMA4__)
#define LINATTN_TARGET_FMA _fma4
#else
#define LINATTN_TARGET_FMA
#endif
#if defined(__F16C__)
#define LINATTN_TARGET_F16C _f16c
#else
#define LINATTN_TARGET_F16C
#endif
// Eigen defines EIGEN_MAX_ALIGN_BYTES itself, but not as 0 where it has packets.
#if defined(EIGEN_DONT_VECTORIZE) || defined(EIGEN_DONT_ALIGN) || \
    (defined(EIGEN_MAX_ALIGN_BYTES) && EIGEN_MAX_ALIGN_BYTES + 0 == 0)
#define LINATTN_TARGET_PACKETS _scalar
#else
#define LINATTN_TARGET_PACKETS
#endif
#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || \
    (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__ + 0 != 0)
#define LINATTN_TARGET_MATH _fast
#else
#define LINATTN_TARGET_MATH
#endif
#if defined(__clang__)
#define LINATTN_TARGET_COMPILER _clang
#else
#define LINATTN_TARGET_COMPILER
#endif

// The list is "800,900" to the host's compiler and to the device's alike.
#if defined(__CUDA_ARCH_LIST__)
#define LINATTN_TARGET_SM(a, b, c, d, e, f, g, h, i, j, k, l, ...) _sm##a##b##c##d##e##f##g##h##i##j##k##l
#define LINATTN_TARGET_LIST(...) LINATTN_TARGET_SM(__VA_ARGS__)
#define LINATTN_TARGET_CUDA LINATTN_TARGET_LIST(__CUDA_ARCH_LIST__, , , , , , , , , , , , )
#else
#define LINATTN_TARGET_CUDA
#endif

#define LINATTN_TARGET_JOIN(a, b, c, d, e, f, g, h, i, j, k, l) a##b##c##d##e##f##g##h##i##j##k##l
#define LINATTN_TARGET_NAME(...) LINATTN_TARGET_JOIN(__VA_ARGS__)
#define LINATTN_TARGET                                                                                 \
  LINATTN_TARGET_NAME(LINATTN_TARGET_SET, LINATTN_TARGET_DQ, LINATTN_TARGET_BW, LINATTN_TARGET_VL,     \
                      LINATTN_TARGET_VBMI, LINATTN_TARGET_16, LINATTN_TARGET_FMA, LINATTN_TARGET_F16C, \
                      LINATTN_TARGET_PACKETS, LINATTN_TARGET_MATH, LINATTN_TARGET_COMPILER,            \
                      LINATTN_TARGET_CUDA)

#endif

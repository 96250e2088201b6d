// Version of the library and the few macros that every header needs.
#pragma once

#include <linattn/detail/target.hpp>

#define LINATTN_VERSION_MAJOR 0
#define LINATTN_VERSION_MINOR 1
#define LINATTN_VERSION_PATCH 0
#define LINATTN_VERSION "0.1.0"

// Functions marked LINATTN_HD are callable on the host and in CUDA device code.
#if defined(__CUDACC__)
#define LINATTN_HD __host__ __device__
#else
#define LINATTN_HD
#endif

// Always inlined: the steps of a kernel, and the members of types that units share (target.hpp), as a copy that the
// linker chose might hold instructions of another unit's machine.
#if defined(__GNUC__)
#define LINATTN_INLINE inline __attribute__((always_inline))
#else
#define LINATTN_INLINE inline
#endif

// The inline namespace keeps two versions of the library apart in one program.
#define LINATTN_BEGIN \
  namespace linattn { \
  inline namespace v0 {
#define LINATTN_END \
  }                 \
  }

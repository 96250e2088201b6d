// The one handle of cuBLASLt that a test program has.
#pragma once

#include <cublasLt.h>

#include <stdexcept>

namespace support {

inline cublasLtHandle_t cublas_lt() {
  static const cublasLtHandle_t handle = [] {
    cublasLtHandle_t made = nullptr;
    if (cublasLtCreate(&made) != CUBLAS_STATUS_SUCCESS) throw std::runtime_error("cublasLtCreate failed");
    return made;
  }();
  return handle;
}

}  // namespace support

// The main program of the device tests: where there is no CUDA device they are skipped.
#define DOCTEST_CONFIG_IMPLEMENT
#include <cuda_runtime.h>
#include <doctest/doctest.h>

#include <cstdio>

int main(int argc, char** argv) {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess || devices == 0) {
    std::printf("SKIP: %s\n", error == cudaSuccess ? "no CUDA device" : cudaGetErrorString(error));
    return 77;
  }
  return doctest::Context(argc, argv).run();
}

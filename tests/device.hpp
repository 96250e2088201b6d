// Buffers and scratch memory on a CUDA device, or on the emulated one, for tests of the ops' CUDA forms.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "buffers.hpp"

namespace support {

inline void require_cuda(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Device memory of a fixed size.
class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t bytes) : bytes_(bytes) {
    void* pointer = nullptr;
    require_cuda(cudaMalloc(&pointer, bytes));
    data_ = static_cast<std::byte*>(pointer);
  }
  DeviceMemory(DeviceMemory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  DeviceMemory& operator=(DeviceMemory&&) = delete;
  ~DeviceMemory() { (void)cudaFree(data_); }

  [[nodiscard]] std::byte* data() const { return data_; }
  [[nodiscard]] std::size_t size() const { return bytes_; }
  void upload(const void* from) { upload(from, 0, bytes_); }
  void upload(const void* from, std::size_t first, std::size_t bytes) {
    require_cuda(cudaMemcpy(data_ + first, from, bytes, cudaMemcpyHostToDevice));
  }
  // Waits for all that was launched before.
  void download(void* to) const { download(to, 0, bytes_); }
  void download(void* to, std::size_t first, std::size_t bytes) const {
    require_cuda(cudaMemcpy(to, data_ + first, bytes, cudaMemcpyDeviceToHost));
  }

 private:
  std::byte* data_;
  std::size_t bytes_;
};

// A copy of a Buffer on the device: the same layout, the same poison beside the view.
template <class T, int R>
class OnDevice {
 public:
  explicit OnDevice(const Buffer<T, R>& host)
      : memory_(host.memory().size() * sizeof(T)), view_(host.view()) {
    memory_.upload(host.memory().data());
    view_.data = reinterpret_cast<T*>(memory_.data()) + (host.view().data - host.memory().data());
  }
  [[nodiscard]] TensorView<T, R> view() const { return view_; }
  operator TensorView<const T, R>() const { return view_; }  // NOLINT: implicit on purpose

  // Copies all of it back, what lies beside the view included: the buffer's intact() then speaks of the device.
  void download(Buffer<T, R>& host) const { memory_.download(host.memory().data()); }

 private:
  DeviceMemory memory_;
  TensorView<T, R> view_;
};

// Scratch memory of exactly `bytes` on the device, guarded, and poisoned where it is not huge: the 32 MB for cuBLASLt
// take longer to fill than most tests.
class DeviceScratch {
 public:
  explicit DeviceScratch(std::size_t bytes) : memory_(skew + bytes + guard), bytes_(bytes) {
    const std::vector<std::byte> poison(std::min(memory_.size(), most_poison), std::byte{0xff});
    memory_.upload(poison.data(), 0, poison.size());
    memory_.upload(poison.data(), skew + bytes_, guard);
  }
  [[nodiscard]] linattn::Workspace workspace() const { return {memory_.data() + skew, bytes_}; }
  [[nodiscard]] bool intact() const {
    std::vector<std::byte> beside(skew + guard);
    memory_.download(beside.data(), 0, skew);
    memory_.download(beside.data() + skew, skew + bytes_, guard);
    return std::all_of(beside.begin(), beside.end(), [](std::byte b) { return b == std::byte{0xff}; });
  }

 private:
  static constexpr std::size_t skew = 16, guard = 256, most_poison = std::size_t{1} << 20;
  DeviceMemory memory_;
  std::size_t bytes_;
};

}  // namespace support

// The host as the place where ops run: --context cpu.
#pragma once

#include <linattn/cpu.hpp>

#include <array>
#include <cstddef>
#include <string>
#include <vector>

#include "ttt.hpp"

namespace golden {

// Scratch memory that grows between calls.
class Arena {
 public:
  Cpu<Serial> operator()(std::size_t bytes) {
    if (memory_.size() < bytes) memory_.resize(bytes);
    return {{memory_.data(), memory_.size()}, {}};
  }

 private:
  std::vector<std::byte> memory_;
};
inline Arena arena;

// One call of an op: it gives views of buffers, runs the op on them, and leaves the results in the buffers.
struct Host {
  static constexpr const char* context = "cpu";
  static constexpr bool has_double = true;
  static constexpr std::array stored_layouts = {Layout::dense};
  static constexpr Tolerance softmax_in_float = recorded<float>;

  template <class T>
  [[nodiscard]] static std::string stored_name(Layout) {
    return support::type_name<T>;
  }
  // 16-bit storage that is rounded `roundings` times on a device: here once, at the end.
  template <class T>
  [[nodiscard]] static Tolerance stored_after([[maybe_unused]] int roundings) {
    return stored<T>;
  }

  template <class T, int R>
  [[nodiscard]] TensorView<T, R> view(const Buffer<T, R>& buffer) const {
    return buffer.view();
  }
  template <class Bytes, class Op>
  void run(const Bytes& bytes, const Op& op) const {
    require(op(arena(bytes(Cpu{}))));
  }
};

}  // namespace golden

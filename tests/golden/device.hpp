// A CUDA device, or the emulated one, as the place where ops run: --context cuda.
#pragma once

#include <linattn/cuda.cuh>

#include <cmath>
#include <cstddef>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cublas_lt.hpp"
#include "../device.hpp"
#include "ttt.hpp"

namespace golden {

// As Host, on mirrors of the buffers in the device's memory.
class Device {
 public:
  static constexpr const char* context = "cuda";
  static constexpr bool has_double = false;
  static constexpr auto stored_layouts = support::all_layouts;
  static constexpr Tolerance softmax_in_float = {Norm::relative_l2, 1e-5};

  template <class T>
  [[nodiscard]] static std::string stored_name(Layout layout) {
    return run_name<T>(layout);
  }
  // Each of n independent factors of a result is wrong by 0.43 unit roundoffs in the mean square, so the result by
  // 0.43 sqrt(n); half as much again is granted to cases of few elements. How many there are is in the contracts.
  template <class T>
  [[nodiscard]] static Tolerance stored_after(int roundings) {
    return {Norm::relative_l2,
            1.5 * 0.43 * std::sqrt(static_cast<double>(roundings)) * support::unit_roundoff<T>};
  }

  // The mirror of an input, and of a result, which comes back after the run.
  template <class T, int R>
  [[nodiscard]] TensorView<T, R> view(const Buffer<T, R>& buffer) {
    return mirror(buffer)->view();
  }
  template <class T, int R>
  [[nodiscard]] TensorView<T, R> view(Buffer<T, R>& buffer) {
    const auto device = mirror(buffer);
    results_.push_back([device, &buffer] {
      device->download(buffer);
      if (!buffer.intact()) throw std::runtime_error("memory beside a result was written");
    });
    return device->view();
  }

  template <class Bytes, class Op>
  void run(const Bytes& bytes, const Op& op) const {
    const Cuda ctx{.cublas_lt = support::cublas_lt()};
    const support::DeviceScratch scratch(bytes(ctx));
    require(op(ctx.with(scratch.workspace())));
    for (const auto& download : results_) download();
    if (!scratch.intact()) throw std::runtime_error("memory beside the workspace was written");
  }

 private:
  template <class T, int R>
  [[nodiscard]] std::shared_ptr<support::OnDevice<T, R>> mirror(const Buffer<T, R>& buffer) {
    const auto made = std::make_shared<support::OnDevice<T, R>>(buffer);
    mirrors_.push_back(made);
    return made;
  }

  std::vector<std::shared_ptr<void>> mirrors_;
  std::vector<std::function<void()>> results_;
};

}  // namespace golden

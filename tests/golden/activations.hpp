// Recorded tensors as the models of the examples take them.
#pragma once

#include <cstddef>
#include <string_view>
#include <vector>

#include "expect.hpp"
#include "golden.hpp"
#include "nn/runtime.hpp"

namespace golden {

template <class T>
[[nodiscard]] nn::Tensor<T> rounded(const Tensor& recorded) {
  nn::Tensor<T> result(recorded.shape);
  for (std::size_t i = 0; i < recorded.values.size(); ++i)
    result.data()[i] = static_cast<T>(recorded.values[i]);
  return result;
}

// Reads a tensor of the case, rounded to T. Throws when its shape is another.
template <class T>
[[nodiscard]] nn::Tensor<T> load(Case& c, std::string_view name, const std::vector<Index>& shape) {
  return rounded<T>(read(c, name, shape));
}

}  // namespace golden

// Recorded tensors as the models of the examples take them.
#pragma once

#include <cstddef>
#include <string_view>

#include "golden.hpp"
#include "nn/runtime.hpp"

namespace golden {

// Reads a tensor of the case, rounded to T.
template <class T>
[[nodiscard]] nn::Tensor<T> load(Case& c, std::string_view name) {
  const Tensor recorded = c.read(name);
  nn::Tensor<T> result(recorded.shape);
  for (std::size_t i = 0; i < recorded.values.size(); ++i)
    result.data()[i] = static_cast<T>(recorded.values[i]);
  return result;
}

}  // namespace golden

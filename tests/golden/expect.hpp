// What a runner expects of a case before it computes: shapes of tensors, whole numbers of the metadata.
#pragma once

#include <cmath>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "golden.hpp"

namespace golden {

inline constexpr Index any = -1;  // extent

// Reads a tensor. Throws when its shape is another.
[[nodiscard]] inline Tensor read(Case& c, std::string_view name, const std::vector<Index>& shape) {
  Tensor tensor = c.read(name);
  bool fits = tensor.shape.size() == shape.size();
  for (std::size_t axis = 0; fits && axis < shape.size(); ++axis)
    fits = tensor.shape[axis] > 0 && (shape[axis] == any || shape[axis] == tensor.shape[axis]);
  if (fits) return tensor;
  const auto text = [](const std::vector<Index>& extents) {
    std::string out;
    for (const Index extent : extents)
      out += (out.empty() ? "" : ", ") + (extent == any ? "any" : std::to_string(extent));
    return "[" + out + "]";
  };
  throw std::runtime_error("tensor '" + std::string(name) + "' has shape " + text(tensor.shape) +
                           ", expected " + text(shape));
}

// A whole number of the metadata.
[[nodiscard]] inline Index integer(const Case& c, std::string_view key, Index least, Index most) {
  const double value = c.number(key);
  if (value >= static_cast<double>(least) && value <= static_cast<double>(most) && value == std::floor(value))
    return static_cast<Index>(value);
  throw std::runtime_error("metadata '" + std::string(key) + "' is " + c.meta(key) +
                           ", expected a whole number from " + std::to_string(least) + " to " +
                           std::to_string(most));
}

}  // namespace golden

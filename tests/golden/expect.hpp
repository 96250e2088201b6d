// What a runner expects of a case before it computes: shapes of tensors, whole numbers of the metadata.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "golden.hpp"

namespace golden {

inline constexpr Index any = -1;  // extent
inline constexpr Index largest_extent = 1 << 20;

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

// Reads whole numbers, such as ids.
[[nodiscard]] inline std::vector<std::int32_t> read_integers(Case& c, std::string_view name,
                                                             const std::vector<Index>& shape) {
  const Tensor tensor = read(c, name, shape);
  std::vector<std::int32_t> result;
  for (const double value : tensor.values) {
    if (!(std::abs(value) <= std::numeric_limits<std::int32_t>::max()) || value != std::floor(value))
      throw std::runtime_error("tensor '" + std::string(name) + "' holds " + std::to_string(value) +
                               ", expected whole numbers of 32 bits");
    result.push_back(static_cast<std::int32_t>(value));
  }
  return result;
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

// A count or a size of the metadata, small enough that products of two are no overflow.
[[nodiscard]] inline Index extent(const Case& c, std::string_view key) {
  return integer(c, key, 1, largest_extent);
}

}  // namespace golden

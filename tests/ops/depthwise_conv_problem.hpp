// What the tests of depthwise_conv share on all backends: cases, and what errors are relative to.
#pragma once

#include <linattn/ops/depthwise_conv.hpp>

#include <array>
#include <cmath>

#include "../reference/depthwise_conv.hpp"
#include "../support.hpp"

namespace depthwise_conv_cases {

using namespace linattn;
using namespace support;

struct Case {
  std::array<Index, 4> shape;
  TokenGrid grid;
};

// Sum of the magnitudes that an output adds up, in L2.
inline double terms(const Buffer<double, 4>& x, const Buffer<double, 4>& weight,
                    const Buffer<double, 1>& bias, const TokenGrid& grid) {
  const auto magnitude = [](const auto& from) {
    auto out = to_double(from);
    for_each_index(out.view().extents,
                   [&](const auto& i) { element(out.view(), i) = std::abs(element(out.view(), i)); });
    return out;
  };
  Buffer<double, 4> sums(x.view().extents);
  reference::depthwise_conv(magnitude(x).view(), magnitude(weight).view(), magnitude(bias).view(), sums, grid,
                            true);
  return difference(sums, sums).norm;
}

}  // namespace depthwise_conv_cases

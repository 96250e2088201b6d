// What the runners that sample share.
#pragma once

#include <string>
#include <type_traits>
#include <vector>

#include <nlohmann/json.hpp>

#include "golden.hpp"
#include "sd35/pipeline.hpp"
#include "sd35/sampler.hpp"

namespace golden {

// The README's column for float, and 1e-9 in double for both methods.
template <class T>
[[nodiscard]] Tolerance sampler_tolerance(sd35::Method method) {
  if (std::is_same_v<T, double>) return {Norm::scaled_max, 1e-9};
  return {Norm::scaled_max, method == sd35::Method::euler ? 2e-5 : 5e-5};
}

// Inputs in.cond.* and in.uncond.* as the pipeline stacks them.
template <class T>
[[nodiscard]] sd35::Conditioning<T> conditioning(Case& c) {
  const auto stack = [&](const std::string& name) {
    const golden::Tensor cond = c.read("in.cond." + name), uncond = c.read("in.uncond." + name);
    std::vector<Index> shape = cond.shape;
    if (name == "y") shape.insert(shape.begin() + 1, 1);
    shape[0] = 2;
    sd35::Tensor<T> result(shape);
    const std::size_t n = cond.values.size();
    for (std::size_t i = 0; i < n; ++i) {
      result.data()[i] = static_cast<T>(cond.values[i]);
      result.data()[n + i] = static_cast<T>(uncond.values.at(i));
    }
    return result;
  };
  return {stack("context"), stack("y")};
}

// {"scale", "start", "end", "layers"}, or nothing.
[[nodiscard]] inline sd35::SkipLayerGuidance skip_layers(const nlohmann::json& json) {
  if (json.empty()) return {};
  return {json.at("scale"), json.at("start"), json.at("end"), json.at("layers").get<std::vector<int>>()};
}

}  // namespace golden

// What the runners of SD3.5's models share.
#pragma once

#include <string>
#include <type_traits>

#include "golden.hpp"
#include "sd35/checkpoint.hpp"
#include "sd35_parameters.hpp"

namespace golden {

// The parameters of a case as a checkpoint. Those that a model loads from the case's own file count as used,
// and no others.
inline sd35::Checkpoint open_checkpoint(Case& c, const Parameters& parameters, sd35::Component component) {
  sd35::Checkpoint checkpoint = sd35::Checkpoint::open(parameters.path(), component);
  checkpoint.on_load = [&c](const std::string& tensor) {
    if (c.has(tensor)) c.use(tensor);
  };
  return checkpoint;
}

// fp32 and fp64 columns of the table of tolerances that the cases come with.
template <class T>
[[nodiscard]] Tolerance model_tolerance(double single) {
  return {Norm::scaled_max, std::is_same_v<T, double> ? 1e-11 : single};
}
template <class T>
inline constexpr const char* variant = std::is_same_v<T, double> ? "double" : "float";

}  // namespace golden

// What the runners of SD3.5's models share: where a case's parameters lie, and how its config is read.
#pragma once

#include <filesystem>
#include <stdexcept>
#include <string>

#include <linattn/weights/json.hpp>

#include "golden.hpp"
#include "sd35/checkpoint.hpp"

namespace golden {

// The parameters of a case: in its own file, or in one of those that `params_from` names ("a + b", same
// folder). Those that the model loads from the case's own file count as used, and no others.
inline sd35::Checkpoint open_parameters(Case& c, sd35::Component component) {
  std::string rest = c.meta("params_from", c.path().filename().string());
  while (!rest.empty()) {
    const std::size_t end = std::min(rest.find(" + "), rest.size());
    const std::filesystem::path path = c.path().parent_path() / rest.substr(0, end);
    rest.erase(0, end + 3);
    auto found = sd35::Checkpoint::open_if_present(path, component);
    if (!found) continue;
    if (path == c.path()) found->on_load = [&c](const std::string& tensor) { c.use(tensor); };
    return *std::move(found);
  }
  throw std::runtime_error("no file of this case holds a " + std::string(sd35::name(component)));
}

// The metadata `config`, a JSON object.
inline nlohmann::json config_of(const Case& c) {
  nlohmann::json config;
  const std::string why = linattn::parse_json(c.meta("config", "{}"), config);
  if (!why.empty() || !config.is_object()) throw std::runtime_error("metadata 'config' is not a JSON object");
  return config;
}
inline Index config_index(const nlohmann::json& config, const char* key, Index otherwise) {
  const auto found = config.find(key);
  return found != config.end() && found->is_number_integer() ? found->get<Index>() : otherwise;
}

// fp32 and fp64 columns of the table of tolerances that the cases come with.
template <class T>
[[nodiscard]] Tolerance model_tolerance(double single) {
  return {Norm::scaled_max, std::is_same_v<T, double> ? 1e-11 : single};
}
template <class T>
inline constexpr const char* variant = std::is_same_v<T, double> ? "double" : "float";

}  // namespace golden

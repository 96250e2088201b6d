// What the runners of SD3.5's models share: where a case's parameters lie, and how its config is read.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include <linattn/weights/json.hpp>
#include <linattn/weights/safetensors.hpp>

#include "golden.hpp"
#include "sd35/checkpoint.hpp"

namespace golden {

inline void check(const linattn::FileStatus& status) {
  if (!status.ok()) throw std::runtime_error(message(status));
}

// The parameters of a case: its own and those of the files that `params_from` names ("a + b", same folder),
// together. Those that a model loads from the case's own file count as used, and no others.
inline sd35::Checkpoint open_parameters(Case& c, sd35::Component component) {
  std::filesystem::path path = c.path();
  std::string rest = c.meta("params_from", "");
  const bool joined = !rest.empty();
  if (joined) {
    std::vector<linattn::Safetensors> files;  // keep the tensors mapped until they are written
    std::vector<linattn::TensorInfo> parameters;
    linattn::Metadata metadata = c.file().metadata();
    std::set<std::string> names;
    const auto gather = [&](const linattn::Safetensors& file) {
      metadata.insert(file.metadata().begin(), file.metadata().end());  // the case's own entries stay
      for (const linattn::TensorInfo& info : file.tensors()) {
        const bool data = info.name.starts_with("in.") || info.name.starts_with("out") ||
                          info.name.starts_with("mid") || info.name.starts_with("alt.");
        if (!data && names.insert(info.name).second) parameters.push_back(info);
      }
    };
    gather(c.file());
    while (!rest.empty()) {
      const std::size_t end = std::min(rest.find(" + "), rest.size());
      files.emplace_back();
      check(linattn::Safetensors::open(c.path().parent_path() / rest.substr(0, end), files.back()));
      gather(files.back());
      rest.erase(0, end + 3);
    }
    path = std::filesystem::temp_directory_path() / ("golden-" + std::to_string(::getpid()) + ".safetensors");
    linattn::SafetensorsWriter::align(parameters);
    check(linattn::write_safetensors(path, parameters, metadata));
  }
  sd35::Checkpoint checkpoint = sd35::Checkpoint::open(path, component);
  if (joined) std::filesystem::remove(path);  // the mapping stays
  checkpoint.on_load = [&c](const std::string& tensor) {
    if (c.has(tensor)) c.use(tensor);
  };
  return checkpoint;
}

// The metadata `config`, a JSON object: the case's, or that of the files with its parameters.
inline nlohmann::json config_of(const Case& c) {
  nlohmann::json config;
  const std::string why = linattn::parse_json(c.meta("config", "{}"), config);
  if (!why.empty() || !config.is_object()) throw std::runtime_error("metadata 'config' is not a JSON object");
  return config;
}
inline nlohmann::json config_of(const Case& c, const sd35::Checkpoint& checkpoint) {
  nlohmann::json config = config_of(c);
  const auto found = checkpoint.metadata().find("config");
  if (config.empty() && found != checkpoint.metadata().end())
    (void)linattn::parse_json(found->second, config);
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

// The parameters of a case of SD3.5: its own, or those of the files that `params_from` names.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include <linattn/weights/json.hpp>
#include <linattn/weights/safetensors.hpp>

#include "golden.hpp"

namespace golden {

// "a.safetensors + b.safetensors" (same folder) and parameters of the case itself come together in one
// temporary file, which lives as long as this.
class Parameters {
 public:
  explicit Parameters(const Case& c) : path_(c.path()), config_(c.meta("config", "")) {
    const std::string from = c.meta("params_from", "");
    if (from.empty()) return;
    std::vector<linattn::TensorInfo> tensors;
    gather(c.file(), tensors);
    constexpr std::string_view separator = " + ";
    std::vector<linattn::Safetensors> files;  // keeps the tensors mapped until they are written
    for (std::size_t begin = 0; begin < from.size();) {
      const std::size_t end = std::min(from.find(separator, begin), from.size());
      files.emplace_back();
      const linattn::FileStatus status =
          linattn::Safetensors::open(c.path().parent_path() / from.substr(begin, end - begin), files.back());
      if (!status.ok()) throw std::runtime_error("params_from: " + message(status));
      gather(files.back(), tensors);
      begin = end + separator.size();
    }
    path_ = std::filesystem::temp_directory_path() /
            ("linattn-golden-" + std::to_string(::getpid()) + ".safetensors");
    temporary_ = true;
    linattn::SafetensorsWriter::align(tensors);
    const linattn::FileStatus status = linattn::write_safetensors(path_, tensors);
    if (!status.ok()) throw std::runtime_error(message(status));
  }
  Parameters(const Parameters&) = delete;
  Parameters& operator=(const Parameters&) = delete;
  ~Parameters() {
    std::error_code ignored;
    if (temporary_) std::filesystem::remove(path_, ignored);
  }

  // A file with all of them.
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }
  // The metadata "config" of the case, else of the first file that has one: a JSON object, maybe empty.
  [[nodiscard]] nlohmann::json config() const {
    nlohmann::json config = nlohmann::json::object();
    const std::string why = config_.empty() ? "" : linattn::parse_json(config_, config);
    if (!why.empty() || !config.is_object())
      throw std::runtime_error("metadata 'config' is not a JSON object");
    return config;
  }

  // Inputs and results have names of their own in a case; the rest are parameters.
  [[nodiscard]] static bool is_parameter(std::string_view tensor) {
    for (const std::string_view prefix : {"in.", "out.", "outx.", "mid", "alt.", "grad."})
      if (tensor.starts_with(prefix)) return false;
    return true;
  }

 private:
  void gather(const linattn::Safetensors& file, std::vector<linattn::TensorInfo>& tensors) {
    const auto config = file.metadata().find("config");
    if (config_.empty() && config != file.metadata().end()) config_ = config->second;
    for (const linattn::TensorInfo& info : file.tensors())
      if (is_parameter(info.name)) tensors.push_back(info);
  }

  std::filesystem::path path_;
  std::string config_;
  bool temporary_ = false;
};

}  // namespace golden

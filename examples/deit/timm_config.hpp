// timm's config.json: what it says of a picture, and whether the model that it describes is the one in the file.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "nn/checkpoint.hpp"
#include "vit.hpp"

namespace deit {

// Both forms that timm reads: {architecture, num_classes, pretrained_cfg: {...}, ...}, and the older one, whose fields of
// pretrained_cfg lie at the top. docs/deit.md has the table of the fields.
class TimmConfig {
 public:
  // Of a checkpoint without config.json everything is absent. Throws std::runtime_error where pretrained_cfg is no object
  // or has a field that timm does not know.
  explicit TimmConfig(const Checkpoint& checkpoint);
  TimmConfig(const TimmConfig&) = delete;
  TimmConfig& operator=(const TimmConfig&) = delete;

  // A field of the file, and one of pretrained_cfg; null where it is absent.
  [[nodiscard]] const nlohmann::json& top(const char* key) const;
  [[nodiscard]] const nlohmann::json& pretrained(const char* key) const;

  // As timm takes it: null, false, 0, "" and [] stand for the default.
  [[nodiscard]] static bool says_nothing(const nlohmann::json& value);

  [[noreturn]] void refuse(const std::string& key, const nlohmann::json& value,
                           const std::string& expected) const;

  // Throws std::runtime_error that names the field where the file describes another model than the checkpoint holds: other
  // sizes, channels, heads, classes or pooling, or an argument of timm's model that changes its result.
  void check(const VitConfig& model) const;

 private:
  void check_pooling(const std::string& key, const nlohmann::json& value, const VitConfig& model) const;
  void check_arguments(const VitConfig& model) const;

  const Checkpoint& checkpoint_;
  nlohmann::json empty_ = nlohmann::json::object();
  const nlohmann::json& file_;
  const nlohmann::json& pretrained_;
};

}  // namespace deit

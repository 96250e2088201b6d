#include "timm_config.hpp"

#include <algorithm>
#include <string_view>

#include "nn/small_file.hpp"
#include "nn/text.hpp"

namespace deit {
namespace {

using nlohmann::json;

// The fields of timm's PretrainedCfg (1.0), and labels, which label_names was called once.
constexpr std::string_view known_fields[] = {"url",
                                             "file",
                                             "state_dict",
                                             "hf_hub_id",
                                             "hf_hub_filename",
                                             "source",
                                             "architecture",
                                             "tag",
                                             "custom_load",
                                             "input_size",
                                             "test_input_size",
                                             "min_input_size",
                                             "fixed_input_size",
                                             "interpolation",
                                             "crop_pct",
                                             "test_crop_pct",
                                             "crop_mode",
                                             "mean",
                                             "std",
                                             "num_classes",
                                             "label_offset",
                                             "label_names",
                                             "label_descriptions",
                                             "pool_size",
                                             "test_pool_size",
                                             "first_conv",
                                             "classifier",
                                             "license",
                                             "description",
                                             "origin_url",
                                             "paper_name",
                                             "paper_ids",
                                             "notes",
                                             "num_features",
                                             "labels"};

// Arguments of timm's models that hold while it is trained, that only choose a kernel, or that the shapes of the tensors
// tell as well.
constexpr std::string_view idle_arguments[] = {
    "drop_rate",      "pos_drop_rate", "patch_drop_rate", "proj_drop_rate",   "attn_drop_rate",
    "drop_path_rate", "weight_init",   "fix_init",        "dynamic_img_size", "strict_img_size",
    "qkv_bias",       "class_token",   "mlp_ratio"};

template <class List>
bool holds(const List& list, std::string_view name) {
  return std::find(std::begin(list), std::end(list), name) != std::end(list);
}

bool is_size(const json& value, std::initializer_list<Index> size) {
  return value == json(size) ||
         (value.is_number_integer() && std::equal(size.begin() + 1, size.end(), size.begin()) &&
          value == *size.begin());
}

}  // namespace

TimmConfig::TimmConfig(const Checkpoint& checkpoint)
    : checkpoint_(checkpoint),
      file_(checkpoint.config().is_object() ? checkpoint.config() : empty_),
      pretrained_(file_.contains("pretrained_cfg") ? file_["pretrained_cfg"] : file_) {
  for (const char* key : {"default_cfg", "pretrained_cfgs"})
    if (file_.contains(key)) refuse(key, file_[key], "it to be called 'pretrained_cfg'");
  if (!pretrained_.is_object()) refuse("pretrained_cfg", pretrained_, "an object");
  if (&pretrained_ == &file_) return;
  for (const auto& [key, value] : pretrained_.items())
    if (!holds(known_fields, key)) refuse("pretrained_cfg." + key, value, "a field of timm's PretrainedCfg");
}

const json& TimmConfig::top(const char* key) const {
  static const json null;
  const auto found = file_.find(key);
  return found == file_.end() ? null : *found;
}

const json& TimmConfig::pretrained(const char* key) const {
  static const json null;
  const auto found = pretrained_.find(key);
  return found == pretrained_.end() ? null : *found;
}

bool TimmConfig::says_nothing(const json& value) {
  return value.is_null() || value == false || value == 0 || value == "" || value == json::array();
}

void TimmConfig::refuse(const std::string& key, const json& value, const std::string& expected) const {
  constexpr std::size_t most = 80;
  std::string said = value.dump(-1, ' ', false, json::error_handler_t::replace);
  if (said.size() > most) said = said.substr(0, most) + "...";
  fail(checkpoint_.path().parent_path() / "config.json",
       "'" + printable(key) + "' is " + printable(said) + ", expected " + expected);
}

void TimmConfig::check(const VitConfig& model) const {
  const Index side = model.grid * model.patch;
  const auto expect = [&](const char* key, const json& value, const json& expected) {
    if (!value.is_null() && value != expected) refuse(key, value, expected.dump() + ", as the tensors say");
  };
  expect("input_size", pretrained("input_size"), json({model.channels, side, side}));
  const json& classes = top("num_classes").is_null() ? pretrained("num_classes") : top("num_classes");
  expect("num_classes", classes, model.classes);
  if (const json& offset = pretrained("label_offset"); !says_nothing(offset))
    refuse("label_offset", offset, "0: classes that timm leaves out are not left out");
  check_pooling("global_pool", top("global_pool"), model);
  check_arguments(model);
}

// A conversion may have dropped the class token that its original pooled by.
void TimmConfig::check_pooling(const std::string& key, const json& value, const VitConfig& model) const {
  if (value.is_null() || value == "token" || (value == "avg" && model.special == 0)) return;
  refuse(key, value, model.special == 0 ? "\"avg\"" : "\"token\"");
}

void TimmConfig::check_arguments(const VitConfig& model) const {
  const json& arguments = top("model_args");
  if (arguments.is_null()) return;
  if (!arguments.is_object()) refuse("model_args", arguments, "an object");
  const Index side = model.grid * model.patch;
  const std::pair<std::string_view, Index> sizes[] = {{"in_chans", model.channels},
                                                      {"embed_dim", model.width},
                                                      {"depth", model.depth},
                                                      {"num_heads", model.heads},
                                                      {"num_classes", model.classes}};
  for (const auto& [key, value] : arguments.items()) {
    const std::string name = "model_args." + key;
    if (value.is_null() || holds(idle_arguments, key)) continue;
    const auto* const size = std::find_if(std::begin(sizes), std::end(sizes),
                                          [&argument = key](const auto& s) { return s.first == argument; });
    if (key == "global_pool") {
      check_pooling(name, value, model);
    } else if (key == "img_size" || key == "patch_size") {
      const Index expected = key == "img_size" ? side : model.patch;
      if (!is_size(value, {expected, expected}))
        refuse(name, value, std::to_string(expected) + ", as the tensors say");
    } else if (size == std::end(sizes)) {
      refuse(name, value, "no such argument, which changes what the model computes or is unknown");
    } else if (value != size->second) {
      refuse(name, value,
             std::to_string(size->second) +
                 (key == "num_heads" ? ": say it with --heads" : ", as the tensors say"));
    }
  }
}

}  // namespace deit

#include "preprocess.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <stdexcept>

#include <linattn/weights/json.hpp>
#include <nlohmann/json.hpp>

#include "nn/finite.hpp"
#include "nn/resize.hpp"
#include "nn/small_file.hpp"
#include "nn/text.hpp"

namespace deit {
namespace {

using nlohmann::json;

[[noreturn]] void fail_config(const Checkpoint& checkpoint, const std::string& what) {
  fail(checkpoint.path().parent_path() / "config.json", what);
}

// A list of names, or an object from number to name; empty where it is neither, or leaves a number out.
std::vector<std::string> to_labels(const json& names) {
  std::vector<std::string> labels(names.is_array() || names.is_object() ? names.size() : 0);
  std::vector<bool> named(labels.size());
  for (const auto& item : names.items()) {
    std::size_t id = 0;
    const char* const end = item.key().data() + item.key().size();
    if (!item.value().is_string() || std::from_chars(item.key().data(), end, id).ptr != end ||
        id >= labels.size() || named[id])
      return {};
    labels[id] = item.value().get<std::string>();
    named[id] = true;
  }
  return labels;
}

}  // namespace

Preprocessing Preprocessing::of(const Checkpoint& checkpoint) {
  Preprocessing result;
  const json& config = checkpoint.config();
  if (!config.is_object() || !config.contains("pretrained_cfg")) return result;
  const json& said = config["pretrained_cfg"];
  if (!said.is_object()) fail_config(checkpoint, "'pretrained_cfg' is not an object");
  if (said.contains("crop_pct")) {
    if (!said["crop_pct"].is_number() || !(said["crop_pct"] > 0) || !(said["crop_pct"] <= 1))
      fail_config(checkpoint, "'crop_pct' is " + said["crop_pct"].dump() + ", expected a number up to 1");
    result.crop = said["crop_pct"];
  }
  const auto colours = [&](const char* key, std::array<double, 3>& values) {
    if (!said.contains(key)) return;
    const json& list = said[key];
    if (!list.is_array() || list.size() != 3 ||
        !std::all_of(list.begin(), list.end(), [](const json& value) { return value.is_number(); }))
      fail_config(checkpoint, "'" + std::string(key) + "' is " + list.dump() + ", expected three numbers");
    values = list.get<std::array<double, 3>>();
  };
  colours("mean", result.mean);
  colours("std", result.deviation);
  for (const double deviation : result.deviation)
    if (!(deviation > 0)) fail_config(checkpoint, "'std' holds " + std::to_string(deviation));
  if (said.contains("interpolation") && said["interpolation"] != "bicubic")
    fail_config(checkpoint,
                "'interpolation' is " + said["interpolation"].dump() + ", only bicubic is supported");
  return result;
}

Tensor<float> preprocess(const Image& image, Index height, Index width, const Preprocessing& preprocessing) {
  const auto shorter =
      static_cast<Index>(std::floor(static_cast<double>(std::max(height, width)) / preprocessing.crop));
  const Index least = std::min(image.width, image.height);
  if (least < 1) throw std::logic_error("an empty picture");
  const Image resized = resize(image, shorter * image.width / least, shorter * image.height / least);
  const auto half = [](Index rest) { return static_cast<Index>(std::lrint(static_cast<double>(rest) / 2)); };
  const Image centre =
      crop(resized, half(resized.width - width), half(resized.height - height), width, height);
  Tensor<float> result({1, 3, height, width});
  for (std::size_t c = 0; c < 3; ++c) {
    float* const plane = result.data() + static_cast<Index>(c) * height * width;
    for (Index i = 0; i < height * width; ++i)
      plane[i] = static_cast<float>(
          (centre.rgb[static_cast<std::size_t>(i) * 3 + c] / 255.0 - preprocessing.mean[c]) /
          preprocessing.deviation[c]);
  }
  expect_finite<float>("the picture given, less the mean and by the deviation of config.json",
                       {result.data(), static_cast<std::size_t>(result.elements())});
  return result;
}

std::vector<std::string> read_labels(const std::filesystem::path& path) {
  const std::string text = checked_text(
      read_small_file(path, std::size_t{16} << 20, "a list of labels", linattn::SmallFile::or_unnamed_pipe),
      path);
  const std::size_t first = text.find_first_not_of(" \t\r\n");
  std::vector<std::string> labels;
  if (first != std::string::npos && (text[first] == '{' || text[first] == '[')) {
    json names;
    if (const std::string why = linattn::parse_json(text, names); !why.empty()) fail(path, why);
    labels = to_labels(names);
    if (labels.empty())
      fail(path, "is neither a list of names nor an object {\"0\": name, \"1\": name, ...}");
    return labels;
  }
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    labels.push_back(text.substr(begin, end - begin));
    if (labels.back().ends_with('\r')) labels.back().pop_back();
    begin = end + 1;
  }
  if (labels.empty()) fail(path, "holds no label");
  return labels;
}

std::vector<std::string> labels_of(const Checkpoint& checkpoint) {
  const json& config = checkpoint.config();
  for (const char* key : {"label_names", "id2label"})
    if (config.is_object() && config.contains(key))
      if (std::vector<std::string> labels = to_labels(config[key]); !labels.empty()) return labels;
  return {};
}

}  // namespace deit

#include "preprocess.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <stdexcept>
#include <string_view>

#include <linattn/weights/json.hpp>
#include <nlohmann/json.hpp>

#include "nn/finite.hpp"
#include "nn/small_file.hpp"
#include "nn/text.hpp"
#include "timm_config.hpp"

namespace deit {
namespace {

using nlohmann::json;

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

template <class Value>
struct Name {
  std::string_view name;
  Value value;
};

// What a field names; `otherwise` where it is absent or says nothing.
template <class Value, std::size_t Count>
Value choose(const TimmConfig& config, const char* key, const Name<Value> (&names)[Count], Value otherwise) {
  const json& said = config.pretrained(key);
  if (TimmConfig::says_nothing(said)) return otherwise;
  std::string known;
  for (const auto& [name, value] : names) {
    if (said == name) return value;
    known += (known.empty() ? "" : ", ") + std::string(name);
  }
  config.refuse(key, said, "one of " + known);
}

// A number for every colour, or three.
std::array<double, 3> colours(const TimmConfig& config, const char* key,
                              const std::array<double, 3>& otherwise) {
  const json& said = config.pretrained(key);
  if (TimmConfig::says_nothing(said)) return otherwise;
  const json list = said.is_array() ? said : json::array({said});
  if ((list.size() != 1 && list.size() != 3) ||
      !std::all_of(list.begin(), list.end(), [](const json& value) { return value.is_number(); }))
    config.refuse(key, said, "three numbers");
  const auto at = [&](std::size_t i) { return list[list.size() == 1 ? 0 : i].get<double>(); };
  return {at(0), at(1), at(2)};
}

Index part(Index size, double crop) {
  return static_cast<Index>(std::floor(static_cast<double>(size) / crop));
}

// To the nearest, halves to even, as Python rounds.
Index nearest(double x) { return static_cast<Index>(std::nearbyint(x)); }

Image centre(const Image& image, Index height, Index width) {
  const auto half = [](Index rest) { return nearest(static_cast<double>(rest) / 2); };
  return crop(image, half(image.width - width), half(image.height - height), width, height);
}

// The size at which the longer side just fits.
Image fit(const Image& image, Index height, Index width, Filter filter) {
  const auto rows = static_cast<double>(image.height), columns = static_cast<double>(image.width);
  const double ratio = std::max(rows / static_cast<double>(height), columns / static_cast<double>(width));
  return resize(image, nearest(columns / ratio), nearest(rows / ratio), filter);
}

Image cut(const Image& image, Index height, Index width, const Preprocessing& p) {
  if (p.mode == CropMode::squash)
    return centre(resize(image, part(width, p.crop), part(height, p.crop), p.filter), height, width);
  if (p.mode == CropMode::border) {
    std::array<std::uint8_t, 3> colour{};
    for (std::size_t c = 0; c < 3; ++c)
      colour[c] = static_cast<std::uint8_t>(nearest(std::clamp(255 * p.mean[c], 0.0, 255.0)));
    const Image whole = fit(image, part(height, p.crop), part(width, p.crop), p.filter);
    return centre(pad(whole, width, height, colour), height, width);
  }
  const Index shorter = part(std::max(height, width), p.crop), least = std::min(image.width, image.height);
  return centre(resize(image, shorter * image.width / least, shorter * image.height / least, p.filter),
                height, width);
}

}  // namespace

Preprocessing Preprocessing::of(const Checkpoint& checkpoint) {
  const TimmConfig config(checkpoint);
  Preprocessing result;
  if (const json& said = config.pretrained("crop_pct"); !said.is_null()) {
    if (!said.is_number() || !(said >= 0.01) || !(said <= 1))
      config.refuse("crop_pct", said, "a number from 0.01 to 1");
    result.crop = said;
  }
  result.mode = choose<CropMode>(
      config, "crop_mode",
      {{"center", CropMode::center}, {"squash", CropMode::squash}, {"border", CropMode::border}},
      result.mode);
  result.filter = choose<Filter>(config, "interpolation",
                                 {{"nearest", Filter::nearest},
                                  {"box", Filter::box},
                                  {"bilinear", Filter::bilinear},
                                  {"hamming", Filter::hamming},
                                  {"bicubic", Filter::bicubic},
                                  {"lanczos", Filter::lanczos}},
                                 result.filter);
  result.mean = colours(config, "mean", result.mean);
  result.deviation = colours(config, "std", result.deviation);
  for (const double deviation : result.deviation)
    if (!(deviation > 0)) config.refuse("std", config.pretrained("std"), "numbers above 0");
  return result;
}

Tensor<float> preprocess(const Image& image, Index height, Index width, const Preprocessing& preprocessing) {
  if (std::min(image.width, image.height) < 1) throw std::logic_error("an empty picture");
  const Image ready = cut(image, height, width, preprocessing);
  Tensor<float> result({1, 3, height, width});
  for (std::size_t c = 0; c < 3; ++c) {
    float* const plane = result.data() + static_cast<Index>(c) * height * width;
    for (Index i = 0; i < height * width; ++i)
      plane[i] = static_cast<float>(
          (ready.rgb[static_cast<std::size_t>(i) * 3 + c] / 255.0 - preprocessing.mean[c]) /
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
  const TimmConfig config(checkpoint);
  for (const json* names : {&config.top("label_names"), &config.pretrained("label_names"),
                            &config.top("labels"), &config.top("id2label")})
    if (std::vector<std::string> labels = to_labels(*names); !labels.empty()) return labels;
  return {};
}

}  // namespace deit

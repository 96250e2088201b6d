// timm's config.json: every form and field of it, and the pictures that it asks for against Pillow's
// (tests/data/deit-tiny/preprocessing.json, made by tests/reference/timm_preprocessing.py).
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "deit/preprocess.hpp"
#include "deit/timm_config.hpp"
#include "deit/vit.hpp"
#include "nn/orientation.hpp"
#include "nn/resize.hpp"
#include "sd35_files.hpp"

namespace {

namespace fs = std::filesystem;
using deit::CropMode;
using nlohmann::json;
using nn::Filter;
using nn::Image;
using nn::Index;
using sd35_files::Folder;

const fs::path tiny = fs::path(LINATTN_TEST_DATA) / "deit-tiny";

const std::map<std::string, Filter> filters = {{"nearest", Filter::nearest},   {"box", Filter::box},
                                               {"bilinear", Filter::bilinear}, {"hamming", Filter::hamming},
                                               {"bicubic", Filter::bicubic},   {"lanczos", Filter::lanczos}};
const std::map<std::string, CropMode> modes = {
    {"center", CropMode::center}, {"squash", CropMode::squash}, {"border", CropMode::border}};

std::string fnv(const std::vector<std::uint8_t>& bytes) {
  std::uint64_t value = 0xcbf29ce484222325;
  for (const std::uint8_t byte : bytes) value = (value ^ byte) * 0x100000001b3;
  std::array<char, 17> text{};
  std::snprintf(text.data(), text.size(), "%016llx", static_cast<unsigned long long>(value));
  return text.data();
}

// The bytes that preprocess has cut out.
std::vector<std::uint8_t> bytes_of(const Image& image, Index height, Index width,
                                   const deit::Preprocessing& preprocessing) {
  const nn::Tensor<float> tensor = deit::preprocess(image, height, width, preprocessing);
  const auto values = tensor.view<4>();
  std::vector<std::uint8_t> bytes;
  double furthest = 0;  // from a byte
  for (Index y = 0; y < height; ++y)
    for (Index x = 0; x < width; ++x)
      for (std::size_t c = 0; c < 3; ++c) {
        const double level =
            255 * (static_cast<double>(values(0, static_cast<Index>(c), y, x)) * preprocessing.deviation[c] +
                   preprocessing.mean[c]);
        furthest = std::max(furthest, std::abs(level - std::round(level)));
        bytes.push_back(static_cast<std::uint8_t>(std::round(level)));
      }
  CHECK(furthest < 1e-3);
  return bytes;
}

// The tiny model with another config.json.
class Model {
 public:
  Model() { fs::copy_file(tiny / "model.safetensors", folder_ / "model.safetensors"); }

  void write(const json& config) const { sd35_files::write_text(folder_ / "config.json", config.dump()); }
  [[nodiscard]] deit::Preprocessing read(const json& config) const {
    write(config);
    return deit::Preprocessing::of(deit::open(folder_.path()));
  }
  // What is said of a config after the file's name; empty where it is taken.
  [[nodiscard]] std::string refusal(const json& config) const {
    write(config);
    try {
      const deit::Checkpoint checkpoint = deit::open(folder_.path());
      (void)deit::Preprocessing::of(checkpoint);
      deit::TimmConfig(checkpoint).check(deit::VitConfig::of(checkpoint, 3));
    } catch (const std::runtime_error& error) {
      const std::string name = (folder_ / "config.json").string() + ": ", what = error.what();
      CHECK(what.starts_with(name));
      return what.substr(name.size());
    }
    return {};
  }
  [[nodiscard]] std::vector<std::string> labels(const json& config) const {
    write(config);
    return deit::labels_of(deit::open(folder_.path()));
  }

 private:
  Folder folder_;
};

TEST_CASE("pictures are resized and cut byte for byte as Pillow and timm do") {
  std::ifstream file(tiny / "preprocessing.json");
  const Image picture = nn::read_image(tiny / "picture.png"), turned = nn::upright(picture, 5);
  const json cases = json::parse(file);
  CHECK(cases.size() == 186);
  for (const json& one : cases) {
    const Index width = one.at("width"), height = one.at("height");
    const Filter filter = filters.at(one.at("filter"));
    CAPTURE(one.dump());
    if (!one.contains("mode")) {
      CHECK(fnv(nn::resize(picture, width, height, filter).rgb) == one.at("hash"));
      continue;
    }
    deit::Preprocessing preprocessing;
    preprocessing.crop = one.at("crop");
    preprocessing.mode = modes.at(one.at("mode"));
    preprocessing.filter = filter;
    CHECK(fnv(bytes_of(one.at("transposed") == true ? turned : picture, height, width, preprocessing)) ==
          one.at("hash"));
  }
}

TEST_CASE("a picture too long for its width is refused, not resized without end") {
  const Image strip{1, 1 << 20, std::vector<std::uint8_t>(3 << 20)};
  CHECK_THROWS_WITH_AS((void)deit::preprocess(strip, 224, 224, {}),
                       doctest::Contains("at most 134217728 pixels are made"), std::runtime_error);
  deit::Preprocessing border;
  border.mode = CropMode::border;
  CHECK_THROWS_WITH_AS((void)deit::preprocess(strip, 224, 224, border), doctest::Contains("cannot resize"),
                       std::runtime_error);
}

TEST_CASE("both forms of timm's config.json say the same") {
  const Model model;
  const json said = {{"input_size", {3, 32, 32}},
                     {"interpolation", "lanczos"},
                     {"crop_pct", 0.9},
                     {"crop_mode", "border"},
                     {"mean", {0.5, 0.25, 0.125}},
                     {"std", {0.25, 0.5, 1}},
                     {"test_input_size", nullptr},
                     {"test_crop_pct", 1.0},
                     {"pool_size", nullptr},
                     {"min_input_size", nullptr},
                     {"fixed_input_size", true},
                     {"num_classes", 6},
                     {"first_conv", "patch_embed.proj"},
                     {"classifier", "head"},
                     {"license", "apache-2.0"}};
  json flat = said;
  flat.update(
      {{"architecture", "deit_tiny"}, {"num_features", 24}, {"labels", {"a", "b", "c", "d", "e", "f"}}});
  const json nested = {{"architecture", "deit_tiny"},
                       {"num_classes", 6},
                       {"num_features", 24},
                       {"global_pool", "token"},
                       {"model_args", {{"img_size", 32}, {"num_heads", 3}}},
                       {"pretrained_cfg", said}};
  for (const json& config : {flat, nested}) {
    CAPTURE(config.dump());
    CHECK(model.refusal(config) == "");
    const deit::Preprocessing p = model.read(config);
    CHECK(p.crop == 0.9);
    CHECK(p.mode == CropMode::border);
    CHECK(p.filter == Filter::lanczos);
    CHECK(p.mean == std::array{0.5, 0.25, 0.125});
    CHECK(p.deviation == std::array{0.25, 0.5, 1.0});
  }
  CHECK(model.labels(flat) == std::vector<std::string>{"a", "b", "c", "d", "e", "f"});
  CHECK(model.labels({{"pretrained_cfg", {{"label_names", {"in"}}}}}) == std::vector<std::string>{"in"});
  CHECK(model.labels({{"label_names", {"top"}}, {"pretrained_cfg", {{"label_names", {"in"}}}}}) ==
        std::vector<std::string>{"top"});

  for (const auto& [name, filter] : filters)
    CHECK(model.read({{"pretrained_cfg", {{"interpolation", name}}}}).filter == filter);
  for (const auto& [name, mode] : modes)
    CHECK(model.read({{"pretrained_cfg", {{"crop_mode", name}}}}).mode == mode);
  // What says nothing leaves timm's defaults; one number is for every colour.
  const deit::Preprocessing none = model.read(json::parse(
      R"({"pretrained_cfg": {"crop_pct": null, "crop_mode": null, "interpolation": "", "mean": [], "std": null}})"));
  CHECK(none.crop == 0.875);
  CHECK(none.mode == CropMode::center);
  CHECK(none.filter == Filter::bicubic);
  CHECK(none.mean == std::array{0.485, 0.456, 0.406});
  CHECK(model.read({{"pretrained_cfg", {{"mean", 0.5}}}}).mean == std::array{0.5, 0.5, 0.5});
  CHECK(model.read({{"pretrained_cfg", {{"std", json::array({0.5})}}}}).deviation ==
        std::array{0.5, 0.5, 0.5});
}

TEST_CASE("what a config.json asks for and is not done is refused by name") {
  const Model model;
  const auto inside = [&](const char* key, const json& value) {
    return model.refusal({{"architecture", "x"}, {"pretrained_cfg", {{key, value}}}});
  };
  CHECK(inside("crop_pct", 0) == "'crop_pct' is 0, expected a number from 0.01 to 1");
  CHECK(inside("crop_pct", 1.5) == "'crop_pct' is 1.5, expected a number from 0.01 to 1");
  CHECK(inside("crop_pct", "0.9") == "'crop_pct' is \"0.9\", expected a number from 0.01 to 1");
  CHECK(inside("crop_mode", "corner") == "'crop_mode' is \"corner\", expected one of center, squash, border");
  CHECK(inside("interpolation", "random") ==
        "'interpolation' is \"random\", expected one of nearest, box, bilinear, hamming, bicubic, lanczos");
  CHECK(inside("mean", "IMAGENET_DEFAULT_MEAN") ==
        "'mean' is \"IMAGENET_DEFAULT_MEAN\", expected three numbers");
  CHECK(inside("mean", {0.5, 0.5, 0.5, 0.5}) == "'mean' is [0.5,0.5,0.5,0.5], expected three numbers");
  CHECK(inside("std", {1, -1, 1}) == "'std' is [1,-1,1], expected numbers above 0");
  CHECK(inside("input_size", {3, 32, 64}) ==
        "'input_size' is [3,32,64], expected [3,32,32], as the tensors say");
  CHECK(inside("input_size", {1, 32, 32}) ==
        "'input_size' is [1,32,32], expected [3,32,32], as the tensors say");
  CHECK(inside("input_size", {4, 32, 32}) ==
        "'input_size' is [4,32,32], expected [3,32,32], as the tensors say");
  CHECK(inside("input_size", 32) == "'input_size' is 32, expected [3,32,32], as the tensors say");
  CHECK(inside("num_classes", 1000) == "'num_classes' is 1000, expected 6, as the tensors say");
  CHECK(inside("label_offset", 1).starts_with("'label_offset' is 1, expected 0"));
  CHECK(inside("crop_border", 4) ==
        "'pretrained_cfg.crop_border' is 4, expected a field of timm's PretrainedCfg");
  CHECK(model.refusal({{"pretrained_cfg", 1}}) == "'pretrained_cfg' is 1, expected an object");
  CHECK(model.refusal({{"architecture", "x"}, {"input_size", {3, 32, 64}}})
            .starts_with("'input_size' is [3,32,64]"));
  CHECK(model.refusal({{"architecture", "x"}, {"default_cfg", {{"crop_pct", 1}}}}) ==
        "'default_cfg' is {\"crop_pct\":1}, expected it to be called 'pretrained_cfg'");
  CHECK(model.refusal({{"global_pool", "avg"}}) == "'global_pool' is \"avg\", expected \"token\"");

  const auto argument = [&](const char* key, const json& value) {
    return model.refusal({{"architecture", "x"}, {"model_args", {{key, value}}}});
  };
  CHECK(argument("img_size", 32) == "");
  CHECK(argument("img_size", {32, 32}) == "");
  CHECK(argument("drop_rate", 0.1) == "");
  CHECK(argument("patch_size", 8) == "");
  CHECK(argument("num_heads", 3) == "");
  CHECK(argument("img_size", 64) == "'model_args.img_size' is 64, expected 32, as the tensors say");
  CHECK(argument("img_size", {32, 64}) ==
        "'model_args.img_size' is [32,64], expected 32, as the tensors say");
  CHECK(argument("num_heads", 6) == "'model_args.num_heads' is 6, expected 3: say it with --heads");
  CHECK(argument("in_chans", 1) == "'model_args.in_chans' is 1, expected 3, as the tensors say");
  CHECK(argument("global_pool", "avg") == "'model_args.global_pool' is \"avg\", expected \"token\"");
  CHECK(argument("act_layer", "quick_gelu").starts_with("'model_args.act_layer' is \"quick_gelu\""));
  CHECK(model.refusal({{"model_args", 3}}) == "'model_args' is 3, expected an object");
}

}  // namespace

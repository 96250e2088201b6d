// A picture as a classifier of ImageNet wants it, and what its classes are called.
#pragma once

#include <array>
#include <filesystem>
#include <string>
#include <vector>

#include "nn/checkpoint.hpp"
#include "nn/image.hpp"
#include "nn/runtime.hpp"

namespace deit {

using namespace nn;

struct Preprocessing {
  double crop = 0.875;  // the part of the shorter side that is kept
  std::array<double, 3> mean{0.485, 0.456, 0.406}, deviation{0.229, 0.224, 0.225};

  // ImageNet's, or what timm's config.json says: pretrained_cfg {crop_pct, mean, std, interpolation}. Throws
  // std::runtime_error where that is no list of numbers, or an interpolation other than bicubic.
  [[nodiscard]] static Preprocessing of(const Checkpoint& checkpoint);
};

// (1, 3, height, width): the shorter side resized to max(height, width) / crop (bicubic, antialiased), the centre
// cut out, (byte / 255 - mean) / deviation. As torchvision's Resize, CenterCrop, ToTensor and Normalize.
[[nodiscard]] Tensor<float> preprocess(const Image& image, Index height, Index width,
                                       const Preprocessing& preprocessing);

// Names by class: a line each, or a JSON list, or a JSON object {"0": "tench", ...}. Throws std::runtime_error
// that names the file.
[[nodiscard]] std::vector<std::string> read_labels(const std::filesystem::path& path);

// Those that config.json has, as label_names (timm) or id2label (transformers); none is empty.
[[nodiscard]] std::vector<std::string> labels_of(const Checkpoint& checkpoint);

}  // namespace deit

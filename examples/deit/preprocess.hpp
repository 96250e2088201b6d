// A picture as a classifier of ImageNet wants it, and what its classes are called.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "nn/checkpoint.hpp"
#include "nn/image.hpp"
#include "nn/resize.hpp"
#include "nn/runtime.hpp"

namespace deit {

using namespace nn;

// How a picture comes to its size: the shorter side to size / crop and the centre of that (center), each side to its own
// size / crop whatever the ratio (squash), or the longer side, with the mean colour around it (border).
enum class CropMode : std::uint8_t { center, squash, border };

struct Preprocessing {
  double crop = 0.875;
  CropMode mode = CropMode::center;
  Filter filter = Filter::bicubic;
  std::array<double, 3> mean{0.485, 0.456, 0.406}, deviation{0.229, 0.224, 0.225};

  // ImageNet's, or what timm's config.json says, as timm's evaluation takes it. Throws std::runtime_error that names the
  // field and its value where it cannot be done.
  [[nodiscard]] static Preprocessing of(const Checkpoint& checkpoint);
};

// (1, 3, height, width): the picture resized and cut as `preprocessing` says, (byte / 255 - mean) / deviation. Byte for
// byte what timm and PIL cut out; of a size that is not square, center takes the larger side for both, as
// torchvision's Resize and CenterCrop.
[[nodiscard]] Tensor<float> preprocess(const Image& image, Index height, Index width,
                                       const Preprocessing& preprocessing);

// Names by class: a line each, or a JSON list, or a JSON object {"0": "tench", ...}. Throws std::runtime_error
// that names the file.
[[nodiscard]] std::vector<std::string> read_labels(const std::filesystem::path& path);

// Those that config.json has, as label_names (timm; once: labels) or id2label (transformers); empty where it has none.
[[nodiscard]] std::vector<std::string> labels_of(const Checkpoint& checkpoint);

}  // namespace deit

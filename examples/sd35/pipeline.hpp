// A prompt to a picture.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "conditioning.hpp"
#include "mmdit.hpp"
#include "nn/image.hpp"
#include "nn/runtime.hpp"
#include "sampler.hpp"

namespace sd35 {

using namespace nn;  // what the examples share

struct SamplingOptions {
  Method method = Method::euler;
  double cfg_scale = 4.5;  // 1 or less: no guidance, the first prompt alone
  SkipLayerGuidance skip_layers{};
};

/// Sees every step: its input, and the denoised latent after guidance.
template <class T>
using StepObserver = std::function<void(int step, std::span<const T> x, std::span<const T> denoised)>;

/// Walks `latent` (1, channels, h, w), dense, from sigmas[0] to the last one. `text` holds the prompt and, if
/// cfg_scale > 1, the negative prompt; both go through the transformer as one batch. Skip-layer guidance adds
/// a third, smaller forward in its steps. What does not depend on the latent is
/// computed once.
template <class T>
void sample(Runtime& rt, const Mmdit<T>& transformer, const Conditioning<T>& text,
            const std::vector<double>& sigmas, const SamplingOptions& options, TensorView<T, 4> latent,
            const StepObserver<T>& observe = {});

/// Where the weights are. A path is what Checkpoint::open takes; an empty one falls back on `model`.
struct ModelFiles {
  std::filesystem::path model{};        // a full single file, or a diffusers folder
  std::filesystem::path transformer{};  // the transformer alone
  std::filesystem::path vae{}, clip_l{}, clip_g{}, t5{};
  std::filesystem::path tokenizers{};  // folder of the tokenizers, where `model` is no folder that has them
};

/// What is unset is the model's default: 1024 x 1024 or the model's largest square, and by its kind 40 steps
/// and guidance 4.5 (Medium), 28 and 3.5 (Large), 4 and 1 (turbo).
struct PictureOptions {
  std::string prompt, negative_prompt;
  std::optional<Index> width, height;
  std::optional<int> steps;
  std::optional<double> cfg_scale;
  std::uint64_t seed = 42;
  Method method = Method::euler;
  Scheduler scheduler = Scheduler::sd3;
  double flow_shift = 3;
  SkipLayerGuidance skip_layers{};
  bool turbo = false;
  bool official =
      false;  // text and colours as the official code has them: ConditioningOptions, Rounding::down
};

/// Seconds that a stage took.
struct Stage {
  std::string name;
  double seconds = 0;
};

struct Picture {
  Image image;
  PictureOptions options;  // with every default filled in
  std::string model;       // "SD3.5 Medium", ...
  Index modules = 0, converted_modules = 0;
  std::vector<Stage> stages;
  double seconds_a_step = 0;

  /// Everything needed to make the picture again, as other Stable Diffusion programs write it into a PNG:
  /// prompt, negative prompt, then "Steps: 40, Sampler: euler, ...".
  [[nodiscard]] std::string parameters() const;
};

/// What a caller may show while a picture is made.
struct Progress {
  std::function<void(std::string_view stage)> on_stage;
  std::function<void(std::string_view encoder)> on_encoder;  // before each is loaded
  std::function<void(std::string_view note)> on_note;        // something the user should know
  std::function<void(int step, int steps)> on_step;          // after each; 0 before the first
};

/// Loads, encodes the prompts, releases the encoders, runs the transformer, decodes. The same options give the
/// same picture, byte for byte, with any number of threads. Throws std::runtime_error with one sentence: a
/// size that the model cannot do, a file or tensor that is missing or of another family.
[[nodiscard]] Picture make_picture(Runtime& rt, const ModelFiles& files, const PictureOptions& options,
                                   const Progress& progress = {});

}  // namespace sd35

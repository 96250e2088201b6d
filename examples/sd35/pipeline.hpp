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
  int schedule = 0;  // the steps that its fractions count, where the run takes but the last of them; 0: all
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
  // Text and colours as the official code has them: ConditioningOptions, Rounding::down.
  bool official = false;
  // A PNG or JPEG to start from instead of noise alone: the last `strength` of the steps work on it. Without width
  // and height the picture has its size, cut to what the model can; with them it is scaled to cover that size.
  // Either way what stands out is cut off evenly.
  std::filesystem::path init_image{};
  double strength = 0.75;
  // The VAE decodes in bands, which takes less memory and more time for the same picture: as the size needs it,
  // or always.
  bool vae_tiling = false;
};

/// Seconds that a stage took.
struct Stage {
  std::string name;
  double seconds = 0;
};

struct Picture {
  Image image;
  PictureOptions options;  // with every default filled in, and the picture's own prompt and seed
  std::string model;       // "SD3.5 Medium", ...
  Index modules = 0, converted_modules = 0;
  std::vector<Ignored> ignored;  // tensors of the files that change nothing
  std::vector<Stage> stages;     // load, text and encode are those of all pictures that were made together
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
  std::function<void(std::size_t picture, std::size_t pictures)> on_picture;  // before each, from 0
};

/// What one of several pictures has of its own. The prompt lies with the caller.
struct Subject {
  std::string_view prompt;
  std::uint64_t seed = 42;
};

/// Loads, encodes each prompt once, releases the encoders, then runs the transformer and decodes, subject by subject;
/// `done` gets each picture as it is ready. The options' own prompt and seed are not looked at. The same options
/// and subject give the same picture, byte for byte, with any number of threads and beside any other subjects.
/// Memory does not grow with the subjects of one prompt; a prompt more takes its rows of text features, twice with
/// guidance: 77 + 256 of 4096 floats, 5.5 MB, in the published models.
/// Throws std::runtime_error with one sentence: a size that the model cannot do, a file or tensor that is missing
/// or of another family.
void make_pictures(Runtime& rt, const ModelFiles& files, const PictureOptions& options,
                   std::span<const Subject> subjects, const Progress& progress,
                   const std::function<void(Picture picture)>& done);
/// The one picture of the options' prompt and seed.
[[nodiscard]] Picture make_picture(Runtime& rt, const ModelFiles& files, const PictureOptions& options,
                                   const Progress& progress = {});

/// The file of picture `index` of `count`: `pattern` itself for a single one; else with the index, from 0, in the
/// place of a %d or %03d in the file's name, or as _000 before the extension.
[[nodiscard]] std::filesystem::path output_path(const std::filesystem::path& pattern, std::size_t index,
                                                std::size_t count);

}  // namespace sd35

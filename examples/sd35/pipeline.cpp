#include "pipeline.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <sstream>
#include <stdexcept>
#include <utility>

#include <linattn/weights/random.hpp>

#include "embeddings.hpp"
#include "vae.hpp"

namespace sd35 {
namespace {

namespace fs = std::filesystem;

class Stopwatch {
 public:
  [[nodiscard]] double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

struct Defaults {
  const char* name;
  int steps;
  double cfg_scale;
};

// The family is told by its structure and its members by their sizes; Turbo has the shapes of Large.
Defaults defaults_of(const MmditConfig& config, bool turbo) {
  const bool dual = std::count(config.dual.begin(), config.dual.end(), true) > 0;
  if (turbo) return {"SD3.5 Large Turbo", 4, 1.0};
  if (config.qk_norm && !dual) return {config.width == 2432 ? "SD3.5 Large" : "SD3.5 Large (small)", 28, 3.5};
  if (dual) return {config.width == 1536 ? "SD3.5 Medium" : "SD3.5 Medium (small)", 40, 4.5};
  return {config.width == 1536 ? "SD3 Medium" : "SD3 (small)", 40, 4.5};
}

// A side of the picture: given or the default, and possible.
Index side(std::optional<Index> wanted, const char* name, Index unit, Index most) {
  const Index value = wanted.value_or(std::min<Index>(1024 / unit * unit, unit * most));
  if (value < unit || value % unit != 0)
    throw std::runtime_error(
        std::string(name) + " " + std::to_string(value) + ": must be a positive multiple of " +
        std::to_string(unit) + " pixels" +
        (value > 0 ? ", such as " + std::to_string((value + unit - 1) / unit * unit) : ""));
  if (value > unit * most)
    throw std::runtime_error(std::string(name) + " " + std::to_string(value) + ": this model goes up to " +
                             std::to_string(unit * most) + " pixels");
  return value;
}

}  // namespace

template <class T>
void sample(Runtime& rt, const Mmdit<T>& transformer, const Conditioning<T>& text,
            const std::vector<double>& sigmas, const SamplingOptions& options, TensorView<T, 4> latent,
            const StepObserver<T>& observe) {
  const Index batch = options.cfg_scale > 1 ? 2 : 1, elements = latent.elements();
  if (text.context.extent(0) < batch) throw std::logic_error("guidance needs a negative prompt");
  Integrator<T> integrator(options.method, sigmas);
  const int steps = integrator.steps();

  // A row a step and prompt.
  const Index time_width = transformer.config().time_width, pooled_width = transformer.config().pooled_width;
  Tensor<T> times({steps * batch, time_width}), pooled({steps * batch, pooled_width});
  for (Index row = 0; row < steps * batch; ++row) {
    timestep_embedding<T>(integrator.time(static_cast<int>(row / batch)),
                          {times.data() + row * time_width, static_cast<std::size_t>(time_width)});
    std::copy_n(text.pooled.data() + row % batch * pooled_width, pooled_width,
                pooled.data() + row * pooled_width);
  }
  const Modulations<T> modulations = transformer.modulate(rt, std::as_const(times).template view<2>(),
                                                          std::as_const(pooled).template view<2>());
  const Tensor<T> context =
      transformer.embed_context(rt, slice<0>(text.context.template view<3>(), 0, batch));

  const auto span = [elements](T* data) { return std::span<T>(data, static_cast<std::size_t>(elements)); };
  const auto shape = [&](Index count) {
    return std::vector<Index>{count, latent.extent(1), latent.extent(2), latent.extent(3)};
  };
  TensorView<const T, 4> shared = latent;  // one latent for all prompts
  shared.extents[0] = batch;
  shared.strides[0] = 0;
  Tensor<T> v(shape(batch)), skipped(shape(1)), denoised(shape(1));
  const std::span<T> x = span(latent.data), cond = span(v.data()), guided = span(denoised.data());
  for (int step = 0; step < steps; ++step) {
    transformer.forward(rt, shared, context.template view<3>(), modulations, step * batch, {},
                        v.template view<4>());
    if (batch == 2)
      guide<T>(cond, span(v.data() + elements), options.cfg_scale, guided);
    else
      std::copy(cond.begin(), cond.end(), guided.begin());
    if (options.skip_layers.active(step, steps)) {
      transformer.forward(rt, latent, slice<0>(context.template view<3>(), 0, 1), modulations, step * batch,
                          options.skip_layers.layers, skipped.template view<4>());
      guide_skip_layer<T>(cond, span(skipped.data()), options.skip_layers.scale, guided);
    }
    integrator.denoise(step, x, guided, guided);
    if (observe) observe(step, x, guided);
    integrator.advance(step, guided, x);
  }
}

template void sample<float>(Runtime&, const Mmdit<float>&, const Conditioning<float>&,
                            const std::vector<double>&, const SamplingOptions&, TensorView<float, 4>,
                            const StepObserver<float>&);
template void sample<double>(Runtime&, const Mmdit<double>&, const Conditioning<double>&,
                             const std::vector<double>&, const SamplingOptions&, TensorView<double, 4>,
                             const StepObserver<double>&);

std::string Picture::parameters() const {
  std::ostringstream text;
  text << options.prompt << "\nNegative prompt: " << options.negative_prompt << "\nSteps: " << *options.steps
       << ", Sampler: " << name(options.method) << ", Scheduler: " << name(options.scheduler)
       << ", Flow shift: " << options.flow_shift << ", CFG scale: " << *options.cfg_scale
       << ", Seed: " << options.seed << ", Size: " << *options.width << "x" << *options.height
       << ", Model: " << model << ", Linear attention: " << converted_modules << " of " << modules;
  if (const SkipLayerGuidance& slg = options.skip_layers; slg.scale != 0) {
    text << ", SLG scale: " << slg.scale << ", SLG start: " << slg.start << ", SLG end: " << slg.end
         << ", Skip layers:";
    for (const int layer : slg.layers) text << " " << layer;
  }
  if (options.official) text << ", Text and colours: official";
  text << ", Version: linattn " << LINATTN_VERSION_MAJOR << "." << LINATTN_VERSION_MINOR;
  return text.str();
}

Picture make_picture(Runtime& rt, const ModelFiles& files, const PictureOptions& options,
                     const Progress& progress) {
  Picture picture;
  picture.options = options;
  std::optional<Stopwatch> watch;
  const auto begin = [&](const char* stage) {
    if (watch) picture.stages.back().seconds = watch->seconds();
    if (progress.on_stage) progress.on_stage(stage);
    picture.stages.push_back({stage, 0});
    watch.emplace();
  };
  const auto note = [&](const std::string& text) {
    if (progress.on_note) progress.on_note(text);
  };

  // Everything that can be wrong with files and options shows here, before the long work.
  begin("load");
  const auto find = [&](const fs::path& path, Component component, const char* option) {
    const fs::path& from = path.empty() ? files.model : path;
    if (from.empty())
      throw std::runtime_error("no " + std::string(name(component)) + " was given: use --model or " + option);
    return Checkpoint::open(from, component);
  };
  const Mmdit<float> transformer(find(files.transformer, Component::transformer, "--diffusion-model"));
  const Checkpoint vae_file = find(files.vae, Component::vae, "--vae");
  const VaeDecoder<float> vae(vae_file, VaeConfig::of(vae_file));
  const MmditConfig& config = transformer.config();
  const Defaults defaults = defaults_of(config, options.turbo);
  picture.model = defaults.name;
  picture.modules = transformer.modules();
  picture.converted_modules = transformer.converted_modules();
  if (vae.latent_channels() != config.in_channels || config.in_channels != config.out_channels)
    throw std::runtime_error("the VAE has " + std::to_string(vae.latent_channels()) +
                             " latent channels, but the transformer " + std::to_string(config.in_channels) +
                             " and " + std::to_string(config.out_channels));

  PictureOptions& chosen = picture.options;
  const Index unit = vae.factor() * config.patch;
  chosen.width = side(options.width, "width", unit, config.position_grid);
  chosen.height = side(options.height, "height", unit, config.position_grid);
  chosen.steps = options.steps.value_or(defaults.steps);
  chosen.cfg_scale = options.cfg_scale.value_or(defaults.cfg_scale);
  if (!std::isfinite(*chosen.cfg_scale)) throw std::runtime_error("cfg scale: a number is needed");
  const std::vector<double> levels = sigmas(options.scheduler, *chosen.steps, options.flow_shift);
  if (options.skip_layers.scale != 0)
    for (const int layer : options.skip_layers.layers)
      if (layer < 0 || layer >= config.depth)
        throw std::runtime_error("skip layer " + std::to_string(layer) + ": the model has blocks 0 to " +
                                 std::to_string(config.depth - 1));

  TextSources sources{{}, {}, {}, files.tokenizers};
  if (sources.tokenizers.empty()) sources.tokenizers = files.model;
  std::error_code ignored;
  if (!fs::is_directory(sources.tokenizers, ignored))
    throw std::runtime_error(
        "no tokenizers were given, and single files hold none: fetch tokenizer/, tokenizer_2/ and "
        "tokenizer_3/ "
        "(merges.txt, spiece.model) of stabilityai/stable-diffusion-3.5-medium on Hugging Face and name "
        "their "
        "folder with --tokenizers");
  const auto encoder = [&](const fs::path& path, Component component, const char* option, fs::path& out) {
    if (!path.empty()) {
      (void)Checkpoint::open(path, component);
      out = path;
    } else if (!files.model.empty() && Checkpoint::open_if_present(files.model, component)) {
      out = files.model;
    } else {
      note("no " + std::string(name(component)) + " (" + option + "): its features are zeros");
    }
  };
  encoder(files.clip_l, Component::clip_l, "--clip_l", sources.clip_l);
  encoder(files.clip_g, Component::clip_g, "--clip_g", sources.clip_g);
  encoder(files.t5, Component::t5, "--t5xxl", sources.t5);
  if (sources.clip_l.empty() && sources.clip_g.empty() && sources.t5.empty())
    throw std::runtime_error(
        "no text encoder was found: name at least one with --clip_l, --clip_g or --t5xxl");

  begin("text");
  std::vector<std::string> prompts{options.prompt};
  if (*chosen.cfg_scale > 1) prompts.push_back(options.negative_prompt);
  const Conditioning<float> text =
      encode_prompts<float>(rt, sources, prompts, config.context_width, config.pooled_width,
                            {.official = options.official, .on_encoder = progress.on_encoder});

  begin("sampling");
  Tensor<float> latent({1, config.in_channels, *chosen.height / vae.factor(), *chosen.width / vae.factor()});
  linattn::TorchGenerator(options.seed).normal({latent.data(), static_cast<std::size_t>(latent.elements())});
  for (Index i = 0; i < latent.elements(); ++i) latent.data()[i] *= static_cast<float>(levels[0]);
  if (progress.on_step) progress.on_step(0, *chosen.steps);
  sample<float>(rt, transformer, text, levels, {options.method, *chosen.cfg_scale, options.skip_layers},
                latent.view<4>(), [&](int step, auto, auto) {
                  if (progress.on_step) progress.on_step(step + 1, *chosen.steps);
                });
  begin("decode");
  const Tensor<float> pixels = vae.decode(rt, std::as_const(latent).view<4>());
  if (pixels.extent(3) != 3)
    throw std::runtime_error("the VAE makes pictures of " + std::to_string(pixels.extent(3)) +
                             " colours, not 3");
  picture.image = to_image<float>({pixels.data(), static_cast<std::size_t>(pixels.elements())}, *chosen.width,
                                  *chosen.height, options.official ? Rounding::down : Rounding::nearest);
  picture.stages.back().seconds = watch->seconds();
  picture.seconds_a_step = picture.stages[2].seconds / *chosen.steps;
  return picture;
}

}  // namespace sd35

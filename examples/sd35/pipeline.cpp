#include "pipeline.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <stdexcept>
#include <utility>

#include <linattn/weights/random.hpp>

#include "clip_text.hpp"
#include "embeddings.hpp"
#include "nn/finite.hpp"
#include "nn/resize.hpp"
#include "nn/small_file.hpp"
#include "t5_encoder.hpp"
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

std::string size_text(Index width, Index height) {
  return std::to_string(width) + " x " + std::to_string(height);
}

std::span<float> values_of(Tensor<float>& tensor) {
  return {tensor.data(), static_cast<std::size_t>(tensor.elements())};
}

// Scaled until it covers the size, where that is another, and cut to it evenly.
Image cover(const Image& image, Index width, Index height) {
  const double scale = std::max(static_cast<double>(width) / static_cast<double>(image.width),
                                static_cast<double>(height) / static_cast<double>(image.height));
  const auto scaled = [&](Index side, Index least) {
    return std::max(least, static_cast<Index>(std::lround(static_cast<double>(side) * scale)));
  };
  const Index large = scaled(image.width, width), tall = scaled(image.height, height);
  const Image resized = resize(image, large, tall);
  return crop(resized, (large - width) / 2, (tall - height) / 2, width, height);
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
  const std::string stage = "transformer";
  const Modulations<T> modulations = in_stage(stage, [&] {
    return transformer.modulate(rt, std::as_const(times).template view<2>(),
                                std::as_const(pooled).template view<2>());
  });
  const Tensor<T> context = in_stage(stage, [&] {
    return transformer.embed_context(rt, slice<0>(text.context.template view<3>(), 0, batch));
  });

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
    const auto forward = [&](const TensorView<const T, 4>& latents, Index prompts, std::span<const int> skip,
                             Tensor<T>& out) {
      in_stage(
          stage,
          [&] {
            transformer.forward(rt, latents, slice<0>(context.template view<3>(), 0, prompts), modulations,
                                step * batch, skip, out.template view<4>());
          },
          step_text(step));
    };
    const auto expect = [&](const std::string& place, std::span<const T> values) {
      expect_finite<T>(place + step_text(step), values);
    };
    forward(shared, batch, {}, v);
    if (batch == 2)
      guide<T>(cond, span(v.data() + elements), options.cfg_scale, guided);
    else
      std::copy(cond.begin(), cond.end(), guided.begin());
    expect("guidance", guided);
    if (options.skip_layers.active(step, options.schedule > 0 ? options.schedule : steps)) {
      forward(latent, 1, options.skip_layers.layers, skipped);
      guide_skip_layer<T>(cond, span(skipped.data()), options.skip_layers.scale, guided);
      expect("skip-layer guidance", guided);
    }
    integrator.denoise(step, x, guided, guided);
    if (observe) observe(step, x, guided);
    integrator.advance(step, guided, x);
    expect("sampler", x);
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
  if (!options.init_image.empty())
    text << ", Denoising strength: " << options.strength
         << ", Initial picture: " << options.init_image.filename().string();
  text << ", Version: linattn " << LINATTN_VERSION_MAJOR << "." << LINATTN_VERSION_MINOR;
  return text.str();
}

void make_pictures(Runtime& rt, const ModelFiles& files, const PictureOptions& options,
                   std::span<const Subject> subjects, const Progress& progress,
                   const std::function<void(Picture)>& done) {
  if (subjects.empty()) throw std::runtime_error("no prompt was given");
  Picture common;  // what the pictures share
  common.options = options;
  std::optional<Stopwatch> watch;
  const auto begin = [&](std::vector<Stage>& stages, const char* stage) {
    if (watch && !stages.empty()) stages.back().seconds = watch->seconds();
    if (progress.on_stage) progress.on_stage(stage);
    stages.push_back({stage, 0});
    watch.emplace();
  };
  const auto note = [&](const std::string& text) {
    if (progress.on_note) progress.on_note(text);
  };

  // Everything that can be wrong with files and options shows here, before the long work.
  begin(common.stages, "load");
  const auto find = [&](const fs::path& path, Component component, const char* option) {
    const fs::path& from = path.empty() ? files.model : path;
    if (from.empty())
      throw std::runtime_error("no " + std::string(name(component)) + " was given: use --model or " + option);
    return Checkpoint::open(from, component);
  };
  const Checkpoint transformer_file = find(files.transformer, Component::transformer, "--diffusion-model");
  const Mmdit<float> transformer(transformer_file);
  const Checkpoint vae_file = find(files.vae, Component::vae, "--vae");
  const VaeConfig vae_config = VaeConfig::of(vae_file);
  const VaeDecoder<float> vae(vae_file, vae_config);
  const auto account = [&](const std::vector<Ignored>& ignored) {
    common.ignored.insert(common.ignored.end(), ignored.begin(), ignored.end());
  };
  account(leftovers(transformer_file));
  const MmditConfig& config = transformer.config();
  const Defaults defaults = defaults_of(config, options.turbo);
  common.model = defaults.name;
  common.modules = transformer.modules();
  common.converted_modules = transformer.converted_modules();
  if (vae.latent_channels() != config.in_channels || config.in_channels != config.out_channels)
    throw std::runtime_error("the VAE has " + std::to_string(vae.latent_channels()) +
                             " latent channels, but the transformer " + std::to_string(config.in_channels) +
                             " and " + std::to_string(config.out_channels));

  PictureOptions& chosen = common.options;
  const Index unit = vae.factor() * config.patch;
  Image init;
  std::optional<VaeEncoder<float>> encoder;
  if (!options.init_image.empty()) {
    init = read_image(options.init_image);
    encoder.emplace(vae_file, vae_config);
    if (encoder->latent_channels() != config.in_channels || encoder->factor() != vae.factor())
      throw std::runtime_error(vae_file.path().string() + ": the VAE's encoder does not fit its decoder");
    if (!options.width && !options.height) {
      if (init.width < unit || init.height < unit)
        throw std::runtime_error(options.init_image.string() + ": " + size_text(init.width, init.height) +
                                 " pixels, at least " + size_text(unit, unit) + " are needed");
      chosen.width = init.width / unit * unit;
      chosen.height = init.height / unit * unit;
    }
  }
  account(leftovers(vae_file, encoder.has_value()));
  chosen.width = side(chosen.width, "width", unit, config.position_grid);
  chosen.height = side(chosen.height, "height", unit, config.position_grid);
  chosen.steps = options.steps.value_or(defaults.steps);
  chosen.cfg_scale = options.cfg_scale.value_or(defaults.cfg_scale);
  if (!std::isfinite(*chosen.cfg_scale)) throw std::runtime_error("cfg scale: a number is needed");
  std::vector<double> levels = sigmas(options.scheduler, *chosen.steps, options.flow_shift);
  if (encoder) levels = remaining_sigmas(levels, options.strength);
  const int steps = static_cast<int>(levels.size()) - 1;
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
  const auto find_encoder = [&](const fs::path& path, Component component, const char* option,
                                fs::path& out) {
    std::optional<Checkpoint> checkpoint;
    if (!path.empty())
      checkpoint = Checkpoint::open(path, component);
    else if (!files.model.empty())
      checkpoint = Checkpoint::open_if_present(files.model, component);
    if (!checkpoint)
      return note("no " + std::string(name(component)) + " (" + option + "): its features are zeros");
    out = path.empty() ? files.model : path;
    // Its tensors stay in the file: whether all are there shows now, not after hours.
    if (component == Component::t5)
      (void)T5Encoder<float>(*checkpoint);
    else
      (void)ClipText<float>(*checkpoint, ClipConfig::of(*checkpoint, component));
    account(leftovers(*checkpoint));
  };
  find_encoder(files.clip_l, Component::clip_l, "--clip-l", sources.clip_l);
  find_encoder(files.clip_g, Component::clip_g, "--clip-g", sources.clip_g);
  find_encoder(files.t5, Component::t5, "--t5xxl", sources.t5);
  if (sources.clip_l.empty() && sources.clip_g.empty() && sources.t5.empty())
    throw std::runtime_error(
        "no text encoder was found: name at least one with --clip-l, --clip-g or --t5xxl");

  begin(common.stages, "text");
  std::vector<Prompts> prompts;
  std::map<std::string_view, std::size_t> places;  // of each prompt among them
  for (const Subject& subject : subjects) {
    if (!places.emplace(subject.prompt, prompts.size()).second) continue;
    prompts.push_back({std::string(subject.prompt)});
    if (*chosen.cfg_scale > 1) prompts.back().push_back(options.negative_prompt);
  }
  const std::vector<Conditioning<float>> texts =
      encode_prompts<float>(rt, sources, prompts, config.context_width, config.pooled_width,
                            {.official = options.official, .on_encoder = progress.on_encoder});

  const VaeMemory memory = options.vae_tiling ? VaeMemory::bands : VaeMemory::automatic;
  const Index rows = *chosen.height / vae.factor(), columns = *chosen.width / vae.factor();
  Tensor<float> init_latent;
  if (encoder) {
    begin(common.stages, "encode");
    const bool own_size = !options.width && !options.height;
    init = own_size ? crop(init, (init.width - *chosen.width) / 2, (init.height - *chosen.height) / 2,
                           *chosen.width, *chosen.height)
                    : cover(init, *chosen.width, *chosen.height);
    std::vector<float> pixels(init.rgb.size());
    std::transform(init.rgb.begin(), init.rgb.end(), pixels.begin(),
                   [](std::uint8_t value) { return static_cast<float>(value) / 127.5f - 1; });
    const TensorView<const float, 4> view{
        pixels.data(), {1, 3, init.height, init.width}, {init.height * init.width * 3, 1, init.width * 3, 3}};
    with_weights_of(vae_file, [&] {
      in_stage("VAE encoder", [&] {
        init_latent = encoder->latent(encoder->moments(rt, view, {}, memory));
        expect_finite<float>("latent", values_of(init_latent));
      });
    });
    encoder.reset();
  }
  common.stages.back().seconds = watch->seconds();

  for (std::size_t i = 0; i < subjects.size(); ++i) {
    if (progress.on_picture) progress.on_picture(i, subjects.size());
    Picture picture = common;
    picture.options.prompt = subjects[i].prompt;
    picture.options.seed = subjects[i].seed;
    watch.reset();
    begin(picture.stages, "sampling");
    Tensor<float> noise({1, config.in_channels, rows, columns});
    linattn::TorchGenerator(subjects[i].seed).normal(values_of(noise));
    Tensor<float> latent = init_latent.empty() ? Tensor<float>::zeros(noise.shape()) : init_latent.clone();
    add_noise<float>(levels[0], values_of(noise), values_of(latent));
    if (progress.on_step) progress.on_step(0, steps);
    with_weights_of(transformer_file, [&] {
      sample<float>(rt, transformer, texts[places.at(subjects[i].prompt)], levels,
                    {options.method, *chosen.cfg_scale, options.skip_layers, *chosen.steps}, latent.view<4>(),
                    [&](int step, auto, auto) {
                      if (progress.on_step) progress.on_step(step + 1, steps);
                    });
    });
    picture.seconds_a_step = watch->seconds() / steps;
    begin(picture.stages, "decode");
    const Tensor<float> pixels = with_weights_of(vae_file, [&] {
      return in_stage("VAE decoder",
                      [&] { return vae.decode(rt, std::as_const(latent).view<4>(), {}, memory); });
    });
    if (pixels.extent(3) != 3)
      throw std::runtime_error("the VAE makes pictures of " + std::to_string(pixels.extent(3)) +
                               " colours, not 3");
    picture.image =
        to_image<float>({pixels.data(), static_cast<std::size_t>(pixels.elements())}, *chosen.width,
                        *chosen.height, options.official ? Rounding::down : Rounding::nearest);
    picture.stages.back().seconds = watch->seconds();
    done(std::move(picture));
  }
}

Picture make_picture(Runtime& rt, const ModelFiles& files, const PictureOptions& options,
                     const Progress& progress) {
  Picture result;
  const Subject subject{options.prompt, options.seed};
  make_pictures(rt, files, options, std::span(&subject, 1), progress,
                [&](Picture picture) { result = std::move(picture); });
  return result;
}

fs::path output_path(const fs::path& pattern, std::size_t index, std::size_t count) {
  if (count <= 1) return pattern;
  std::string file = pattern.filename().string(), number = std::to_string(index);
  const auto padded = [&](std::size_t digits) {
    return std::string(digits > number.size() ? digits - number.size() : 0, '0') + number;
  };
  for (std::size_t at = file.find('%'); at != std::string::npos; at = file.find('%', at + 1)) {
    // %d, %3d and %03d; the blanks of %3d would be a nuisance in a name.
    std::size_t end = at + 1, digits = 0;
    while (end < file.size() && file[end] >= '0' && file[end] <= '9' && digits < 10)
      digits = 10 * digits + static_cast<std::size_t>(file[end++] - '0');
    if (end < file.size() && file[end] == 'd')
      return pattern.parent_path() / file.replace(at, end + 1 - at, padded(digits));
  }
  return pattern.parent_path() / (pattern.stem().string() + "_" + padded(3) + pattern.extension().string());
}

}  // namespace sd35

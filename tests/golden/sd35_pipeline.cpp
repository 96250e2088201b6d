// pipeline: the whole chain, noise (or a latent to start from) to latent to picture, in the runs that the metadata
// list: {"name": {"sampler", "steps", "slg"?, "denoise"?, "init"?, "cfg_scale"?, "shift"?}}.
#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "golden.hpp"
#include "sd35.hpp"
#include "sd35/pipeline.hpp"
#include "sd35/vae.hpp"
#include "sd35_mmdit.hpp"
#include "sd35_sampling.hpp"

namespace {

using golden::Case;
using golden::Norm;
using golden::variant;
using linattn::Index;

template <class T>
std::span<T> span_of(sd35::Tensor<T>& tensor) {
  return {tensor.data(), static_cast<std::size_t>(tensor.elements())};
}
template <class T>
sd35::Tensor<T> tensor_of(const golden::Tensor& recorded) {
  sd35::Tensor<T> result(recorded.shape);
  std::transform(recorded.values.begin(), recorded.values.end(), result.data(),
                 [](double value) { return static_cast<T>(value); });
  return result;
}

// The picture of the recorded latent, so that only the decoder's own error counts.
template <class T>
void check_picture(Case& c, const std::string& run, const sd35::VaeDecoder<T>& vae,
                   const sd35::VaeConfig& config) {
  if (!c.has("outx." + run + ".image") && !c.has("outx." + run + ".image_u8")) return;
  sd35::Tensor<T> latent = tensor_of<T>(golden::read(
      c, "outx." + run + ".latent", {golden::any, vae.latent_channels(), golden::any, golden::any}));
  for (T& value : span_of(latent))
    value = (value - static_cast<T>(config.shift)) * static_cast<T>(config.scaling);
  sd35::Runtime rt;
  const sd35::Tensor<T> picture = vae.decode(rt, std::as_const(latent).template view<4>());
  const auto pixels = picture.template view<4>();  // (batch, row, column, colour)
  if (const std::string name = "outx." + run + ".image"; c.has(name)) {
    linattn::TensorView<const T, 4> planes = pixels;
    planes.extents = {pixels.extent(0), pixels.extent(3), pixels.extent(1), pixels.extent(2)};
    planes.strides = {pixels.stride(0), pixels.stride(3), pixels.stride(1), pixels.stride(2)};
    c.check(name, variant<T>, planes, golden::model_tolerance<T>(1e-5));
  }
  if (const std::string name = "outx." + run + ".image_u8"; c.has(name)) {
    const golden::Tensor recorded = c.read(name);
    const sd35::Image image = sd35::to_image<T>(
        {picture.data(), static_cast<std::size_t>(pixels.extent(1) * pixels.extent(2) * pixels.extent(3))},
        pixels.extent(2), pixels.extent(1), sd35::Rounding::down);
    const double largest = recorded.values.empty() ? 0 : *std::ranges::max_element(recorded.values);
    c.check(name, std::string(variant<T>) + ", within 1",
            golden::Tensor{{image.height, image.width, 3}, {image.rgb.begin(), image.rgb.end()}},
            {Norm::scaled_max, 1 / std::max(1.0, largest)});
  }
}

template <class T>
void check_run(Case& c, const std::string& name, const nlohmann::json& run, const sd35::Mmdit<T>& transformer,
               const sd35::VaeDecoder<T>& vae, const sd35::VaeConfig& config) {
  sd35::SamplingOptions options;
  options.method = sd35::parse_method(run.at("sampler").get<std::string>());
  options.cfg_scale = run.value("cfg_scale", c.number("cfg_scale", options.cfg_scale));
  options.skip_layers = golden::skip_layers(run.value("slg", nlohmann::json::object()));
  options.schedule = run.at("steps");
  std::vector<double> levels =
      sigmas(sd35::Scheduler::sd3, options.schedule, run.value("shift", c.number("shift", 3)));
  if (run.contains("denoise")) levels = sd35::remaining_sigmas(levels, run.at("denoise"));

  const sd35::MmditConfig& sizes = transformer.config();
  const golden::Tensor recorded_noise = golden::read_latents(c, "in.noise", sizes);
  sd35::Tensor<T> noise = tensor_of<T>(recorded_noise), latent = sd35::Tensor<T>::zeros(noise.shape());
  // "in.x.latent (words)": what the sampler works on.
  if (const std::string init = run.value("init", ""); !init.empty())
    latent = tensor_of<T>(golden::read(c, init.substr(0, init.find(' ')), recorded_noise.shape));
  sd35::add_noise<T>(levels[0], span_of(noise), span_of(latent));
  golden::sample_all<T>(transformer, golden::Prompts(c, recorded_noise.extent(0), sizes), levels, options,
                        latent.template view<4>(), [](auto&&...) {});

  golden::Tensor result{recorded_noise.shape, {}};
  for (const T value : span_of(latent))
    result.values.push_back(static_cast<double>(value) / config.scaling + config.shift);
  c.check("outx." + name + ".latent", variant<T>, result, golden::sampler_tolerance<T>(options.method));
  check_picture(c, name, vae, config);
}

template <class T>
void run_as(Case& c, const sd35::Checkpoint& transformer_file, const sd35::Checkpoint& vae_file,
            const nlohmann::json& json) {
  const sd35::Mmdit<T> transformer(transformer_file, golden::transformer_config(transformer_file, json));
  const sd35::VaeConfig config = sd35::VaeConfig::of(vae_file);
  const sd35::VaeDecoder<T> vae(vae_file, config);
  const nlohmann::json runs = nlohmann::json::parse(c.meta("runs"));
  for (const auto& run : runs.items()) check_run(c, run.key(), run.value(), transformer, vae, config);
}

void run_pipeline(Case& c) {
  const golden::Parameters parameters(c);
  const sd35::Checkpoint transformer = golden::open_transformer(c, parameters);
  const sd35::Checkpoint vae = golden::open_checkpoint(c, parameters, sd35::Component::vae);
  run_as<float>(c, transformer, vae, parameters.config());
  run_as<double>(c, transformer, vae, parameters.config());
}

const golden::Registration registration({"pipeline"}, run_pipeline);

}  // namespace

// linattn-dit: classes to pictures with a diffusion transformer, several models side by side.
#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <iomanip>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "nn/command.hpp"
#include "nn/finite.hpp"
#include "nn/image.hpp"
#include "nn/options.hpp"
#include "nn/outputs.hpp"
#include "nn/progress.hpp"
#include "nn/standard_output.hpp"
#include "nn/threads.hpp"
#include "sampling.hpp"
#include "sd35/vae.hpp"

namespace {

namespace fs = std::filesystem;
using nn::Image;
using nn::Index;
using nn::Tensor;
using nn::TensorView;

constexpr const char* examples = R"(Examples:
  eight classes of ImageNet, as the official sampler draws them
    linattn-dit -m DiT-XL-2-256x256.safetensors --vae sd-vae-ft-mse \
      --classes 207,360,387,974,88,979,417,279 --cfg-scale 4 --steps 250 --seed 0 -o grid.png
  softmax above its conversion by linattn-inherit, and what a step of each costs
    linattn-dit -m DiT-S-2.safetensors DiT5-S-2.safetensors --vae sd-vae-ft-mse --sampler ddim --steps 50
  half the width
    linattn-dit -m DiT-XL-2-256x256.safetensors --vae sd-vae-ft-mse -W 128 --json
Exit code: 0 when the picture is written, 2 after an error, which stderr states in one sentence.)";

struct Arguments {
  std::vector<fs::path> models;
  fs::path vae, output = "samples.png";
  std::vector<std::int32_t> classes{207, 360, 387, 974, 88, 979, 417, 279};
  dit::SamplingOptions sampling;
  std::optional<int> steps;
  std::string method = "ddpm";
  std::optional<Index> width, height, heads;
  std::optional<Index> columns;
  int threads = 0;
  bool json = false;
};

void add_options(CLI::App& app, Arguments& a) {
  const char* const model = "Model";
  nn::add_paths(app, "-m,--model", a.models,
                "safetensors files or folders; each is drawn, one above the next")
      ->required()
      ->group(model);
  nn::add_path(app, "--vae", a.vae,
               "the VAE of Stable Diffusion 1 or 2, such as sd-vae-ft-mse: folder or file")
      ->required()
      ->group(model);
  nn::add_number(app, "--heads", a.heads, nn::head_range, "of every attention, where the files do not tell")
      ->group(model);

  const char* const picture = "Picture";
  nn::add_number(app, "-c,--classes", a.classes, {0, 999999}, "one sample each")->group(picture);
  nn::add_number(app, "-W,--width", a.width, nn::side_range,
                 "of a sample in pixels (default: what the first model was trained on)")
      ->group(picture);
  nn::add_number(app, "-H,--height", a.height, nn::side_range, "of a sample in pixels (default: likewise)")
      ->group(picture);
  nn::add_number(app, "--columns", a.columns, {1, 100000}, "samples side by side (default: at most 8)")
      ->group(picture);
  nn::add_number(app, "-s,--seed", a.sampling.seed, nn::seed_range, "of the noise, that of torch on the CPU")
      ->group(picture);
  nn::add_path(app, "-o,--output", a.output, "PNG file to write")->group(picture);

  const char* const sampling = "Sampling";
  nn::add_text(app, "--sampler,--sampling-method", a.method,
               "ddpm (ancestral, the official one), or ddim (eta 0)")
      ->group(sampling);
  nn::add_number(app, "--steps", a.steps, {1, dit::training_steps}, "default: 250 (ddpm), 50 (ddim)")
      ->group(sampling);
  nn::add_number(app, "--cfg-scale", a.sampling.cfg_scale, nn::guidance_range,
                 "guidance, on three of four channels as in the official sampler; 1 or less is none")
      ->group(sampling);

  const char* const run = "Run";
  nn::add_number(app, "-t,--threads", a.threads, nn::thread_range,
                 "0: all cores; the picture is the same with any number")
      ->group(run);
  app.add_flag("--json", a.json, "print the result as JSON on stdout")->group(run);
  app.footer(examples);
}

// One model on its way.
struct Entry {
  fs::path path;
  nn::Checkpoint file;
  std::unique_ptr<dit::Dit<float>> model;
  std::optional<dit::Sampling<float>> sampling;
  std::vector<double> milliseconds;  // of each step

  [[nodiscard]] std::string label() const { return linattn::dit_label(model->config().shapes); }
  [[nodiscard]] double median() const {
    std::vector<double> sorted = milliseconds;
    std::sort(sorted.begin(), sorted.end());
    return sorted[sorted.size() / 2];
  }
};

// Samples in rows of `columns`, a white gap between them.
class Grid {
 public:
  Grid(Index width, Index height, Index columns, Index rows)
      : width_(width + gap),
        height_(height + gap),
        columns_(columns),
        image_{columns * width_ - gap, rows * height_ - gap, {}} {
    image_.rgb.assign(static_cast<std::size_t>(image_.width * image_.height * 3), 255);
  }

  void place(const Image& sample, Index at) {
    for (Index y = 0; y < sample.height; ++y)
      std::copy_n(
          sample.rgb.begin() + y * sample.width * 3, sample.width * 3,
          image_.rgb.begin() + ((at / columns_ * height_ + y) * image_.width + at % columns_ * width_) * 3);
  }
  [[nodiscard]] const Image& image() const { return image_; }

 private:
  static constexpr Index gap = 2;
  Index width_, height_, columns_;
  Image image_;
};

// One sample: a decoder's activations are large.
Image decode(nn::Runtime& rt, const sd35::Checkpoint& file, const sd35::VaeDecoder<float>& vae,
             const TensorView<const float, 4>& latent) {
  const Tensor<float> pixels = nn::with_weights_of(
      file, [&] { return nn::in_stage("VAE decoder", [&] { return vae.decode(rt, latent); }); });
  if (pixels.extent(3) != 3)
    throw std::runtime_error("the VAE makes pictures of " + std::to_string(pixels.extent(3)) +
                             " colours, not 3");
  return nn::to_image<float>({pixels.data(), static_cast<std::size_t>(pixels.elements())}, pixels.extent(2),
                             pixels.extent(1));
}

// A side of the latents from one of the pictures.
Index latent_side(std::optional<Index> pixels, const char* name, Index otherwise, Index factor) {
  if (!pixels) return otherwise;
  if (*pixels % factor != 0)
    throw std::runtime_error(std::string(name) + " " + std::to_string(*pixels) +
                             ": must be a positive multiple of the VAE's " + std::to_string(factor) +
                             " pixels");
  return *pixels / factor;
}

std::string parameters(const Arguments& a, const std::vector<Entry>& entries, Index width, Index height) {
  std::ostringstream text;
  text << "Classes:";
  for (const std::int32_t label : a.classes) text << " " << label;
  text << "\nSteps: " << a.sampling.steps << ", Sampler: " << name(a.sampling.method)
       << ", CFG scale: " << a.sampling.cfg_scale << ", Seed: " << a.sampling.seed << ", Size: " << width
       << "x" << height;
  for (const Entry& entry : entries)
    text << ", Model: " << entry.label() << " (" << entry.path.filename().string()
         << "), Linear attention: " << entry.model->converted_modules() << " of " << entry.model->modules();
  text << ", Version: linattn " << LINATTN_VERSION;
  return text.str();
}

nlohmann::ordered_json report(const Arguments& a, const std::vector<Entry>& entries, Index width,
                              Index height, Index threads, double decode_seconds) {
  nlohmann::ordered_json json{{"output", a.output.string()},
                              {"classes", a.classes},
                              {"width", width},
                              {"height", height},
                              {"seed", a.sampling.seed},
                              {"sampler", name(a.sampling.method)},
                              {"steps", a.sampling.steps},
                              {"cfg_scale", a.sampling.cfg_scale},
                              {"threads", threads},
                              {"decode_seconds", decode_seconds},
                              {"models", nlohmann::ordered_json::array()}};
  for (const Entry& entry : entries)
    json["models"].push_back({{"path", entry.path.string()},
                              {"model", entry.label()},
                              {"heads", entry.model->config().heads},
                              {"attention_modules", entry.model->modules()},
                              {"linear_attention_modules", entry.model->converted_modules()},
                              {"milliseconds_a_step", entry.median()}});
  return json;
}

int run(Arguments& a) {
  a.sampling.method = dit::parse_method(a.method);
  a.sampling.steps = a.steps.value_or(a.sampling.method == dit::Method::ddpm ? 250 : 50);
  linattn::FileSet inputs;
  for (const fs::path& model : a.models) nn::add_model(inputs, model);
  nn::add_model(inputs, a.vae);
  nn::Outputs outputs(std::move(inputs));
  outputs.add_file(a.output);

  nn::expect_threads(a.threads);
  nn::Runtime rt(a.threads);
  const sd35::Checkpoint vae_file = sd35::Checkpoint::open(a.vae, sd35::Component::vae);
  const sd35::VaeDecoder<float> vae(vae_file, sd35::VaeConfig::of(vae_file));
  std::vector<nn::Ignored> ignored = sd35::leftovers(vae_file);
  std::vector<Entry> entries;
  Index height = 0, width = 0;
  for (const fs::path& path : a.models) {
    const nn::Checkpoint checkpoint = dit::open_checkpoint(path);
    const dit::DitConfig config = dit::DitConfig::of(checkpoint, a.heads);
    if (config.shapes.channels != vae.latent_channels())
      throw std::runtime_error(path.string() + ": the model has " + std::to_string(config.shapes.channels) +
                               " channels, but the latents of the VAE " + a.vae.string() + " have " +
                               std::to_string(vae.latent_channels()));
    if (entries.empty()) {
      const Index trained = config.grid() * config.shapes.patch;
      height = latent_side(a.height, "--height", trained, vae.factor());
      width = latent_side(a.width, "--width", trained, vae.factor());
    }
    Entry& entry = entries.emplace_back(Entry{path, checkpoint, nullptr, {}, {}});
    entry.model = std::make_unique<dit::Dit<float>>(checkpoint, config);
    ignored.insert(ignored.end(), entry.model->ignored().begin(), entry.model->ignored().end());
    try {
      entry.sampling.emplace(*entry.model, a.classes, height, width, a.sampling);
    } catch (const std::runtime_error& error) {
      throw std::runtime_error(path.string() + ": " + error.what());
    }
  }

  // The models take turns step by step: what else the machine does hits all of them alike.
  nn::ProgressBar bar;
  bar.begin();
  for (int step = 0; step < a.sampling.steps; ++step) {
    bar.show(step, a.sampling.steps);
    for (Entry& entry : entries) {
      const auto start = std::chrono::steady_clock::now();
      nn::with_weights_of(entry.file,
                          [&] { nn::in_stage(entry.path.string(), [&] { entry.sampling->step(rt); }); });
      entry.milliseconds.push_back(
          std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
    }
  }
  bar.show(a.sampling.steps, a.sampling.steps);

  const auto start = std::chrono::steady_clock::now();
  const auto samples = static_cast<Index>(a.classes.size());
  const Index columns = std::min(a.columns.value_or(8), samples);
  // Each model begins a row of its own.
  const Index rows = (samples + columns - 1) / columns;
  width *= vae.factor();
  height *= vae.factor();
  Grid grid(width, height, columns, rows * static_cast<Index>(entries.size()));
  for (std::size_t m = 0; m < entries.size(); ++m)
    for (Index i = 0; i < samples; ++i)
      grid.place(decode(rt, vae_file, vae, slice<0>(entries[m].sampling->latents(), i, 1)),
                 static_cast<Index>(m) * rows * columns + i);
  const double decode_seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  nlohmann::ordered_json facts = report(a, entries, width, height, rt.workers(), decode_seconds);
  facts["ignored_tensors"] = nn::to_json(ignored);
  nn::expect_finite_report(facts);
  outputs.write(a.output, nn::encode_png(grid.image(), {{"parameters", parameters(a, entries, width, height)},
                                                        {"Software", "linattn"}}));

  if (a.json) {
    nn::print_text(facts.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
    return 0;
  }
  std::ostringstream text;
  text << std::fixed << std::setprecision(1);
  for (const Entry& entry : entries)
    text << entry.path.string() << ": " << entry.label() << ", " << entry.model->converted_modules() << " of "
         << entry.model->modules() << " attentions linear, " << entry.median() << " ms a step\n";
  outputs.print_text(text.str());
  outputs.print_text(a.output.string() + "\n");
  return 0;
}

}  // namespace

int main(int count, char** values) {
  CLI::App app("Draws classes with a diffusion transformer (DiT), softmax or DiT5's linear attention.",
               "linattn-dit");
  Arguments arguments;
  add_options(app, arguments);
  return nn::run_command(app, count, values, [&] { return run(arguments); });
}

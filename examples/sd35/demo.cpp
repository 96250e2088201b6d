// linattn-demo: one prompt and one seed through a model with softmax and through its conversion to linear
// attention; the pictures side by side, and what a step costs as the picture grows.
#include <CLI/CLI.hpp>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <linattn/weights/random.hpp>

#include "embeddings.hpp"
#include "nn/command.hpp"
#include "nn/finite.hpp"
#include "nn/options.hpp"
#include "nn/outputs.hpp"
#include "nn/progress.hpp"
#include "nn/small_file.hpp"
#include "nn/standard_output.hpp"
#include "nn/threads.hpp"
#include "pipeline.hpp"

namespace {

namespace fs = std::filesystem;
using sd35::Index;
using sd35::Tensor;

// Image tokens of a step, and the side of that square in patches.
constexpr std::array<std::pair<Index, Index>, 3> sizes{{{256, 16}, {1024, 32}, {4096, 64}}};

Tensor<float> noise(std::vector<Index> shape, std::uint64_t seed) {
  Tensor<float> result(std::move(shape));
  linattn::TorchGenerator(seed).normal({result.data(), static_cast<std::size_t>(result.elements())});
  return result;
}

// One step with guidance: prompt and negative prompt through the transformer. The numbers are noise, as time
// does not depend on them.
class Step {
 public:
  Step(sd35::Runtime& rt, const sd35::Mmdit<float>& model, Index side) : rt_(rt), model_(model) {
    const sd35::MmditConfig& config = model.config();
    constexpr Index clip_tokens = 77, t5_tokens = 256;
    Tensor<float> times({2, config.time_width});
    for (Index i = 0; i < 2; ++i)
      sd35::timestep_embedding<float>(
          500, {times.data() + i * config.time_width, static_cast<std::size_t>(config.time_width)});
    const Tensor<float> pooled = noise({2, config.pooled_width}, 1);
    modulations_ = model.modulate(rt, std::as_const(times).view<2>(), pooled.view<2>());
    const Tensor<float> text = noise({2, clip_tokens + t5_tokens, config.context_width}, 2);
    context_ = model.embed_context(rt, text.view<3>());
    latent_ = noise({2, config.in_channels, side * config.patch, side * config.patch}, 3);
    v_ = Tensor<float>({2, config.out_channels, side * config.patch, side * config.patch});
  }

  double milliseconds() {
    const auto start = std::chrono::steady_clock::now();
    model_.forward(rt_, std::as_const(latent_).view<4>(), std::as_const(context_).view<3>(), modulations_, 0,
                   {}, v_.view<4>());
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  }

 private:
  sd35::Runtime& rt_;
  const sd35::Mmdit<float>& model_;
  sd35::Modulations<float> modulations_;
  Tensor<float> context_, latent_, v_;
};

struct Arguments {
  fs::path softmax, converted, out = "demo";
  std::string prompt = "a lighthouse above a stormy sea at night";
  std::uint64_t seed = 42;
  Index size = 512;
  int steps = 20, threads = 0, repetitions = 3;
  bool trained = false;
};

struct Row {
  std::string name;
  sd35::Picture picture;
  std::array<double, sizes.size()> milliseconds{};
};

sd35::Picture draw(sd35::Runtime& rt, const fs::path& model, const Arguments& a, const std::string& name) {
  sd35::PictureOptions options;
  options.prompt = a.prompt;
  options.width = options.height = a.size;
  options.seed = a.seed;
  options.steps = a.steps;
  sd35::ProgressBar bar;
  sd35::Progress progress;
  progress.on_step = [&](int step, int steps) {
    if (step == 0) bar.begin();
    bar.show(step, steps);
  };
  std::fprintf(stderr, "%s: %s\n", name.c_str(), model.c_str());
  return nn::in_stage(model.string(), [&] { return make_picture(rt, {.model = model}, options, progress); });
}

// The models take turns and the best time counts, so that another program on the machine disturbs little.
void measure(sd35::Runtime& rt, const Arguments& a, std::array<Row, 2>& rows) {
  std::fprintf(stderr, "measuring steps\n");
  const std::array models{
      sd35::Mmdit<float>(sd35::Checkpoint::open(a.softmax, sd35::Component::transformer)),
      sd35::Mmdit<float>(sd35::Checkpoint::open(a.converted, sd35::Component::transformer))};
  for (std::size_t size = 0; size < sizes.size(); ++size) {
    if (sizes[size].second > models[0].config().position_grid) continue;
    std::array steps{Step(rt, models[0], sizes[size].second), Step(rt, models[1], sizes[size].second)};
    for (Row& row : rows) row.milliseconds[size] = std::numeric_limits<double>::infinity();
    for (int i = 0; i < a.repetitions; ++i)
      for (std::size_t m = 0; m < models.size(); ++m)
        rows[m].milliseconds[size] = std::min(rows[m].milliseconds[size], steps[m].milliseconds());
  }
}

void print(const Arguments& a, const std::array<Row, 2>& rows, Index threads) {
  nn::print("\nms a step (prompt and negative prompt, %td threads) by the image tokens of the picture\n",
            threads);
  nn::print("%-10s %-18s", "attention", "modules replaced");
  for (const auto& size : sizes) nn::print(" %8td", size.first);
  nn::print("\n");
  for (const Row& row : rows) {
    const std::string replaced =
        std::to_string(row.picture.converted_modules) + " of " + std::to_string(row.picture.modules);
    nn::print("%-10s %-18s", row.name.c_str(), replaced.c_str());
    for (const double time : row.milliseconds) time > 0 ? nn::print(" %8.1f", time) : nn::print(" %8s", "-");
    nn::print("\n");
  }
  nn::print("\npictures: %s, %s; both: %s\n", (a.out / "softmax.png").c_str(), (a.out / "t5.png").c_str(),
            (a.out / "side_by_side.png").c_str());
  if (!a.trained)
    nn::print(
        "\nNote: this model's weights are random, so its pictures show patterns and not the prompt. And a "
        "T5\n"
        "conversion is broken by nature until it is fine-tuned: its attention starts from new fast weights, "
        "so\n"
        "the two pictures differ. What this shows is that both run, from one folder and one seed, and what "
        "a\n"
        "step of each costs.\n");
}

// The folder for the pictures. One that was not there goes again, if nothing comes into it.
class Folder {
 public:
  explicit Folder(const fs::path& path) {
    std::error_code error;
    for (fs::path part = path; !part.empty() && !fs::exists(part, error); part = part.parent_path())
      made_.push_back(part);
    fs::create_directories(path, error);
    if (error) sd35::fail(path, "cannot be created: " + error.message());
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  ~Folder() {
    std::error_code ignored;
    for (const fs::path& part : made_) fs::remove(part, ignored);
  }

 private:
  std::vector<fs::path> made_;  // the innermost first
};

int run(const Arguments& a) {
  linattn::FileSet inputs;
  for (const fs::path* model : {&a.softmax, &a.converted}) nn::add_model(inputs, *model);
  nn::Outputs outputs(std::move(inputs));
  const std::array files{a.out / "softmax.png", a.out / "t5.png", a.out / "side_by_side.png"};
  for (const fs::path& file : files) outputs.claim(file);
  const Folder folder(a.out);
  for (const fs::path& file : files) outputs.try_file(file);
  nn::expect_threads(a.threads);
  sd35::Runtime rt(a.threads);
  std::array<Row, 2> rows;
  rows[0] = {"softmax", draw(rt, a.softmax, a, "softmax"), {}};
  rows[1] = {"t5", draw(rt, a.converted, a, "t5"), {}};
  for (const Row& row : rows)
    outputs.write(a.out / (row.name + ".png"),
                  nn::encode_png(row.picture.image, {{"parameters", row.picture.parameters()}}));
  outputs.write(a.out / "side_by_side.png",
                nn::encode_png(sd35::side_by_side(std::array{rows[0].picture.image, rows[1].picture.image}),
                               {{"parameters", rows[0].picture.parameters()},
                                {"parameters_right", rows[1].picture.parameters()}}));
  measure(rt, a, rows);
  print(a, rows, rt.workers());
  return 0;
}

}  // namespace

int main(int count, char** values) {
  CLI::App app("Draws one prompt with softmax and with linear attention, and measures what a step costs.",
               "linattn-demo");
  Arguments a;
  nn::add_path(app, "model", a.softmax, "diffusers folder")->required();
  nn::add_path(app, "converted", a.converted, "the same model, converted by linattn-inherit")->required();
  nn::add_text(app, "-p,--prompt", a.prompt, "what to draw");
  nn::add_path(app, "-o,--output,--out", a.out, "folder for the pictures");
  nn::add_number(app, "-s,--seed", a.seed, nn::seed_range, "of the noise, that of torch on the CPU");
  nn::add_number(app, "--size", a.size, nn::side_range, "width and height in pixels");
  nn::add_number(app, "--steps", a.steps, {1, sd35::max_steps}, "of the sampler");
  nn::add_number(app, "--repeat,--repetitions", a.repetitions, nn::repeat_range,
                 "runs of each measured step; the best counts");
  nn::add_number(app, "-t,--threads", a.threads, nn::thread_range,
                 "0: all cores; the pictures are the same with any number");
  app.add_flag("--trained", a.trained,
               "the models are trained and tuned: leave out the note on random weights");
  app.footer("Example: linattn-demo tests/data/sd35-tiny demo/t5 --prompt \"a red fox\" -o demo");
  return nn::run_command(app, count, values, [&] { return run(a); });
}

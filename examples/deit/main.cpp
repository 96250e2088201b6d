// linattn-deit: names what is on pictures with vision transformers, softmax and T5 side by side, and measures them.
#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <limits>
#include <numeric>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "nn/command.hpp"
#include "nn/finite.hpp"
#include "nn/options.hpp"
#include "nn/standard_output.hpp"
#include "nn/threads.hpp"
#include "preprocess.hpp"
#include "timm_config.hpp"
#include "vit.hpp"

namespace {

namespace fs = std::filesystem;
using deit::Index;
using deit::Tensor;
using Clock = std::chrono::steady_clock;

constexpr const char* examples = R"(Examples:
  linattn-deit deit_tiny_patch16_224/ cat.jpg dog.png
  linattn-inherit --drop-cls deit_tiny_patch16_224/model.safetensors t5.safetensors
  linattn-deit deit_tiny_patch16_224/ t5.safetensors cat.jpg --labels imagenet.txt
  linattn-deit deit_tiny_patch16_224/ t5.safetensors --size 224,384,512 --repeat 10
Exit code: 0 when all is done, 2 after an error, which stderr states in one sentence.)";

struct Arguments {
  std::vector<fs::path> files;
  fs::path labels;
  std::optional<Index> heads;
  std::vector<Index> sizes;
  Index top = 5;
  int threads = 0, repeat = 5;
  bool json = false;
};

struct Model {
  fs::path path;
  deit::Checkpoint checkpoint;
  deit::Preprocessing preprocessing;
  std::vector<std::string> labels;
  deit::Vit<float> vit;

  // What the picture is resized to where nobody says.
  [[nodiscard]] Index own_size() const { return vit.config().grid * vit.config().patch; }
  [[nodiscard]] std::string attention() const {
    const Index converted = vit.converted_blocks(), all = vit.config().depth;
    if (converted == 0) return "softmax";
    return converted == all ? "T5"
                            : "T5 in " + std::to_string(converted) + " of " + std::to_string(all) + " blocks";
  }
  [[nodiscard]] const std::string& label(std::size_t id) const {
    static const std::string none;
    return id < labels.size() ? labels[id] : none;
  }
};

struct Guess {
  std::size_t id = 0;
  double probability = 0;
};

// The `top` largest of softmax(logits), largest first; of equal ones the first class.
std::vector<Guess> best(const Tensor<float>& logits, Index top) {
  const std::span<const float> values(logits.data(), static_cast<std::size_t>(logits.elements()));
  std::vector<Guess> guesses(values.size());
  const double largest = static_cast<double>(*std::max_element(values.begin(), values.end()));
  double total = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    guesses[i] = {i, std::exp(static_cast<double>(values[i]) - largest)};
    total += guesses[i].probability;
  }
  std::stable_sort(guesses.begin(), guesses.end(),
                   [](const Guess& a, const Guess& b) { return a.probability > b.probability; });
  guesses.resize(std::min(guesses.size(), static_cast<std::size_t>(top)));
  for (Guess& guess : guesses) guess.probability /= total;
  return guesses;
}

Model load(const fs::path& path, const Arguments& a) {
  const deit::Checkpoint checkpoint = deit::open(path);
  Model model{path, checkpoint, deit::Preprocessing::of(checkpoint),
              a.labels.empty() ? deit::labels_of(checkpoint) : deit::read_labels(a.labels),
              deit::Vit<float>(checkpoint, a.heads)};
  const deit::VitConfig& config = model.vit.config();
  deit::TimmConfig(checkpoint).check(config);
  if (config.channels != 3)
    throw std::runtime_error(path.string() + ": expects pictures of " + std::to_string(config.channels) +
                             " channels, not of 3");
  if (!model.labels.empty() && static_cast<Index>(model.labels.size()) != config.classes) {
    if (!a.labels.empty())
      throw std::runtime_error(a.labels.string() + ": holds " + std::to_string(model.labels.size()) +
                               " labels, but " + path.string() + " has " + std::to_string(config.classes) +
                               " classes");
    model.labels.clear();
  }
  return model;
}

// A conversion in a file of its own has no config.json beside it: it takes the names of another model with as many
// classes.
void share_labels(std::vector<Model>& models) {
  for (Model& model : models)
    for (const Model& other : models)
      if (model.labels.empty() && other.vit.config().classes == model.vit.config().classes)
        model.labels = other.labels;
}

double milliseconds(const Model& model, deit::Runtime& rt, const Tensor<float>& picture,
                    Tensor<float>* logits = nullptr) {
  const auto start = Clock::now();
  Tensor<float> result = nn::with_weights_of(model.checkpoint, [&] {
    return nn::in_stage(model.path.string(), [&] { return model.vit.forward(rt, picture.view<4>()); });
  });
  const double time = std::chrono::duration<double, std::milli>(Clock::now() - start).count();
  if (logits != nullptr) *logits = std::move(result);
  return time;
}

nlohmann::ordered_json classify(const std::vector<Model>& models, const fs::path& path, deit::Runtime& rt,
                                const Arguments& a) {
  const deit::Image image = deit::read_image(path);
  nlohmann::ordered_json results = nlohmann::ordered_json::array();
  if (!a.json) nn::print("%s\n", path.c_str());
  for (const Model& model : models) {
    const Tensor<float> picture =
        deit::preprocess(image, model.own_size(), model.own_size(), model.preprocessing);
    Tensor<float> logits;
    const double time = milliseconds(model, rt, picture, &logits);
    nlohmann::ordered_json top = nlohmann::ordered_json::array();
    if (!a.json) nn::print("  %s (%s), %.1f ms\n", model.path.c_str(), model.attention().c_str(), time);
    for (const Guess& guess : best(logits, a.top)) {
      const std::string& label = model.label(guess.id);
      nlohmann::ordered_json entry{{"class", guess.id}, {"probability", guess.probability}};
      if (!label.empty()) entry["label"] = label;
      top.push_back(std::move(entry));
      if (!a.json) nn::print("    %5.1f %%  %4zu  %s\n", 100 * guess.probability, guess.id, label.c_str());
    }
    results.push_back({{"model", model.path.string()},
                       {"attention", model.attention()},
                       {"milliseconds", time},
                       {"top", std::move(top)}});
  }
  return {{"picture", path.string()}, {"results", std::move(results)}};
}

// One picture of `size` x `size`: the models take turns and the best time counts, so that another program on the
// machine disturbs little. What is on the picture does not matter for the time.
nlohmann::ordered_json measure(const std::vector<Model>& models, Index size, deit::Runtime& rt,
                               const Arguments& a) {
  std::vector<double> times(models.size(), std::numeric_limits<double>::infinity());
  const Tensor<float> picture = Tensor<float>::zeros({1, 3, size, size});
  for (int i = 0; i < a.repeat; ++i)
    for (std::size_t m = 0; m < models.size(); ++m)
      times[m] = std::min(times[m], milliseconds(models[m], rt, picture));
  nlohmann::ordered_json results = nlohmann::ordered_json::array();
  const Index side = size / models[0].vit.config().patch;
  if (!a.json) nn::print("%6td %7td", size, side * side);
  for (std::size_t m = 0; m < models.size(); ++m) {
    results.push_back({{"model", models[m].path.string()},
                       {"attention", models[m].attention()},
                       {"milliseconds", times[m]}});
    if (!a.json) nn::print(" %12.1f", times[m]);
  }
  if (!a.json && models.size() == 2) nn::print(" %8.2f", times[0] / times[1]);
  if (!a.json) nn::print("\n");
  return {{"size", size}, {"tokens", side * side}, {"results", std::move(results)}};
}

int run(const Arguments& a) {
  std::vector<Model> models;
  std::vector<fs::path> pictures;
  for (const fs::path& path : a.files) {
    if (nn::is_model(path))
      models.push_back(load(path, a));
    else
      pictures.push_back(path);
  }
  if (models.empty())
    throw std::runtime_error("no model is given: a folder, or a file that ends in .safetensors");
  if (pictures.empty() && a.sizes.empty()) throw std::runtime_error("neither a picture nor --size is given");
  for (const Model& model : models)
    for (const Index size : a.sizes)
      if (size % model.vit.config().patch != 0)
        throw std::runtime_error("--size " + std::to_string(size) + ": " + model.path.string() +
                                 " takes multiples of " + std::to_string(model.vit.config().patch) +
                                 " pixels");
  share_labels(models);

  std::vector<deit::Ignored> ignored;
  for (const Model& model : models)
    ignored.insert(ignored.end(), model.vit.ignored().begin(), model.vit.ignored().end());
  nn::expect_threads(a.threads);
  deit::Runtime rt(a.threads);
  nlohmann::ordered_json report{{"threads", rt.workers()},
                                {"ignored_tensors", nn::to_json(ignored)},
                                {"pictures", nlohmann::ordered_json::array()},
                                {"sizes", nlohmann::ordered_json::array()}};
  for (const fs::path& picture : pictures) report["pictures"].push_back(classify(models, picture, rt, a));
  if (!a.sizes.empty() && !a.json) {
    nn::print("best of %d, ms a picture, %td threads\n%6s %7s", a.repeat, rt.workers(), "size", "tokens");
    for (const Model& model : models) nn::print(" %12s", model.attention().c_str());
    nn::print("%s\n", models.size() == 2 ? "    ratio" : "");
  }
  for (const Index size : a.sizes) report["sizes"].push_back(measure(models, size, rt, a));
  nn::expect_finite_report(report);
  if (a.json) nn::print_text(report.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
  return 0;
}

}  // namespace

int main(int count, char** values) {
  CLI::App app(
      "Classifies pictures with vision transformers (ViT, DeiT under timm's names; safetensors), softmax or\n"
      "converted to T5, side by side. A model is a folder or a .safetensors file, all else a PNG or a JPEG.",
      "linattn-deit");
  Arguments a;
  nn::add_paths(app, "files", a.files, "models and pictures")->required();
  nn::add_path(app, "--labels", a.labels,
               "names of the classes: a line each, or JSON (default: those of the model's config.json)");
  nn::add_number(app, "--top", a.top, {1, 1000000}, "how many classes to print");
  nn::add_number(app, "--heads", a.heads, nn::head_range,
                 "of every attention, where the model does not tell");
  nn::add_number(app, "--size", a.sizes, {1, 16384},
                 "measure pictures of these sizes, positions interpolated: 224,384,512");
  nn::add_number(app, "--repeat", a.repeat, nn::repeat_range, "runs of each measurement; the best counts");
  nn::add_number(app, "-t,--threads", a.threads, nn::thread_range,
                 "0: all cores; the result is the same with any number");
  app.add_flag("--json", a.json, "print the results as JSON on stdout");
  app.footer(examples);
  return nn::run_command(app, count, values, [&] { return run(a); });
}

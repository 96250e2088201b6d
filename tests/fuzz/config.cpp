// The config.json of a model and a list of labels: any text is taken or refused in one sentence, by every reader of the two.
#include <deit/preprocess.hpp>
#include <deit/timm_config.hpp>
#include <linattn/weights/inherit.hpp>
#include <nn/checkpoint.hpp>
#include <nn/text.hpp>

#include <optional>

#include "fuzz.hpp"

namespace {

// Beside the config: a model of one tensor.
void write_model() {
  static const std::array<float, 4> values{};
  const linattn::TensorInfo tensor{
      {"head.weight", linattn::Dtype::f32, {2, 2}}, std::as_bytes(std::span(values)), 0};
  const auto path = fuzz::folder() / "model.safetensors";
  if (!std::filesystem::exists(path))
    fuzz::expect(write_safetensors(path, std::span(&tensor, 1)).ok(), "a model is written");
}

template <class T>
void read_number(const nn::Checkpoint& checkpoint, const char* key, const nn::Range<T>& range) {
  (void)fuzz::refusal([&] {
    const std::optional<T> number = checkpoint.config_number(key, range);
    fuzz::expect(!number || (range.holds(*number) && checkpoint.config()[key] == *number),
                 "a number is the one that the file has, and in its range");
  });
}

// As the models ask their config.
void read_values(const nn::Checkpoint& checkpoint) {
  for (const char* key : {"num_layers", "num_attention_heads", "patch_size", "eos_token_id"})
    read_number<nn::Index>(checkpoint, key, {1, 1 << 20});
  for (const char* key : {"layer_norm_eps", "scaling_factor"}) read_number<double>(checkpoint, key, {0, 1e3});
  for (const char* key : {"hidden_act", "qk_norm"})
    (void)fuzz::refusal([&] { (void)checkpoint.config_text(key); });
  (void)fuzz::refusal([&] { (void)checkpoint.config_heads(); });
  (void)fuzz::refusal([&] { (void)deit::labels_of(checkpoint); });
  (void)fuzz::refusal([&] {
    deit::TimmConfig(checkpoint)
        .check({.depth = 12,
                .width = 192,
                .heads = 3,
                .mlp_width = 768,
                .channels = 3,
                .patch = 8,
                .grid = 4,
                .classes = 6,
                .special = 1});
  });
  (void)fuzz::refusal([&] {
    const auto preprocessing = deit::Preprocessing::of(checkpoint);
    fuzz::expect(preprocessing.crop >= 0.01 && preprocessing.crop <= 1, "a crop is a share of the picture");
    for (const double deviation : preprocessing.deviation)
      fuzz::expect(deviation > 0, "a deviation is positive");
  });
}

}  // namespace

// A config, or a config and a list of labels.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  write_model();
  const std::vector<std::string> parts = fuzz::parts(data, size);
  const auto config = fuzz::write("config.json", parts[0]);
  (void)fuzz::refusal([&] { read_values(nn::Checkpoint::open(fuzz::folder())); });

  // The library's own reader takes part of the document, and of the words about conversions none that the model lacks.
  linattn::Safetensors model;
  fuzz::expect(linattn::Safetensors::open(fuzz::folder() / "model.safetensors", model).ok(),
               "the model opens");
  linattn::Conversion conversion;
  if (fuzz::accepted(linattn::read_conversion(model, conversion, config)))
    fuzz::expect(conversion.empty(), "no module is converted of which there is no tensor");

  if (parts.size() < 2) return 0;
  const auto path = fuzz::write("labels", parts[1]);
  std::vector<std::string> labels;
  const std::string why = fuzz::refusal(path, [&] { labels = deit::read_labels(path); });
  fuzz::expect(why.empty() != labels.empty(), "a list holds labels, or is refused");
  const bool json = parts[1].find_first_of("[{") != std::string::npos;
  for (const std::string& label : labels) {
    fuzz::expect(nn::text_error(label).empty(), "a label is text");
    fuzz::expect(json || label.find('\n') == std::string::npos, "a label is a line");
  }
  return 0;
}

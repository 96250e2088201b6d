// The tiny model's text encoders and VAE against what transformers and diffusers made of it (tests/data, written
// by tests/reference/sd35_tiny.py).
#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "nn/image.hpp"
#include "sd35/conditioning.hpp"
#include "sd35/vae.hpp"
#include "support.hpp"

namespace {

namespace fs = std::filesystem;
using linattn::Index;
using linattn::TensorView;

#ifdef LINATTN_TEST_DATA
const fs::path data = LINATTN_TEST_DATA;
#else
const fs::path data = fs::path(__FILE__).parent_path().parent_path() / "data";
#endif
const fs::path model = data / "sd35-tiny", reference = data / "sd35-tiny-ref";

std::vector<double> read(const linattn::Safetensors& file, const std::string& name) {
  const linattn::TensorInfo* info = file.find(name);
  REQUIRE_MESSAGE(info != nullptr, name);
  std::vector<double> values(static_cast<std::size_t>(info->elements()));
  const linattn::FileStatus status = linattn::read(*info, std::span<double>(values));
  REQUIRE_MESSAGE(status.ok(), message(status));
  return values;
}

// The reference was computed in double, but for the float32 softmax of transformers' T5, and is stored in float.
template <class T>
void check(const T* actual, const std::vector<double>& expected, double tolerance) {
  const auto n = static_cast<Index>(expected.size());
  support::check_relative(TensorView<const T, 1>{actual, {n}},
                          TensorView<const double, 1>{expected.data(), {n}}, tolerance);
}

TEST_CASE_TEMPLATE("prompts become transformers' features", T, float, double) {
  linattn::Safetensors file;
  REQUIRE(linattn::Safetensors::open(reference / "intermediates.safetensors", file).ok());
  const std::vector<std::string> prompts = {"a red fox in the snow, watercolour painting", ""};
  sd35::Runtime rt(2);
  const auto text = sd35::encode_prompts<T>(rt, {model, model, model, model}, prompts, 64, 56);
  const double tolerance = std::is_same_v<T, double> ? 2e-7 : 2e-6;
  const auto context = text.context.template view<3>();
  const auto pooled = text.pooled.template view<3>();
  REQUIRE(context.extents == std::array<Index, 3>{2, 333, 64});
  check(context.pointer(0), read(file, "prompt_embeds"), tolerance);
  check(context.pointer(1), read(file, "negative_prompt_embeds"), tolerance);
  check(pooled.pointer(0), read(file, "pooled"), tolerance);
  check(pooled.pointer(1), read(file, "negative_pooled"), tolerance);
}

TEST_CASE_TEMPLATE("latents become diffusers' pictures", T, float, double) {
  linattn::Safetensors file;
  REQUIRE(linattn::Safetensors::open(reference / "intermediates.safetensors", file).ok());
  const sd35::Checkpoint checkpoint = sd35::Checkpoint::open(model, sd35::Component::vae);
  const sd35::VaeConfig config = sd35::VaeConfig::of(checkpoint);
  CHECK(config.groups == 4);
  const sd35::VaeDecoder<T> decoder(checkpoint, config);
  CHECK(decoder.factor() == 8);
  sd35::Runtime rt(2);
  for (const char* attention : {"softmax", "paper", "all"}) {
    CAPTURE(attention);
    const std::vector<double> latent = read(file, std::string(attention) + ".final_latents");
    const std::vector<T> values(latent.begin(), latent.end());
    const sd35::Tensor<T> picture =
        decoder.decode(rt, TensorView<const T, 4>{values.data(), {1, 16, 16, 12}});
    const sd35::Image ours =
        sd35::to_image<T>({picture.data(), static_cast<std::size_t>(picture.elements())}, 96, 128);
    const sd35::Image theirs = sd35::read_image(reference / (std::string(attention) + "-prompt0-seed0.png"));
    REQUIRE(ours.rgb.size() == theirs.rgb.size());
    int different = 0, worst = 0;
    for (std::size_t i = 0; i < ours.rgb.size(); ++i) {
      const int gap = std::abs(int{ours.rgb[i]} - int{theirs.rgb[i]});
      different += gap > 0 ? 1 : 0;
      worst = std::max(worst, gap);
    }
    // Only values at the edge of two bytes may fall to the other side.
    CHECK(worst <= 1);
    CHECK(different <= 4);
  }
}

}  // namespace

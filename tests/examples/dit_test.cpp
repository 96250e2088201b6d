// The tiny DiT of tests/data against what diffusers' blocks and float64 samplers made of it (written by
// tests/reference/dit_tiny.py), its conversion, and what is refused.
#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <linattn/weights/safetensors.hpp>

#include "dit/sampling.hpp"
#include "nn/image.hpp"
#include "reference/sd35_models.hpp"
#include "sd35/embeddings.hpp"
#include "sd35/vae.hpp"
#include "sd35_files.hpp"
#include "support.hpp"

namespace {

namespace fs = std::filesystem;
using linattn::Index;
using linattn::TensorView;

#ifdef LINATTN_TEST_DATA
const fs::path data = fs::path(LINATTN_TEST_DATA) / "dit-tiny";
#else
const fs::path data = fs::path(__FILE__).parent_path().parent_path() / "data" / "dit-tiny";
#endif
const std::vector<std::int32_t> labels{1, 7, 3, 9};

class Recorded {
 public:
  Recorded() { REQUIRE(linattn::Safetensors::open(data / "samples.safetensors", file_).ok()); }
  [[nodiscard]] std::vector<double> operator()(const std::string& name) const {
    const linattn::TensorInfo* info = file_.find(name);
    REQUIRE_MESSAGE(info != nullptr, name);
    std::vector<double> values(static_cast<std::size_t>(info->elements()));
    const linattn::FileStatus status = linattn::read(*info, std::span<double>(values));
    REQUIRE_MESSAGE(status.ok(), message(status));
    return values;
  }

 private:
  linattn::Safetensors file_;
};

template <class T>
void check(const T* actual, const std::vector<double>& expected, double tolerance) {
  const auto n = static_cast<Index>(expected.size());
  support::check_relative(TensorView<const T, 1>{actual, {n}},
                          TensorView<const double, 1>{expected.data(), {n}}, tolerance);
}

// model.safetensors with the tensors of dit5.safetensors beside its own: a converted file that says nothing of
// itself.
fs::path write_converted(const sd35_files::Folder& folder) {
  std::array<linattn::Safetensors, 2> files;
  std::vector<linattn::TensorInfo> tensors;
  std::size_t i = 0;
  for (const char* name : {"model.safetensors", "dit5.safetensors"}) {
    REQUIRE(linattn::Safetensors::open(data / name, files[i]).ok());
    tensors.insert(tensors.end(), files[i].tensors().begin(), files[i].tensors().end());
    ++i;
  }
  linattn::SafetensorsWriter::align(tensors);
  const fs::path path = folder / "dit5.safetensors";
  const linattn::FileStatus status = linattn::write_safetensors(path, tensors);
  REQUIRE_MESSAGE(status.ok(), message(status));
  return path;
}

fs::path path_of(const std::string& attention, const sd35_files::Folder& folder) {
  return attention == "softmax" ? data / "model.safetensors" : write_converted(folder);
}

// A width of 48 has no published number of heads, and is no multiple of 64.
constexpr Index heads = 3;
template <class T>
dit::Dit<T> open_model(const fs::path& path) {
  const nn::Checkpoint checkpoint = dit::open_checkpoint(path);
  return {checkpoint, dit::DitConfig::of(checkpoint, heads)};
}

double psnr(const nn::Image& a, const nn::Image& b) {
  REQUIRE(a.rgb.size() == b.rgb.size());
  double squares = 0;
  for (std::size_t i = 0; i < a.rgb.size(); ++i) squares += std::pow(int{a.rgb[i]} - int{b.rgb[i]}, 2);
  return squares == 0 ? 1e9 : 10 * std::log10(255.0 * 255.0 * static_cast<double>(a.rgb.size()) / squares);
}

// The blocks on a grid that is no square and not that of the file's positions, one class being none.
TEST_CASE_TEMPLATE("the network follows diffusers' blocks and DiT5's attention", T, float, double) {
  const Recorded recorded;
  const sd35_files::Folder folder;
  for (const std::string attention : {"softmax", "dit5"}) {
    CAPTURE(attention);
    const dit::Dit<T> model = open_model<T>(path_of(attention, folder));
    CHECK(model.converted_modules() == (attention == "softmax" ? 0 : 3));
    const std::vector<double> input = recorded("x");
    const std::vector<T> x(input.begin(), input.end());
    nn::Tensor<T> sinusoids({2, 256});
    sd35::timestep_embedding<T>(999, {sinusoids.data(), 256});
    sd35::timestep_embedding<T>(130, {sinusoids.data() + 256, 256});
    nn::Runtime rt(1), more(3);
    const auto modulations =
        model.modulate(rt, std::as_const(sinusoids).template view<2>(), std::array{4, 10});
    nn::Tensor<T> out({2, 8, 12, 20}), again({2, 8, 12, 20});
    const TensorView<const T, 4> latents{x.data(), {2, 4, 12, 20}};
    model.forward(rt, latents, modulations, out.template view<4>());
    check(out.data(), recorded(attention + ".output"), std::is_same_v<T, double> ? 1.5e-7 : 2e-6);
    model.forward(more, latents, modulations, again.template view<4>());
    CHECK(support::same_bits(std::as_const(out).template view<4>(), std::as_const(again).template view<4>()));
  }
}

// Noise agrees with torch's to 3e-7, which the steps amplify, as they do the rounding of float.
TEST_CASE_TEMPLATE("samples are those of float64 samplers and torch's noise", T, float, double) {
  const Recorded recorded;
  const sd35_files::Folder folder;
  const sd35::Checkpoint vae_file = sd35::Checkpoint::open(data / "vae", sd35::Component::vae);
  const sd35::VaeDecoder<T> vae(vae_file, sd35::VaeConfig::of(vae_file));
  struct Run {
    std::string attention;
    dit::Method method;
    int steps;
    Index width;
  };
  for (const Run& run : {Run{"softmax", dit::Method::ddpm, 20, 16}, Run{"softmax", dit::Method::ddim, 10, 12},
                         Run{"dit5", dit::Method::ddpm, 20, 16}, Run{"dit5", dit::Method::ddim, 10, 12}}) {
    const std::string name = run.attention + "-" + std::string(dit::name(run.method));
    CAPTURE(name);
    const dit::Dit<T> model = open_model<T>(path_of(run.attention, folder));
    dit::Sampling<T> sampling(model, labels, 16, run.width, {.method = run.method, .steps = run.steps});
    nn::Runtime rt(2);
    while (sampling.steps_taken() < sampling.steps()) sampling.step(rt);
    check(sampling.latents().data, recorded(name + ".latents"), std::is_same_v<T, double> ? 3e-6 : 1e-4);
    const nn::Tensor<T> pixels = vae.decode(rt, slice<0>(sampling.latents(), 0, 1));
    const nn::Image ours = nn::to_image<T>({pixels.data(), static_cast<std::size_t>(pixels.elements())},
                                           pixels.extent(2), pixels.extent(1));
    CHECK(psnr(ours, nn::read_image(data / (name + ".png"))) > 40);
  }
}

TEST_CASE("latents become the pixels of diffusers' VAE") {
  const Recorded recorded;
  const sd35::Checkpoint checkpoint = sd35::Checkpoint::open(data / "vae", sd35::Component::vae);
  const sd35::VaeDecoder<double> vae(checkpoint, sd35::VaeConfig::of(checkpoint));
  const std::vector<double> latents = recorded("softmax-ddim.latents");
  nn::Runtime rt(2);
  const nn::Tensor<double> pixels =
      vae.decode(rt, TensorView<const double, 4>{latents.data(), {1, 4, 16, 12}});
  REQUIRE(pixels.shape() == std::vector<Index>{1, 128, 96, 3});
  std::vector<double> picked;  // every fourth, colours first
  for (Index c = 0; c < 3; ++c)
    for (Index y = 0; y < 128; y += 4)
      for (Index x = 0; x < 96; x += 4) picked.push_back(pixels.view<4>()(0, y, x, c));
  check(picked.data(), recorded("pixels"), 3e-7);
}

TEST_CASE("the times of the samplers are the official ones") {
  const std::vector<int> ddpm = dit::spaced_times(dit::Method::ddpm, 250);
  CHECK(ddpm.size() == 250);
  CHECK(std::vector<int>(ddpm.begin(), ddpm.begin() + 6) == std::vector<int>{0, 4, 8, 12, 16, 20});
  CHECK(std::vector<int>(ddpm.end() - 3, ddpm.end()) == std::vector<int>{991, 995, 999});
  CHECK(dit::spaced_times(dit::Method::ddpm, 3) == std::vector<int>{0, 500, 999});  // 499.5: halves to even
  CHECK(dit::spaced_times(dit::Method::ddim, 4) == std::vector<int>{0, 250, 500, 750});
  CHECK(dit::spaced_times(dit::Method::ddim, 50).back() == 980);
  CHECK(dit::spaced_times(dit::Method::ddim, 1000).back() == 999);
  CHECK_THROWS_WITH_AS((void)dit::spaced_times(dit::Method::ddim, 300), doctest::Contains("250 or 334"),
                       std::runtime_error);
  for (const int steps : {-1, 0, 1, 1001})
    CHECK_THROWS_WITH_AS((void)dit::spaced_times(dit::Method::ddpm, steps), doctest::Contains("2 to 1000"),
                         std::runtime_error);
}

TEST_CASE("guidance is of three channels") {
  const std::vector<double> cond{1, 2, 3, 4, 5, 6, 7, 8}, uncond{0, 0, 1, 1, 2, 2, 3, 3};
  std::vector<double> out = cond;
  dit::guide(out.data(), uncond.data(), 4.0, 1, 4, 2, out.data());
  CHECK(out == std::vector<double>{4, 8, 9, 13, 14, 18, 7, 8});
}

// The classes of a sampler without guidance are the whole batch, and its noise is that of the batch.
TEST_CASE("without guidance nothing is asked for no class") {
  const dit::Dit<float> model = open_model<float>(data / "model.safetensors");
  nn::Runtime rt(1);
  const auto sample = [&](double scale) {
    dit::Sampling<float> sampling(model, labels, 10, 10,
                                  {.method = dit::Method::ddim, .steps = 2, .cfg_scale = scale});
    sampling.step(rt);
    sampling.step(rt);
    const auto view = sampling.latents();
    return std::vector<float>(view.data, view.data + view.elements());
  };
  const std::vector<float> none = sample(1), least = sample(1 + 1e-12);
  const std::vector<double> expected(none.begin(), none.end());
  check(least.data(), expected, 1e-5);
  CHECK(sample(4) != none);
}

TEST_CASE("what a model cannot do is refused in words") {
  const sd35_files::Folder folder;
  const dit::Dit<float> model = open_model<float>(write_converted(folder));
  const auto refused = [&](std::vector<std::int32_t> classes, Index height, Index width,
                           dit::SamplingOptions options, const char* words) {
    CHECK_THROWS_WITH_AS((dit::Sampling<float>(model, classes, height, width, options)),
                         doctest::Contains(words), std::runtime_error);
  };
  refused({10}, 16, 16, {}, "class 10: the model has classes 0 to 9");
  refused({-1}, 16, 16, {}, "class -1");
  refused({}, 16, 16, {}, "no class");
  refused({1}, 16, 15, {}, "multiples of the patch, 2");
  refused({1}, 16, 8, {}, "a grid of 8 x 4 tokens is smaller than the window");
  refused({1}, 16, 16, {.steps = 1}, "2 to 1000");
  refused({1}, 16, 16, {.cfg_scale = NAN}, "cfg scale");

  const nn::Checkpoint softmax = dit::open_checkpoint(data / "model.safetensors");
  CHECK_THROWS_WITH_AS((void)dit::DitConfig::of(softmax), doctest::Contains("heads"), std::runtime_error);
  CHECK_THROWS_WITH_AS((void)dit::DitConfig::of(softmax, 5), doctest::Contains("5 heads"),
                       std::runtime_error);
  CHECK(dit::DitConfig::of(dit::open_checkpoint(folder / "dit5.safetensors")).heads == 3);
  CHECK_THROWS_WITH_AS((void)dit::open_checkpoint(data / "vae"), doctest::Contains("holds no DiT"),
                       std::runtime_error);

  sd35_files::Maker maker(linattn::Dtype::f32);
  maker.add("transformer_blocks.0.attn1.to_q.weight", {4, 4});
  sd35_files::write(folder / "diffusers.safetensors", maker.parameters, linattn::Dtype::f32);
  CHECK_THROWS_WITH_AS((void)dit::open_checkpoint(folder / "diffusers.safetensors"),
                       doctest::Contains("diffusers"), std::runtime_error);
}

}  // namespace

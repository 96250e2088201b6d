// vae_decoder: a latent to a picture, with every stage; vae_encoder: a picture to the moments and the mean of its
// latent. Recorded activations are (batch, channel, row, column).
#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "expect.hpp"
#include "golden.hpp"
#include "sd35.hpp"
#include "sd35/vae.hpp"

namespace {

using golden::Case;
using golden::Index;
using golden::TensorView;
using golden::variant;

// (batch, positions, channels) as (batch, channels, positions), in the recorded shape where that fits.
template <class T>
golden::Tensor channels_first(const TensorView<const T, 3>& values, const golden::Tensor& recorded) {
  golden::Tensor result{{values.extent(0), values.extent(2), values.extent(1)}, {}};
  for (Index b = 0; b < values.extent(0); ++b)
    for (Index c = 0; c < values.extent(2); ++c)
      for (Index i = 0; i < values.extent(1); ++i)
        result.values.push_back(static_cast<double>(values(b, i, c)));
  const std::vector<Index>& shape = recorded.shape;
  if (shape.size() == 4 && shape[0] == result.shape[0] && shape[1] == result.shape[1] &&
      shape[2] * shape[3] == result.shape[2])
    result.shape = shape;
  return result;
}

sd35::VaeConfig vae_config(const sd35::Checkpoint& checkpoint, const nlohmann::json& json) {
  sd35::VaeConfig config = sd35::VaeConfig::of(checkpoint);
  config.groups = json.value("norm_num_groups", config.groups);
  config.scaling = json.value("scaling_factor", config.scaling);
  config.shift = json.value("shift_factor", config.shift);
  return config;
}

template <class T>
void run_decoder(Case& c) {
  const golden::Parameters parameters(c);
  const sd35::Checkpoint checkpoint = golden::open_checkpoint(c, parameters, sd35::Component::vae);
  const sd35::VaeDecoder<T> model(checkpoint, vae_config(checkpoint, parameters.config()));

  using golden::any;
  const golden::Tensor latent = golden::read(c, "in.latent", {any, model.latent_channels(), any, any});
  const std::vector<T> values(latent.values.begin(), latent.values.end());
  const TensorView<const T, 4> view{values.data(), latent.view<4>().extents};
  const golden::Tolerance tolerance = golden::model_tolerance<T>(1e-5);

  sd35::Runtime rt;
  const auto check = [&](const std::string& name, const TensorView<const T, 3>& ours) {
    c.check(name, variant<T>, channels_first(ours, c.read(name)), tolerance);
  };
  const sd35::Tensor<T> image =
      model.decode(rt, view, [&](const std::string& name, const TensorView<const T, 3>& ours) {
        if (c.has("mid." + name)) check("mid." + name, ours);
      });
  const Index height = image.extent(1), width = image.extent(2), colours = image.extent(3);
  check("out.image", {image.data(), {image.extent(0), height * width, colours}});

  if (!c.has("out.image_u8")) return;
  const golden::Tensor recorded = c.read("out.image_u8");  // of the first picture
  golden::Tensor bytes{{height, width, colours}, {}};
  for (Index i = 0; i < height * width * colours; ++i)
    bytes.values.push_back(
        std::trunc(255 * std::clamp((static_cast<double>(image.data()[i]) + 1) / 2, 0.0, 1.0)));
  const double largest = recorded.values.empty() ? 0 : *std::ranges::max_element(recorded.values);
  c.check("out.image_u8", std::string(variant<T>) + ", within 1", bytes,
          {golden::Norm::scaled_max, 1 / std::max(1.0, largest)});
}

template <class T>
void run_encoder(Case& c) {
  const golden::Parameters parameters(c);
  const sd35::Checkpoint checkpoint = golden::open_checkpoint(c, parameters, sd35::Component::vae);
  const sd35::VaeEncoder<T> model(checkpoint, vae_config(checkpoint, parameters.config()));

  using golden::any;
  const golden::Tensor picture = golden::read(c, "in.image", {any, any, any, any});
  const std::vector<T> values(picture.values.begin(), picture.values.end());
  const golden::Tolerance tolerance = golden::model_tolerance<T>(1e-5);
  sd35::Runtime rt;
  const auto check = [&](const std::string& name, const TensorView<const T, 3>& ours) {
    if (c.has(name)) c.check(name, variant<T>, channels_first(ours, c.read(name)), tolerance);
  };
  const sd35::Tensor<T> moments = model.moments(
      rt, {values.data(), picture.view<4>().extents},
      [&](const std::string& name, const TensorView<const T, 3>& ours) { check("mid." + name, ours); });
  check("out.moments",
        {moments.data(), {moments.extent(0), moments.extent(1) * moments.extent(2), moments.extent(3)}});
  if (!c.has("out.latent_mean")) return;
  const sd35::Tensor<T> latent = model.latent(moments);
  c.check("out.latent_mean", variant<T>, latent.template view<4>(), tolerance);
}

void run_vae_decoder(Case& c) {
  run_decoder<float>(c);
  run_decoder<double>(c);
}
void run_vae_encoder(Case& c) {
  run_encoder<float>(c);
  run_encoder<double>(c);
}

const golden::Registration decoder({"vae_decoder"}, run_vae_decoder);
const golden::Registration encoder({"vae_encoder"}, run_vae_encoder);

}  // namespace

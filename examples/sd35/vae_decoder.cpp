#include <stdexcept>
#include <string>
#include <utility>

#include "nn/finite.hpp"
#include "vae.hpp"

namespace sd35 {

VaeConfig VaeConfig::of(const Checkpoint& checkpoint) {
  VaeConfig config;
  if (checkpoint.has("post_quant_conv.weight") || checkpoint.has("quant_conv.weight"))
    config.scaling = 0.18215, config.shift = 0;
  config.groups = checkpoint.config_number<Index>("norm_num_groups", {1, 4096}).value_or(config.groups);
  config.scaling = checkpoint.config_number<double>("scaling_factor", {0.001, 1000}).value_or(config.scaling);
  config.shift = checkpoint.config_number<double>("shift_factor", {-1000, 1000}).value_or(config.shift);
  return config;
}

template <class T>
VaeDecoder<T>::VaeDecoder(const Checkpoint& checkpoint, const VaeConfig& config) : config_(config) {
  if (checkpoint.has("post_quant_conv.weight"))
    post_quant_ = checkpoint.linear<T>("post_quant_conv", Checkpoint::any, Checkpoint::any);
  conv_in_ = vae::load_conv<T>(checkpoint, "decoder.conv_in", Checkpoint::any,
                               post_quant_ ? post_quant_->out() : Checkpoint::any);
  middle_ = vae::load_middle<T>(checkpoint, "decoder.mid.", conv_in_.out(), config.groups);
  Index channels = middle_.block2.out();

  Index levels = 0;
  const auto level_name = [](Index level) { return "decoder.up." + std::to_string(level) + "."; };
  while (checkpoint.has(level_name(levels) + "block.0.norm1.weight")) ++levels;
  levels_.resize(static_cast<std::size_t>(levels));
  for (Index i = levels - 1; i >= 0; --i) {
    Level& level = levels_[static_cast<std::size_t>(i)];
    for (std::string name; name = level_name(i) + "block." + std::to_string(level.blocks.size()) + ".",
                           checkpoint.has(name + "norm1.weight");) {
      level.blocks.push_back(vae::load_block<T>(checkpoint, name, channels, config.groups));
      channels = level.blocks.back().out();
    }
    if (i > 0) {
      level.upsample =
          vae::load_conv<T>(checkpoint, level_name(i) + "upsample.conv", Checkpoint::any, channels);
      channels = level.upsample->out();
    }
  }
  norm_out_ = vae::load_norm<T>(checkpoint, "decoder.norm_out", channels, config.groups);
  conv_out_ = vae::load_conv<T>(checkpoint, "decoder.conv_out", Checkpoint::any, channels);
}

template <class T>
Index VaeDecoder<T>::latent_channels() const {
  return post_quant_ ? post_quant_->in() : conv_in_.in;
}

template <class T>
Index VaeDecoder<T>::factor() const {
  return levels_.empty() ? 1 : Index{1} << (levels_.size() - 1);
}

template <class T>
Tensor<T> VaeDecoder<T>::decode(Runtime& rt, const TensorView<const T, 4>& latent, const Observer<T>& observe,
                                VaeMemory memory) const {
  const Index batch = latent.extent(0), height = latent.extent(2), width = latent.extent(3);
  if (latent.extent(1) != latent_channels() || batch < 1 || height < 1 || width < 1)
    throw std::runtime_error("VAE decoder: expected a latent of " + std::to_string(latent_channels()) +
                             " channels, got " + to_string({batch, latent.extent(1), height, width}));

  vae::Image<T> x(batch, height, width, latent_channels());
  const auto show = [&](const std::string& name, const std::string& place) {
    expect_finite<T>(rt, place, std::as_const(x).view());
    if (observe) observe(name, std::as_const(x).view());
  };
  for (Index b = 0; b < batch; ++b)
    for (Index y = 0; y < height; ++y)
      for (Index i = 0; i < width; ++i)
        for (Index c = 0; c < latent_channels(); ++c)
          x.view()(b, y * width + i, c) =
              latent(b, c, y, i) / static_cast<T>(config_.scaling) + static_cast<T>(config_.shift);
  show("z", "latent");
  if (post_quant_) {
    x.values = linear<T>(rt, std::as_const(x).view(), *post_quant_);
    show("post_quant_conv", "post_quant_conv");
  }
  x = vae::convolve<T>(rt, x, {.conv = &conv_in_});
  show("conv_in", "conv_in");
  vae::apply(rt, middle_, x, "mid.", observe);

  const vae::Conv<T>* upsample = nullptr;  // that comes before the level
  for (std::size_t level = levels_.size(); level-- > 0;) {
    const std::string name = "up." + std::to_string(level), place = "up block " + std::to_string(level);
    const Index scale = upsample != nullptr ? 2 : 1;
    const bool bands = vae::in_bands<T>(memory, scale * scale * x.values.elements());
    if (upsample != nullptr && (!bands || levels_[level].blocks.empty())) {
      x = vae::convolve<T>(rt, x, {.conv = upsample, .sampling = vae::Sampling::up});
      upsample = nullptr;
      show("up." + std::to_string(level + 1) + ".upsample",
           "up block " + std::to_string(level + 1) + ", upsampling");
    }
    for (std::size_t block = 0; block < levels_[level].blocks.size(); ++block) {
      if (bands)
        vae::apply_banded(rt, std::exchange(upsample, nullptr), levels_[level].blocks[block], x);
      else
        vae::apply(rt, levels_[level].blocks[block], x);
      show(name + ".block." + std::to_string(block), place + ", residual block " + std::to_string(block));
    }
    if (levels_[level].upsample) upsample = &*levels_[level].upsample;
  }
  const Tensor<T> terms = vae::norm_terms(rt, x, norm_out_);
  if (observe) {
    vae::Image<T> normed(batch, x.height, x.width, x.channels());
    vae::normalize(rt, x, terms, normed.values);
    observe("norm_out", std::as_const(normed).view());
  }
  x = vae::convolve<T>(rt, x, {.conv = &conv_out_, .norm_terms = &terms});
  expect_finite<T>(rt, "conv_out", std::as_const(x).view());
  return std::move(x.values).reshaped({batch, x.height, x.width, conv_out_.out()});
}

template class VaeDecoder<float>;
template class VaeDecoder<double>;

}  // namespace sd35

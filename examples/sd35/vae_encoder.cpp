#include <stdexcept>
#include <string>
#include <utility>

#include "nn/finite.hpp"
#include "vae.hpp"

namespace sd35 {

template <class T>
VaeEncoder<T>::VaeEncoder(const Checkpoint& checkpoint, const VaeConfig& config) : config_(config) {
  conv_in_ = vae::load_conv<T>(checkpoint, "encoder.conv_in", Checkpoint::any, Checkpoint::any);
  Index channels = conv_in_.out();
  for (std::string down; down = "encoder.down." + std::to_string(levels_.size()) + ".",
                         checkpoint.has(down + "block.0.norm1.weight");) {
    Level level;
    for (std::string name; name = down + "block." + std::to_string(level.blocks.size()) + ".",
                           checkpoint.has(name + "norm1.weight");) {
      level.blocks.push_back(vae::load_block<T>(checkpoint, name, channels, config.groups));
      channels = level.blocks.back().out();
    }
    const std::string next = "encoder.down." + std::to_string(levels_.size() + 1) + ".block.0.norm1.weight";
    if (checkpoint.has(next)) {
      level.downsample = vae::load_conv<T>(checkpoint, down + "downsample.conv", Checkpoint::any, channels);
      channels = level.downsample->out();
    }
    levels_.push_back(std::move(level));
  }
  middle_ = vae::load_middle<T>(checkpoint, "encoder.mid.", channels, config.groups);
  channels = middle_.block2.out();
  norm_out_ = vae::load_norm<T>(checkpoint, "encoder.norm_out", channels, config.groups);
  conv_out_ = vae::load_conv<T>(checkpoint, "encoder.conv_out", Checkpoint::any, channels);
  if (checkpoint.has("quant_conv.weight"))
    quant_ = checkpoint.linear<T>("quant_conv", Checkpoint::any, conv_out_.out());
  if (const Index out = quant_ ? quant_->out() : conv_out_.out(); out % 2 != 0)
    throw std::runtime_error(checkpoint.path().string() + ": the VAE encoder makes " + std::to_string(out) +
                             " channels, which are no pairs of mean and variance");
}

template <class T>
Index VaeEncoder<T>::latent_channels() const {
  return (quant_ ? quant_->out() : conv_out_.out()) / 2;
}

template <class T>
Index VaeEncoder<T>::factor() const {
  return levels_.empty() ? 1 : Index{1} << (levels_.size() - 1);
}

template <class T>
Tensor<T> VaeEncoder<T>::moments(Runtime& rt, const TensorView<const T, 4>& picture,
                                 const Observer<T>& observe, VaeMemory memory) const {
  const Index batch = picture.extent(0), colours = picture.extent(1), height = picture.extent(2),
              width = picture.extent(3);
  if (colours != conv_in_.in || batch < 1 || height < factor() || width < factor())
    throw std::runtime_error("VAE encoder: expected a picture of " + std::to_string(conv_in_.in) +
                             " colours and at least " + std::to_string(factor()) + " pixels a side, got " +
                             to_string({batch, colours, height, width}));

  vae::Image<T> x(batch, height, width, colours);
  const auto show = [&](const std::string& name, const std::string& place) {
    expect_finite<T>(rt, place, std::as_const(x).view());
    if (observe) observe(name, std::as_const(x).view());
  };
  for (Index b = 0; b < batch; ++b)
    for (Index y = 0; y < height; ++y)
      for (Index i = 0; i < width; ++i)
        for (Index c = 0; c < colours; ++c) x.view()(b, y * width + i, c) = picture(b, c, y, i);
  x = vae::convolve<T>(rt, x, {.conv = &conv_in_});
  show("conv_in", "conv_in");
  for (std::size_t level = 0; level < levels_.size(); ++level) {
    const std::string name = "down." + std::to_string(level) + ".",
                      place = "down block " + std::to_string(level) + ", ";
    const bool bands = vae::in_bands<T>(memory, x.values.elements());
    for (std::size_t block = 0; block < levels_[level].blocks.size(); ++block) {
      if (bands)
        vae::apply_banded<T>(rt, nullptr, levels_[level].blocks[block], x);
      else
        vae::apply(rt, levels_[level].blocks[block], x);
      show(name + "block." + std::to_string(block), place + "residual block " + std::to_string(block));
    }
    if (levels_[level].downsample) {
      x = vae::convolve<T>(rt, x, {.conv = &*levels_[level].downsample, .sampling = vae::Sampling::down});
      show(name + "downsample", place + "downsampling");
    }
  }
  vae::apply(rt, middle_, x, "mid.", observe);
  const Tensor<T> terms = vae::norm_terms(rt, x, norm_out_);
  if (observe) {
    vae::Image<T> normed(batch, x.height, x.width, x.channels());
    vae::normalize(rt, x, terms, normed.values);
    observe("norm_out", std::as_const(normed).view());
  }
  x = vae::convolve<T>(rt, x, {.conv = &conv_out_, .norm_terms = &terms});
  if (quant_) x.values = linear<T>(rt, std::as_const(x).view(), *quant_);
  expect_finite<T>(rt, quant_ ? "quant_conv" : "conv_out", std::as_const(x).view());
  return std::move(x.values).reshaped({batch, x.height, x.width, 2 * latent_channels()});
}

template <class T>
Tensor<T> VaeEncoder<T>::latent(const Tensor<T>& moments) const {
  const auto from = moments.template view<4>();
  Tensor<T> result({from.extent(0), latent_channels(), from.extent(1), from.extent(2)});
  const auto to = result.template view<4>();
  for (Index b = 0; b < to.extent(0); ++b)
    for (Index c = 0; c < to.extent(1); ++c)
      for (Index y = 0; y < to.extent(2); ++y)
        for (Index i = 0; i < to.extent(3); ++i)
          to(b, c, y, i) =
              (from(b, y, i, c) - static_cast<T>(config_.shift)) * static_cast<T>(config_.scaling);
  return result;
}

template class VaeEncoder<float>;
template class VaeEncoder<double>;

}  // namespace sd35

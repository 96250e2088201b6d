// The VAE of Stable Diffusion, of any size: latents to pictures and back. SD3.5 has one, and DiT another.
#pragma once

#include <optional>
#include <vector>

#include "checkpoint.hpp"
#include "nn/nn.hpp"
#include "nn/runtime.hpp"
#include "vae_blocks.hpp"

namespace sd35 {

using namespace nn;  // what the examples share

struct VaeConfig {
  Index groups = 32;  // of the group norms
  double scaling = 1.5305, shift = 0.0609;

  // From config.json, where there is one. Without words on it, a VAE with a post_quant_conv or a quant_conv is
  // that of Stable Diffusion 1 and 2, which DiT works on: 0.18215 and no shift.
  [[nodiscard]] static VaeConfig of(const Checkpoint& checkpoint);
};

// post_quant_conv (1 x 1), where the checkpoint has one; conv_in; middle: residual block, attention, residual
// block; then a level at a time, coarsest first: residual blocks and, but for the last, nearest x2 with a
// convolution; group norm, SiLU, conv_out. Sizes come from the shapes; the factor between latent and picture is
// 2^(levels - 1).
//   res(x)  = shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))
//   attn(x) = x + proj(softmax(q k^T / sqrt(C)) v) of norm(x), one head of width C over all positions
// T is float or double; statistics are double, of the whole picture whatever its bands. So the picture does not
// depend on VaeMemory, bit for bit, and a large one has no seams.
// Source: Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022.
template <class T>
class VaeDecoder {
 public:
  VaeDecoder(const Checkpoint& checkpoint, const VaeConfig& config);

  [[nodiscard]] Index latent_channels() const;
  // Pixels a latent position, along either axis.
  [[nodiscard]] Index factor() const;

  // The sampler's latent (batch, channels, h, w), any strides, to a picture (batch, h f, w f, colours), about
  // -1 to 1 and not clamped. z = latent / scaling + shift. The observer gets "z", "post_quant_conv", "conv_in",
  // "mid.block_1", ..., "up.0.block.0", "norm_out" as (batch, positions, channels), but for what bands leave out.
  [[nodiscard]] Tensor<T> decode(Runtime& rt, const TensorView<const T, 4>& latent,
                                 const Observer<T>& observe = {},
                                 VaeMemory memory = VaeMemory::automatic) const;

 private:
  struct Level {
    std::vector<vae::ResBlock<T>> blocks;
    std::optional<vae::Conv<T>> upsample;
  };

  VaeConfig config_;
  std::optional<LinearWeights<T>> post_quant_;
  vae::Conv<T> conv_in_, conv_out_;
  vae::Middle<T> middle_;
  std::vector<Level> levels_;  // in the order of the file: 0 is the finest and runs last
  vae::Norm<T> norm_out_;
};

// conv_in; a level at a time, finest first: residual blocks and, but for the last, a convolution of stride 2; the
// decoder's middle; group norm, SiLU, conv_out; quant_conv (1 x 1), where the checkpoint has one. Blocks and
// numerics are those of the decoder.
template <class T>
class VaeEncoder {
 public:
  // Throws std::runtime_error that names the tensor which is missing or has another shape.
  VaeEncoder(const Checkpoint& checkpoint, const VaeConfig& config);

  [[nodiscard]] Index latent_channels() const;
  // Pixels a latent position, along either axis.
  [[nodiscard]] Index factor() const;

  // A picture (batch, colours, height, width), -1 to 1, any strides, to mean and log variance of its latent,
  // (batch, height / f, width / f, 2 channels), the means first. A side that f does not divide is cut. The
  // observer gets "conv_in", "down.0.block.0", "down.0.downsample", ..., "mid.block_1", ..., "norm_out".
  [[nodiscard]] Tensor<T> moments(Runtime& rt, const TensorView<const T, 4>& picture,
                                  const Observer<T>& observe = {},
                                  VaeMemory memory = VaeMemory::automatic) const;
  // The latent that the sampler works on, (batch, channels, height / f, width / f): (mean - shift) scaling.
  [[nodiscard]] Tensor<T> latent(const Tensor<T>& moments) const;

 private:
  struct Level {
    std::vector<vae::ResBlock<T>> blocks;
    std::optional<vae::Conv<T>> downsample;
  };

  VaeConfig config_;
  vae::Conv<T> conv_in_, conv_out_;
  std::vector<Level> levels_;  // in the order in which they run
  vae::Middle<T> middle_;
  vae::Norm<T> norm_out_;
  std::optional<LinearWeights<T>> quant_;
};

extern template class VaeDecoder<float>;
extern template class VaeDecoder<double>;
extern template class VaeEncoder<float>;
extern template class VaeEncoder<double>;

}  // namespace sd35

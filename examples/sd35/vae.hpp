// The decoder of the VAE of Stable Diffusion, of any size: latents to pictures. SD3.5 has one, and DiT another.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "checkpoint.hpp"
#include "nn/nn.hpp"
#include "nn/runtime.hpp"

namespace sd35 {

using namespace nn;  // what the examples share

struct VaeConfig {
  Index groups = 32;  // of the group norms
  double scaling = 1.5305, shift = 0.0609;

  // From config.json, where there is one. Without words on it, a VAE with a post_quant_conv is that of Stable
  // Diffusion 1 and 2, which DiT works on: 0.18215 and no shift.
  [[nodiscard]] static VaeConfig of(const Checkpoint& checkpoint);
};

// post_quant_conv (1 x 1), where the checkpoint has one; conv_in; middle: residual block, attention, residual block; then a level at a time, coarsest first: residual
// blocks and, but for the last, nearest x2 with a convolution; group norm, SiLU, conv_out. Sizes come from the
// shapes; the factor between latent and picture is 2^(levels - 1).
//   res(x)  = shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))
//   attn(x) = x + proj(softmax(q k^T / sqrt(C)) v) of norm(x), one head of width C over all positions
// Convolutions are 3 x 3 with zero padding, a tile of the picture at a time: the tile is normalised, activated
// and unfolded into columns in scratch memory, so that a block holds two activations and no third. Nor does a
// score matrix or an enlarged activation exist. T is float or double; statistics are double.
// Source: Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022.
template <class T>
class VaeDecoder {
 public:
  VaeDecoder(const Checkpoint& checkpoint, const VaeConfig& config);

  [[nodiscard]] Index latent_channels() const;
  // Pixels a latent position, along either axis.
  [[nodiscard]] Index factor() const;

  // The sampler's latent (batch, channels, h, w), any strides, to a picture (batch, h f, w f, colours), about
  // -1 to 1 and not clamped. z = latent / scaling + shift. The observer gets "z", "post_quant_conv", "conv_in", "mid.block_1",
  // ..., "up.0.block.0", "norm_out" as (batch, positions, channels).
  [[nodiscard]] Tensor<T> decode(Runtime& rt, const TensorView<const T, 4>& latent,
                                 const Observer<T>& observe = {}) const;

  // Activations (batch, height * width, channels) with their grid.
  struct Image {
    Tensor<T> values;
    Index height = 0, width = 0;

    [[nodiscard]] Index batch() const { return values.extent(0); }
    [[nodiscard]] Index channels() const { return values.extent(2); }
    [[nodiscard]] TensorView<T, 3> view() { return values.template view<3>(); }
    [[nodiscard]] TensorView<const T, 3> view() const { return values.template view<3>(); }
  };
  struct Norm {
    std::vector<T> weight, bias;
  };
  struct Conv {
    Index in = 0;
    LinearWeights<T> weights;  // [out, 9 in], columns (channel, ky, kx): the checkpoint's own order
  };

 private:
  struct ResBlock {
    Norm norm1, norm2;
    Conv conv1, conv2;
    std::optional<LinearWeights<T>> shortcut;  // where the channels change
  };
  struct Level {
    std::vector<ResBlock> blocks;
    std::optional<Conv> upsample;
  };

  [[nodiscard]] Norm load_norm(const Checkpoint& checkpoint, const std::string& name, Index channels) const;
  [[nodiscard]] ResBlock load_block(const Checkpoint& checkpoint, const std::string& name,
                                    Index channels) const;

  // Per (batch, channel): mean, weight / sqrt(variance + eps), bias, as (batch, 3, channels).
  [[nodiscard]] Tensor<T> norm_terms(const Runtime& rt, const Image& x, const Norm& norm) const;
  void apply_block(Runtime& rt, const ResBlock& block, Image& x) const;
  void apply_attention(Runtime& rt, Image& x) const;

  VaeConfig config_;
  std::optional<LinearWeights<T>> post_quant_;
  Conv conv_in_, conv_out_;
  ResBlock mid1_, mid2_;
  Norm attention_norm_;
  LinearWeights<T> q_, k_, v_, proj_;
  std::vector<Level> levels_;  // in the order of the file: 0 is the finest and runs last
  Norm norm_out_;
};

extern template class VaeDecoder<float>;
extern template class VaeDecoder<double>;

}  // namespace sd35

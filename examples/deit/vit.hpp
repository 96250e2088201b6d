// Vision transformers under timm's names (ViT, DeiT, distilled DeiT) and their conversions to T5: softmax or
// Test-Time-Training attention, block by block as the checkpoint says.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "nn/checkpoint.hpp"
#include "nn/leftovers.hpp"
#include "nn/nn.hpp"
#include "nn/runtime.hpp"
#include "nn/ttt_module.hpp"
#include "nn/weight.hpp"

namespace deit {

using namespace nn;  // what the examples share

// The checkpoint of a ViT, below whatever prefix ("model.", "module.") its tensors lie; of a training checkpoint
// the raw weights, or their moving average where there are no others.
[[nodiscard]] Checkpoint open(const std::filesystem::path& path);

struct VitConfig {
  Index depth = 0, width = 0, heads = 0, mlp_width = 0;
  Index channels = 0, patch = 0;  // of a picture; patch x patch pixels are a token
  Index grid = 0;                 // patches along an axis of the table of positions
  Index classes = 0;
  Index special = 0;  // tokens before those of the picture: 0, 1 (class), 2 (class and distillation)

  [[nodiscard]] Index head_dim() const { return width / heads; }

  // From the shapes of the tensors. They do not tell the heads: `heads` counts first, then what find_heads of
  // linattn/weights finds, as the converter does (config.json: num_heads or num_attention_heads). Throws
  // std::runtime_error where nothing tells them, or where a tensor is missing.
  [[nodiscard]] static VitConfig of(const Checkpoint& checkpoint, std::optional<Index> heads = {});
};

//   x = [class, distillation, patches(picture)] + positions
//   each block:  x += attn(LN(x));  x += fc2(gelu(fc1(LN(x))))          LN eps 1e-6, gelu by erf
//   logits = head(LN(x) of the class token); distilled: (head(class) + head_dist(distillation)) / 2;
//            without special tokens: head(mean of LN(x) over the tokens)
// attn is the softmax layer, or the T5 layer with the inner model, loss and convolutions that the conversion
// names; convolutions act on the grid of the picture's tokens and pass special tokens by. A picture may have any
// height and width that are multiples of the patch: positions are then interpolated (resample_positions).
// T is float or double, and arithmetic is in T. The result does not depend on the number of threads.
// Source: Dosovitskiy et al., 2021; Touvron et al., Training data-efficient image transformers, 2021; T5/models.py
// of LeapLabTHU/Transformer-to-TTT.
template <class T>
class Vit {
 public:
  // Throws std::runtime_error that names the tensor which is missing, has another shape, or is none of a ViT.
  explicit Vit(const Checkpoint& checkpoint, std::optional<Index> heads = {})
      : Vit(checkpoint, VitConfig::of(checkpoint, heads)) {}
  Vit(const Checkpoint& checkpoint, const VitConfig& config);

  [[nodiscard]] const VitConfig& config() const { return config_; }
  // What lies beside the model's tensors and changes nothing.
  [[nodiscard]] const std::vector<Ignored>& ignored() const { return ignored_; }
  // Blocks whose attention is a Test-Time-Training layer.
  [[nodiscard]] Index converted_blocks() const;

  // Pictures (batch, channels, height, width), any strides, to logits (batch, classes). Throws
  // std::runtime_error where a size does not fit. The observer gets (batch, tokens, width) "patch_embed" (before
  // positions, picture tokens alone), "positions" (batch 1, all tokens), "block0.q", "block0.k", "block0.v"
  // (after the projection, heads side by side), "block0.attn" (the result, projected), "block0", "block1.q",
  // ..., "norm".
  [[nodiscard]] Tensor<T> forward(Runtime& rt, In<T, 4> pictures, const Observer<T>& observe = {}) const;

 private:
  struct Norm {
    std::vector<T> weight, bias;
  };
  struct Block {
    Norm norm1, norm2;
    Weight qkv, proj;  // stored as T
    std::vector<T> qkv_bias, proj_bias;
    std::optional<TttModule<T>> ttt;
    LinearWeights<T> fc1, fc2;
  };

  [[nodiscard]] Norm load_norm(const Checkpoint& checkpoint, const std::string& name) const;
  [[nodiscard]] Block load_block(const Checkpoint& checkpoint, const std::string& name,
                                 linattn::Conversion& conversion) const;

  [[nodiscard]] Tensor<T> embed(Runtime& rt, const TensorView<const T, 4>& pictures,
                                const Observer<T>& observe) const;
  // x = attn(x), in place
  void attend(Runtime& rt, const std::string& what, const Block& block, const linattn::TokenGrid& grid,
              TensorView<T, 3> x, const Observer<T>& observe) const;
  // x += fc2(gelu(fc1(LN(x)))); `scratch` as x, `hidden` [1, rows at a time, mlp_width]
  void add_mlp(Runtime& rt, const Block& block, TensorView<T, 3> x, TensorView<T, 3> scratch,
               Tensor<T>& hidden) const;
  [[nodiscard]] Tensor<T> classify(Runtime& rt, const TensorView<const T, 3>& normalised) const;

  VitConfig config_;
  LinearWeights<T> patches_;
  std::vector<T> special_;    // (special, width)
  std::vector<T> positions_;  // (special + grid * grid, width)
  std::vector<Block> blocks_;
  Norm norm_;
  LinearWeights<T> head_, distilled_head_;
  std::vector<Ignored> ignored_;
};

extern template class Vit<float>;
extern template class Vit<double>;

// A table (grid, grid, width) on another grid: bicubic convolution with a = -0.75, edges repeated, sample points
// at the centres of the cells, no antialiasing. That is torch's interpolate(mode="bicubic", align_corners=False),
// with which DeiT's own code takes a model to another resolution. Weights are computed in double, sums in T; out
// (rows, columns, width).
template <class T>
void resample_positions(const T* table, Index grid, Index width, Index rows, Index columns, T* out);

}  // namespace deit

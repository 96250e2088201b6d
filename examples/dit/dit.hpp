// Diffusion transformers (DiT) of any size, with softmax attention or with DiT5's mixed attention, block by
// block as the checkpoint says.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <linattn/weights/dit.hpp>

#include "nn/checkpoint.hpp"
#include "nn/leftovers.hpp"
#include "nn/nn.hpp"
#include "nn/runtime.hpp"
#include "nn/ttt_module.hpp"

namespace dit {

using namespace nn;  // what the examples share

// The tensors of a DiT by their official names, whatever stands before them in a training checkpoint. Of weights
// and their moving average the average is taken, as the official sampler does.
[[nodiscard]] Checkpoint open_checkpoint(const std::filesystem::path& path);

struct DitConfig {
  linattn::DitModel shapes;  // what the tensors tell
  Index heads = 0;

  // `heads` where the file must not decide: else a converted module, the metadata or config.json tell them, or
  // the published size, or heads are taken to have 64 channels.
  [[nodiscard]] static DitConfig of(const Checkpoint& checkpoint, std::optional<Index> heads = {});

  [[nodiscard]] Index out_channels() const { return shapes.outputs / (shapes.patch * shapes.patch); }
  [[nodiscard]] bool learns_variance() const { return out_channels() == 2 * shapes.channels; }
  // The last row of the label table stands for no class.
  [[nodiscard]] Index classes() const { return shapes.labels - 1; }
  [[nodiscard]] Index no_class() const { return classes(); }
  // Patches along an axis of the picture that the model was trained on.
  [[nodiscard]] Index grid() const;
};

// Shift, scale and gate of every block, and shift and scale of the final layer: (1, batch, chunks * width) each.
// They depend on time and class alone.
template <class T>
using Modulations = std::vector<Tensor<T>>;

//   X = patches(x) + positions;  c = mlp(sinusoid(t)) + table[class]
//   each block, with shift, scale and gate from linear(silu(c)), mod(u) = LN(u) (1 + scale) + shift:
//     X += gate attention(mod(X));  X += gate mlp(mod(X)), with the tanh form of GELU
//   noise, variance = unpatchify(linear(mod(X)))
// LN has no parameters, and an eps of 1e-6. T is float or double; the weights stay in their file and are widened
// as they are used, but for the small ones and those of the attentions.
// Source: Peebles and Xie, Scalable Diffusion Models with Transformers, 2023; facebookresearch/DiT, models.py;
// DiT5/models.py of LeapLabTHU/Transformer-to-TTT.
template <class T>
class Dit {
 public:
  // Throws std::runtime_error that names the tensor which is missing, has another shape, or is none of a DiT.
  explicit Dit(const Checkpoint& checkpoint) : Dit(checkpoint, DitConfig::of(checkpoint)) {}
  Dit(const Checkpoint& checkpoint, const DitConfig& config);

  [[nodiscard]] const DitConfig& config() const { return config_; }
  // What lies beside the model's tensors and changes nothing.
  [[nodiscard]] const std::vector<Ignored>& ignored() const { return ignored_; }
  [[nodiscard]] Index modules() const { return config_.shapes.depth; }
  [[nodiscard]] Index converted_modules() const;

  // Throws std::runtime_error where latents of this height and width are none that the model can take: no multiples
  // of the patch, or a grid of tokens smaller than the window of neighborhood attention.
  void expect_size(Index height, Index width) const;

  // For the i-th row of `sinusoids` (batch, frequencies) with the i-th of `classes`, rows of the label table. The observer gets "t_emb", "y_emb".
  [[nodiscard]] Modulations<T> modulate(Runtime& rt, In<T, 2> sinusoids,
                                        std::span<const std::int32_t> classes,
                                        const Observer<T>& observe = {}) const;

  // Latents x (batch, channels, h, w), any strides, to (batch, out channels, h, w): the noise, then, where it is
  // learned, the variance. h and w are multiples of the patch; positions are computed where the grid is not the
  // checkpoint's. The observer gets "x_embed", "block0.attn", "block0", ..., "final".
  void forward(Runtime& rt, In<T, 4> x, const Modulations<T>& modulations, TensorView<T, 4> out,
               const Observer<T>& observe = {}) const;

 private:
  struct Block {
    Weight qkv, proj;  // stored as T
    std::vector<T> qkv_bias, proj_bias;
    std::optional<TttModule<T>> ttt;
    std::vector<T> qk_scale, qk_offset;  // [width, 2], beside neighborhood attention
    LinearWeights<T> fc1, fc2, modulation;
  };
  [[nodiscard]] Block load_block(const Checkpoint& checkpoint, const std::string& name,
                                 linattn::Conversion& conversion) const;
  // x += table of sin and cos
  void add_positions(Runtime& rt, TensorView<T, 3> x, Index rows, Index columns) const;
  // x = attention(x), in place
  void attend(Runtime& rt, const std::string& what, const Block& block, const linattn::TokenGrid& grid,
              TensorView<T, 3> x) const;
  // x = fc2(gelu(fc1(x))), in place; `hidden` [1, rows at a time, shapes.hidden]
  void apply_mlp(Runtime& rt, const Block& block, TensorView<T, 3> x, Tensor<T>& hidden) const;

  DitConfig config_;
  Weight positions_, classes_;
  LinearWeights<T> patches_, time1_, time2_;
  std::vector<Block> blocks_;
  LinearWeights<T> final_modulation_, final_;
  std::vector<Ignored> ignored_;
};

extern template class Dit<float>;
extern template class Dit<double>;

}  // namespace dit

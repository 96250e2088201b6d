// The transformer of Stable Diffusion 3 and 3.5 (MMDiT-X), of any size, with softmax attention or
// Test-Time-Training layers as the checkpoint says.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "checkpoint.hpp"
#include "nn/nn.hpp"
#include "nn/runtime.hpp"
#include "nn/ttt_module.hpp"

namespace sd35 {

using namespace nn;  // what the examples share

struct MmditConfig {
  Index depth = 0, width = 0, heads = 0;
  Index patch = 0, in_channels = 0, out_channels = 0;
  Index position_grid = 0;  // patches along an axis of the table of position embeddings
  Index context_width = 0, pooled_width = 0, time_width = 0, mlp_width = 0;
  bool qk_norm = false;
  std::vector<bool> dual;  // a block: does it have a second, image-only attention?

  [[nodiscard]] Index head_dim() const { return width / heads; }

  // From the shapes of the tensors; what config.json says counts more, and must agree with the shapes when
  // they are read. Where neither tells the head size (no qk-norm), it is 64.
  [[nodiscard]] static MmditConfig of(const Checkpoint& checkpoint);
};

// Shift, scale and gate of every block for a number of (time, pooled text) pairs: a row of `layers[i]` each,
// in chunks of the model's width.
template <class T>
struct Modulations {
  std::vector<Tensor<T>>
      layers;  // (1, pairs, chunks * width): image then context of each block, the final one

  // Chunk `index` of a layer for `batch` pairs from `first` on.
  [[nodiscard]] TensorView<const T, 2> chunk(std::size_t layer, Index index, Index first, Index batch,
                                             Index width) const {
    return slice<1>(slice<0>(at(layers[layer].template view<3>(), 0), first, batch), index * width, width);
  }
};

//   X = patches(x) + positions;  C = context_embedder(context);  c = mlp(sinusoid(t)) + mlp(pooled)
//   each block, with shift, scale and gate from silu(c), mod(u) = LN(u) (1 + scale) + shift:
//     [Oc, Ox] = attention over the tokens of both;   O2 = a second attention over the image (dual blocks)
//     X += gate proj(Ox);  X += gate2 proj2(O2);  X += gate mlp(mod(X));  the same for C, but in the last block
//   v = unpatchify(linear(mod(X)))
// Attention is softmax, or the joint or image-only T5 layer where the conversion lists the module. T is float
// or double; the weights stay in their file and are widened as they are used, but for the small ones.
// Source: Esser et al., Scaling Rectified Flow Transformers, 2024; Stability-AI/sd3.5, mmditx.py.
template <class T>
class Mmdit {
 public:
  // Throws std::runtime_error that names the tensor which is missing or has another shape.
  explicit Mmdit(const Checkpoint& checkpoint) : Mmdit(checkpoint, MmditConfig::of(checkpoint)) {}
  Mmdit(const Checkpoint& checkpoint, const MmditConfig& config);

  [[nodiscard]] const MmditConfig& config() const { return config_; }
  // Attentions in all, and those that are Test-Time-Training layers.
  [[nodiscard]] Index modules() const;
  [[nodiscard]] Index converted_modules() const;

  // What depends on time and pooled text alone, for all pairs (i-th row of both) at once: each weight is read
  // once a picture. `sinusoids` (pairs, time_width) of timestep_embedding, `pooled` (pairs, pooled_width).
  [[nodiscard]] Modulations<T> modulate(Runtime& rt, In<T, 2> sinusoids, In<T, 2> pooled,
                                        const Observer<T>& observe = {}) const;
  // (batch, tokens, context_width) -> (batch, tokens, width), the same for all steps.
  [[nodiscard]] Tensor<T> embed_context(Runtime& rt, In<T, 3> context, const Observer<T>& observe = {}) const;

  // v of latents x (batch, in_channels, h, w), any strides: a batch stride of 0 gives one latent to all.
  // `context` is that of embed_context, modulations are the rows first_pair, first_pair + 1, ... a batch entry.
  // h and w are multiples of the patch, at most position_grid patches. The blocks in `skip` are passed by. The
  // observer gets "patch_embed", "cropped_pos", "block0.x", "block0.context", ..., "final_layer", and what goes
  // into the attentions: "block0.attn.x", "block0.attn.context", "block0.attn2.x".
  void forward(Runtime& rt, In<T, 4> x, In<T, 3> context, const Modulations<T>& modulations, Index first_pair,
               std::span<const int> skip, TensorView<T, 4> v, const Observer<T>& observe = {}) const;

 private:
  // The parameters around an attention, all stored in one type; what a module lacks is empty.
  struct Projections {
    Weight q, k, v, out, q_bias, k_bias, v_bias, out_bias, q_norm, k_norm;
  };
  struct Attention {
    Projections image;
    std::optional<TttModule<T>> ttt;
  };
  struct Mlp {
    LinearWeights<T> fc1, fc2;
  };
  struct Block {
    LinearWeights<T> image_modulation, context_modulation;
    Attention joint;
    Projections context;
    std::optional<Attention> second;
    Mlp image_mlp;
    std::optional<Mlp> context_mlp;
  };
  [[nodiscard]] Projections load_projections(const Checkpoint& checkpoint, const std::string& name,
                                             bool with_out) const;
  [[nodiscard]] Mlp load_mlp(const Checkpoint& checkpoint, const std::string& name) const;

  [[nodiscard]] Tensor<T> embed_patches(Runtime& rt, In<T, 4> x, const Observer<T>& observe) const;
  void attend(Runtime& rt, const std::string& what, const Attention& attention,
              const Projections& text_weights, TensorView<T, 3> image, In<T, 3> text,
              TensorView<T, 3> text_out, Index rows, Index columns) const;
  void add_mlp(Runtime& rt, const Mlp& mlp, TensorView<T, 3> x, const TensorView<const T, 2>& shift,
               const TensorView<const T, 2>& scale, const TensorView<const T, 2>& gate,
               TensorView<T, 3> scratch, Tensor<T>& hidden) const;

  MmditConfig config_;
  Weight positions_;
  LinearWeights<T> patches_, time1_, time2_, pooled1_, pooled2_, context_embedder_;
  std::vector<Block> blocks_;
  LinearWeights<T> final_modulation_, final_;
};

extern template class Mmdit<float>;
extern template class Mmdit<double>;

}  // namespace sd35

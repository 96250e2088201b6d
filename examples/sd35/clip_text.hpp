// The text model of CLIP: CLIP-L and CLIP-G of SD3.5, of any size.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint.hpp"
#include "nn/nn.hpp"
#include "nn/runtime.hpp"

namespace sd35 {

using namespace nn;  // what the examples share

// The activation that config.json calls `hidden_act`. Throws where it is none of CLIP's.
[[nodiscard]] Activation clip_activation(std::string_view hidden_act);

struct ClipConfig {
  Index layers = 0, width = 0, heads = 0, vocabulary = 0, positions = 0;
  Activation activation = Activation::quick_gelu;
  double eps = 1e-5;
  std::optional<std::int32_t> eos;  // unset: the largest id of a row
  bool project = false;             // whether the model's pooled feature is the projected one

  // From config.json where there is one, else from the shapes: heads of 64 channels; CLIP-L with quick_gelu
  // and an unprojected pooled feature, CLIP-G with the exact GELU and a projected one.
  [[nodiscard]] static ClipConfig of(const Checkpoint& checkpoint, Component component);
};

template <class T>
struct ClipFeatures {
  Tensor<T> hidden;       // (batch, tokens, width): input of the last layer, no final norm
  Tensor<T> last_hidden;  // (batch, tokens, width): output of the last layer after the final norm
  Tensor<T> pooled;       // (batch, 1, width): last_hidden at the first EOS
  Tensor<T> projected;    // pooled times text_projection; empty where the file has none
};

// x = token + position; each layer: x += out(attention(LN1 x)), x += fc2(act(fc1(LN2 x))), causal, scale
// head_dim^-1/2, no padding mask. T is float or double; the weights stay in their file.
// Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021; Esser
// et al., Scaling Rectified Flow Transformers, 2024 (which features SD3 takes).
template <class T>
class ClipText {
 public:
  ClipText(const Checkpoint& checkpoint, const ClipConfig& config);

  [[nodiscard]] const ClipConfig& config() const { return config_; }

  // Token ids of `batch` rows of equal length, one after the other; at most `positions` each.
  // The observer gets "layer0", "layer1", ...
  [[nodiscard]] ClipFeatures<T> encode(Runtime& rt, std::span<const std::int32_t> tokens, Index batch,
                                       const Observer<T>& observe = {}) const;
  // The pooled feature that the pipeline uses: (batch, 1, width).
  [[nodiscard]] const Tensor<T>& pooled(const ClipFeatures<T>& features) const {
    return config_.project ? features.projected : features.pooled;
  }

 private:
  struct Norm {
    std::vector<T> weight, bias;
  };
  struct Layer {
    Norm norm1, norm2;
    LinearWeights<T> q, k, v, out, fc1, fc2;
  };

  [[nodiscard]] LayerNormOptions<T> norm_options(const Norm& norm) const {
    return {.eps = config_.eps, .weight = as_view(norm.weight), .bias = as_view(norm.bias)};
  }

  ClipConfig config_;
  Weight token_embedding_;
  std::vector<T> position_embedding_;
  std::vector<Layer> layers_;
  Norm final_norm_;
  std::optional<LinearWeights<T>> projection_;
};

extern template class ClipText<float>;
extern template class ClipText<double>;

}  // namespace sd35

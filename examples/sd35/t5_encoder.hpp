// The encoder of T5 v1.1 (T5-XXL in SD3.5), of any size.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "checkpoint.hpp"
#include "clip_text.hpp"
#include "nn/nn.hpp"
#include "nn/runtime.hpp"

namespace sd35 {

using namespace nn;  // what the examples share

// The bucket of a relative position, key - query, of a bidirectional encoder with 32 buckets and distances to
// 128: 16 for the future plus 0..7 exactly, then eight logarithmic steps. The bounds of the steps,
// ceil(8 * 16^(i/8)), are exact integers here, where the formula with logarithms depends on their rounding.
[[nodiscard]] constexpr Index t5_bucket(Index key_minus_query) {
  const Index distance = key_minus_query < 0 ? -key_minus_query : key_minus_query;
  Index bucket = distance < 8 ? distance : 7;
  for (const Index bound : {8, 12, 16, 23, 32, 46, 64, 91}) bucket += distance >= bound ? 1 : 0;
  return bucket + (key_minus_query > 0 ? 16 : 0);
}

// x = embedding; each block: x += o(attention(RMS x)), x += wo(gelu_tanh(wi_0 u) * wi_1 u) with u = RMS x;
// the output is RMS x. Attention is bidirectional, has scale 1 and no padding mask, and adds the bias of block
// 0, b[bucket(key - query)][head], in every block. T is float or double; the weights stay in their file, in 16 or 8 bits,
// and no more than a block of them stays in memory.
// Source: Raffel et al., Exploring the Limits of Transfer Learning, 2020; Shazeer, GLU Variants, 2020.
template <class T>
class T5Encoder {
 public:
  explicit T5Encoder(const Checkpoint& checkpoint);

  [[nodiscard]] Index vocabulary() const { return embedding_.extent(0); }
  [[nodiscard]] Index width() const { return embedding_.extent(1); }

  // Token ids of `batch` rows of equal length, one after the other -> (batch, tokens, width).
  // The observer gets "block0", "block1", ...
  [[nodiscard]] Tensor<T> encode(Runtime& rt, std::span<const std::int32_t> tokens, Index batch,
                                 const Observer<T>& observe = {}) const;

 private:
  struct Block {
    std::vector<T> norm1, norm2;
    LinearWeights<T> q, k, v, o, wi_0, wi_1, wo;
  };

  Weight embedding_;
  std::vector<T> relative_bias_;  // [buckets, heads]
  Index heads_ = 0;
  double eps_ = 1e-6;
  std::vector<Block> blocks_;
  std::vector<T> final_norm_;
};

extern template class T5Encoder<float>;
extern template class T5Encoder<double>;

}  // namespace sd35

// What the decoder and the encoder of the VAE are made of: 3 x 3 convolutions with what surrounds them, residual
// blocks and the attention in the middle, on activations with the channels last.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint.hpp"
#include "nn/nn.hpp"
#include "nn/runtime.hpp"

namespace sd35 {

// How a level of the network runs.
enum class VaeMemory : std::uint8_t {
  automatic,  // in bands where an activation takes more than 1 GiB, which is beyond 1024 x 1024 in float
  whole,      // one convolution after the other: up to three activations
  bands,      // residual blocks in bands of rows: one activation, and part of the products once or twice more
};

namespace vae {

// Whether activations of so many elements are computed in bands.
template <class T>
[[nodiscard]] constexpr bool in_bands(VaeMemory memory, Index elements) {
  return memory == VaeMemory::bands ||
         (memory == VaeMemory::automatic && elements > (Index{1} << 30) / static_cast<Index>(sizeof(T)));
}

// Rows of activations that are computed at a time where not all of them are kept.
inline constexpr Index band = 16;

// Activations (batch, rows * width, channels) of a picture of `height` rows: all of them, or the latest few that
// were computed. Row y lies at y mod rows.
template <class T>
struct Image {
  Tensor<T> values;
  Index height = 0, width = 0, rows = 0;

  Image() = default;
  Image(Index batch, Index picture_height, Index picture_width, Index channels)
      : Image(batch, picture_height, picture_width, channels, picture_height) {}
  // A window of three bands: what a convolution reads while its input goes on.
  [[nodiscard]] static Image window(Index batch, Index height, Index width, Index channels) {
    return Image(batch, height, width, channels, 3 * band);
  }

  [[nodiscard]] Index batch() const { return values.extent(0); }
  [[nodiscard]] Index channels() const { return values.extent(2); }
  [[nodiscard]] T* row(Index b, Index y) {
    return values.data() + (b * rows + y % rows) * width * channels();
  }
  [[nodiscard]] const T* row(Index b, Index y) const {
    return values.data() + (b * rows + y % rows) * width * channels();
  }
  [[nodiscard]] TensorView<T, 3> view() { return values.template view<3>(); }
  [[nodiscard]] TensorView<const T, 3> view() const { return values.template view<3>(); }

 private:
  Image(Index batch, Index picture_height, Index picture_width, Index channels, Index held)
      : values({batch, held * picture_width, channels}),
        height(picture_height),
        width(picture_width),
        rows(held) {}
};

template <class T>
struct Norm {
  Index groups = 0;
  std::vector<T> weight, bias;
};
template <class T>
struct Conv {
  Index in = 0;
  LinearWeights<T> weights;  // [out, 9 in], columns (ky, kx, channel)

  [[nodiscard]] Index out() const { return weights.out(); }
};
template <class T>
struct ResBlock {
  Norm<T> norm1, norm2;
  Conv<T> conv1, conv2;
  std::optional<LinearWeights<T>> shortcut;  // where the channels change

  [[nodiscard]] Index out() const { return conv1.out(); }
};
// Residual block, attention, residual block.
template <class T>
struct Middle {
  ResBlock<T> block1, block2;
  Norm<T> norm;
  LinearWeights<T> q, k, v, proj;
};

// The parameters under `name`, which ends in a dot where a part follows. Throw std::runtime_error that names the
// tensor; channels must divide into the groups.
template <class T>
[[nodiscard]] Norm<T> load_norm(const Checkpoint& checkpoint, const std::string& name, Index channels,
                                Index groups);
template <class T>
[[nodiscard]] Conv<T> load_conv(const Checkpoint& checkpoint, const std::string& name, Index out, Index in);
template <class T>
[[nodiscard]] ResBlock<T> load_block(const Checkpoint& checkpoint, const std::string& name, Index channels,
                                     Index groups);
template <class T>
[[nodiscard]] Middle<T> load_middle(const Checkpoint& checkpoint, const std::string& name, Index channels,
                                    Index groups);

// Mean and variance of groups of channels, gathered over rows of pictures in any portions. Sums in double,
// merged in the order of the rows.
template <class T>
class GroupMoments {
 public:
  GroupMoments(Index batch, Index height, Index groups);

  // Rows [begin, end) of x.
  void add(const Runtime& rt, const Image<T>& x, Index begin, Index end);
  // What a norm is per (batch, channel): mean, weight / sqrt(variance + 1e-6), bias, as (batch, 3, channels).
  [[nodiscard]] Tensor<T> terms(const Norm<T>& norm) const;

 private:
  // Count, mean and sum of squared deviations of a set.
  struct Moments {
    double count = 0, mean = 0, squares = 0;
    void merge(const Moments& other);
  };
  Index batch_, height_, groups_;
  std::vector<Moments> rows_;
};
template <class T>
[[nodiscard]] Tensor<T> norm_terms(const Runtime& rt, const Image<T>& x, const Norm<T>& norm) {
  GroupMoments<T> moments(x.batch(), x.height, norm.groups);
  moments.add(rt, x, 0, x.height);
  return moments.terms(norm);
}
// out = the group norm alone.
template <class T>
void normalize(const Runtime& rt, const Image<T>& x, const Tensor<T>& terms, Tensor<T>& out);

enum class Sampling : std::uint8_t {
  same,  // zero padding of one
  up,    // nearest x2 before it, zero padding of one
  down,  // zero padding of one at the right and the lower edge, stride 2: height / 2, width / 2, rounded down
};

// A 3 x 3 convolution: out = residual + conv(act(x)), act the group norm and SiLU where there are terms of it.
template <class T>
struct Convolution {
  const Conv<T>* conv = nullptr;
  Sampling sampling = Sampling::same;
  const Tensor<T>* norm_terms = nullptr;
  const Image<T>* residual = nullptr;          // may be the output
  const LinearWeights<T>* shortcut = nullptr;  // what the residual goes through
};
// Rows [begin, end) of out; begin is a multiple of `band`, end is one or the last row. A tile of the picture at
// a time is normalised, activated and unfolded into columns in scratch memory: no activation but x and out
// exists, and a row is the same, bit for bit, whatever rows are computed with it.
template <class T>
void convolve(Runtime& rt, const Image<T>& x, const Convolution<T>& convolution, Image<T>& out, Index begin,
              Index end);
// The whole of it in new memory.
template <class T>
[[nodiscard]] Image<T> convolve(Runtime& rt, const Image<T>& x, const Convolution<T>& convolution);

// x = shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x)))))), with an intermediate of the size of x.
template <class T>
void apply(Runtime& rt, const ResBlock<T>& block, Image<T>& x);
// The same of upsample(x), if there is one, bit for bit, without an intermediate: windows of bands run through
// the convolutions, once for the moments of each norm and once for the result. conv1 is computed twice, and
// upsample three times. In place where the channels and the size stay.
template <class T>
void apply_banded(Runtime& rt, const Conv<T>* upsample, const ResBlock<T>& block, Image<T>& x);

// The attention: x += proj(softmax(q k^T / sqrt(C)) v) of norm(x), one head of width C over all positions, no
// score matrix. The observer gets `name` + "block_1", "attn_1", "block_2".
template <class T>
void apply(Runtime& rt, const Middle<T>& middle, Image<T>& x, const std::string& name,
           const Observer<T>& observe);

}  // namespace vae
}  // namespace sd35

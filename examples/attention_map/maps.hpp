// The attention maps of one layer: softmax beside Test-Time-Training.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "nn/checkpoint.hpp"
#include "nn/image.hpp"
#include "nn/leftovers.hpp"
#include "nn/runtime.hpp"
#include "nn/ttt_module.hpp"

namespace attention_map {

using namespace nn;  // what the examples share

// What goes into an attention, (batch 1, tokens, heads, head_dim), behind the projections, and which of the tokens are
// those of the picture.
struct Inputs {
  Tensor<float> q, k, v;
  linattn::TokenGrid grid;

  [[nodiscard]] Index tokens() const { return q.extent(1); }
  [[nodiscard]] Index heads() const { return q.extent(2); }
};

// The two layers that are compared. Each has its own inputs: in a converted model a layer sees what the converted
// layers before it made.
struct Layers {
  std::string name;
  Inputs softmax, ttt;
  TttModule<float> module;
  Image photo;  // what the model saw; empty if nobody knows
  std::vector<Ignored> ignored;
};

// A file that holds `q`, `k`, `v` [tokens, heads, head_dim] and the tensors of one converted attention under their
// names in a checkpoint; both layers then see the same. The grid is the last tokens, at most two (a class token) lie
// before it; height 0: it is a square. Throws std::runtime_error that names the file and the tensor.
[[nodiscard]] Layers read_layer(const std::filesystem::path& file, Index height, Index width);

// One block of a vision transformer and of its conversion, as the picture passes through each at the size that the
// first was made for. Throws std::runtime_error that names the file.
[[nodiscard]] Layers run_models(Runtime& rt, const std::filesystem::path& softmax,
                                const std::filesystem::path& ttt, const std::filesystem::path& picture,
                                Index block);

// (heads, queries, tokens of the grid); queries are tokens of the grid, counted from its first.
using Map = Tensor<float>;
[[nodiscard]] Map softmax_map(Runtime& rt, const Layers& layers, const std::vector<Index>& queries);
[[nodiscard]] Map ttt_map(Runtime& rt, const Layers& layers, const std::vector<Index>& queries);

// |mean k| / mean |k| of each head.
[[nodiscard]] std::vector<float> key_shift_ratios(Runtime& rt, const Inputs& inputs);

}  // namespace attention_map

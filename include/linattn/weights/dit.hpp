// Diffusion transformers (DiT): recognised by their tensors, at any size. Their attention becomes DiT5's: half
// Test-Time Training (Mlp, squared error), half neighborhood attention of 5 x 5.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <linattn/version.hpp>
#include <linattn/weights/conversion.hpp>
#include <linattn/weights/family.hpp>
#include <linattn/weights/file_status.hpp>
#include <linattn/weights/recognise.hpp>
#include <linattn/weights/safetensors.hpp>

LINATTN_BEGIN

// What the shapes of a checkpoint say.
struct DitModel {
  Index depth = 0, width = 0, channels = 0, patch = 0, positions = 0, frequencies = 0, hidden = 0;
  Index labels = 0;   // classes, and the one of no class
  Index outputs = 0;  // of a patch: patch x patch x channels, twice if the variance is learned
};

namespace detail {

// https://arxiv.org/abs/2212.09748, table 1
inline constexpr std::array<KnownSize, 4> dit_sizes{
    {{"S", 384, 12, 6}, {"B", 768, 12, 12}, {"L", 1024, 24, 16}, {"XL", 1152, 28, 16}}};

[[nodiscard]] inline const KnownSize* dit_size(const DitModel& model) {
  return known_size(dit_sizes, model.width, model.depth, model.hidden);
}

inline constexpr std::string_view dit_anchor = "x_embedder.proj.weight";

}  // namespace detail

// "DiT-XL/2" for the sizes that have a name.
[[nodiscard]] inline std::string dit_label(const DitModel& model) {
  const detail::KnownSize* size = detail::dit_size(model);
  if (size != nullptr) return "DiT-" + std::string(size->name) + "/" + std::to_string(model.patch);
  return "DiT of " + std::to_string(model.depth) + " blocks, width " + std::to_string(model.width);
}

// Every tensor that both models have, with its shape; the dtypes are the file's own business.
[[nodiscard]] inline std::vector<TensorSpec> dit_tensors(const DitModel& model) {
  std::vector<TensorSpec> specs;
  const Index width = model.width;
  const auto add = [&](const std::string& tensor, std::vector<Index> shape) {
    specs.push_back({tensor, Dtype::f32, std::move(shape)});
  };
  const auto linear = [&](const std::string& stem, Index out, Index in) {
    add(stem + ".weight", {out, in});
    add(stem + ".bias", {out});
  };
  add("pos_embed", {1, model.positions, width});
  add("x_embedder.proj.weight", {width, model.channels, model.patch, model.patch});
  add("x_embedder.proj.bias", {width});
  linear("t_embedder.mlp.0", width, model.frequencies);
  linear("t_embedder.mlp.2", width, width);
  add("y_embedder.embedding_table.weight", {model.labels, width});
  for (Index i = 0; i < model.depth; ++i) {
    const std::string block = "blocks." + std::to_string(i) + ".";
    linear(block + "attn.qkv", 3 * width, width);
    linear(block + "attn.proj", width, width);
    linear(block + "mlp.fc1", model.hidden, width);
    linear(block + "mlp.fc2", width, model.hidden);
    linear(block + "adaLN_modulation.1", 6 * width, width);
  }
  linear("final_layer.linear", model.outputs, width);
  linear("final_layer.adaLN_modulation.1", 2 * width, width);
  return specs;
}

// The heads of the published models of this size, which no shape tells.
[[nodiscard]] inline std::optional<Index> dit_heads(const DitModel& model) {
  const detail::KnownSize* size = detail::dit_size(model);
  return size != nullptr ? std::optional(size->heads) : std::nullopt;
}

// What the names of a model's tensors begin with in a file: "", "model.", "ema." and the like. One a set is usual.
[[nodiscard]] inline std::vector<std::string> dit_prefixes(const Safetensors& file, WeightSet set) {
  return detail::weight_prefixes(file, detail::dit_anchor, set);
}

[[nodiscard]] inline bool holds_dit(const Safetensors& file) {
  return !dit_prefixes(file, WeightSet::raw).empty() || !dit_prefixes(file, WeightSet::ema).empty();
}

// Takes the sizes of a model whose names begin with `prefix` from the shapes of its tensors.
[[nodiscard]] inline FileStatus recognise_dit(const Safetensors& file, const std::string& prefix,
                                              DitModel& out) {
  DitModel model;
  constexpr Index least = 10;  // tensors of a block
  if (FileStatus status = count_blocks(file, prefix + "blocks.", least, model.depth); !status.ok())
    return status;
  detail::ShapeReader shapes(file, prefix);
  model.width = shapes.extent("x_embedder.proj.weight", 4, 0);
  model.channels = shapes.extent("x_embedder.proj.weight", 4, 1);
  model.patch = shapes.extent("x_embedder.proj.weight", 4, 2);
  model.positions = shapes.extent("pos_embed", 3, 1);
  model.frequencies = shapes.extent("t_embedder.mlp.0.weight", 2, 1);
  model.labels = shapes.extent("y_embedder.embedding_table.weight", 2, 0);
  model.hidden = shapes.extent("blocks.0.mlp.fc1.weight", 2, 0);
  model.outputs = shapes.extent("final_layer.linear.weight", 2, 0);
  if (!shapes.status().ok()) return shapes.status();
  out = model;
  return {};
}

// The rules of inheritance. The paper replaces every attention.
[[nodiscard]] inline FileStatus dit_rules(const Safetensors& file, const FamilyOptions& options,
                                          std::optional<Index> config_heads, ModelRules& out) {
  detail::WeightPrefixes weights;
  if (FileStatus status = detail::choose_weights(file, detail::dit_anchor, options.weights, weights);
      !status.ok())
    return status;
  DitModel model;
  if (FileStatus status = recognise_dit(file, weights.chosen, model); !status.ok()) return status;
  ModelRules rules{.label = dit_label(model),
                   .layout = "official",
                   .depth = model.depth,
                   .module = dit5_module,
                   .options = {"heads", "weights"}};
  if (FileStatus status =
          detail::choose_heads(file, model.width, options.heads, config_heads, dit_heads(model), rules);
      !status.ok())
    return status;
  detail::add_block_attentions(rules);
  for (TensorSpec& spec : dit_tensors(model))
    rules.inherited.push_back(detail::inherit_as_is(std::move(spec)));
  detail::apply_weights(weights, rules);
  out = std::move(rules);
  return {};
}

LINATTN_END

// Vision transformers under the names of timm (ViT, DeiT): recognised by their tensors, at any size. Their
// attention becomes the paper's: T5 (SwiGlu and convolutions), or its two-layer form without convolutions.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <linattn/version.hpp>
#include <linattn/weights/family.hpp>
#include <linattn/weights/file_status.hpp>
#include <linattn/weights/recognise.hpp>
#include <linattn/weights/safetensors.hpp>

LINATTN_BEGIN

// What the shapes of a checkpoint say. The class and the distillation token are not part of it: the converted
// model has neither, its head reads the mean over all tokens.
struct VitModel {
  Index depth = 0, width = 0, channels = 0, patch = 0, grid = 0, hidden = 0;
  Index classes = 0;  // 0: no head
  bool qkv_bias = true;
  Index extra_positions = 0;  // of the class and the distillation token, before the grid x grid others
};

namespace detail {

// Heads of 64 channels, except in ViT-Huge. https://arxiv.org/abs/2010.11929 and https://arxiv.org/abs/2012.12877
inline constexpr std::array<KnownSize, 5> vit_sizes{{{"Tiny", 192, 12, 3},
                                                     {"Small", 384, 12, 6},
                                                     {"Base", 768, 12, 12},
                                                     {"Large", 1024, 24, 16},
                                                     {"Huge", 1280, 32, 16}}};

[[nodiscard]] inline const KnownSize* vit_size(const VitModel& model) {
  return known_size(vit_sizes, model.width, model.depth, model.hidden);
}

inline constexpr std::string_view vit_anchor = "patch_embed.proj.weight";

// The side of a square of n tokens, or 0.
[[nodiscard]] inline Index square_side(Index n) {
  if (n < 1) return 0;
  const auto side = static_cast<Index>(std::llround(std::sqrt(static_cast<double>(n))));
  return side * side == n ? side : 0;
}

}  // namespace detail

// "DeiT-Tiny" for the sizes that have a name; a ViT of the same size has the same shapes.
[[nodiscard]] inline std::string vit_label(const VitModel& model) {
  const detail::KnownSize* size = detail::vit_size(model);
  if (size == nullptr)
    return "ViT of " + std::to_string(model.depth) + " blocks, width " + std::to_string(model.width);
  if (model.patch == 16 && model.width <= 768) return "DeiT-" + std::string(size->name);
  return "ViT-" + std::string(size->name) + "/" + std::to_string(model.patch);
}

// Every tensor that both models have, with its shape in the converted one; the dtypes are the file's own business.
[[nodiscard]] inline std::vector<TensorSpec> vit_tensors(const VitModel& model) {
  std::vector<TensorSpec> specs;
  const Index width = model.width;
  const auto add = [&](const std::string& tensor, std::vector<Index> shape) {
    specs.push_back({tensor, Dtype::f32, std::move(shape)});
  };
  const auto norm = [&](const std::string& stem) {
    add(stem + ".weight", {width});
    add(stem + ".bias", {width});
  };
  const auto linear = [&](const std::string& stem, Index out, Index in, bool bias = true) {
    add(stem + ".weight", {out, in});
    if (bias) add(stem + ".bias", {out});
  };
  add("pos_embed", {1, model.grid * model.grid, width});
  add("patch_embed.proj.weight", {width, model.channels, model.patch, model.patch});
  add("patch_embed.proj.bias", {width});
  for (Index i = 0; i < model.depth; ++i) {
    const std::string block = "blocks." + std::to_string(i) + ".";
    norm(block + "norm1");
    linear(block + "attn.qkv", 3 * width, width, model.qkv_bias);
    linear(block + "attn.proj", width, width);
    norm(block + "norm2");
    linear(block + "mlp.fc1", model.hidden, width);
    linear(block + "mlp.fc2", width, model.hidden);
  }
  norm("norm");
  if (model.classes > 0) linear("head", model.classes, width);
  return specs;
}

// The heads of the published models of this size, which no shape tells.
[[nodiscard]] inline std::optional<Index> vit_heads(const VitModel& model) {
  const detail::KnownSize* size = detail::vit_size(model);
  return size != nullptr ? std::optional(size->heads) : std::nullopt;
}

// What the names of a model's tensors begin with in a file: "", "model.", "ema." and the like. One a set is usual.
[[nodiscard]] inline std::vector<std::string> vit_prefixes(const Safetensors& file, WeightSet set) {
  return detail::weight_prefixes(file, detail::vit_anchor, set);
}

[[nodiscard]] inline bool holds_vit(const Safetensors& file) {
  return !vit_prefixes(file, WeightSet::raw).empty() || !vit_prefixes(file, WeightSet::ema).empty();
}

// Takes the sizes of a model whose names begin with `prefix` from the shapes of its tensors. Positions that are
// no square, with or without those of the tokens that the file has, give the next smaller one.
[[nodiscard]] inline FileStatus recognise_vit(const Safetensors& file, const std::string& prefix,
                                              VitModel& out) {
  VitModel model;
  constexpr Index least = 11;  // tensors of a block, where qkv has no bias
  if (FileStatus status = count_blocks(file, prefix + "blocks.", least, model.depth); !status.ok())
    return status;
  detail::ShapeReader shapes(file, prefix);
  model.width = shapes.extent("patch_embed.proj.weight", 4, 0);
  model.channels = shapes.extent("patch_embed.proj.weight", 4, 1);
  model.patch = shapes.extent("patch_embed.proj.weight", 4, 2);
  model.hidden = shapes.extent("blocks.0.mlp.fc1.weight", 2, 0);
  model.qkv_bias = shapes.has("blocks.0.attn.qkv.bias");
  if (shapes.has("head.weight")) model.classes = shapes.extent("head.weight", 2, 0);

  const Index positions = shapes.extent("pos_embed", 3, 1);
  const Index tokens = (shapes.has("cls_token") ? 1 : 0) + (shapes.has("dist_token") ? 1 : 0);
  model.grid = static_cast<Index>(std::sqrt(static_cast<double>(positions)));
  for (const Index extra : {2, 1, 0})
    if (const Index side = detail::square_side(positions - extra);
        side > 0 && (extra == 0 || tokens == 0 || extra == tokens)) {
      model.grid = side;
      model.extra_positions = extra;
    }
  if (!shapes.status().ok()) return shapes.status();
  out = model;
  return {};
}

// The rules of inheritance. The paper replaces every attention.
[[nodiscard]] inline FileStatus vit_rules(const Safetensors& file, const FamilyOptions& options,
                                          std::optional<Index> config_heads, ModelRules& out) {
  detail::WeightPrefixes weights;
  if (FileStatus status = detail::choose_weights(file, detail::vit_anchor, options.weights, weights);
      !status.ok())
    return status;
  VitModel model;
  if (FileStatus status = recognise_vit(file, weights.chosen, model); !status.ok()) return status;
  ModelRules rules{.label = vit_label(model),
                   .layout = "timm",
                   .depth = model.depth,
                   .options = {"heads", "classes", "weights", "drop-cls"}};
  if (FileStatus status =
          detail::choose_heads(file, model.width, options.heads, config_heads, vit_heads(model), rules);
      !status.ok())
    return status;
  detail::add_block_attentions(rules);

  rules.dropped = {
      {"cls_token", "the converted model has no class token, its head reads the mean of all tokens"},
      {"dist_token", "the converted model has no distillation token"},
      {"head_dist.weight", "the converted model has no distillation token"},
      {"head_dist.bias", "the converted model has no distillation token"}};
  if (options.classes && (*options.classes < 1 || *options.classes > 1 << 24))
    return detail::file_error(file.path(), std::to_string(*options.classes) + " is no number of classes", {},
                              Code::option);
  VitModel target = model;
  if (options.classes && *options.classes != model.classes) {
    const std::string reason = "has " + std::to_string(model.classes) + " classes, " +
                               std::to_string(*options.classes) + " are asked for: the new one is untrained";
    for (const char* tensor : {"head.weight", "head.bias"}) rules.dropped.push_back({tensor, reason});
    const std::string like = model.classes > 0 ? "head.weight" : "blocks.0.attn.qkv.weight";
    rules.created = {
        {{"head.weight", Dtype::f32, {*options.classes, model.width}}, Initialiser::normal, like},
        {{"head.bias", Dtype::f32, {*options.classes}}, Initialiser::zero, like}};
    target.classes = 0;
  } else if (model.classes == 0) {
    return detail::file_error(file.path(), "is missing (--classes N makes a new head)",
                              weights.chosen + "head.weight", Code::shape);
  }
  for (TensorSpec& spec : vit_tensors(target))
    rules.inherited.push_back(detail::inherit_as_is(std::move(spec)));
  const Index extra = model.extra_positions;
  if (extra > 0) {
    TensorRule& positions = rules.inherited.front();
    const std::string first = extra == 1
                                  ? "the first position, which belongs to the class token"
                                  : "the first two positions, which belong to class and distillation token";
    positions.note = options.drop_cls ? "without " + first : "--drop-cls leaves out " + first;
    if (options.drop_cls) positions.given = {1, model.grid * model.grid + extra, model.width};
  } else if (options.drop_cls) {
    rules.notes.emplace_back("positions: none belongs to a class token, none is dropped");
  }
  detail::apply_weights(weights, rules);
  out = std::move(rules);
  return {};
}

LINATTN_END

// The Stable Diffusion 3.5 family (MMDiT-X): recognised by its tensors, at any size, in two layouts.
#pragma once

#include <algorithm>
#include <cmath>
#include <compare>
#include <cstdint>
#include <optional>
#include <set>
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

// Names as Stability AI's files have them (with or without "model.diffusion_model."), or as diffusers does.
enum class Sd35Layout : std::uint8_t { official, diffusers };

// One attention of a block: the image-only one (attn2), or the joint one of text and image (attn).
struct Sd35Module {
  bool dual = false;
  Index block = 0;

  auto operator<=>(const Sd35Module&) const = default;
};

// What the shapes of a checkpoint say.
struct Sd35Model {
  Sd35Layout layout = Sd35Layout::official;
  std::string prefix;  // before every name of the transformer
  Index depth = 0, width = 0, heads = 0, head_dim = 0;
  Index channels = 0, patch = 0, positions = 0, frequencies = 0, pooled = 0, context = 0, hidden = 0,
        outputs = 0;
  bool qk_norm = false;
  std::set<Index> dual_blocks;

  [[nodiscard]] std::vector<Sd35Module> modules() const {
    std::vector<Sd35Module> all;
    for (Index block = 0; block < depth; ++block) all.push_back({false, block});
    for (const Index block : dual_blocks) all.push_back({true, block});
    return all;
  }
};

// Stable Diffusion 3.5 Medium, as published.
[[nodiscard]] inline Sd35Model sd35_medium(std::string prefix = "model.diffusion_model.") {
  return {.layout = Sd35Layout::official,
          .prefix = std::move(prefix),
          .depth = 24,
          .width = 1536,
          .heads = 24,
          .head_dim = 64,
          .channels = 16,
          .patch = 2,
          .positions = 384 * 384,
          .frequencies = 256,
          .pooled = 2048,
          .context = 4096,
          .hidden = 6144,
          .outputs = 64,
          .qk_norm = true,
          .dual_blocks = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}};
}

// The stem of a module's tensors, without prefix.
[[nodiscard]] inline std::string sd35_stem(Sd35Layout layout, Sd35Module module) {
  const std::string block = std::to_string(module.block), attention = module.dual ? "attn2" : "attn";
  return layout == Sd35Layout::official ? "joint_blocks." + block + ".x_block." + attention
                                        : "transformer_blocks." + block + "." + attention;
}

// The tensors that any block has, the last one without norms of queries and keys included; see count_blocks().
[[nodiscard]] constexpr Index sd35_least(Sd35Layout layout) {
  return layout == Sd35Layout::official ? 14 : 22;
}

// "SD3.5 Medium" for the sizes that have a name. Large and Large Turbo have the same shapes.
[[nodiscard]] inline std::string sd35_label(const Sd35Model& model) {
  const bool named = model.head_dim == 64 && model.depth == model.heads && model.context == 4096;
  if (named && model.depth == 24 && model.dual_blocks.size() == 13) return "SD3.5 Medium";
  if (named && model.depth == 38 && model.dual_blocks.empty()) return "SD3.5 Large";
  return "SD3.5 of " + std::to_string(model.depth) + " blocks, width " + std::to_string(model.width);
}

// Every tensor that the transformer must have, with its shape; the dtypes are the file's own business.
[[nodiscard]] inline std::vector<TensorSpec> sd35_tensors(const Sd35Model& model) {
  std::vector<TensorSpec> specs;
  const bool official = model.layout == Sd35Layout::official;
  const Index width = model.width;
  const auto add = [&](const std::string& tensor, std::vector<Index> shape) {
    specs.push_back({model.prefix + tensor, Dtype::f32, std::move(shape)});
  };
  const auto linear = [&](const std::string& stem, Index out, Index in) {
    add(stem + ".weight", {out, in});
    add(stem + ".bias", {out});
  };
  const auto choose = [&](const char* a, const char* b) { return std::string(official ? a : b); };

  add(choose("pos_embed", "pos_embed.pos_embed"), {1, model.positions, width});
  const std::string patches = choose("x_embedder.proj", "pos_embed.proj");
  add(patches + ".weight", {width, model.channels, model.patch, model.patch});
  add(patches + ".bias", {width});
  linear(choose("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"), width, model.frequencies);
  linear(choose("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"), width, width);
  linear(choose("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"), width, model.pooled);
  linear(choose("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"), width, width);
  linear("context_embedder", width, model.context);
  linear(choose("final_layer.adaLN_modulation.1", "norm_out.linear"), 2 * width, width);
  linear(choose("final_layer.linear", "proj_out"), model.outputs, width);

  // Queries, keys and values: one matrix in the official layout, three in diffusers'.
  const auto projections = [&](const std::string& stem, const std::string& packed, const char* q,
                               const char* k, const char* v) {
    if (official) return linear(stem + packed, 3 * width, width);
    for (const char* part : {q, k, v}) linear(stem + part, width, width);
  };
  const auto norms = [&](const std::string& q, const std::string& k) {
    if (!model.qk_norm) return;
    add(q + ".weight", {model.head_dim});
    add(k + ".weight", {model.head_dim});
  };
  for (Index i = 0; i < model.depth; ++i) {
    const bool last = i + 1 == model.depth, dual = model.dual_blocks.contains(i);
    const std::string block = choose("joint_blocks.", "transformer_blocks.") + std::to_string(i);
    const std::string image = block + choose(".x_block.", "."), text = block + choose(".context_block.", ".");

    linear(image + choose("adaLN_modulation.1", "norm1.linear"), (dual ? 9 : 6) * width, width);
    projections(image, "attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v");
    norms(image + choose("attn.ln_q", "attn.norm_q"), image + choose("attn.ln_k", "attn.norm_k"));
    linear(image + choose("attn.proj", "attn.to_out.0"), width, width);
    if (dual) {
      projections(image, "attn2.qkv", "attn2.to_q", "attn2.to_k", "attn2.to_v");
      norms(image + choose("attn2.ln_q", "attn2.norm_q"), image + choose("attn2.ln_k", "attn2.norm_k"));
      linear(image + choose("attn2.proj", "attn2.to_out.0"), width, width);
    }
    linear(image + choose("mlp.fc1", "ff.net.0.proj"), model.hidden, width);
    linear(image + choose("mlp.fc2", "ff.net.2"), width, model.hidden);

    // The last block gives no text: it only reads it.
    linear(text + choose("adaLN_modulation.1", "norm1_context.linear"), (last ? 2 : 6) * width, width);
    projections(text, "attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj");
    norms(text + choose("attn.ln_q", "attn.norm_added_q"), text + choose("attn.ln_k", "attn.norm_added_k"));
    if (last) continue;
    linear(text + choose("attn.proj", "attn.to_add_out"), width, width);
    linear(text + choose("mlp.fc1", "ff_context.net.0.proj"), model.hidden, width);
    linear(text + choose("mlp.fc2", "ff_context.net.2"), width, model.hidden);
  }
  return specs;
}

// Whether a file holds a model of the family, and in which layout below which prefix.
[[nodiscard]] inline bool holds_sd35(const Safetensors& file, Sd35Model& out) {
  for (const Sd35Layout layout : {Sd35Layout::official, Sd35Layout::diffusers}) {
    const bool official = layout == Sd35Layout::official;
    const std::string_view anchor =
        official ? "joint_blocks.0.x_block.attn.qkv.weight" : "transformer_blocks.0.attn.add_q_proj.weight";
    std::optional<std::string> found;
    for (const TensorInfo& info : file.tensors()) {
      if (!info.name.ends_with(anchor)) continue;
      std::string prefix = info.name.substr(0, info.name.size() - anchor.size());
      const std::string plain = without_wrappers(prefix);
      if (official ? plain != "model.diffusion_model." && !plain.empty()
                   : !plain.empty() || file.find(prefix + "pos_embed.pos_embed") == nullptr)
        continue;
      // Of several the one of a file that holds more than the transformer.
      if (!found || without_wrappers(*found).size() < plain.size()) found = std::move(prefix);
    }
    if (!found) continue;
    out.layout = layout;
    out.prefix = *std::move(found);
    return true;
  }
  return false;
}

// Takes the sizes of a model that holds_sd35() from the shapes of its tensors. Whether every other tensor fits
// is for the caller to compare with sd35_tensors().
[[nodiscard]] inline FileStatus recognise_sd35(const Safetensors& file, Sd35Model& out) {
  Sd35Model model;
  if (!holds_sd35(file, model))
    return detail::file_error(file.path(),
                              "is no checkpoint of the Stable Diffusion 3.5 family: it has neither "
                              "joint_blocks nor the transformer_blocks and pos_embed of diffusers");
  const bool official = model.layout == Sd35Layout::official;
  const std::string blocks = model.prefix + (official ? "joint_blocks." : "transformer_blocks.");
  if (FileStatus status = count_blocks(file, blocks, sd35_least(model.layout), model.depth); !status.ok())
    return status;
  for (Index block = 0; block < model.depth; ++block)
    if (file.holds_below(model.prefix + sd35_stem(model.layout, {true, block}) + "."))
      model.dual_blocks.insert(block);

  detail::ShapeReader shapes(file, model.prefix);
  const auto choose = [&](const char* a, const char* b) { return std::string(official ? a : b); };
  const std::string patches = choose("x_embedder.proj.weight", "pos_embed.proj.weight");
  model.width = shapes.extent(patches, 4, 0);
  model.channels = shapes.extent(patches, 4, 1);
  model.patch = shapes.extent(patches, 4, 2);
  model.positions = shapes.extent(choose("pos_embed", "pos_embed.pos_embed"), 3, 1);
  model.frequencies = shapes.extent(
      choose("t_embedder.mlp.0.weight", "time_text_embed.timestep_embedder.linear_1.weight"), 2, 1);
  model.pooled =
      shapes.extent(choose("y_embedder.mlp.0.weight", "time_text_embed.text_embedder.linear_1.weight"), 2, 1);
  model.context = shapes.extent("context_embedder.weight", 2, 1);
  model.outputs = shapes.extent(choose("final_layer.linear.weight", "proj_out.weight"), 2, 0);
  model.hidden = shapes.extent(
      choose("joint_blocks.0.x_block.mlp.fc1.weight", "transformer_blocks.0.ff.net.0.proj.weight"), 2, 0);
  const std::string norm = sd35_stem(model.layout, {false, 0}) + choose(".ln_q.weight", ".norm_q.weight");
  model.qk_norm = shapes.has(norm);
  model.head_dim = model.qk_norm ? shapes.extent(norm, 1, 0) : 64;
  if (!shapes.status().ok()) return shapes.status();
  if (model.width % model.head_dim != 0)
    return detail::file_error(file.path(),
                              "a width of " + std::to_string(model.width) + " is no multiple of the " +
                                  std::to_string(model.head_dim) + " channels of a head",
                              model.prefix + patches, Code::shape);
  model.heads = model.width / model.head_dim;
  out = std::move(model);
  return {};
}

// The rules of inheritance. The paper replaces every attn2, and the joint attention of the last
// max(1, round(5/24 depth)) blocks: 5 in Medium, 8 in Large.
[[nodiscard]] inline ModelRules sd35_rules(const Sd35Model& model) {
  const bool official = model.layout == Sd35Layout::official;
  ModelRules rules{.label = sd35_label(model),
                   .layout = official ? "official" : "diffusers",
                   .depth = model.depth,
                   .heads = model.heads,
                   .head_dim = model.head_dim,
                   .kinds = {"joint", "attn2"},
                   .own = model.prefix};
  const Index joint = std::max<Index>(1, std::lround(5.0 / 24.0 * static_cast<double>(model.depth)));
  for (const Sd35Module module : model.modules()) {
    const std::string stem = model.prefix + sd35_stem(model.layout, module),
                      canonical = sd35_stem(Sd35Layout::official, module),
                      other = sd35_stem(Sd35Layout::diffusers, module);
    rules.attentions.push_back(
        {.kind = module.dual ? "attn2" : "joint",
         .block = module.block,
         .paper = module.dual || module.block >= model.depth - joint,
         .stem = stem,
         .like = stem + (official ? ".qkv.weight" : ".to_q.weight"),
         .aliases = {canonical, "model.diffusion_model." + canonical, other, "transformer." + other}});
  }
  for (TensorSpec& spec : sd35_tensors(model))
    rules.inherited.push_back(detail::inherit_as_is(std::move(spec)));
  // The moving average of the softmax transformer, the discriminator of the VAE.
  for (const char* remains : {"model_ema.", "loss."})
    rules.dropped.push_back({remains, "left from training"});
  if (official && !without_wrappers(model.prefix).empty())
    rules.beside = {""};
  else if (official)
    rules.beside = {"first_stage_model.", "vae.", "text_encoders.", "conditioner.", "denoiser."};
  return rules;
}

LINATTN_END

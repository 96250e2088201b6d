// Small SD3.5 checkpoints for the tests of inheritance.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include <linattn/weights/json.hpp>
#include <linattn/weights/sd35.hpp>

#include "checkpoint_builder.hpp"
#include "temporary_folder.hpp"

namespace support {

using linattn::Sd35Layout;
using linattn::Sd35Model;

// A model of the family's structure: 5 blocks of 2 heads of 4 channels, attn2 in the first two.
[[nodiscard]] inline Sd35Model tiny(Sd35Layout layout, const char* prefix = "") {
  return {.layout = layout,
          .prefix = prefix,
          .depth = 5,
          .width = 8,
          .heads = 2,
          .head_dim = 4,
          .channels = 3,
          .patch = 2,
          .positions = 16,
          .frequencies = 6,
          .pooled = 5,
          .context = 7,
          .hidden = 9,
          .outputs = 12,
          .qk_norm = true,
          .dual_blocks = {0, 1}};
}

[[nodiscard]] inline CheckpointBuilder official(const char* prefix = "model.diffusion_model.") {
  CheckpointBuilder builder(sd35_tensors(tiny(Sd35Layout::official, prefix)));
  builder.set_dtype(Dtype::f16);
  return builder;
}

// A pipeline folder: a transformer in two shards, other components, and things that are no part of a model.
inline void write_folder(const std::filesystem::path& root) {
  std::vector<TensorSpec> specs = sd35_tensors(tiny(Sd35Layout::diffusers));
  for (TensorSpec& spec : specs) spec.dtype = Dtype::bf16;
  std::filesystem::create_directories(root / "transformer");
  std::filesystem::create_directories(root / "vae/nested");
  std::filesystem::create_directories(root / ".cache");
  const auto half_way = specs.begin() + static_cast<Index>(specs.size() / 2);
  CheckpointBuilder({specs.begin(), half_way})
      .write(root / "transformer/part-1.safetensors", {{"format", "pt"}});
  CheckpointBuilder({half_way, specs.end()})
      .write(root / "transformer/part-2.safetensors", {{"format", "pt"}});
  nlohmann::json index{{"metadata", {{"total_size", 0}, {"note", "kept"}}}};
  for (auto spec = specs.begin(); spec != specs.end(); ++spec)
    index["weight_map"][spec->name] = spec < half_way ? "part-1.safetensors" : "part-2.safetensors";
  write_text(root / "transformer/diffusion_pytorch_model.safetensors.index.json", index.dump());
  write_text(root / "transformer/config.json", R"({"zz_first": 1, "_class_name": "SD3Transformer2DModel"})");
  write_text(root / "transformer/diffusion_pytorch_model.fp16.safetensors",
             "other weights of the same model");
  write_text(root / "model_index.json", R"({"_class_name": "StableDiffusion3Pipeline"})");
  write_text(root / "vae/diffusion_pytorch_model.safetensors", std::string(100'000, 'v'));
  write_text(root / "vae/nested/empty", "");
  write_text(root / ".cache/secret", "no part of the model");
  write_text(root / "sd3.5_medium.safetensors", "the same model, unconverted");
}

}  // namespace support

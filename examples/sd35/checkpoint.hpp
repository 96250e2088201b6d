// The tensors of one component of SD3.5, under one set of names whatever file they come from.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

#include "nn/checkpoint.hpp"
#include "nn/leftovers.hpp"

namespace sd35 {

using namespace nn;  // what the examples share

enum class Component : std::uint8_t { transformer, vae, clip_l, clip_g, t5 };

// "CLIP-L text encoder"
[[nodiscard]] std::string_view name(Component component);

// Names are those of the official single file, without their prefix (transformer `joint_blocks.0...`,
// VAE `decoder.up.0...`, CLIP `text_model...`, T5 `encoder.block.0...`); a diffusers folder is mapped onto
// them. Two things differ from the files, so that both layouts read alike:
// - q, k and v are tensors of their own: `x_block.attn.q.weight` is the first third of the fused
//   `x_block.attn.qkv.weight`, or diffusers' `attn.to_q.weight`;
// - modulations have the official order of chunks: diffusers' `norm_out` and the last `norm1_context`, which
//   hold (scale, shift), come as (shift, scale).
class Checkpoint : public nn::Checkpoint {
 public:
  // A safetensors file, an index of shards, a folder that holds one of them, or a diffusers directory, of
  // which the folder of this component is taken. A file may hold other components beside this one.
  [[nodiscard]] static Checkpoint open(const std::filesystem::path& path, Component component);
  // Nothing where the file or the directory does not hold this component; other failures throw.
  [[nodiscard]] static std::optional<Checkpoint> open_if_present(const std::filesystem::path& path,
                                                                 Component component);

  // Beside "text_encoders.clip_l.transformer." lies what belongs to the same encoder. A file without prefixes is the
  // component's but for what has the prefix of another.
  [[nodiscard]] std::optional<std::string_view> own_name(std::string_view stored) const override;
  [[nodiscard]] Component component() const { return component_; }

  // The names are diffusers'.
  [[nodiscard]] bool diffusers() const { return diffusers_; }

 private:
  Checkpoint() = default;
  // The name of q, k or v of a fused tensor is that of the tensor.
  [[nodiscard]] std::string stored_name(std::string_view tensor) const override;
  [[nodiscard]] Weight adapt(std::string_view tensor, Weight weight) const override;
  [[nodiscard]] bool swapped_halves(std::string_view tensor) const;

  Component component_ = Component::transformer;
  bool diffusers_ = false;
  Index vae_levels_ = 0;
  bool vae_old_attention_ = false;
};

// What lies beside the tensors that the models of this component have loaded, and changes nothing; `encodes` says
// whether the encoder of a VAE is among them. With the transformer come the tensors of its file that belong to no
// component. Throws std::runtime_error that names a tensor which would change what is computed.
[[nodiscard]] std::vector<Ignored> leftovers(const Checkpoint& checkpoint, bool encodes = false);

}  // namespace sd35

// The tensors of one component of SD3.5, under one set of names whatever file they come from.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <linattn/weights/safetensors.hpp>
#include <nlohmann/json.hpp>

#include "weight.hpp"

namespace sd35 {

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
// Tensors stay mapped in the file's type. One that is misaligned for its type is copied. Failures throw
// std::runtime_error with one sentence that names the file and the tensor.
class Checkpoint {
 public:
  // A safetensors file, an index of shards, a folder that holds one of them, or a diffusers directory, of
  // which the folder of this component is taken. A file may hold other components beside this one.
  [[nodiscard]] static Checkpoint open(const std::filesystem::path& path, Component component);
  // Nothing where the file or the directory does not hold this component; other failures throw.
  [[nodiscard]] static std::optional<Checkpoint> open_if_present(const std::filesystem::path& path,
                                                                 Component component);

  // An axis that may have any extent.
  static constexpr Index any = -1;

  [[nodiscard]] bool has(std::string_view tensor) const;
  // Throws if the tensor is missing, has another shape, or a type that is no weight (F8, integers).
  [[nodiscard]] Weight get(std::string_view tensor, const std::vector<Index>& shape) const;
  // A matrix [out, in]; a 1x1 convolution [out, in, 1, 1] is one.
  [[nodiscard]] Weight matrix(std::string_view tensor, Index out, Index in) const;
  template <class T>
  [[nodiscard]] std::vector<T> vector(std::string_view tensor, Index extent) const {
    return widen<T>(get(tensor, {extent}));
  }
  // `module.weight` [out, in] and `module.bias` [out].
  template <class T>
  [[nodiscard]] LinearWeights<T> linear(const std::string& module, Index out, Index in) const {
    LinearWeights<T> weights = linear_without_bias<T>(module, out, in);
    weights.bias = vector<T>(module + ".bias", weights.out());
    return weights;
  }
  template <class T>
  [[nodiscard]] LinearWeights<T> linear_without_bias(const std::string& module, Index out, Index in) const {
    return {matrix(module + ".weight", out, in), {}};
  }

  // Called with the file's own name of each tensor that is loaded, to account for those that nobody wants.
  std::function<void(const std::string& tensor)> on_load;

  // Tensors as the file names them, without the prefix of the component.
  [[nodiscard]] std::vector<std::string> stored_names() const;
  // The names are diffusers'.
  [[nodiscard]] bool diffusers() const { return diffusers_; }
  // config.json of the component's folder; null for a single file.
  [[nodiscard]] const nlohmann::json& config() const { return config_; }
  // An integer, a number or a string of config.json, or what to take where it does not say.
  template <class V>
  [[nodiscard]] V config_value(const char* key, V otherwise) const {
    if (!config_.is_object() || !config_.contains(key) || config_[key].is_null()) return otherwise;
    const nlohmann::json& value = config_[key];
    if constexpr (std::is_same_v<V, std::string>) {
      if (!value.is_string()) throw_config(key, "a string");
    } else if constexpr (std::is_floating_point_v<V>) {
      if (!value.is_number()) throw_config(key, "a number");
    } else {
      if (!value.is_number_integer()) throw_config(key, "an integer");
    }
    return value.get<V>();
  }
  [[nodiscard]] const linattn::Metadata& metadata() const { return files_->metadata(); }
  [[nodiscard]] const linattn::Safetensors& files() const { return *files_; }
  // The name in the file, prefix and all, of a canonical name.
  [[nodiscard]] std::string full_name(std::string_view tensor) const { return prefix_ + stored_name(tensor); }
  [[nodiscard]] const std::filesystem::path& path() const { return files_->path(); }

 private:
  Checkpoint() = default;
  // The name in the file, without prefix, of a canonical name; of q, k or v of a fused tensor that tensor.
  [[nodiscard]] std::string stored_name(std::string_view tensor) const;
  [[nodiscard]] const linattn::TensorInfo* info(std::string_view tensor) const;
  [[nodiscard]] Weight load(std::string_view tensor, const std::vector<Index>& expected) const;
  [[nodiscard]] bool swapped_halves(std::string_view tensor) const;
  [[noreturn]] void fail(std::string_view tensor, const std::string& why) const;
  [[noreturn]] void throw_config(const char* key, const char* expected) const;

  std::shared_ptr<const linattn::Safetensors> files_;
  Component component_ = Component::transformer;
  std::string prefix_;
  bool diffusers_ = false;
  Index vae_levels_ = 0;
  nlohmann::json config_;
};

}  // namespace sd35

// The tensors of a model file by their names, as the examples load them.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include <linattn/weights/safetensors.hpp>
#include <nlohmann/json.hpp>

#include "numbers.hpp"
#include "weight.hpp"

namespace nn {

// Tensors stay mapped in the file's type; one that is misaligned for its type is copied. Failures throw
// std::runtime_error with one sentence that names the file and the tensor. A model whose files come in several
// layouts derives from this and says what a name is in its files.
class Checkpoint {
 public:
  // A safetensors file, an index of shards, or a folder that holds one of them. Names are those of the file
  // behind `prefix`.
  [[nodiscard]] static Checkpoint open(const std::filesystem::path& path, const std::string& prefix = {});
  virtual ~Checkpoint() = default;
  Checkpoint(const Checkpoint&) = default;
  Checkpoint(Checkpoint&&) = default;
  Checkpoint& operator=(const Checkpoint&) = default;
  Checkpoint& operator=(Checkpoint&&) = default;

  // An axis that may have any extent.
  static constexpr Index any = -1;

  [[nodiscard]] bool has(std::string_view tensor) const { return info(tensor) != nullptr; }
  // Throws if the tensor is missing, has another shape, or a type that is no weight (integers, F8 but where the
  // model takes it). An F8_E4M3 tensor `x.weight` comes with the scale of `x.scale_weight`, where that is there.
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

  // Called with the file's own name of each tensor that is loaded.
  std::function<void(const std::string& tensor)> on_load;
  // Whether the file's tensor of this name was loaded from this checkpoint or a copy of it.
  [[nodiscard]] bool has_loaded(const std::string& stored) const { return loaded_->contains(stored); }
  // The name below the prefix of a tensor of the file; nothing where the tensor belongs to other parts of it.
  [[nodiscard]] virtual std::optional<std::string_view> own_name(std::string_view stored) const {
    if (!stored.starts_with(prefix_)) return std::nullopt;
    return stored.substr(prefix_.size());
  }

  // Tensors as the file names them, without the prefix.
  [[nodiscard]] std::vector<std::string> stored_names() const;
  // config.json beside the tensors; null where there is none.
  [[nodiscard]] const nlohmann::json& config() const { return config_; }
  // A number or a string of config.json, or nothing where it does not say (or says null). Throws where it says what
  // is none, or lies outside the range.
  template <Number T>
  [[nodiscard]] std::optional<T> config_number(const char* key, const Range<T>& range) const {
    const nlohmann::json* const value = config_entry(key);
    if (value == nullptr) return std::nullopt;
    const std::optional<T> number = json_number(*value, range);
    if (!number) fail_config(key, "expected " + describe(range));
    return number;
  }
  [[nodiscard]] std::optional<std::string> config_text(const char* key) const;
  // A size that the tensors tell. Throws where config.json says another.
  Index confirmed(const char* key, Index size) const;
  // Throws "config.json: 'key' is what it is, ...".
  [[noreturn]] void fail_config(const char* key, const std::string& expected) const;
  // The heads of the attentions, where config.json tells them: no tensor of a softmax model does.
  [[nodiscard]] std::optional<Index> config_heads() const;
  [[nodiscard]] const linattn::Metadata& metadata() const { return files_->metadata(); }
  [[nodiscard]] const linattn::Safetensors& files() const { return *files_; }
  // The name in the file, prefix and all, of a canonical name.
  [[nodiscard]] std::string full_name(std::string_view tensor) const { return prefix_ + stored_name(tensor); }
  [[nodiscard]] const std::filesystem::path& path() const { return files_->path(); }

 protected:
  Checkpoint() = default;

  // The name in the file, without the prefix.
  [[nodiscard]] virtual std::string stored_name(std::string_view tensor) const { return std::string(tensor); }
  // What a tensor of the file becomes under the name that was asked for.
  [[nodiscard]] virtual Weight adapt(std::string_view, Weight weight) const { return weight; }

  [[nodiscard]] const linattn::TensorInfo* info(std::string_view tensor) const {
    return files_->find(full_name(tensor));
  }
  [[noreturn]] void fail(std::string_view tensor, const std::string& why) const;

  std::shared_ptr<const linattn::Safetensors> files_;
  std::string prefix_;
  nlohmann::json config_;
  bool takes_f8_ = false;  // whether the model's layers take F8_E4M3 weights and their scales

 private:
  void note_load(const std::string& stored) const;
  [[nodiscard]] Weight load(std::string_view tensor, const std::vector<Index>& expected) const;
  [[nodiscard]] float scale_of(const linattn::TensorInfo& weight) const;
  [[nodiscard]] const nlohmann::json* config_entry(const char* key) const;  // null: it does not say

  std::shared_ptr<std::set<std::string>> loaded_ = std::make_shared<std::set<std::string>>();
};

// The config.json of a folder; null where there is none.
[[nodiscard]] nlohmann::json read_config(const std::filesystem::path& folder);

// The weights of a file, an index or a folder. What a user should know of their choice is a line on stderr, once.
[[nodiscard]] std::shared_ptr<const linattn::Safetensors> open_weights(const std::filesystem::path& path);

// Whether a path is a model rather than a picture: a folder, a file with the content of a model, or with its name.
[[nodiscard]] bool is_model(const std::filesystem::path& path);

// Takes the pages of a mapped weight out of this process until they are touched again; they may stay in the
// system's cache. For weights that a model reads once in a long while.
void release(const Weight& weight);

// The same weight in memory of its own, its halves swapped or not.
[[nodiscard]] Weight copy(const Weight& weight, bool swap_halves = false);

}  // namespace nn

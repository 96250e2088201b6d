// What the rules of a model family say of one checkpoint, as data: sd35.hpp, vit.hpp and dit.hpp fill it in, and
// the plan of a conversion (inherit_plan.hpp) follows it without knowing a family.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <linattn/version.hpp>
#include <linattn/weights/conversion.hpp>
#include <linattn/weights/safetensors.hpp>

LINATTN_BEGIN

// Which weights of a training checkpoint: those of the optimizer's last step, or their moving average.
enum class WeightSet : std::uint8_t { raw, ema };

// What a family may want to be told beyond the file. What a family does not have must not be asked of it.
struct FamilyOptions {
  // Of every attention, where the file does not tell.
  std::optional<Index> heads = std::nullopt;
  // A head of another size is dropped, and new.
  std::optional<Index> classes = std::nullopt;
  // Of a file with both sets. Default: raw, as the loaders of the paper's code.
  std::optional<WeightSet> weights = std::nullopt;
  // The positions of class and distillation token are left out.
  bool drop_cls = false;
};

// How the values of a new tensor come about.
enum class Initialiser : std::uint8_t { none, normal, uniform, zero, one, file };

[[nodiscard]] constexpr std::string_view name(Initialiser initialiser) {
  constexpr std::array<std::string_view, 6> names{
      "none", "normal(0, 0.02)", "uniform(-1/3, 1/3)", "zero", "one", "file"};
  return names[static_cast<std::size_t>(initialiser)];
}

// An attention that can be replaced.
struct AttentionRule {
  std::string kind;  // one of ModelRules::kinds
  Index block = 0;
  bool paper = true;                 // whether the paper replaces it
  std::string stem;                  // of its tensors in the target
  std::string like;                  // the tensor of the source whose dtype and shard its new ones take
  std::vector<std::string> aliases;  // stems that a file of new weights may use; the seeds go by the first
};

// A tensor of the target that is inherited. The dtype is the file's own.
struct TensorRule {
  TensorSpec target;
  std::string source;
  std::vector<Index> given{};  // shape of the source where it has positions in front that the target lacks
  std::string note{};          // why it is re-laid out, or what can be done about another shape
};

// A tensor of the target that is new, but belongs to no attention.
struct NewTensorRule {
  TensorSpec target;
  Initialiser initialiser = Initialiser::normal;
  std::string like;  // as of AttentionRule
};

// A tensor of the source, or all below a prefix (which ends in a dot), that the target has no use for.
struct DropRule {
  std::string name, reason;

  [[nodiscard]] bool is_prefix() const { return name.ends_with('.'); }
};

// All that a plan needs to know of a model.
struct ModelRules {
  std::string label{}, layout{};     // "SD3.5 Medium", "official"
  std::vector<std::string> notes{};  // choices that the report must not keep to itself
  Index depth = 0, heads = 0, head_dim = 0;
  bool tells_heads = true;    // whether the tensors of the softmax model tell them
  ModuleConversion module{};  // what an attention becomes

  std::vector<std::string> kinds{};         // of attention, as a choice of modules calls them
  std::vector<AttentionRule> attentions{};  // kind by kind, block by block
  std::vector<TensorRule> inherited{};      // all of them must be there
  std::vector<NewTensorRule> created{};
  std::vector<DropRule> dropped{};
  std::vector<std::string_view> options{};  // the FamilyOptions that mean something here

  // What the names of the model's tensors begin with in the source, and those of other parts of the file, which
  // are kept as they are.
  std::string own{};
  std::vector<std::string> beside{};
};

// The FamilyOptions that were given.
[[nodiscard]] inline std::vector<std::string_view> asked_for(const FamilyOptions& options) {
  std::vector<std::string_view> names;
  if (options.heads) names.emplace_back("heads");
  if (options.classes) names.emplace_back("classes");
  if (options.weights) names.emplace_back("weights");
  if (options.drop_cls) names.emplace_back("drop-cls");
  return names;
}

LINATTN_END

// What the families share in recognising a checkpoint: sizes from shapes, block numbers, sets of weights, heads.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <linattn/version.hpp>
#include <linattn/weights/family.hpp>
#include <linattn/weights/file_status.hpp>
#include <linattn/weights/safetensors.hpp>

LINATTN_BEGIN

// A name without the parts that torch.compile ("_orig_mod.") and DistributedDataParallel ("module.") put into it, in any
// order and number.
[[nodiscard]] inline std::string without_wrappers(std::string_view name) {
  std::string plain;
  while (!name.empty()) {
    const std::string_view part = name.substr(0, std::min(name.find('.'), name.size() - 1) + 1);
    if (part != "module." && part != "_orig_mod.") plain += part;
    name.remove_prefix(part.size());
  }
  return plain;
}

// Wrappers are looked for before the blocks of a model. torch.compile of a block, or of a part of one, puts its own behind the
// block's number, and nothing would be found.
[[nodiscard]] inline FileStatus check_wrappers(const Safetensors& file) {
  for (const TensorInfo& info : file.tensors()) {
    const std::string_view name = info.name, outside = name.substr(0, name.rfind("._orig_mod."));
    if (outside.size() == name.size()) continue;
    for (std::size_t dot = outside.find('.'); dot < outside.size(); dot = outside.find('.', dot + 1))
      if (dot + 1 < outside.size() && outside[dot + 1] >= '0' && outside[dot + 1] <= '9')
        return detail::file_error(
            file.path(),
            "is in a part of a block that torch.compile wrapped: such tensors are known by "
            "their names without '_orig_mod.'",
            name);
  }
  return {};
}

// The number of heads of a ViT or DiT, and who says so.
struct Heads {
  Index count = 0;
  std::string_view from;
};

// No shape of a softmax attention tells its heads. In this order: what is asked for; what the converted modules of
// the file have; what its config.json says; what the published model of this size has; heads of 64 channels.
[[nodiscard]] inline FileStatus find_heads(const Safetensors& file, Index width, std::optional<Index> asked,
                                           std::optional<Index> config, std::optional<Index> known,
                                           Heads& out) {
  std::optional<Index> converted;
  for (const TensorInfo& info : file.tensors())
    if (info.name.ends_with(".attn.w1") && info.shape.size() == 4) converted = info.shape[1];
  if (asked)
    out = {*asked, "as asked for"};
  else if (converted)
    out = {*converted, "as its converted modules have"};
  else if (config)
    out = {*config, "as config.json says"};
  else if (known)
    out = {*known, "as models of this size have"};
  else if (width % 64 == 0)
    out = {width / 64, "a guess: 64 channels each"};
  else
    return detail::file_error(file.path(),
                              "tells no heads: a width of " + std::to_string(width) +
                                  " is no multiple of 64, so their number must be given (heads)",
                              {}, Code::option);
  if (out.count < 1 || width % out.count != 0)
    return detail::file_error(
        file.path(),
        "a width of " + std::to_string(width) + " cannot be cut into " + std::to_string(out.count) + " heads",
        {}, Code::option);
  return {};
}

namespace detail {

// Takes sizes from the shapes of tensors. After the first error, which it keeps, every size is 1.
class ShapeReader {
 public:
  ShapeReader(const Safetensors& file, std::string prefix) : file_(file), prefix_(std::move(prefix)) {}

  [[nodiscard]] bool has(const std::string& tensor) const { return file_.find(prefix_ + tensor) != nullptr; }
  [[nodiscard]] Index extent(const std::string& tensor, std::size_t rank, std::size_t axis) {
    const TensorInfo* info = file_.find(prefix_ + tensor);
    if (!status_.ok()) return 1;
    if (info == nullptr)
      status_ = file_error(file_.path(), "is missing", prefix_ + tensor);
    else if (info->shape.size() != rank)
      status_ = file_error(file_.path(),
                           "is " + describe(*info) + ", but " + std::to_string(rank) + " axes are needed",
                           info->name, Code::shape);
    else if (info->shape[axis] < 1 || info->shape[axis] > 1 << 28)
      status_ = file_error(file_.path(), "is " + describe(*info) + ", which is no size of this family",
                           info->name, Code::shape);
    else
      return info->shape[axis];
    return 1;
  }
  [[nodiscard]] const FileStatus& status() const { return status_; }

 private:
  const Safetensors& file_;
  std::string prefix_;
  FileStatus status_;
};

// The number that a name has behind `blocks` ("blocks."), up to the next dot, or nothing.
[[nodiscard]] inline std::optional<Index> block_number(std::string_view tensor, std::string_view blocks) {
  const std::string_view rest = tensor.substr(blocks.size()), digits = rest.substr(0, rest.find('.'));
  Index block = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), block);
  if (error != std::errc() || end != digits.data() + digits.size() || digits.size() == rest.size() ||
      digits[0] == '-' || (digits[0] == '0' && digits.size() > 1))
    return std::nullopt;
  return block;
}

}  // namespace detail

// Counts the blocks whose tensors lie below `blocks`. All that follows grows with their number, which a name alone can
// make large: the numbers must run from 0 without a gap, and half of the `least` tensors that a block of the family
// has must be there on average.
[[nodiscard]] inline FileStatus count_blocks(const Safetensors& file, std::string_view blocks, Index least,
                                             Index& depth) {
  const TensorInfo* highest = nullptr;
  Index tensors = 0, last = -1;
  std::vector<bool> there(file.tensors().size());
  for (const TensorInfo& info : file.tensors()) {
    if (!info.name.starts_with(blocks)) continue;
    const std::optional<Index> block = detail::block_number(info.name, blocks);
    if (!block) return detail::file_error(file.path(), "has no block number", info.name);
    if (*block > last) {
      last = *block;
      highest = &info;
    }
    if (*block < static_cast<Index>(there.size())) there[static_cast<std::size_t>(*block)] = true;
    ++tensors;
  }
  const Index gap = std::find(there.begin(), there.end(), false) - there.begin();
  if (gap < last)
    return detail::file_error(
        file.path(),
        "is of block " + std::to_string(last) + ", but no tensor is of block " + std::to_string(gap),
        highest->name);
  depth = last + 1;
  if (2 * tensors < least * depth)
    return detail::file_error(file.path(), "holds " + std::to_string(tensors) + " tensors in " +
                                               std::to_string(depth) + " blocks, but a block has at least " +
                                               std::to_string(least));
  return {};
}

namespace detail {

// A tensor that the target has as the source does.
[[nodiscard]] inline TensorRule inherit_as_is(TensorSpec spec) {
  std::string source = spec.name;
  return {.target = std::move(spec), .source = std::move(source)};
}

// The attentions of ViT and DiT: one a block, all of which the paper replaces.
inline void add_block_attentions(ModelRules& rules) {
  rules.kinds = {"attn"};
  for (Index i = 0; i < rules.depth; ++i) {
    const std::string stem = "blocks." + std::to_string(i) + ".attn";
    rules.attentions.push_back({.kind = "attn",
                                .block = i,
                                .stem = stem,
                                .like = stem + ".qkv.weight",
                                .aliases = {stem, "module." + stem, "model." + stem}});
  }
}

// A published size of a family. The shapes of a checkpoint do not tell its heads.
struct KnownSize {
  std::string_view name;
  Index width, depth, heads;
};

template <class Sizes>
[[nodiscard]] const KnownSize* known_size(const Sizes& sizes, Index width, Index depth, Index hidden) {
  for (const KnownSize& size : sizes)
    if (size.width == width && size.depth == depth && hidden == 4 * width) return &size;
  return nullptr;
}

// The prefix below which the weights of a training checkpoint lie, and what of the other set there is.
struct WeightPrefixes {
  std::string chosen;
  std::optional<std::string> other;
  WeightSet set = WeightSet::raw;
};

// Whether a prefix is one that training code gives to a model's tensors, and to which set.
[[nodiscard]] inline std::optional<WeightSet> weight_set(std::string_view wrapped) {
  WeightSet set = WeightSet::raw;
  const std::string plain = without_wrappers(wrapped);
  std::string_view prefix = plain;
  while (!prefix.empty()) {
    const std::size_t dot = prefix.find('.');
    if (dot == std::string_view::npos) return std::nullopt;
    const std::string_view part = prefix.substr(0, dot);
    prefix.remove_prefix(dot + 1);
    if (part == "ema" || part == "model_ema" || part == "state_dict_ema")
      set = WeightSet::ema;
    else if (part != "model" && part != "state_dict" && part != "model_state_dict")
      return std::nullopt;
  }
  return set;
}

// The prefixes below which a set lies: those of a tensor that every model of the family has once, where blocks of
// attention are beside it.
[[nodiscard]] inline std::vector<std::string> weight_prefixes(const Safetensors& file,
                                                              std::string_view anchor, WeightSet set) {
  std::vector<std::string> prefixes;
  for (const TensorInfo& info : file.tensors()) {
    if (!info.name.ends_with(anchor)) continue;
    std::string prefix = info.name.substr(0, info.name.size() - anchor.size());
    if (weight_set(prefix) == set && file.find(prefix + "blocks.0.attn.qkv.weight") != nullptr)
      prefixes.push_back(std::move(prefix));
  }
  return prefixes;
}

// Chooses between the sets. Default: raw, as the loaders of the paper's code do; EMA where there is nothing else.
[[nodiscard]] inline FileStatus choose_weights(const Safetensors& file, std::string_view anchor,
                                               std::optional<WeightSet> asked, WeightPrefixes& out) {
  const auto raw = weight_prefixes(file, anchor, WeightSet::raw),
             ema = weight_prefixes(file, anchor, WeightSet::ema);
  if (raw.empty() && ema.empty()) return file_error(file.path(), "is missing", anchor);
  for (const auto* set : {&raw, &ema})
    if (set->size() > 1)
      return file_error(
          file.path(),
          "is there twice: under '" + printable((*set)[0]) + "' and '" + printable((*set)[1]) + "'", anchor);
  out.set = asked.value_or(raw.empty() ? WeightSet::ema : WeightSet::raw);
  const auto &chosen = out.set == WeightSet::raw ? raw : ema, &other = out.set == WeightSet::raw ? ema : raw;
  if (chosen.empty())
    return file_error(file.path(),
                      out.set == WeightSet::raw ? "holds no raw weights, only their EMA"
                                                : "holds no EMA weights, only raw ones",
                      {}, Code::option);
  out.chosen = chosen[0];
  if (!other.empty()) out.other = other[0];
  return {};
}

// What the choice means for the rules, whose inherited and dropped tensors are plain names so far: the source
// has them below the prefix, and the other set is dropped.
inline void apply_weights(const WeightPrefixes& weights, ModelRules& rules) {
  const bool raw = weights.set == WeightSet::raw;
  const std::string reason = raw ? "EMA weights, the raw ones are taken" : "raw weights, their EMA is taken";
  std::vector<DropRule> others;
  if (weights.other && weights.other->empty()) {
    for (const TensorRule& rule : rules.inherited) others.push_back({rule.source, reason});
    for (const DropRule& rule : rules.dropped) others.push_back({rule.name, reason});
  } else if (weights.other) {
    others.push_back({*weights.other, reason});
  }
  for (TensorRule& rule : rules.inherited) rule.source.insert(0, weights.chosen);
  for (DropRule& rule : rules.dropped) rule.name.insert(0, weights.chosen);
  for (AttentionRule& rule : rules.attentions) rule.like.insert(0, weights.chosen);
  for (NewTensorRule& rule : rules.created) rule.like.insert(0, weights.chosen);
  rules.dropped.insert(rules.dropped.end(), others.begin(), others.end());
  for (const char* remains : {"optimizer.", "opt.", "scheduler.", "lr_scheduler.", "scaler.", "args.",
                              "epoch", "step", "train_steps"})
    rules.dropped.push_back({remains, "left from training"});
  rules.own = weights.chosen;
  if (weights.other)
    rules.notes.push_back(raw ? "weights: raw, not their EMA" : "weights: EMA, not the raw ones");
  else if (!raw)
    rules.notes.emplace_back("weights: EMA, there are no others");
}

// The heads of a family whose shapes do not tell them, as rules that the report explains.
[[nodiscard]] inline FileStatus choose_heads(const Safetensors& file, Index width, std::optional<Index> asked,
                                             std::optional<Index> config, std::optional<Index> known,
                                             ModelRules& rules) {
  Heads heads;
  if (FileStatus status = find_heads(file, width, asked, config, known, heads); !status.ok()) return status;
  rules.heads = heads.count;
  rules.head_dim = width / heads.count;
  rules.tells_heads = false;
  rules.notes.push_back("heads: " + std::to_string(heads.count) + ", " + std::string(heads.from));
  return {};
}

}  // namespace detail

LINATTN_END

// The plan of a conversion: what becomes of every tensor, as data, complete before a byte is written.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include <linattn/version.hpp>
#include <linattn/weights/conversion.hpp>
#include <linattn/weights/dit.hpp>
#include <linattn/weights/family.hpp>
#include <linattn/weights/file_status.hpp>
#include <linattn/weights/json.hpp>
#include <linattn/weights/mapped_file.hpp>
#include <linattn/weights/model_files.hpp>
#include <linattn/weights/random.hpp>
#include <linattn/weights/recognise.hpp>
#include <linattn/weights/safetensors.hpp>
#include <linattn/weights/sd35.hpp>
#include <linattn/weights/small_file.hpp>
#include <linattn/weights/vit.hpp>

LINATTN_BEGIN

// ---- what is converted ----

// An opened model: a single file, or a folder.
struct Checkpoint {
  Safetensors weights;
  std::filesystem::path root;         // what the caller named
  std::filesystem::path transformer;  // the folder of the transformer; empty for a single file

  [[nodiscard]] bool folder() const { return !transformer.empty(); }
  [[nodiscard]] std::filesystem::path config() const {
    return folder() ? transformer / "config.json" : std::filesystem::path();
  }
};

// Opens a single file, a diffusers pipeline (a folder with transformer/), or a model by itself (a folder with
// config.json and weights).
[[nodiscard]] inline FileStatus open_checkpoint(const std::filesystem::path& path, Checkpoint& out) {
  std::error_code error;
  Checkpoint made;
  made.root = path.has_filename() ? path : path.parent_path();  // "folder/"
  if (std::filesystem::is_directory(path, error)) {
    made.transformer = made.root / "transformer";
    if (!std::filesystem::is_directory(made.transformer, error)) made.transformer = made.root;
    if (!std::filesystem::exists(made.config(), error))
      return detail::file_error(path, "is no model folder: there is no " + made.config().string());
  }
  const auto& weights = made.folder() ? made.transformer : path;
  if (FileStatus status = Safetensors::open(weights, made.weights); !status.ok()) return status;
  if (FileStatus status = check_wrappers(made.weights); !status.ok()) return status;
  if (!made.folder() && made.weights.sharded())
    return detail::file_error(path, "is an index: name the folder of the model instead", {}, Code::option);
  out = std::move(made);
  return {};
}

// ---- the plan ----

enum class Initialisation : std::uint8_t { zero_conv, official, file };

struct InheritOptions {
  std::string replace = "paper";  // see select_modules
  Initialisation init = Initialisation::zero_conv;
  const Safetensors* init_file = nullptr;                    // with Initialisation::file
  std::optional<InnerModelKind> inner_model = std::nullopt;  // default: the family's, or what the file has
  bool conv = true;                                          // false: no convolutions
  std::uint64_t seed = 0;
  FamilyOptions family = {};
};

// Where a tensor of the target comes from.
enum class Source : std::uint8_t { copy, create, drop };

struct PlanItem {
  TensorSpec target;  // of a dropped tensor, as it was
  Source from = Source::copy;
  std::string source;  // the tensor of the checkpoint, or of the init file
  Initialiser initialiser = Initialiser::none;
  std::uint32_t seed = 0;  // of normal and uniform
  std::size_t shard = 0;
  Index left_out = 0;       // elements at the begin of the source that the target does not have
  std::string reason = {};  // why it is dropped or re-laid out
};

// A tensor that is not as the family has it. Nothing is expected of a tensor that the family does not have.
struct Mismatch {
  std::string tensor, expected, actual;
  std::string note = {};  // what can be done about it
};
[[nodiscard]] inline std::string describe(const Mismatch& mismatch) {
  if (mismatch.expected.empty()) return "is no tensor of this family";
  return "is " + mismatch.actual + ", but " + mismatch.expected + " is needed" +
         (mismatch.note.empty() ? "" : " (" + mismatch.note + ")");
}

struct Plan {
  ModelRules model;
  std::vector<AttentionRule> replaced;
  Conversion conversion;
  std::vector<PlanItem> items;  // in the order in which they are written, dropped ones included
  std::vector<Mismatch> mismatches;
  std::vector<std::string> not_needed;          // tensors of the init file whose modules stay softmax
  std::vector<std::filesystem::path> folders;   // of a model folder, relative to it
  std::vector<std::filesystem::path> files;     // copied as they are
  std::vector<std::filesystem::path> left_out;  // other weights of the same transformer
  std::vector<std::filesystem::path> stale;     // shards and indices of other components that are out of date

  // The heads that the target must state, because its softmax attentions would not tell them.
  [[nodiscard]] std::optional<Index> stated_heads() const {
    return model.tells_heads ? std::nullopt : std::optional(model.heads);
  }
};

[[nodiscard]] constexpr std::string_view name(Source source) {
  return source == Source::copy ? "copy" : source == Source::create ? "new" : "drop";
}

namespace detail {

// "0-12", "7", or nothing for all: adds the attentions of one kind, as positions in ModelRules::attentions.
[[nodiscard]] inline std::string select_blocks(const ModelRules& model, const std::string& kind,
                                               std::string_view range, std::set<std::size_t>& out) {
  Index first = 0, last = model.depth - 1;
  if (!range.empty()) {
    const char* const end = range.data() + range.size();
    auto parsed = std::from_chars(range.data(), end, first);
    last = first;
    if (parsed.ec == std::errc() && parsed.ptr != end && *parsed.ptr == '-')
      parsed = std::from_chars(parsed.ptr + 1, end, last);
    if (parsed.ec != std::errc() || parsed.ptr != end || first < 0 || last < first)
      return "'" + printable(range) + "' is no block or range of blocks, as 7 or 0-12";
    if (last >= model.depth)
      return kind + " block " + std::to_string(last) + " does not exist: the model has " +
             std::to_string(model.depth) + " blocks";
  }
  std::set<Index> found;
  for (std::size_t i = 0; i < model.attentions.size(); ++i) {
    const AttentionRule& attention = model.attentions[i];
    if (attention.kind != kind || attention.block < first || attention.block > last) continue;
    out.insert(i);
    found.insert(attention.block);
  }
  if (range.empty()) return found.empty() ? "the model has no " + kind : "";
  for (Index block = first; block <= last; ++block)
    if (!found.contains(block)) return "block " + std::to_string(block) + " has no " + kind;
  return {};
}

}  // namespace detail

// Which attentions a choice means: a list, separated by commas, of
//   paper                     those that the paper replaces in a model of this family
//   all
//   attn (ViT, DiT), attn2, joint (SD3.5)
//   attn:0-5, attn2:0-12, joint:19-23, joint:7
// Returns what is wrong with it, or nothing.
[[nodiscard]] inline std::string select_modules(const ModelRules& model, std::string_view choice,
                                                std::vector<AttentionRule>& out) {
  std::set<std::size_t> chosen;
  for (bool more = true; more;) {
    const std::size_t comma = choice.find(',');
    const std::string_view part = choice.substr(0, comma);
    more = comma != std::string_view::npos;
    if (more) choice.remove_prefix(comma + 1);

    if (part == "paper" || part == "all") {
      for (std::size_t i = 0; i < model.attentions.size(); ++i)
        if (part == "all" || model.attentions[i].paper) chosen.insert(i);
      continue;
    }
    const std::size_t colon = part.find(':');
    const std::string_view range = colon == std::string_view::npos ? "" : part.substr(colon + 1);
    const auto kind = std::find(model.kinds.begin(), model.kinds.end(), part.substr(0, colon));
    if (kind == model.kinds.end() || (colon != std::string_view::npos && range.empty())) {
      std::string why = "'" + detail::printable(part) + "' is none of paper, all";
      for (const std::string& known : model.kinds) why += ", " + known + ", " + known + ":A-B";
      return why;
    }
    if (std::string why = detail::select_blocks(model, *kind, range, chosen); !why.empty()) return why;
  }
  out.clear();
  for (const std::size_t i : chosen) out.push_back(model.attentions[i]);
  return {};
}

// "joint 19-23, attn2 0-12"
[[nodiscard]] inline std::string describe(const std::vector<AttentionRule>& modules) {
  std::string text;
  for (std::size_t i = 0; i < modules.size();) {
    std::size_t end = i + 1;
    while (end < modules.size() && modules[end].kind == modules[i].kind &&
           modules[end].block == modules[end - 1].block + 1)
      ++end;
    const bool same_kind = i > 0 && modules[i - 1].kind == modules[i].kind;
    text += std::string(i > 0 ? ", " : "") + (same_kind ? "" : modules[i].kind + " ") +
            std::to_string(modules[i].block);
    if (end - i > 1) text += "-" + std::to_string(modules[end - 1].block);
    i = end;
  }
  return text.empty() ? "none" : text;
}

namespace detail {

// The heads that a config.json tells, under the name of DiT's code and timm's, or that of transformers.
[[nodiscard]] inline FileStatus config_heads(const Checkpoint& checkpoint, std::optional<Index>& out) {
  if (!checkpoint.folder()) return {};
  nlohmann::ordered_json config;
  if (FileStatus status = read_json_file(checkpoint.config(), "a configuration", config); !status.ok())
    return status;
  for (const char* key : {"num_heads", "num_attention_heads"})
    if (const auto found = config.find(key); found != config.end() && !found->is_null()) {
      if (!found->is_number_unsigned() || *found < 1 || *found > 4096)
        return file_error(checkpoint.config(), std::string(key) + " is no whole number from 1 to 4096");
      out = found->get<Index>();
      return {};
    }
  return {};
}

// The family of a checkpoint, and its rules.
[[nodiscard]] inline FileStatus find_rules(const Checkpoint& checkpoint, const FamilyOptions& options,
                                           ModelRules& out) {
  const Safetensors& file = checkpoint.weights;
  FileStatus status;
  Sd35Model sd35;
  if (holds_sd35(file, sd35)) {
    status = recognise_sd35(file, sd35);
    if (status.ok()) out = sd35_rules(sd35);
  } else if (holds_vit(file) || holds_dit(file)) {
    std::optional<Index> heads;
    status = config_heads(checkpoint, heads);
    if (status.ok()) status = (holds_vit(file) ? vit_rules : dit_rules)(file, options, heads, out);
  } else {
    return file_error(
        file.path(),
        "is no checkpoint of a known family: SD3.5 has joint_blocks, or the transformer_blocks "
        "and pos_embed of diffusers; ViT has blocks and patch_embed; DiT blocks and x_embedder");
  }
  if (!status.ok()) return status;
  for (const std::string_view option : asked_for(options))
    if (std::find(out.options.begin(), out.options.end(), option) == out.options.end())
      return file_error(checkpoint.root, std::string(option) + " is no option for " + out.label, {},
                        Code::option);
  return {};
}

// Every tensor of the source against the rules of the family.
inline void plan_inherited(const Safetensors& file, Plan& plan) {
  const ModelRules& model = plan.model;
  std::map<std::string_view, const TensorRule*> expected;
  for (const TensorRule& rule : model.inherited) expected.emplace(rule.source, &rule);
  const auto beside = [&](std::string_view tensor) {
    if (!model.own.empty() && tensor.starts_with(model.own)) return false;
    return std::any_of(model.beside.begin(), model.beside.end(),
                       [&](const std::string& prefix) { return tensor.starts_with(prefix); });
  };
  // As many whole names may be dropped as there are tensors, but few prefixes.
  std::map<std::string_view, const DropRule*> dropped;
  std::vector<const DropRule*> dropped_below;
  for (const DropRule& rule : model.dropped)
    if (rule.is_prefix())
      dropped_below.push_back(&rule);
    else
      dropped.emplace(rule.name, &rule);
  const auto drop_rule = [&](std::string_view tensor) -> const DropRule* {
    if (const auto found = dropped.find(tensor); found != dropped.end()) return found->second;
    const auto found = std::find_if(dropped_below.begin(), dropped_below.end(),
                                    [&](const DropRule* rule) { return tensor.starts_with(rule->name); });
    return found != dropped_below.end() ? *found : nullptr;
  };
  for (const TensorInfo& info : file.tensors()) {
    PlanItem item{.target = info, .source = info.name, .shard = info.shard};
    const auto found = expected.find(info.name);
    const DropRule* const drop = drop_rule(info.name);
    if (found != expected.end()) {
      const TensorRule& rule = *found->second;
      const std::vector<Index>& given = rule.given.empty() ? rule.target.shape : rule.given;
      item.target.name = rule.target.name;
      if (given != info.shape) {
        plan.mismatches.push_back(
            {info.name, describe(info.dtype, given), describe(info), rule.given.empty() ? rule.note : ""});
      } else if (!rule.given.empty()) {
        item.target.shape = rule.target.shape;
        item.left_out = info.elements() - item.target.elements();
        item.reason = rule.note;
      }
      expected.erase(found);
    } else if (drop != nullptr) {
      item.from = Source::drop;
      item.reason = drop->reason;
    } else if (!beside(info.name)) {
      plan.mismatches.push_back({info.name, "", describe(info)});
    }
    plan.items.push_back(std::move(item));
  }
  for (const auto& [tensor, rule] : expected)
    plan.mismatches.push_back(
        {std::string(tensor), describe(rule->target).substr(describe(rule->target).find('[')), "missing"});
}

// The init file by the stem of the target: the stem that it uses itself, and what it says of the module.
using InitModules = std::map<std::string, std::pair<std::string, ModuleConversion>, std::less<>>;

[[nodiscard]] inline FileStatus read_init(const Safetensors& file, Plan& plan, InitModules& out) {
  Conversion conversion;
  if (FileStatus status = read_conversion(file, conversion); !status.ok()) return status;
  const auto unused = [&](std::string_view tensor) {
    return file_error(file.path(), "belongs to no attention of the model", tensor, Code::option);
  };
  const auto created = [&](std::string_view tensor) {
    return std::any_of(plan.model.created.begin(), plan.model.created.end(),
                       [&](const NewTensorRule& rule) { return rule.target.name == tensor; });
  };
  for (const TensorInfo& info : file.tensors())
    if (!module_stem(info.name) && !created(info.name)) return unused(info.name);
  std::map<std::string_view, const AttentionRule*> known;
  for (const AttentionRule& attention : plan.model.attentions)
    for (const std::string& alias : attention.aliases) known.emplace(alias, &attention);
  std::set<std::string_view> replaced;
  for (const AttentionRule& attention : plan.replaced) replaced.insert(attention.stem);
  for (const auto& [stem, module] : conversion) {
    const auto attention = known.find(known.contains(stem) ? stem : without_wrappers(stem));
    if (attention == known.end()) return unused(stem + ".w1");
    if (!out.emplace(attention->second->stem, std::pair(stem, module)).second)
      return file_error(file.path(), "the module is there twice, under two names", stem + ".w1",
                        Code::option);
    if (replaced.contains(attention->second->stem)) continue;
    for (const TensorSpec& spec : module_tensors(stem, module, 1, 1, Dtype::f32))
      plan.not_needed.push_back(spec.name);
  }
  return {};
}

// What a replaced attention becomes without an init file.
[[nodiscard]] inline FileStatus choose_module(const Checkpoint& checkpoint, const InheritOptions& options,
                                              const ModelRules& model, ModuleConversion& out) {
  out = model.module;
  out.inner_model = options.inner_model.value_or(out.inner_model);
  out.conv = options.conv && out.conv;
  if (model.module.neighborhood > 0 && out != model.module)
    return file_error(checkpoint.root,
                      model.label + " becomes DiT5, whose module has an mlp and convolutions, no other form",
                      {}, Code::option);
  return {};
}

// Whether what an init file says of a module is what the options ask for and the family can be.
[[nodiscard]] inline FileStatus accept_module(const Safetensors& init_file, const InheritOptions& options,
                                              const ModelRules& model, const std::string& stem,
                                              const ModuleConversion& module) {
  const auto refuse = [&](const std::string& why) {
    return file_error(init_file.path(), why, stem + ".w1", Code::option);
  };
  if (options.inner_model && *options.inner_model != module.inner_model)
    return refuse("has inner model " + std::string(name(module.inner_model)) + ", but " +
                  std::string(name(*options.inner_model)) + " is asked for");
  if (!options.conv && module.conv) return refuse("has convolutions, but none are asked for");
  if ((module.neighborhood > 0) != (model.module.neighborhood > 0))
    return refuse(std::string(module.neighborhood > 0 ? "is" : "is not") +
                  " beside neighborhood attention, which does not fit " + model.label);
  return {};
}

// The tensor that a new one shall be like in dtype and shard, or null if it is missing, which is a mismatch.
[[nodiscard]] inline FileStatus find_like(const Safetensors& file, const std::string& tensor,
                                          const TensorInfo*& out) {
  out = file.find(tensor);
  if (out == nullptr || out->dtype == Dtype::f64 || out->dtype == Dtype::f32 || out->dtype == Dtype::f16 ||
      out->dtype == Dtype::bf16)
    return {};
  return file_error(file.path(),
                    "is " + describe(*out) + ": new weights can be F64, F32, F16 or BF16, as it is", tensor,
                    Code::option);
}

// A new tensor from the init file, whose name for it is `source`.
inline void take_from_file(const Safetensors& init_file, std::string source, PlanItem& item, Plan& plan) {
  item.initialiser = Initialiser::file;
  item.source = std::move(source);
  const TensorInfo& given = *init_file.find(item.source);
  if (given.shape != item.target.shape)
    plan.mismatches.push_back({item.source, describe(item.target), describe(given)});
}

// The initial values of a new tensor of a module, by the end of its name.
[[nodiscard]] inline Initialiser module_initialiser(std::string_view suffix, Initialisation init) {
  if (suffix == ".qk_scale_ttt") return Initialiser::one;
  if (suffix == ".qk_offset_ttt") return Initialiser::zero;
  if (suffix.find("conv") == std::string_view::npos) return Initialiser::normal;
  return init == Initialisation::official ? Initialiser::uniform : Initialiser::zero;
}

inline void initialise(Initialiser initialiser, std::uint64_t seed, std::string_view name, PlanItem& item) {
  item.initialiser = initialiser;
  if (initialiser == Initialiser::normal || initialiser == Initialiser::uniform)
    item.seed = named_seed(seed, name);
}

// The new tensors of one replaced module.
[[nodiscard]] inline FileStatus plan_module(const Checkpoint& checkpoint, const InheritOptions& options,
                                            const InitModules& init, const AttentionRule& which, Plan& plan) {
  const TensorInfo* like = nullptr;
  if (FileStatus status = find_like(checkpoint.weights, which.like, like); !status.ok() || like == nullptr)
    return status;
  ModuleConversion module;
  std::string init_stem;
  if (options.init == Initialisation::file) {
    const auto found = init.find(which.stem);
    if (found == init.end())
      return file_error(options.init_file->path(), "is missing", which.stem + ".w1", Code::option);
    std::tie(init_stem, module) = found->second;
    if (FileStatus status = accept_module(*options.init_file, options, plan.model, init_stem, module);
        !status.ok())
      return status;
  } else if (FileStatus status = choose_module(checkpoint, options, plan.model, module); !status.ok()) {
    return status;
  }
  plan.conversion.emplace(which.stem, module);
  for (TensorSpec& spec :
       module_tensors(which.stem, module, plan.model.heads, plan.model.head_dim, like->dtype)) {
    const std::string suffix = spec.name.substr(which.stem.size());
    PlanItem item{.target = std::move(spec), .from = Source::create, .source = {}, .shard = like->shard};
    if (options.init == Initialisation::file)
      take_from_file(*options.init_file, init_stem + suffix, item, plan);
    else
      initialise(module_initialiser(suffix, options.init), options.seed, which.aliases[0] + suffix, item);
    plan.items.push_back(std::move(item));
  }
  return {};
}

// A new tensor of no module.
[[nodiscard]] inline FileStatus plan_created(const Checkpoint& checkpoint, const InheritOptions& options,
                                             const NewTensorRule& rule, Plan& plan) {
  const TensorInfo* like = nullptr;
  if (FileStatus status = find_like(checkpoint.weights, rule.like, like); !status.ok() || like == nullptr)
    return status;
  PlanItem item{.target = rule.target, .from = Source::create, .source = {}, .shard = like->shard};
  item.target.dtype = like->dtype;
  if (options.init != Initialisation::file)
    initialise(rule.initialiser, options.seed, rule.target.name, item);
  else if (options.init_file->find(rule.target.name) == nullptr)
    return file_error(options.init_file->path(), "is missing", rule.target.name, Code::option);
  else
    take_from_file(*options.init_file, rule.target.name, item, plan);
  plan.items.push_back(std::move(item));
  return {};
}

// All that lies in a model folder beside the transformer's weights. Hidden entries are no part of a model.
[[nodiscard]] inline FileStatus plan_folder(const Checkpoint& checkpoint, Plan& plan) {
  namespace fs = std::filesystem;
  const auto is_weight = [](const fs::path& path) {
    const std::string file = path.filename().string();
    return weight_name(file).kind != WeightName::Kind::other || ModelFiles::is_foreign(path) ||
           file.ends_with(".index.json");
  };
  std::set<fs::path> stale;  // in the folders of other components
  const auto examine = [&](const fs::path& folder) -> FileStatus {
    ModelFiles files;
    std::set<std::string> names;
    if (FileStatus status = ModelFiles::list(folder, files); !status.ok()) return status;
    if (FileStatus status = files.stale(names); !status.ok()) return status;
    for (const std::string& file : names) stale.insert(folder / file);
    return {};
  };
  std::error_code error;
  fs::recursive_directory_iterator entry(checkpoint.root, error);
  for (; !error && entry != fs::recursive_directory_iterator(); entry.increment(error)) {
    const fs::path path = entry->path(), relative = path.lexically_relative(checkpoint.root);
    const bool folder = entry->is_directory(error);
    if (!is_utf8(path.filename().string())) return file_error(path, "has a name that is not UTF-8");
    if (path.filename().string().starts_with(".")) {
      if (folder) entry.disable_recursion_pending();
    } else if (folder) {
      if (entry->is_symlink(error)) return file_error(path, "is a link to a folder, which is not followed");
      plan.folders.push_back(relative);
      if (path != checkpoint.transformer)
        if (FileStatus status = examine(path); !status.ok()) return status;
    } else if (!entry->is_regular_file(error)) {
      return file_error(path, error ? "cannot be read: " + error.message() : "not a regular file");
    } else if (path == checkpoint.config()) {
      // Written anew.
    } else if (is_weight(path) &&
               (path.parent_path() == checkpoint.transformer || path.parent_path() == checkpoint.root)) {
      const auto& shards = checkpoint.weights.shards();
      if (path != checkpoint.weights.path() &&
          std::none_of(shards.begin(), shards.end(),
                       [&](const MappedFile& shard) { return shard.path() == path; }))
        plan.left_out.push_back(relative);
    } else if (stale.contains(path)) {
      plan.stale.push_back(relative);
    } else {
      plan.files.push_back(relative);
    }
  }
  if (error) return system_error(checkpoint.root, "list", error.value());
  std::sort(plan.folders.begin(), plan.folders.end());
  std::sort(plan.files.begin(), plan.files.end());
  std::sort(plan.left_out.begin(), plan.left_out.end());
  std::sort(plan.stale.begin(), plan.stale.end());
  return {};
}

}  // namespace detail

// Plans the conversion of a checkpoint. Every tensor of the transformer is held against the rules of the
// family: one that is missing, has another shape, or is not known, is a mismatch, and a plan with mismatches
// is an error (the plan is filled all the same, for its report).
[[nodiscard]] inline FileStatus make_plan(const Checkpoint& checkpoint, const InheritOptions& options,
                                          Plan& out) {
  out = {};
  const Safetensors& file = checkpoint.weights;
  if (FileStatus status = detail::find_rules(checkpoint, options.family, out.model); !status.ok())
    return status;
  if (!file.note().empty()) out.model.notes.push_back(file.note());
  Conversion already;
  if (FileStatus status = read_conversion(file, already, checkpoint.config()); !status.ok()) return status;
  if (!already.empty())
    return detail::file_error(checkpoint.root,
                              "is already converted (" + already.begin()->first +
                                  " is a TTT module): convert the original checkpoint instead",
                              {}, Code::option);
  if (const std::string why = select_modules(out.model, options.replace, out.replaced); !why.empty())
    return detail::file_error(checkpoint.root, "cannot replace: " + why, {}, Code::option);

  detail::plan_inherited(file, out);
  detail::InitModules init;
  if (options.init == Initialisation::file)
    if (FileStatus status = detail::read_init(*options.init_file, out, init); !status.ok()) return status;
  for (const AttentionRule& which : out.replaced)
    if (FileStatus status = detail::plan_module(checkpoint, options, init, which, out); !status.ok())
      return status;
  for (const NewTensorRule& rule : out.model.created)
    if (FileStatus status = detail::plan_created(checkpoint, options, rule, out); !status.ok()) return status;
  if (checkpoint.folder())
    if (FileStatus status = detail::plan_folder(checkpoint, out); !status.ok()) return status;

  // Shard by shard, and in each so that no tensor is misaligned: inherited ones in their old order, new ones
  // behind them.
  std::stable_sort(out.items.begin(), out.items.end(), [](const PlanItem& a, const PlanItem& b) {
    return a.shard != b.shard ? a.shard < b.shard : size_of(a.target.dtype) > size_of(b.target.dtype);
  });
  if (out.mismatches.empty()) return {};
  const Mismatch& first = out.mismatches.front();
  const std::size_t others = out.mismatches.size() - 1;
  return detail::file_error(
      checkpoint.root,
      describe(first) + (others > 0 ? " (and " + std::to_string(others) + " more mismatches)" : ""),
      first.tensor, Code::shape);
}

LINATTN_END

// The plan of a conversion: what becomes of every tensor, as data, complete before a byte is written.
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
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
#include <linattn/weights/file_status.hpp>
#include <linattn/weights/mapped_file.hpp>
#include <linattn/weights/random.hpp>
#include <linattn/weights/safetensors.hpp>
#include <linattn/weights/sd35.hpp>

LINATTN_BEGIN

// ---- what is converted ----

// An opened model: a single file, or a folder of diffusers.
struct Checkpoint {
  Safetensors weights;
  std::filesystem::path root;         // what the caller named
  std::filesystem::path transformer;  // the folder of the transformer; empty for a single file

  [[nodiscard]] bool folder() const { return !transformer.empty(); }
  [[nodiscard]] std::filesystem::path config() const {
    return folder() ? transformer / "config.json" : std::filesystem::path();
  }
};

// Opens a single file, a diffusers pipeline (a folder with transformer/), or a diffusers transformer by itself
// (a folder with config.json and weights).
[[nodiscard]] inline FileStatus open_checkpoint(const std::filesystem::path& path, Checkpoint& out) {
  std::error_code error;
  Checkpoint made;
  made.root = path.has_filename() ? path : path.parent_path();  // "folder/"
  if (std::filesystem::is_directory(path, error)) {
    made.transformer = made.root / "transformer";
    if (!std::filesystem::is_directory(made.transformer, error)) made.transformer = made.root;
    if (!std::filesystem::exists(made.config(), error))
      return detail::file_error(path,
                                "is no model folder of diffusers: there is no " + made.config().string());
  } else if (path.filename().string().ends_with(".index.json")) {
    return detail::file_error(path, "is an index: name the folder of the model instead", {}, Code::option);
  }
  const auto& weights = made.folder() ? made.transformer : path;
  if (FileStatus status = Safetensors::open(weights, made.weights); !status.ok()) return status;
  out = std::move(made);
  return {};
}

// ---- the plan ----

enum class Initialisation : std::uint8_t { zero_conv, official, file };

struct InheritOptions {
  std::string replace = "paper";  // see select_modules
  Initialisation init = Initialisation::zero_conv;
  const Safetensors* init_file = nullptr;     // with Initialisation::file
  std::optional<InnerModelKind> inner_model;  // default: SwiGlu, or what the init file has
  std::uint64_t seed = 0;
};

// Where a tensor of the target comes from.
enum class Source : std::uint8_t { copy, create, drop };
enum class Initialiser : std::uint8_t { none, normal, uniform, zero, file };

struct PlanItem {
  TensorSpec target;
  Source from = Source::copy;
  std::string source;  // the tensor of the checkpoint, or of the init file
  Initialiser initialiser = Initialiser::none;
  std::uint32_t seed = 0;  // of normal and uniform
  std::size_t shard = 0;
};

// A tensor that is not as the family has it. Nothing is expected of a tensor that the family does not have.
struct Mismatch {
  std::string tensor, expected, actual;
};
[[nodiscard]] inline std::string describe(const Mismatch& mismatch) {
  if (mismatch.expected.empty()) return "is no tensor of this family";
  return "is " + mismatch.actual + ", but " + mismatch.expected + " is needed";
}

struct Plan {
  Sd35Model model;
  std::vector<Sd35Module> replaced;
  Conversion conversion;
  std::vector<PlanItem> items;  // in the order in which they are written, dropped ones included
  std::vector<Mismatch> mismatches;
  std::vector<std::string> not_needed;          // tensors of the init file whose modules stay softmax
  std::vector<std::filesystem::path> folders;   // of a model folder, relative to it
  std::vector<std::filesystem::path> files;     // copied as they are
  std::vector<std::filesystem::path> left_out;  // other weights of the same transformer
};

[[nodiscard]] constexpr std::string_view name(Source source) {
  return source == Source::copy ? "copy" : source == Source::create ? "new" : "drop";
}
[[nodiscard]] constexpr std::string_view name(Initialiser initialiser) {
  constexpr std::array<std::string_view, 5> names{"none", "normal(0, 0.02)", "uniform(-1/3, 1/3)", "zero",
                                                  "file"};
  return names[static_cast<std::size_t>(initialiser)];
}

namespace detail {

// "0-12", "7", or nothing for all: adds the modules of one kind.
[[nodiscard]] inline std::string select_blocks(const Sd35Model& model, bool dual, std::string_view range,
                                               std::set<Sd35Module>& out) {
  const char* const kind = dual ? "attn2" : "joint";
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
      return std::string(kind) + " block " + std::to_string(last) + " does not exist: the model has " +
             std::to_string(model.depth) + " blocks";
  }
  const std::size_t before = out.size();
  for (Index block = first; block <= last; ++block) {
    if (!dual || model.dual_blocks.contains(block))
      out.insert({dual, block});
    else if (!range.empty())
      return "block " + std::to_string(block) + " has no attn2";
  }
  return out.size() == before && range.empty() && dual ? "the model has no attn2" : "";
}

}  // namespace detail

// Which attentions a choice means: a list, separated by commas, of
//   paper         every attn2, and the joint attention of the last max(1, round(5/24 depth)) blocks
//   all, attn2, joint
//   attn2:0-12, joint:19-23, joint:7
// Returns what is wrong with it, or nothing.
[[nodiscard]] inline std::string select_modules(const Sd35Model& model, std::string_view choice,
                                                std::vector<Sd35Module>& out) {
  std::set<Sd35Module> chosen;
  for (bool more = true; more;) {
    const std::size_t comma = choice.find(',');
    const std::string_view part = choice.substr(0, comma);
    more = comma != std::string_view::npos;
    if (more) choice.remove_prefix(comma + 1);

    std::string why;
    if (part == "paper" || part == "all") {
      const Index joint =
          part == "all" ? model.depth
                        : std::max<Index>(1, std::lround(5.0 / 24.0 * static_cast<double>(model.depth)));
      for (const Index block : model.dual_blocks) chosen.insert({true, block});
      for (Index block = model.depth - joint; block < model.depth; ++block) chosen.insert({false, block});
    } else if (part == "attn2" || part == "joint") {
      why = detail::select_blocks(model, part == "attn2", {}, chosen);
    } else if ((part.starts_with("attn2:") || part.starts_with("joint:")) && part.size() > 6) {
      why = detail::select_blocks(model, part.starts_with("attn2:"), part.substr(6), chosen);
    } else {
      why = "'" + detail::printable(part) + "' is none of paper, all, attn2, joint, attn2:A-B, joint:A-B";
    }
    if (!why.empty()) return why;
  }
  out.assign(chosen.begin(), chosen.end());
  return {};
}

// "joint 19-23, attn2 0-12"
[[nodiscard]] inline std::string describe(const std::vector<Sd35Module>& modules) {
  std::string text;
  for (std::size_t i = 0; i < modules.size();) {
    std::size_t end = i + 1;
    while (end < modules.size() && modules[end].dual == modules[i].dual &&
           modules[end].block == modules[end - 1].block + 1)
      ++end;
    const bool same_kind = i > 0 && modules[i - 1].dual == modules[i].dual;
    text += std::string(i > 0 ? ", " : "") +
            (same_kind         ? ""
             : modules[i].dual ? "attn2 "
                               : "joint ") +
            std::to_string(modules[i].block);
    if (end - i > 1) text += "-" + std::to_string(modules[end - 1].block);
    i = end;
  }
  return text.empty() ? "none" : text;
}

namespace detail {

// Parts of a single file that are no transformer.
[[nodiscard]] inline bool beside_transformer(const Sd35Model& model, std::string_view tensor) {
  if (model.layout == Sd35Layout::diffusers) return false;
  if (!model.prefix.empty()) return !tensor.starts_with(model.prefix);
  for (const std::string_view prefix :
       {"first_stage_model.", "vae.", "text_encoders.", "conditioner.", "denoiser."})
    if (tensor.starts_with(prefix)) return true;
  return false;
}

// Left from training, of no use to a converted model: the moving average of the softmax transformer, the
// discriminator of the VAE.
[[nodiscard]] inline bool training_remains(std::string_view tensor) {
  return tensor.starts_with("model_ema.") || tensor.starts_with("loss.");
}

// Every tensor of the source against the rules of the family.
inline void plan_inherited(const Safetensors& file, Plan& plan) {
  std::map<std::string, TensorSpec, std::less<>> expected;
  for (TensorSpec& spec : sd35_tensors(plan.model)) expected.emplace(spec.name, spec);
  for (const TensorInfo& info : file.tensors()) {
    PlanItem item{.target = info, .source = info.name, .shard = info.shard};
    const auto rule = expected.find(info.name);
    if (rule != expected.end()) {
      if (rule->second.shape != info.shape)
        plan.mismatches.push_back({info.name, describe(info.dtype, rule->second.shape), describe(info)});
      expected.erase(rule);
    } else if (training_remains(info.name)) {
      item.from = Source::drop;
    } else if (!beside_transformer(plan.model, info.name)) {
      plan.mismatches.push_back({info.name, "", describe(info)});
    }
    plan.items.push_back(std::move(item));
  }
  for (const auto& [tensor, spec] : expected)
    plan.mismatches.push_back({tensor, describe(spec).substr(describe(spec).find('[')), "missing"});
}

// The init file by module: which tensors it has for each, and what it says of them.
struct InitModules {
  std::map<Sd35Module, std::pair<std::string, ModuleConversion>> modules;  // stem in the file
};

[[nodiscard]] inline FileStatus read_init(const Safetensors& file, Plan& plan, InitModules& out) {
  Conversion conversion;
  if (FileStatus status = read_conversion(file, conversion); !status.ok()) return status;
  const auto unused = [&](std::string_view tensor) {
    return file_error(file.path(), "belongs to no attention of the model", tensor, Code::option);
  };
  for (const TensorInfo& info : file.tensors())
    if (!module_stem(info.name)) return unused(info.name);
  const auto all = plan.model.modules();
  for (const auto& [stem, module] : conversion) {
    const auto which = sd35_module(stem);
    if (!which || std::find(all.begin(), all.end(), *which) == all.end()) return unused(stem + ".w1");
    if (!out.modules.emplace(*which, std::pair(stem, module)).second)
      return file_error(file.path(), "the module is there twice, in two layouts", stem + ".w1", Code::option);
    if (std::find(plan.replaced.begin(), plan.replaced.end(), *which) != plan.replaced.end()) continue;
    for (const TensorSpec& spec : module_tensors(stem, module, 1, 1, Dtype::f32))
      plan.not_needed.push_back(spec.name);
  }
  return {};
}

// The new tensors of one replaced module.
[[nodiscard]] inline FileStatus plan_module(const Safetensors& file, const InheritOptions& options,
                                            const InitModules& init, Sd35Module which, Plan& plan) {
  const std::string stem = sd35_stem(plan.model, which);
  const TensorInfo* qkv =
      file.find(stem + (plan.model.layout == Sd35Layout::official ? ".qkv.weight" : ".to_q.weight"));
  if (qkv == nullptr) return {};  // already a mismatch
  if (qkv->dtype != Dtype::f64 && qkv->dtype != Dtype::f32 && qkv->dtype != Dtype::f16 &&
      qkv->dtype != Dtype::bf16)
    return file_error(file.path(),
                      "is " + describe(*qkv) + ": new weights can be F64, F32, F16 or BF16, as it is",
                      qkv->name, Code::option);
  ModuleConversion module{.inner_model = options.inner_model.value_or(InnerModelKind::swiglu)};
  std::string init_stem;
  if (options.init == Initialisation::file) {
    const auto found = init.modules.find(which);
    if (found == init.modules.end())
      return file_error(options.init_file->path(), "is missing", stem + ".w1", Code::option);
    std::tie(init_stem, module) = found->second;
    if (options.inner_model && *options.inner_model != module.inner_model)
      return file_error(options.init_file->path(),
                        "has inner model " + std::string(name(module.inner_model)) + ", but " +
                            std::string(name(*options.inner_model)) + " is asked for",
                        init_stem + ".w1", Code::option);
  }
  plan.conversion.emplace(stem, module);
  const std::string canonical = sd35_stem(Sd35Layout::official, which);
  for (TensorSpec& spec : module_tensors(stem, module, plan.model.heads, plan.model.head_dim, qkv->dtype)) {
    const std::string suffix = spec.name.substr(stem.size());
    PlanItem item{.target = std::move(spec), .from = Source::create, .source = {}, .shard = qkv->shard};
    if (options.init == Initialisation::file) {
      item.initialiser = Initialiser::file;
      item.source = init_stem + suffix;
      const TensorInfo* given = options.init_file->find(item.source);  // there, as read_conversion checked
      if (given->shape != item.target.shape)
        plan.mismatches.push_back({item.source, describe(item.target), describe(*given)});
    } else {
      const bool conv = suffix.find("conv") != std::string::npos;
      item.initialiser = !conv                                      ? Initialiser::normal
                         : options.init == Initialisation::official ? Initialiser::uniform
                                                                    : Initialiser::zero;
      if (item.initialiser != Initialiser::zero) item.seed = named_seed(options.seed, canonical + suffix);
    }
    plan.items.push_back(std::move(item));
  }
  return {};
}

// All that lies in a model folder beside the transformer's weights. Hidden entries are no part of a model.
[[nodiscard]] inline FileStatus plan_folder(const Checkpoint& checkpoint, Plan& plan) {
  namespace fs = std::filesystem;
  const auto is_weight = [](const fs::path& path) {
    const fs::path extension = path.extension();
    return extension == ".safetensors" || extension == ".bin" || extension == ".pt" ||
           extension == ".msgpack" || path.filename().string().ends_with(".index.json");
  };
  std::error_code error;
  fs::recursive_directory_iterator entry(checkpoint.root, error);
  for (; !error && entry != fs::recursive_directory_iterator(); entry.increment(error)) {
    const fs::path path = entry->path(), relative = path.lexically_relative(checkpoint.root);
    const bool folder = entry->is_directory(error);
    if (path.filename().string().starts_with(".")) {
      if (folder) entry.disable_recursion_pending();
    } else if (folder) {
      if (entry->is_symlink(error)) return file_error(path, "is a link to a folder, which is not followed");
      plan.folders.push_back(relative);
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
    } else {
      plan.files.push_back(relative);
    }
  }
  if (error) return system_error(checkpoint.root, "list", error.value());
  std::sort(plan.folders.begin(), plan.folders.end());
  std::sort(plan.files.begin(), plan.files.end());
  std::sort(plan.left_out.begin(), plan.left_out.end());
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
  if (FileStatus status = recognise_sd35(file, out.model); !status.ok()) return status;
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
  for (const Sd35Module which : out.replaced)
    if (FileStatus status = detail::plan_module(file, options, init, which, out); !status.ok()) return status;
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

// Weight inheritance: a softmax checkpoint becomes one whose attentions are Test-Time-Training modules.
// Rules of the family -> plan -> report -> apply. The plan is data, complete before a byte is written.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include <linattn/version.hpp>
#include <linattn/weights/atomic_file.hpp>
#include <linattn/weights/conversion.hpp>
#include <linattn/weights/file_status.hpp>
#include <linattn/weights/json.hpp>
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

// ---- the report ----

struct Tally {
  std::size_t tensors = 0;
  Index parameters = 0;

  void add(const TensorSpec& spec) {
    ++tensors;
    parameters += spec.elements();
  }
};

// Source = inherited + re-laid out + dropped. Target = inherited + re-laid out + new.
struct Totals {
  Tally source, target, inherited, relaid, created, dropped;
  std::uint64_t target_bytes = 0;
};

// A copy under another name or shape is re-laid out; the SD3.5 plans have none.
[[nodiscard]] inline std::string_view outcome(const PlanItem& item) {
  if (item.from == Source::create) return "new";
  if (item.from == Source::drop) return "dropped";
  return item.source == item.target.name ? "inherited" : "re-laid out";
}

[[nodiscard]] inline Totals totals(const Plan& plan) {
  Totals sum;
  for (const PlanItem& item : plan.items) {
    const std::string_view what = outcome(item);
    if (what == "inherited") sum.inherited.add(item.target);
    if (what == "re-laid out") sum.relaid.add(item.target);
    if (what == "new") sum.created.add(item.target);
    if (what == "dropped") sum.dropped.add(item.target);
    if (what != "new") sum.source.add(item.target);
    if (what == "dropped") continue;
    sum.target.add(item.target);
    sum.target_bytes += item.target.byte_size();
  }
  return sum;
}

// The report for people. Percentages are of the target's parameters.
[[nodiscard]] inline std::string report_table(const Plan& plan) {
  const Totals sum = totals(plan);
  std::string text =
      sd35_label(plan.model) +
      (plan.model.layout == Sd35Layout::official ? ", single-file names" : ", diffusers names") + "\n";
  text += "replaced: " + describe(plan.replaced) + " (" + std::to_string(plan.replaced.size()) + " of " +
          std::to_string(plan.model.modules().size()) + " attentions)\n\n";
  const auto row = [&](const char* what, const Tally& tally, bool share) {
    std::string digits = std::to_string(tally.parameters);
    for (auto i = static_cast<Index>(digits.size()) - 3; i > 0; i -= 3)
      digits.insert(static_cast<std::size_t>(i), ",");
    std::array<char, 96> line{};
    std::snprintf(line.data(), line.size(), "%-14s %8zu tensors %17s parameters", what, tally.tensors,
                  digits.c_str());
    text += line.data();
    if (share) {
      const double part = sum.target.parameters > 0 ? 100.0 * static_cast<double>(tally.parameters) /
                                                          static_cast<double>(sum.target.parameters)
                                                    : 0.0;
      std::snprintf(line.data(), line.size(), " %7.2f %%", part);
      text += line.data();
    }
    text += "\n";
  };
  row("source", sum.source, false);
  row("  dropped", sum.dropped, false);
  row("target", sum.target, true);
  row("  inherited", sum.inherited, true);
  row("  re-laid out", sum.relaid, true);
  row("  new", sum.created, true);
  text += "mismatched     " +
          std::string(8 - std::min<std::size_t>(8, std::to_string(plan.mismatches.size()).size()), ' ') +
          std::to_string(plan.mismatches.size()) + " tensors\n";
  constexpr std::size_t shown = 20;
  for (std::size_t i = 0; i < std::min(shown, plan.mismatches.size()); ++i)
    text += "  " + detail::printable(plan.mismatches[i].tensor) + " " + describe(plan.mismatches[i]) + "\n";
  if (plan.mismatches.size() > shown)
    text += "  and " + std::to_string(plan.mismatches.size() - shown) + " more\n";
  if (!plan.not_needed.empty())
    text += "not needed     " + std::to_string(plan.not_needed.size()) + " tensors of the init file\n";
  if (!plan.files.empty())
    text += "copied         " + std::to_string(plan.files.size()) + " other files of the folder\n";
  for (const auto& path : plan.left_out)
    text += "left out       " + path.string() + ", which holds unconverted weights\n";
  return text;
}

// The report for machines: every tensor of source and target, with what becomes of it.
[[nodiscard]] inline nlohmann::ordered_json report_json(const Plan& plan) {
  using Json = nlohmann::ordered_json;
  const Totals sum = totals(plan);
  const auto tally = [&](const Tally& of) {
    return Json{{"tensors", of.tensors},
                {"parameters", of.parameters},
                {"percent_of_target",
                 sum.target.parameters > 0
                     ? 100.0 * static_cast<double>(of.parameters) / static_cast<double>(sum.target.parameters)
                     : 0.0}};
  };
  Json tensors = Json::array(), mismatches = Json::array(), files = Json::array(), left_out = Json::array();
  for (const PlanItem& item : plan.items) {
    Json entry{{"name", item.target.name},
               {"outcome", outcome(item)},
               {"dtype", name(item.target.dtype)},
               {"shape", item.target.shape},
               {"parameters", item.target.elements()}};
    if (!item.source.empty()) entry["source"] = item.source;
    if (item.initialiser != Initialiser::none) entry["initialiser"] = name(item.initialiser);
    if (item.initialiser == Initialiser::normal || item.initialiser == Initialiser::uniform)
      entry["seed"] = item.seed;
    tensors.push_back(std::move(entry));
  }
  for (const Mismatch& mismatch : plan.mismatches)
    mismatches.push_back(
        {{"name", mismatch.tensor}, {"expected", mismatch.expected}, {"actual", mismatch.actual}});
  for (const auto& path : plan.files) files.push_back(path.string());
  for (const auto& path : plan.left_out) left_out.push_back(path.string());
  return {{"family", sd35_label(plan.model)},
          {"layout", plan.model.layout == Sd35Layout::official ? "official" : "diffusers"},
          {"replaced", describe(plan.replaced)},
          {"attentions", {{"replaced", plan.replaced.size()}, {"all", plan.model.modules().size()}}},
          {"linattn", conversion_json<Json>(plan.conversion)},
          {"source", tally(sum.source)},
          {"target", tally(sum.target)},
          {"inherited", tally(sum.inherited)},
          {"re_laid_out", tally(sum.relaid)},
          {"new", tally(sum.created)},
          {"dropped", tally(sum.dropped)},
          {"mismatched", std::move(mismatches)},
          {"not_needed", plan.not_needed},
          {"tensors", std::move(tensors)},
          {"files_copied", std::move(files)},
          {"files_left_out", std::move(left_out)}};
}

// ---- apply ----

// Told the bytes written so far and all that will be; false stops the conversion and leaves nothing behind.
using Progress = std::function<bool(std::uint64_t done, std::uint64_t total)>;

namespace detail {

// Moves mapped bytes into files piece by piece, to tell the progress between them.
class Mover {
 public:
  Mover(std::uint64_t total, const Progress& progress) : total_(total), progress_(progress) {}

  template <class Sink>
  [[nodiscard]] FileStatus move(const MappedFile& from, std::span<const std::byte> bytes, Sink& to) {
    while (!bytes.empty()) {
      const std::span<const std::byte> part = bytes.first(std::min(bytes.size(), piece));
      if (FileStatus status = to.write(from, part); !status.ok()) return status;
      bytes = bytes.subspan(part.size());
      if (FileStatus status = advance(part.size()); !status.ok()) return status;
    }
    return {};
  }
  [[nodiscard]] FileStatus advance(std::size_t bytes) {
    done_ += bytes;
    if (progress_ && !progress_(done_, total_))
      return file_error({}, "stopped, nothing is written", {}, Code::option);
    return {};
  }

 private:
  // No multiple of a page: ext4 of Linux 6.18 took twice the time for pieces that begin on one.
  static constexpr std::size_t piece = 10'000'000;
  std::uint64_t done_ = 0, total_;
  const Progress& progress_;
};

// A folder that appears whole or not at all.
class AtomicFolder {
 public:
  AtomicFolder() = default;
  AtomicFolder(const AtomicFolder&) = delete;
  AtomicFolder& operator=(const AtomicFolder&) = delete;
  ~AtomicFolder() {
    std::error_code ignored;
    if (!temporary_.empty()) std::filesystem::remove_all(temporary_, ignored);
  }

  [[nodiscard]] FileStatus create(const std::filesystem::path& target) {
    target_ = target;
    std::filesystem::path temporary = target;
    temporary += "." + std::to_string(::getpid()) + ".tmp";
    std::error_code error;
    if (!std::filesystem::create_directory(temporary, error))
      return system_error(target, "create", error ? error.value() : EEXIST);
    temporary_ = temporary;
    return {};
  }
  [[nodiscard]] const std::filesystem::path& path() const { return temporary_; }

  // A target that exists makes way only now, and comes back if the new one cannot take its place.
  [[nodiscard]] FileStatus commit() {
    std::error_code error;
    std::filesystem::path old = temporary_;
    old += ".old";
    const bool replaces = std::filesystem::exists(target_, error);
    if (replaces) std::filesystem::rename(target_, old, error);
    if (error) return system_error(target_, "replace", error.value());
    std::filesystem::rename(temporary_, target_, error);
    if (error) {
      std::error_code ignored;
      if (replaces) std::filesystem::rename(old, target_, ignored);
      return system_error(target_, "create", error.value());
    }
    temporary_.clear();
    if (replaces) std::filesystem::remove_all(old, error);
    return error ? system_error(old, "remove", error.value()) : FileStatus{};
  }

 private:
  std::filesystem::path target_, temporary_;
};

// The values of a new tensor, in its dtype.
[[nodiscard]] inline FileStatus create_values(const PlanItem& item, const Safetensors* init_file,
                                              std::vector<std::byte>& out) {
  const auto count = static_cast<std::size_t>(item.target.elements());
  out.assign(item.target.byte_size(), std::byte{});
  if (item.initialiser == Initialiser::zero) return {};
  if (item.initialiser == Initialiser::file) {
    const TensorInfo& given = *init_file->find(item.source);
    FileStatus status;
    if (given.dtype == item.target.dtype)
      std::copy(given.bytes.begin(), given.bytes.end(), out.begin());
    else
      visit_dtype(item.target.dtype, [&](auto type) {
        std::vector<decltype(type)> values(count);
        status = read(given, std::span(values));
        std::memcpy(out.data(), values.data(), out.size());
      });
    return status;
  }
  std::vector<float> values(count);
  TorchGenerator generator(item.seed);
  if (item.initialiser == Initialiser::normal) {
    generator.normal(values);
    for (float& value : values) value *= 0.02f;
  } else {
    constexpr float bound = 1.0f / 3.0f;  // 1 / sqrt(fan in) of a depthwise 3x3
    for (float& value : values) value = generator.uniform() * (2 * bound) - bound;
  }
  visit_dtype(item.target.dtype, [&](auto type) {
    for (std::size_t i = 0; i < count; ++i) {
      const auto value = convert<decltype(type)>(values[i]);
      std::memcpy(out.data() + i * sizeof value, &value, sizeof value);
    }
  });
  return {};
}

// One file of the target, from the items of one shard.
[[nodiscard]] inline FileStatus write_shard(const Checkpoint& checkpoint, const Plan& plan, std::size_t shard,
                                            const Safetensors* init_file, const std::filesystem::path& target,
                                            Mover& mover) {
  const Safetensors& source = checkpoint.weights;
  std::vector<TensorSpec> specs;
  for (const PlanItem& item : plan.items)
    if (item.shard == shard && item.from != Source::drop) specs.push_back(item.target);
  // The metadata of a shard is that of the whole: of several shards only "format" is common to all.
  Metadata metadata = source.metadata();
  if (!checkpoint.folder()) metadata.merge(conversion_metadata(plan.conversion));

  SafetensorsWriter writer;
  if (FileStatus status = SafetensorsWriter::create(target, specs, metadata, writer); !status.ok())
    return status;
  std::vector<std::byte> values;
  for (const PlanItem& item : plan.items) {
    if (item.shard != shard || item.from == Source::drop) continue;
    FileStatus status;
    if (item.from == Source::copy) {
      status = mover.move(source.shards()[shard], source.find(item.source)->bytes, writer);
    } else {
      status = create_values(item, init_file, values);
      if (status.ok()) status = writer.write(values);
      if (status.ok()) status = mover.advance(values.size());
    }
    if (!status.ok()) return status;
  }
  return writer.finish();
}

[[nodiscard]] inline FileStatus read_config(const std::filesystem::path& path, nlohmann::ordered_json& out) {
  MappedFile file;
  if (FileStatus status = MappedFile::open(path, file); !status.ok()) return status;
  const std::string_view text(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size());
  if (const std::string why = parse_json(text, out); !why.empty()) return file_error(path, why);
  if (!out.is_object()) return file_error(path, "is not an object");
  return {};
}

[[nodiscard]] inline std::string pretty(const nlohmann::ordered_json& json) { return json.dump(2) + "\n"; }

// The whole model folder, into a folder that is there.
[[nodiscard]] inline FileStatus write_folder(const Checkpoint& checkpoint, const Plan& plan,
                                             const Safetensors* init_file,
                                             const std::filesystem::path& target, Mover& mover) {
  namespace fs = std::filesystem;
  std::error_code error;
  for (const fs::path& folder : plan.folders)
    if (!fs::create_directory(target / folder, error))
      return system_error(target / folder, "create", error.value());

  const Safetensors& source = checkpoint.weights;
  const fs::path transformer =
      checkpoint.transformer == checkpoint.root ? target : target / checkpoint.transformer.filename();
  for (std::size_t shard = 0; shard < source.shards().size(); ++shard) {
    const fs::path file = transformer / source.shards()[shard].path().filename();
    if (FileStatus status = write_shard(checkpoint, plan, shard, init_file, file, mover); !status.ok())
      return status;
  }
  nlohmann::ordered_json config;
  if (FileStatus status = read_config(checkpoint.config(), config); !status.ok()) return status;
  config["linattn"] = conversion_json<nlohmann::ordered_json>(plan.conversion);
  if (FileStatus status = write_file(transformer / "config.json", pretty(config)); !status.ok())
    return status;

  if (source.sharded()) {
    nlohmann::ordered_json index;
    if (FileStatus status = read_config(source.path(), index); !status.ok()) return status;
    nlohmann::ordered_json weight_map = nlohmann::ordered_json::object();
    std::map<std::string, std::string> sorted;
    for (const PlanItem& item : plan.items)
      if (item.from != Source::drop)
        sorted[item.target.name] = source.shards()[item.shard].path().filename().string();
    for (auto& [tensor, file] : sorted) weight_map.emplace(tensor, file);
    index["metadata"]["total_size"] = totals(plan).target_bytes;
    index["weight_map"] = std::move(weight_map);
    if (FileStatus status = write_file(transformer / source.path().filename(), pretty(index)); !status.ok())
      return status;
  }
  for (const fs::path& path : plan.files) {
    MappedFile from;
    AtomicFile to;
    if (FileStatus status = MappedFile::open(checkpoint.root / path, from); !status.ok()) return status;
    if (FileStatus status = AtomicFile::create(target / path, to); !status.ok()) return status;
    if (FileStatus status = mover.move(from, from.bytes(), to); !status.ok()) return status;
    if (FileStatus status = to.commit(); !status.ok()) return status;
  }
  return {};
}

// The target must be of the same kind as the source, must not be it or lie in it, and must not exist unless
// it may be overwritten.
[[nodiscard]] inline FileStatus check_target(const Checkpoint& checkpoint,
                                             const std::filesystem::path& target, bool overwrite) {
  namespace fs = std::filesystem;
  std::error_code error;
  const auto refuse = [&](const char* why) { return file_error(target, why, {}, Code::option); };
  const fs::path whole = fs::weakly_canonical(target, error), root = fs::canonical(checkpoint.root, error);
  if (fs::equivalent(target, checkpoint.root, error) || whole == root) return refuse("is the input itself");
  if (checkpoint.folder() &&
      std::mismatch(root.begin(), root.end(), whole.begin(), whole.end()).first == root.end())
    return refuse("lies in the input folder");
  if (!fs::exists(fs::symlink_status(target, error))) return {};
  if (!overwrite) return refuse("exists already");
  const bool folder = fs::is_directory(target, error);
  if (folder != checkpoint.folder())
    return refuse(folder ? "is a folder, but the input is a file" : "is a file, but the input is a folder");
  if (folder && !fs::exists(target / "transformer" / "config.json", error) &&
      !fs::exists(target / "config.json", error))
    return refuse("is a folder that holds no model, and stays as it is");
  return {};
}

}  // namespace detail

// Writes the converted model: a file for a file, a complete folder for a folder, with the same shards. It
// appears under its name when all of it is on the disk; after any failure nothing is left. Inherited tensors
// are copied byte for byte. Memory does not grow with the model. `overwrite` permits to replace a target of
// the same kind, never the input.
[[nodiscard]] inline FileStatus apply(const Checkpoint& checkpoint, const Plan& plan,
                                      const InheritOptions& options, const std::filesystem::path& target,
                                      bool overwrite = false, const Progress& progress = {}) {
  namespace fs = std::filesystem;
  if (!plan.mismatches.empty())
    return detail::file_error(checkpoint.root, "the plan has mismatches", plan.mismatches[0].tensor,
                              Code::shape);
  fs::path destination = target;
  if (!destination.has_filename()) destination = destination.parent_path();  // "folder/"
  if (FileStatus status = detail::check_target(checkpoint, destination, overwrite); !status.ok())
    return status;
  std::error_code error;
  std::uint64_t total = totals(plan).target_bytes;
  for (const fs::path& path : plan.files) {
    const auto size = fs::file_size(checkpoint.root / path, error);
    if (error) return detail::system_error(checkpoint.root / path, "examine", error.value());
    total += size;
  }
  detail::Mover mover(total, progress);
  if (!checkpoint.folder())
    return detail::write_shard(checkpoint, plan, 0, options.init_file, destination, mover);
  detail::AtomicFolder folder;
  if (FileStatus status = folder.create(destination); !status.ok()) return status;
  if (FileStatus status = detail::write_folder(checkpoint, plan, options.init_file, folder.path(), mover);
      !status.ok())
    return status;
  return folder.commit();
}

LINATTN_END

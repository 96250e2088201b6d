// Which files of a folder are the model, under the names that transformers, diffusers and timm write:
//   STEM.safetensors                        a single file
//   STEM-00001-of-00002.safetensors         shards, which STEM.safetensors.index.json lists
// and of a variant ("fp16") STEM.fp16.safetensors, STEM.fp16-00001-of-00002.safetensors (or, in old files,
// STEM-00001-of-00002.fp16.safetensors), STEM.safetensors.index.fp16.json or STEM.fp16.safetensors.index.json.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <iterator>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <linattn/version.hpp>
#include <linattn/weights/file_status.hpp>
#include <linattn/weights/small_file.hpp>

LINATTN_BEGIN

namespace detail {

// The format's own bound, so that a corrupt length cannot ask for any memory.
inline constexpr std::uint64_t largest_header = 100'000'000;

// What the name of a file says.
struct WeightName {
  enum class Kind : std::uint8_t { other, file, shard, index };
  Kind kind = Kind::other;
  std::string model;  // the stem and the variant: "model.fp16"
  bool only = false;  // the one shard of one
};

// Takes "-00001-of-00002" out of a name. False if it is not there.
inline bool take_shard_number(std::string& name, bool& only) {
  constexpr std::string_view digits = "0123456789", of = "-of-";
  const std::size_t middle = name.rfind(of);
  if (middle == std::string::npos) return false;
  const std::size_t end = std::min(name.size(), name.find_first_not_of(digits, middle + of.size()));
  const std::size_t before = name.find_last_not_of(digits, middle - 1);
  if (middle == 0 || before == std::string::npos || name[before] != '-' || before + 1 == middle ||
      end == middle + of.size() || (end < name.size() && name[end] != '.'))
    return false;
  only = std::stoull(
             "0" + name.substr(middle + of.size(), std::min<std::size_t>(end - middle - of.size(), 18))) == 1;
  name.erase(before, end - before);
  return true;
}

[[nodiscard]] inline WeightName weight_name(std::string_view file) {
  constexpr std::string_view extension = ".safetensors", index = ".safetensors.index", json = ".json";
  WeightName name;
  if (file.starts_with('.')) return name;
  if (file.ends_with(extension)) {
    name.model = file.substr(0, file.size() - extension.size());
    name.kind = take_shard_number(name.model, name.only) ? WeightName::Kind::shard : WeightName::Kind::file;
  } else if (const std::size_t at = file.find(index); at != std::string_view::npos && file.ends_with(json)) {
    const std::string_view variant =
        file.substr(at + index.size(), file.size() - json.size() - at - index.size());
    if (!variant.empty() && (variant.size() == 1 || variant[0] != '.')) return name;
    name.model = std::string(file.substr(0, at)) + std::string(variant);
    name.kind = WeightName::Kind::index;
  }
  return name;
}

// The shards that an index lists. Those that are no names of files in its folder are refused.
[[nodiscard]] inline FileStatus read_index(const std::filesystem::path& path, nlohmann::json& weight_map,
                                           std::set<std::string, std::less<>>& shards) {
  nlohmann::json document;
  if (FileStatus status = read_json_file(path, "an index of shards", document, largest_header); !status.ok())
    return status;
  const auto found = document.find("weight_map");
  if (found == document.end() || !found->is_object()) return file_error(path, "no weight_map");
  for (const auto& item : found->items()) {
    if (!item.value().is_string()) return file_error(path, "file name is not a string", item.key());
    const auto& shard = item.value().get_ref<const std::string&>();
    if (shard.empty() || shard == "." || shard == ".." || shard.find_first_of("/\\") != std::string::npos ||
        shard.find('\0') != std::string::npos)
      return file_error(path, "'" + printable(shard) + "' is not the name of a file in the same folder",
                        item.key());
    shards.insert(shard);
  }
  weight_map = std::move(*found);
  return {};
}

}  // namespace detail

// The models of a folder, by their names: the single file, the shards, the index of each.
class ModelFiles {
 public:
  [[nodiscard]] static FileStatus list(const std::filesystem::path& folder, ModelFiles& out) {
    namespace fs = std::filesystem;
    ModelFiles made;
    made.folder_ = folder;
    std::error_code error, ignored;
    fs::directory_iterator entry(folder, error);
    for (; !error && entry != fs::directory_iterator(); entry.increment(error)) {
      const std::string file = entry->path().filename().string();
      const detail::WeightName name = detail::weight_name(file);
      if (entry->is_directory(ignored)) continue;
      using Kind = detail::WeightName::Kind;
      if (name.kind == Kind::other) {
        if (is_foreign(entry->path())) made.foreign_.insert(file);
        continue;
      }
      Model& model = made.models_[name.model];
      if (name.kind == Kind::index)
        model.indices.push_back(file);
      else if (name.kind == Kind::shard && !name.only)
        model.shards.insert(file);
      else
        model.files.push_back(file);
    }
    if (error) return detail::system_error(folder, "list", error.value());
    for (auto& [name, model] : made.models_) {
      std::sort(model.indices.begin(), model.indices.end());
      std::sort(model.files.begin(), model.files.end());
    }
    out = std::move(made);
    return {};
  }

  // The file or the index of the model: that of diffusion_pytorch_model or model; else of the only variant of one of
  // them; else the only one there is. `note` says what a user should know of the choice, where there is something.
  [[nodiscard]] FileStatus choose(std::filesystem::path& out, std::string& note) const {
    for (const std::string_view stem : stems)
      if (const auto found = models_.find(stem); found != models_.end())
        return open(found->second, {}, out, note);
    for (const std::string_view stem : stems) {
      std::vector<Models::const_iterator> variants;
      for (auto i = models_.begin(); i != models_.end(); ++i)
        if (i->first.starts_with(std::string(stem) + ".")) variants.push_back(i);
      if (variants.size() > 1) return several(variants);
      if (variants.size() == 1)
        return open(variants[0]->second, variants[0]->first.substr(stem.size() + 1), out, note);
    }
    // Shards may have any name.
    Names listed;
    std::string absent;
    for (const auto& [name, model] : models_)
      for (const std::string& index : model.indices)
        if (FileStatus status = read_shards(index, listed, absent); !status.ok()) return status;
    std::vector<Models::const_iterator> others;
    for (auto i = models_.begin(); i != models_.end(); ++i)
      if (!i->second.indices.empty() || !i->second.shards.empty() ||
          std::any_of(i->second.files.begin(), i->second.files.end(),
                      [&](const std::string& file) { return !listed.contains(file); }))
        others.push_back(i);
    if (others.size() > 1) return several(others);
    if (others.size() == 1) return open(others[0]->second, {}, out, note);
    if (foreign_.empty()) return detail::file_error(folder_, "holds no safetensors file");
    return detail::file_error(folder_,
                              "holds no safetensors file, but " + detail::printable(*foreign_.begin()) +
                                  ": load it in PyTorch and write it with safetensors.torch.save_file");
  }

  // What a copy of the folder should leave out: shards that no index lists, and indices of variants whose shards are
  // not there. Refused is what leaves open which file is the model.
  [[nodiscard]] FileStatus stale(std::set<std::string>& out) const {
    for (const auto& [name, model] : models_) {
      const bool plain = std::find(stems.begin(), stems.end(), name) != stems.end();
      Names listed;
      std::string absent;
      if (!model.indices.empty()) {
        if (FileStatus status = read_shards(model.indices[0], listed, absent); !status.ok()) return status;
      } else if (model.files.empty()) {
        absent = "an index";
      }
      if (absent.empty() || plain) {
        std::filesystem::path file;
        std::string ignored;
        if (FileStatus status = open(model, {}, file, ignored); !status.ok()) return status;
      } else {
        out.insert(model.indices.begin(), model.indices.end());
        listed.clear();
      }
      std::set_difference(model.shards.begin(), model.shards.end(), listed.begin(), listed.end(),
                          std::inserter(out, out.end()));
    }
    return {};
  }

  [[nodiscard]] static FileStatus lists_absent(const std::filesystem::path& index, std::string_view shard) {
    return detail::file_error(index, "lists '" + detail::printable(shard) +
                                         "', which is not there: fetch it as well, or remove the index");
  }

  // Whether a file of weights has one of the names that transformers and diffusers give.
  [[nodiscard]] static bool is_standard(std::string_view file) {
    const detail::WeightName name = detail::weight_name(file);
    return name.kind != detail::WeightName::Kind::other &&
           std::any_of(stems.begin(), stems.end(), [&](std::string_view stem) {
             return name.model == stem || name.model.starts_with(std::string(stem) + ".");
           });
  }

  // Weights in the formats of other programs.
  [[nodiscard]] static bool is_foreign(const std::filesystem::path& file) {
    static constexpr std::array<std::string_view, 10> extensions{".bin",  ".pt", ".pth",     ".ckpt", ".pkl",
                                                                 ".gguf", ".h5", ".msgpack", ".onnx", ".npz"};
    return std::find(extensions.begin(), extensions.end(), file.extension().string()) != extensions.end();
  }

 private:
  struct Model {
    std::vector<std::string> indices, files;
    std::set<std::string, std::less<>> shards;
  };
  using Models = std::map<std::string, Model, std::less<>>;
  using Names = std::set<std::string, std::less<>>;
  static constexpr std::array<std::string_view, 2> stems{"diffusion_pytorch_model", "model"};

  // The shards of an index, and one of them that is not there.
  [[nodiscard]] FileStatus read_shards(const std::string& index, Names& shards, std::string& absent) const {
    nlohmann::json ignored;
    if (FileStatus status = detail::read_index(folder_ / index, ignored, shards); !status.ok()) return status;
    std::error_code error;
    for (const std::string& shard : shards)
      if (absent.empty() && !std::filesystem::exists(folder_ / shard, error)) absent = shard;
    return {};
  }

  [[nodiscard]] FileStatus several(const std::vector<Models::const_iterator>& models) const {
    std::string names;
    for (std::size_t i = 0; i < std::min<std::size_t>(models.size(), 3); ++i)
      names += (i > 0 ? ", " : "") + detail::printable(first_of(models[i]->second));
    return detail::file_error(folder_, "holds " + std::to_string(models.size()) + " models: name one (" +
                                           names + (models.size() > 3 ? ", ..." : "") + ")");
  }
  [[nodiscard]] static const std::string& first_of(const Model& model) {
    if (!model.indices.empty()) return model.indices[0];
    return model.files.empty() ? *model.shards.begin() : model.files[0];
  }

  // The file or index of one model, where it is one.
  [[nodiscard]] FileStatus open(const Model& model, std::string_view variant, std::filesystem::path& out,
                                std::string& note) const {
    if (model.indices.size() > 1)
      return refuse("holds two indices of one model, " + shown(model.indices[0]) + " and " +
                    shown(model.indices[1]) + ": remove one");
    if (model.indices.empty() && model.files.empty())
      return refuse("holds " + shown(*model.shards.begin()) +
                    ", a shard, but no index that lists it: fetch the index (" +
                    "*.safetensors.index.json) as well");
    if (model.files.size() > 1)
      return refuse("holds two files of one model, " + shown(model.files[0]) + " and " +
                    shown(model.files[1]) + ": remove one");
    out = folder_ / first_of(model);
    if (!variant.empty())
      note = folder_.string() + ": no plain weights are there, so the variant " + std::string(variant) +
             " is read, " + shown(first_of(model));
    std::string passed_over, why = "that no index lists";
    if (model.indices.empty()) {
      if (!model.shards.empty()) passed_over = *model.shards.begin();
    } else {
      Names listed;
      std::string absent;
      if (FileStatus status = read_shards(model.indices[0], listed, absent); !status.ok()) return status;
      if (!model.files.empty() && !listed.contains(model.files[0]))
        return refuse("holds " + shown(model.files[0]) + " beside " + shown(model.indices[0]) +
                      ", which does not list it" +
                      (absent.empty() ? "" : ", but " + shown(absent) + ", which is not there") +
                      ": remove the one that is out of date");
      if (!absent.empty()) return lists_absent(out, absent);
      for (const std::string& shard : model.shards)
        if (passed_over.empty() && !listed.contains(shard)) passed_over = shard;
      why = "that it does not list";
    }
    if (!passed_over.empty())
      note += (note.empty() ? folder_.string() + ": " : "; ") + shown(first_of(model)) + " is read, not " +
              shown(passed_over) + ", a shard " + why;
    return {};
  }
  [[nodiscard]] FileStatus refuse(std::string why) const {
    return detail::file_error(folder_, std::move(why));
  }

  [[nodiscard]] static std::string shown(std::string_view name) { return detail::printable(name); }

  std::filesystem::path folder_;
  Models models_;
  std::set<std::string> foreign_;
};

LINATTN_END

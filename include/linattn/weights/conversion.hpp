// What a converted checkpoint says of its Test-Time-Training modules, and the tensors that such a module has.
//
// A module is known by its stem: the part of its tensors' names before ".w1", as they stand in the file, e.g.
// "model.diffusion_model.joint_blocks.3.x_block.attn2", "transformer_blocks.3.attn2" or "blocks.3.attn". A
// single file carries in its __metadata__ "linattn.format" = "1" and for every module "linattn.<stem>.<field>";
// a folder carries in its config.json {"linattn": {"format": 1, "modules": {<stem>: {<field>: value}}}}.
// Fields: inner_model, inner_loss, inner_lr, key_norm_eps, conv, and neighborhood where it is not 0.
// "linattn.heads" is optional: the heads of every attention, for those whose tensors do not tell it.
#pragma once

#include <array>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <linattn/version.hpp>
#include <linattn/weights/file_status.hpp>
#include <linattn/weights/json.hpp>
#include <linattn/weights/safetensors.hpp>
#include <linattn/weights/small_file.hpp>

LINATTN_BEGIN

// The inner models and losses of ops/ttt.hpp, as data.
enum class InnerModelKind : std::uint8_t { linear, mlp, swiglu };
enum class InnerLossKind : std::uint8_t { inner_product, squared_error };

[[nodiscard]] constexpr std::string_view name(InnerModelKind kind) {
  constexpr std::array<std::string_view, 3> names{"linear", "mlp", "swiglu"};
  return names[static_cast<std::size_t>(kind)];
}
[[nodiscard]] constexpr std::string_view name(InnerLossKind kind) {
  return kind == InnerLossKind::inner_product ? "inner_product" : "squared_error";
}
// How many matrices w1, w2, w3 the model has.
[[nodiscard]] constexpr std::size_t matrix_count(InnerModelKind kind) {
  return static_cast<std::size_t>(kind) + 1;
}

// All that a reader needs beyond the tensors. The defaults are the paper's.
struct ModuleConversion {
  InnerModelKind inner_model = InnerModelKind::swiglu;
  InnerLossKind inner_loss = InnerLossKind::inner_product;
  double inner_lr = 1;
  double key_norm_eps = 1;
  bool conv = true;
  // The window of the neighborhood attention that the TTT output is averaged with, half and half, as DiT5's
  // MixedAttention does; 0: none. Its queries and keys are scaled and shifted channel by channel first.
  Index neighborhood = 0;

  bool operator==(const ModuleConversion&) const = default;
};

// "swiglu, inner product, conv"
[[nodiscard]] inline std::string describe(const ModuleConversion& module) {
  std::string text(name(module.inner_model));
  text += module.inner_loss == InnerLossKind::inner_product ? ", inner product" : ", squared error";
  text += module.conv ? ", conv" : ", no conv";
  if (module.neighborhood > 0)
    text += ", beside neighborhood attention of " + std::to_string(module.neighborhood) + " x " +
            std::to_string(module.neighborhood);
  return text;
}

// DiT5's MixedAttention as the paper has it.
inline constexpr ModuleConversion dit5_module{
    .inner_model = InnerModelKind::mlp, .inner_loss = InnerLossKind::squared_error, .neighborhood = 5};

// Stem -> what became of the module. Modules that are not in it are softmax attention.
using Conversion = std::map<std::string, ModuleConversion, std::less<>>;

// The parameters of a module, relative to its stem: w1.. [1, heads, d, d]; q_conv2d.weight [heads * d, 1, 3, 3]
// and q_conv2d.bias [heads * d], k_conv2d likewise; beside neighborhood attention qk_scale_ttt and qk_offset_ttt
// [1, 1, heads * d, 2], column 0 for the queries and 1 for the keys.
[[nodiscard]] inline std::vector<TensorSpec> module_tensors(std::string_view stem,
                                                            const ModuleConversion& module, Index heads,
                                                            Index head_dim, Dtype dtype) {
  std::vector<TensorSpec> specs;
  const std::string dot = std::string(stem) + ".";
  for (std::size_t i = 1; i <= matrix_count(module.inner_model); ++i)
    specs.push_back({dot + "w" + std::to_string(i), dtype, {1, heads, head_dim, head_dim}});
  if (module.conv)
    for (const char* conv : {"q_conv2d", "k_conv2d"}) {
      specs.push_back({dot + conv + ".weight", dtype, {heads * head_dim, 1, 3, 3}});
      specs.push_back({dot + conv + ".bias", dtype, {heads * head_dim}});
    }
  if (module.neighborhood > 0)
    for (const char* affine : {"qk_scale_ttt", "qk_offset_ttt"})
      specs.push_back({dot + affine, dtype, {1, 1, heads * head_dim, 2}});
  return specs;
}

namespace detail {

inline constexpr std::array<std::string_view, 9> module_suffixes{".w1",
                                                                 ".w2",
                                                                 ".w3",
                                                                 ".q_conv2d.weight",
                                                                 ".q_conv2d.bias",
                                                                 ".k_conv2d.weight",
                                                                 ".k_conv2d.bias",
                                                                 ".qk_scale_ttt",
                                                                 ".qk_offset_ttt"};

// Of a window of neighborhood attention: odd, and no larger than any picture.
inline constexpr Index largest_neighborhood = 1 << 15;

}  // namespace detail

// The stem of a tensor that only a converted attention has, or nothing.
[[nodiscard]] inline std::optional<std::string_view> module_stem(std::string_view tensor) {
  for (const std::string_view suffix : detail::module_suffixes)
    if (tensor.ends_with(suffix)) {
      tensor.remove_suffix(suffix.size());
      if (tensor.ends_with(".attn") || tensor.ends_with(".attn2")) return tensor;
    }
  return std::nullopt;
}

namespace detail {

// Field by field from JSON values; a file's __metadata__ holds the same as strings.
[[nodiscard]] inline std::string parse_module(const nlohmann::json& fields, ModuleConversion& out) {
  if (!fields.is_object()) return "is not an object";
  for (const char* field : {"inner_model", "inner_loss", "inner_lr", "key_norm_eps", "conv"})
    if (!fields.contains(field)) return "has no " + std::string(field);
  if (fields.size() != (fields.contains("neighborhood") ? 6 : 5))
    return "has a field that this version does not know";

  bool known = false;
  for (const auto kind : {InnerModelKind::linear, InnerModelKind::mlp, InnerModelKind::swiglu})
    if (fields["inner_model"] == name(kind)) {
      out.inner_model = kind;
      known = true;
    }
  if (!known) return "has inner_model " + printable(fields["inner_model"].dump(-1, ' ', true));
  known = false;
  for (const auto kind : {InnerLossKind::inner_product, InnerLossKind::squared_error})
    if (fields["inner_loss"] == name(kind)) {
      out.inner_loss = kind;
      known = true;
    }
  if (!known) return "has inner_loss " + printable(fields["inner_loss"].dump(-1, ' ', true));

  if (!fields["inner_lr"].is_number() || !(std::abs(fields["inner_lr"].get<double>()) <= 1e6))
    return "has an inner_lr that is no finite number from -1e6 to 1e6";
  out.inner_lr = fields["inner_lr"].get<double>();
  if (!fields["key_norm_eps"].is_number() ||
      !(fields["key_norm_eps"].get<double>() > 0 && fields["key_norm_eps"].get<double>() <= 1))
    return "has a key_norm_eps that is no positive number up to 1";
  out.key_norm_eps = fields["key_norm_eps"].get<double>();
  if (!fields["conv"].is_boolean()) return "has a conv that is neither true nor false";
  out.conv = fields["conv"].get<bool>();
  if (!fields.contains("neighborhood")) return {};
  const nlohmann::json& window = fields["neighborhood"];
  if (!window.is_number() || !(window.get<double>() >= 0 && window.get<double>() <= largest_neighborhood))
    return "has a neighborhood that is no size of a window";
  out.neighborhood = static_cast<Index>(window.get<double>());
  if (static_cast<double>(out.neighborhood) != window.get<double>() ||
      (out.neighborhood != 0 && out.neighborhood % 2 == 0))
    return "has a neighborhood that is neither 0 nor odd";
  return {};
}

[[nodiscard]] inline FileStatus parse_modules(const std::filesystem::path& path,
                                              const nlohmann::json& linattn, Conversion& out) {
  const auto has = [&](const char* key) { return linattn.contains(key); };
  if (!linattn.is_object() || !has("format") || linattn["format"] != 1)
    return file_error(path, "linattn.format is not 1, the only format that this version reads");
  if (!has("modules") || !linattn["modules"].is_object() || linattn.size() != (has("heads") ? 3 : 2))
    return file_error(path, "linattn holds something other than format, heads and modules");
  for (const auto& item : linattn["modules"].items()) {
    ModuleConversion module;
    if (const std::string why = parse_module(item.value(), module); !why.empty())
      return file_error(path, "linattn module " + printable(item.key()) + " " + why);
    out.emplace(item.key(), module);
  }
  return {};
}

// The entries "linattn.*" of __metadata__ as the object that config.json would hold. Null if there are none.
[[nodiscard]] inline std::string collect_metadata(const Metadata& metadata, nlohmann::json& out) {
  constexpr std::string_view prefix = "linattn.";
  for (const auto& [key, value] : metadata) {
    if (!key.starts_with(prefix)) continue;
    if (out.is_null()) out = {{"modules", nlohmann::json::object()}};
    const std::string rest = key.substr(prefix.size());
    const std::size_t dot = rest.rfind('.');
    const std::string field = dot == std::string::npos ? rest : rest.substr(dot + 1);
    nlohmann::json parsed = value;
    if (field == "format" || field == "heads" || field == "inner_lr" || field == "key_norm_eps" ||
        field == "neighborhood") {
      double number = 0;
      const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
      if (error != std::errc() || end != value.data() + value.size())
        return "metadata " + printable(key) + " is '" + printable(value) + "', which is no number";
      parsed = number;
    } else if (value == "true" || value == "false") {
      parsed = value == "true";
    }
    if (dot != std::string::npos)
      out["modules"][rest.substr(0, dot)][field] = std::move(parsed);
    else if (field == "format" || field == "heads")
      out[field] = std::move(parsed);
    else
      return "metadata " + printable(key) + " is not known to this version";
  }
  return {};
}

// The tensors of a module must be exactly those of its conversion.
[[nodiscard]] inline FileStatus check_module(const Safetensors& model, const std::string& stem,
                                             const ModuleConversion& module) {
  const TensorInfo* w1 = model.find(stem + ".w1");
  if (w1 == nullptr) return file_error(model.path(), "is missing", stem + ".w1");
  if (w1->shape.size() != 4 || w1->shape[0] != 1 || w1->shape[1] < 1 || w1->shape[2] < 1 ||
      w1->shape[2] != w1->shape[3] || w1->shape[1] > std::numeric_limits<Index>::max() / w1->shape[2])
    return file_error(model.path(), "is " + describe(*w1) + ", not [1, heads, head_dim, head_dim]", w1->name,
                      Code::shape);
  std::set<std::string, std::less<>> wanted;
  for (const TensorSpec& spec : module_tensors(stem, module, w1->shape[1], w1->shape[2], w1->dtype)) {
    const TensorInfo* found = model.find(spec.name);
    if (found == nullptr) return file_error(model.path(), "is missing", spec.name);
    if (found->shape != spec.shape)
      return file_error(model.path(), "is " + describe(*found) + ", but " + describe(spec) + " is needed",
                        spec.name, Code::shape);
    if (!holds<double>(found->dtype) && !holds<float>(found->dtype) && !holds<half>(found->dtype) &&
        !holds<bfloat16>(found->dtype))
      return file_error(model.path(), "is " + describe(*found) + ": F64, F32, F16 or BF16 is needed",
                        spec.name, Code::option);
    wanted.insert(spec.name);
  }
  for (const std::string_view suffix : module_suffixes)
    if (const std::string tensor = stem + std::string(suffix);
        model.find(tensor) != nullptr && !wanted.contains(tensor))
      return file_error(model.path(),
                        "is not a tensor of a module with inner model " +
                            std::string(name(module.inner_model)) +
                            (module.conv ? " and conv" : " and no conv") +
                            (module.neighborhood > 0 ? " beside neighborhood attention" : ""),
                        tensor);
  return {};
}

}  // namespace detail

// Reads which modules of a checkpoint are converted, and how. `config` is the config.json of a diffusers
// transformer, or empty; without a "linattn" object in it the file's own metadata counts. A checkpoint that
// says nothing has the modules that its tensors tell: SwiGlu with three matrices, Mlp with two, the conv where
// its tensors are, DiT5's form (Mlp, squared error, beside neighborhood attention of 5 x 5) where qk_scale_ttt
// is, else the defaults. An original checkpoint gives an empty map. Tensors and words that disagree are an
// error, and so is a module that is only half there.
[[nodiscard]] inline FileStatus read_conversion(const Safetensors& model, Conversion& out,
                                                const std::filesystem::path& config = {}) {
  using nlohmann::json;
  out.clear();
  std::filesystem::path source = model.path();
  json said;
  if (!config.empty()) {
    json document;
    if (FileStatus status = read_json_file(config, "a configuration", document); !status.ok()) return status;
    if (document.contains("linattn")) {
      said = document["linattn"];
      source = config;
    }
  }
  if (said.is_null())
    if (const std::string why = detail::collect_metadata(model.metadata(), said); !why.empty())
      return detail::file_error(source, why);
  if (!said.is_null())
    if (FileStatus status = detail::parse_modules(source, said, out); !status.ok()) return status;

  for (const TensorInfo& info : model.tensors()) {
    const auto stem = module_stem(info.name);
    if (!stem || out.contains(*stem)) continue;
    if (!said.is_null())
      return detail::file_error(source, "linattn does not list the module of this tensor", info.name);
    const auto has = [&](const char* suffix) { return model.find(std::string(*stem) + suffix) != nullptr; };
    if (!has(".w2"))
      return detail::file_error(
          model.path(),
          "tells no inner model: there are no linattn metadata, and " + std::string(*stem) + ".w2 is missing",
          info.name);
    ModuleConversion& module = out[std::string(*stem)];
    module = has(".qk_scale_ttt") ? dit5_module : ModuleConversion{};
    if (!has(".qk_scale_ttt") && !has(".w3")) module.inner_model = InnerModelKind::mlp;
    module.conv = has(".q_conv2d.weight");
  }
  for (const auto& [stem, module] : out) {
    if (FileStatus status = detail::check_module(model, stem, module); !status.ok()) return status;
    const TensorInfo& w1 = *model.find(stem + ".w1");
    if (said.is_object() && said.contains("heads") && said["heads"] != w1.shape[1])
      return detail::file_error(
          source, "is " + describe(w1) + ", but linattn.heads is " + detail::printable(said["heads"].dump()),
          w1.name, Code::shape);
  }
  return {};
}

namespace detail {

[[nodiscard]] inline std::string shortest(double value) {
  std::array<char, 32> text{};
  const auto end = std::to_chars(text.data(), text.data() + text.size(), value).ptr;
  return {text.data(), end};
}

}  // namespace detail

// A conversion as entries of __metadata__; read_conversion reads them back. `heads` where it is to be said.
[[nodiscard]] inline Metadata conversion_metadata(const Conversion& conversion,
                                                  std::optional<Index> heads = std::nullopt) {
  Metadata out{{"linattn.format", "1"}};
  if (heads) out["linattn.heads"] = std::to_string(*heads);
  for (const auto& [stem, module] : conversion) {
    const std::string dot = "linattn." + stem + ".";
    out[dot + "inner_model"] = name(module.inner_model);
    out[dot + "inner_loss"] = name(module.inner_loss);
    out[dot + "inner_lr"] = detail::shortest(module.inner_lr);
    out[dot + "key_norm_eps"] = detail::shortest(module.key_norm_eps);
    out[dot + "conv"] = module.conv ? "true" : "false";
    // Not said where it is 0: what knew no neighborhood can read the file.
    if (module.neighborhood > 0) out[dot + "neighborhood"] = std::to_string(module.neighborhood);
  }
  return out;
}

// A conversion as the "linattn" object of a config.json.
template <class Json>
[[nodiscard]] Json conversion_json(const Conversion& conversion, std::optional<Index> heads = std::nullopt) {
  Json modules = Json::object();
  for (const auto& [stem, module] : conversion) {
    modules[stem] = {{"inner_model", name(module.inner_model)},
                     {"inner_loss", name(module.inner_loss)},
                     {"inner_lr", module.inner_lr},
                     {"key_norm_eps", module.key_norm_eps},
                     {"conv", module.conv}};
    if (module.neighborhood > 0) modules[stem]["neighborhood"] = module.neighborhood;
  }
  Json out{{"format", 1}};
  if (heads) out["heads"] = *heads;
  out["modules"] = std::move(modules);
  return out;
}

LINATTN_END

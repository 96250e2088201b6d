#include "checkpoint.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <stdexcept>
#include <utility>

#include <linattn/weights/recognise.hpp>

namespace sd35 {
namespace {

namespace fs = std::filesystem;
using linattn::Safetensors;
using linattn::TensorInfo;

struct ComponentTraits {
  std::string_view name;
  std::string_view folder;                   // in a diffusers directory
  std::array<std::string_view, 3> prefixes;  // in a file that holds several components
  // A tensor that begins so tells the component: official, diffusers; and the same of its other half.
  std::array<std::string_view, 4> signatures;
};

const ComponentTraits& traits(Component component) {
  static constexpr std::string_view clip = "text_model.embeddings.token_embedding.";
  static constexpr std::array<ComponentTraits, 5> table{{
      {"SD3.5 transformer",
       "transformer",
       {"model.diffusion_model.", "", ""},
       {"joint_blocks.0.", "transformer_blocks.0.attn.add_q_proj."}},
      {"VAE",
       "vae",
       {"first_stage_model.", "vae.", ""},
       {"decoder.mid.block_1.", "decoder.mid_block.", "encoder.mid.block_1.", "encoder.mid_block."}},
      {"CLIP-L text encoder", "text_encoder", {"text_encoders.clip_l.transformer.", "", ""}, {clip, clip}},
      {"CLIP-G text encoder", "text_encoder_2", {"text_encoders.clip_g.transformer.", "", ""}, {clip, clip}},
      {"T5 text encoder",
       "text_encoder_3",
       {"text_encoders.t5xxl.transformer.", "", ""},
       {"encoder.block.0.", "encoder.block.0."}},
  }};
  return table[static_cast<std::size_t>(component)];
}

struct Renaming {
  std::string_view official, diffusers;
};

// The first rule whose official part begins the name.
template <std::size_t N>
std::string rename(std::string_view name, const std::array<Renaming, N>& rules) {
  for (const Renaming& rule : rules)
    if (name.starts_with(rule.official))
      return std::string(rule.diffusers) + std::string(name.substr(rule.official.size()));
  return std::string(name);
}

// Takes "<number>." off the front of `rest`; -1 if it is not there.
Index take_index(std::string_view& rest) {
  Index index = -1;
  const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), index);
  if (error != std::errc{} || end == rest.data() + rest.size() || *end != '.') return -1;
  rest.remove_prefix(static_cast<std::size_t>(end - rest.data()) + 1);
  return index;
}

std::string diffusers_transformer_name(std::string_view name) {
  static constexpr std::array<Renaming, 8> outside{{
      {"x_embedder.proj.", "pos_embed.proj."},
      {"t_embedder.mlp.0.", "time_text_embed.timestep_embedder.linear_1."},
      {"t_embedder.mlp.2.", "time_text_embed.timestep_embedder.linear_2."},
      {"y_embedder.mlp.0.", "time_text_embed.text_embedder.linear_1."},
      {"y_embedder.mlp.2.", "time_text_embed.text_embedder.linear_2."},
      {"final_layer.adaLN_modulation.1.", "norm_out.linear."},
      {"final_layer.linear.", "proj_out."},
      {"pos_embed", "pos_embed.pos_embed"},
  }};
  static constexpr std::array<Renaming, 26> inside{{
      {"x_block.adaLN_modulation.1.", "norm1.linear."},
      {"x_block.attn.q.", "attn.to_q."},
      {"x_block.attn.k.", "attn.to_k."},
      {"x_block.attn.v.", "attn.to_v."},
      {"x_block.attn.ln_q.", "attn.norm_q."},
      {"x_block.attn.ln_k.", "attn.norm_k."},
      {"x_block.attn.proj.", "attn.to_out.0."},
      {"x_block.attn.", "attn."},  // what a conversion adds: w1, q_conv2d, ...
      {"x_block.attn2.q.", "attn2.to_q."},
      {"x_block.attn2.k.", "attn2.to_k."},
      {"x_block.attn2.v.", "attn2.to_v."},
      {"x_block.attn2.ln_q.", "attn2.norm_q."},
      {"x_block.attn2.ln_k.", "attn2.norm_k."},
      {"x_block.attn2.proj.", "attn2.to_out.0."},
      {"x_block.attn2.", "attn2."},
      {"x_block.mlp.fc1.", "ff.net.0.proj."},
      {"x_block.mlp.fc2.", "ff.net.2."},
      {"context_block.adaLN_modulation.1.", "norm1_context.linear."},
      {"context_block.attn.q.", "attn.add_q_proj."},
      {"context_block.attn.k.", "attn.add_k_proj."},
      {"context_block.attn.v.", "attn.add_v_proj."},
      {"context_block.attn.ln_q.", "attn.norm_added_q."},
      {"context_block.attn.ln_k.", "attn.norm_added_k."},
      {"context_block.attn.proj.", "attn.to_add_out."},
      {"context_block.mlp.fc1.", "ff_context.net.0.proj."},
      {"context_block.mlp.fc2.", "ff_context.net.2."},
  }};
  static constexpr std::string_view blocks = "joint_blocks.";
  if (!name.starts_with(blocks)) return rename(name, outside);
  std::string_view rest = name.substr(blocks.size());
  const Index block = take_index(rest);
  if (block < 0) return std::string(name);
  return "transformer_blocks." + std::to_string(block) + "." + rename(rest, inside);
}

// Files of before 2023, such as sd-vae-ft-mse, name the parts of an attention otherwise.
std::string old_attention_name(std::string name) {
  static constexpr std::array<Renaming, 4> parts{
      {{"to_q.", "query."}, {"to_k.", "key."}, {"to_v.", "value."}, {"to_out.0.", "proj_attn."}}};
  static constexpr std::string_view attention = ".attentions.0.";
  const std::size_t at = name.find(attention);
  if (at == std::string::npos) return name;
  const std::size_t part = at + attention.size();
  return name.substr(0, part) + rename(std::string_view(name).substr(part), parts);
}

std::string diffusers_vae_name(std::string_view name, Index levels) {
  static constexpr std::array<Renaming, 8> outside{{
      {"norm_out.", "conv_norm_out."},
      {"mid.block_1.", "mid_block.resnets.0."},
      {"mid.block_2.", "mid_block.resnets.1."},
      {"mid.attn_1.norm.", "mid_block.attentions.0.group_norm."},
      {"mid.attn_1.q.", "mid_block.attentions.0.to_q."},
      {"mid.attn_1.k.", "mid_block.attentions.0.to_k."},
      {"mid.attn_1.v.", "mid_block.attentions.0.to_v."},
      {"mid.attn_1.proj_out.", "mid_block.attentions.0.to_out.0."},
  }};
  static constexpr std::array<Renaming, 2> inside{
      {{"upsample.", "upsamplers.0."}, {"downsample.", "downsamplers.0."}}};
  static constexpr std::string_view up = "up.", down = "down.", block = "block.", shortcut = "nin_shortcut.";
  const std::size_t dot = name.find('.') + 1;  // behind "encoder." or "decoder."
  const std::string side(name.substr(0, dot));
  if (side != "decoder." && side != "encoder.") return std::string(name);
  std::string_view rest = name.substr(dot);
  const bool rises = rest.starts_with(up);
  if (!rises && !rest.starts_with(down)) return side + rename(rest, outside);
  rest.remove_prefix(rises ? up.size() : down.size());
  const Index level = take_index(rest);
  if (level < 0) return std::string(name);
  // diffusers counts the levels in the order in which they run
  const std::string result =
      side +
      (rises ? "up_blocks." + std::to_string(levels - 1 - level) : "down_blocks." + std::to_string(level)) +
      ".";
  if (!rest.starts_with(block)) return result + rename(rest, inside);
  rest.remove_prefix(block.size());
  const Index index = take_index(rest);
  if (index < 0) return std::string(name);
  const std::string resnet = result + "resnets." + std::to_string(index) + ".";
  if (rest.starts_with(shortcut))
    return resnet + "conv_shortcut." + std::string(rest.substr(shortcut.size()));
  return resnet + std::string(rest);
}

// What the names of a component begin with, and whether they are diffusers'.
struct Naming {
  std::string prefix;
  bool diffusers = false;
};

// The first prefix of the component under which a tensor tells it, whatever wrappers are in the prefix.
std::optional<Naming> find_naming(const Safetensors& files, const ComponentTraits& wanted) {
  std::optional<Naming> found;
  std::pair<std::size_t, std::size_t> best;  // prefix and signature
  for (const TensorInfo& info : files.tensors())
    for (std::size_t i = 0; i < wanted.signatures.size(); ++i) {
      const std::size_t at =
          wanted.signatures[i].empty() ? std::string::npos : info.name.find(wanted.signatures[i]);
      if (at == std::string::npos) continue;
      const std::string prefix = info.name.substr(0, at);
      const auto plain =
          std::find(wanted.prefixes.begin(), wanted.prefixes.end(), linattn::without_wrappers(prefix));
      if (plain == wanted.prefixes.end()) continue;
      const std::pair rank(static_cast<std::size_t>(plain - wanted.prefixes.begin()), i);
      if (found && rank == best && prefix != found->prefix)
        throw std::runtime_error(files.path().string() + ": holds two models of a kind (" +
                                 std::string(wanted.name) + "), below '" +
                                 linattn::detail::printable(found->prefix) + "' and '" +
                                 linattn::detail::printable(prefix) + "'");
      if (found && rank >= best) continue;
      found = Naming{prefix, i % 2 == 1};
      best = rank;
    }
  return found;
}

// What a file without a component of SD3.5 is instead, if that can be told.
std::string guess_family(const Safetensors& files) {
  static constexpr std::array<std::pair<std::string_view, std::string_view>, 8> known{{
      {"double_blocks.", "a Flux transformer"},
      {"model.diffusion_model.double_blocks.", "a Flux model"},
      {"model.diffusion_model.input_blocks.", "a Stable Diffusion 1, 2 or XL model"},
      {"down_blocks.", "a U-Net of Stable Diffusion 1, 2 or XL"},
      {"transformer_blocks.", "a diffusion transformer of another family"},
      {"blocks.", "a vision or diffusion transformer of another family"},
      {"lora_", "a LoRA"},
      {"model.diffusion_model.joint_blocks.", "an SD3 or SD3.5 model file"},
  }};
  for (const auto& [beginning, family] : known)
    if (files.holds_below(beginning)) return "; it looks like " + std::string(family);
  return {};
}

// The part of a fused tensor that `.q.`, `.k.` or `.v.` names: 0, 1, 2, or -1 if the name is of none.
int fused_part(std::string_view tensor) {
  for (int part = 0; part < 3; ++part)
    for (const std::string_view attention : {".attn.", ".attn2."}) {
      const std::string wanted = std::string(attention) + "qkv"[part] + ".";
      if (tensor.find(wanted) != std::string_view::npos) return part;
    }
  return -1;
}

constexpr std::array components{Component::transformer, Component::vae, Component::clip_l, Component::clip_g,
                                Component::t5};

// What the names of all that belongs to a component begin with, its model being below the prefix.
std::string_view domain(std::string_view prefix) {
  constexpr std::string_view model = "transformer.";
  return prefix.ends_with(model) ? prefix.substr(0, prefix.size() - model.size()) : prefix;
}

bool belongs_to(std::string_view stored, Component component) {
  const auto& prefixes = traits(component).prefixes;
  return std::any_of(prefixes.begin(), prefixes.end(), [&](std::string_view prefix) {
    return !prefix.empty() && stored.starts_with(domain(prefix));
  });
}

std::vector<Harmless> harmless_beside(Component component, bool encodes) {
  const std::string text = "the half of CLIP that reads pictures";
  switch (component) {
    case Component::vae:
      if (encodes) return {{"loss.*", "of the training"}};
      return {{"encoder.*", "the encoder, which no picture to start from needs"},
              {"quant_conv.*", "of the encoder, which no picture to start from needs"},
              {"loss.*", "of the training"}};
    case Component::clip_l:
    case Component::clip_g:
      return {{"text_model.embeddings.position_ids", "the numbers from 0"},
              {"logit_scale", "scales a comparison with pictures"},
              {"vision_model.*", text},
              {"visual_projection.weight", text}};
    case Component::t5:
      return {{"encoder.embed_tokens.weight", "another name of shared.weight"},
              {"decoder.*", "the decoder"},
              {"lm_head.weight", "of the decoder"},
              {"spiece_model", "the tokenizer, which --tokenizers names"},
              {"logit_scale", "nothing of T5"},
              {"scaled_fp8", "says that weights have scales, which are applied"},
              {"*.scale_input", "rounds activations to 8 bits, which keep theirs here"}};
    case Component::transformer:
      break;
  }
  return {};
}

}  // namespace

std::string_view name(Component component) { return traits(component).name; }

std::optional<Checkpoint> Checkpoint::open_if_present(const fs::path& path, Component component) {
  const ComponentTraits& wanted = traits(component);
  std::error_code ignored;
  fs::path folder;
  if (fs::is_directory(path, ignored)) {
    folder = path;
    if (fs::is_directory(path / wanted.folder, ignored))
      folder = path / wanted.folder;
    else if (fs::exists(path / "model_index.json", ignored))
      return std::nullopt;
  }

  Checkpoint checkpoint;
  checkpoint.component_ = component;
  checkpoint.files_ = open_weights(folder.empty() ? path : folder);
  const std::optional<Naming> naming = find_naming(*checkpoint.files_, wanted);
  if (!naming) return std::nullopt;
  checkpoint.prefix_ = naming->prefix;
  checkpoint.diffusers_ = naming->diffusers;

  // A lone file of the standard name lies in the folder of its component, too.
  if (folder.empty() && linattn::ModelFiles::is_standard(path.filename().string()))
    folder = path.has_parent_path() ? path.parent_path() : fs::path(".");
  if (!folder.empty()) checkpoint.config_ = read_config(folder);

  const std::string levels = checkpoint.prefix_ + "decoder.up_blocks.";
  if (component == Component::vae && checkpoint.diffusers_)
    while (checkpoint.files_->holds_below(levels + std::to_string(checkpoint.vae_levels_) + "."))
      ++checkpoint.vae_levels_;
  checkpoint.vae_old_attention_ =
      checkpoint.files_->holds_below(checkpoint.prefix_ + "decoder.mid_block.attentions.0.query.") ||
      checkpoint.files_->holds_below(checkpoint.prefix_ + "encoder.mid_block.attentions.0.query.");

  checkpoint.takes_f8_ = component == Component::t5;
  return checkpoint;
}

Checkpoint Checkpoint::open(const fs::path& path, Component component) {
  if (std::optional<Checkpoint> checkpoint = open_if_present(path, component)) return *std::move(checkpoint);
  const ComponentTraits& wanted = traits(component);
  std::error_code ignored;
  if (fs::exists(path / "model_index.json", ignored))
    throw std::runtime_error(path.string() + ": no folder " + std::string(wanted.folder) + ", so no " +
                             std::string(wanted.name));
  Safetensors files;
  const linattn::FileStatus status = Safetensors::open(path, files);
  throw std::runtime_error(path.string() + ": holds no " + std::string(wanted.name) + " (no tensor '" +
                           std::string(wanted.signatures[0]) + "...')" +
                           (status.ok() ? guess_family(files) : ""));
}

std::optional<std::string_view> Checkpoint::own_name(std::string_view stored) const {
  if (const auto name = nn::Checkpoint::own_name(stored); name && !prefix_.empty()) return name;
  const std::string_view own = domain(prefix_);
  if (!own.empty()) return stored.starts_with(own) ? std::optional(stored.substr(own.size())) : std::nullopt;
  for (const Component component : components)
    if (component != component_ && belongs_to(stored, component)) return std::nullopt;
  return stored;
}

std::string Checkpoint::stored_name(std::string_view tensor) const {
  if (component_ == Component::transformer) {
    if (diffusers_) return diffusers_transformer_name(tensor);
    if (fused_part(tensor) >= 0) {
      std::string fused(tensor);
      const std::size_t dot = fused.rfind('.', fused.rfind('.') - 1);
      return fused.replace(dot + 1, 1, "qkv");
    }
  }
  if (component_ == Component::vae && diffusers_) {
    std::string stored = diffusers_vae_name(tensor, vae_levels_);
    return vae_old_attention_ ? old_attention_name(std::move(stored)) : stored;
  }
  return std::string(tensor);
}

Weight Checkpoint::adapt(std::string_view tensor, Weight weight) const {
  if (component_ != Component::transformer) return weight;
  if (swapped_halves(tensor)) weight = copy(weight, true);
  if (!diffusers_ && fused_part(tensor) >= 0) {
    if (weight.shape.empty() || weight.shape[0] % 3 != 0)
      fail(tensor, "expected rows of q, k and v alike, got " + to_string(weight.shape));
    const Index rows = weight.shape[0] / 3;
    weight = weight.rows(fused_part(tensor) * rows, rows);
  }
  return weight;
}

bool Checkpoint::swapped_halves(std::string_view tensor) const {
  if (!diffusers_) return false;
  if (tensor.starts_with("final_layer.adaLN_modulation.1.")) return true;
  const std::size_t at = tensor.find(".context_block.adaLN_modulation.1.");
  // The last context block alone has no projection: its modulation is (shift, scale) only.
  return at != std::string_view::npos &&
         !has(std::string(tensor.substr(0, at)) + ".context_block.attn.proj.weight");
}

std::vector<Ignored> leftovers(const Checkpoint& checkpoint, bool encodes) {
  const Component component = checkpoint.component();
  std::vector<Ignored> ignored = nn::leftovers(checkpoint, "the " + std::string(name(component)) + "'s",
                                               harmless_beside(component, encodes));
  if (component != Component::transformer || checkpoint.full_name("").empty()) return ignored;
  for (const TensorInfo& tensor : checkpoint.files().tensors()) {
    if (std::any_of(components.begin(), components.end(),
                    [&](Component other) { return belongs_to(tensor.name, other); }))
      continue;
    if (tensor.name.find("lora") != std::string::npos)
      throw std::runtime_error(checkpoint.path().string() + ": tensor '" + tensor.name +
                               "' is of a LoRA that is not merged into the weights");
    const std::string names = tensor.name.substr(0, tensor.name.find('.')) + ".*";
    const auto line = std::find_if(ignored.begin(), ignored.end(),
                                   [&](const Ignored& known) { return known.names == names; });
    if (line == ignored.end())
      ignored.push_back({checkpoint.path().string(), names, "belongs to no component of SD3.5", 1});
    else
      ++line->count;
  }
  return ignored;
}

}  // namespace sd35

// One set of names over every layout of an SD3.5 checkpoint.
#include <doctest/doctest.h>

#include <functional>
#include <string>
#include <vector>

#include "sd35/checkpoint.hpp"
#include "sd35_files.hpp"

namespace {

using linattn::Dtype;
using linattn::Index;
using reference::Array;
using reference::Parameters;
using sd35::Checkpoint;
using sd35::Component;
using sd35::Weight;
using sd35_files::Folder;
using sd35_files::Maker;

constexpr Index width = 8, depth = 3;

// A transformer in the official layout: block 0 is dual, block 2 the last.
Parameters make_transformer(Dtype dtype) {
  Maker m(dtype);
  m.add("pos_embed", {1, 16, width});
  m.conv("x_embedder.proj", width, 4, 2);
  for (const char* name : {"t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.mlp.0", "y_embedder.mlp.2"})
    m.linear(name, width, width);
  m.linear("context_embedder", width, 6);
  for (Index i = 0; i < depth; ++i) {
    const std::string block = "joint_blocks." + std::to_string(i) + ".";
    const bool dual = i == 0, last = i + 1 == depth;
    const auto attention = [&](const std::string& name, bool proj) {
      m.linear(name + ".qkv", 3 * width, width);
      m.norm(name + ".ln_q", 4, false);
      m.norm(name + ".ln_k", 4, false);
      if (proj) m.linear(name + ".proj", width, width);
    };
    const auto mlp = [&](const std::string& name) {
      m.linear(name + ".fc1", 2 * width, width);
      m.linear(name + ".fc2", width, 2 * width);
    };
    m.linear(block + "x_block.adaLN_modulation.1", (dual ? 9 : 6) * width, width);
    m.linear(block + "context_block.adaLN_modulation.1", (last ? 2 : 6) * width, width);
    attention(block + "x_block.attn", true);
    if (dual) attention(block + "x_block.attn2", true);
    attention(block + "context_block.attn", !last);
    mlp(block + "x_block.mlp");
    if (!last) mlp(block + "context_block.mlp");
  }
  m.linear("final_layer.adaLN_modulation.1", 2 * width, width);
  m.linear("final_layer.linear", 16, width);
  m.add("joint_blocks.2.x_block.attn.w1", {1, 2, 4, 4});
  m.add("joint_blocks.2.x_block.attn.q_conv2d.weight", {width, 1, 3, 3});
  return std::move(m.parameters);
}

// Every pair of names, official and diffusers, of the table of the two layouts.
const std::vector<std::pair<std::string, std::string>> outside = {
    {"x_embedder.proj", "pos_embed.proj"},
    {"t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"},
    {"t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"},
    {"y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"},
    {"y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"},
    {"context_embedder", "context_embedder"},
    {"final_layer.adaLN_modulation.1", "norm_out.linear"},
    {"final_layer.linear", "proj_out"},
};
const std::vector<std::pair<std::string, std::string>> inside = {
    {"x_block.adaLN_modulation.1", "norm1.linear"},
    {"context_block.adaLN_modulation.1", "norm1_context.linear"},
    {"x_block.attn.ln_q", "attn.norm_q"},
    {"x_block.attn.ln_k", "attn.norm_k"},
    {"x_block.attn.proj", "attn.to_out.0"},
    {"x_block.attn2.ln_q", "attn2.norm_q"},
    {"x_block.attn2.ln_k", "attn2.norm_k"},
    {"x_block.attn2.proj", "attn2.to_out.0"},
    {"context_block.attn.ln_q", "attn.norm_added_q"},
    {"context_block.attn.ln_k", "attn.norm_added_k"},
    {"context_block.attn.proj", "attn.to_add_out"},
    {"x_block.mlp.fc1", "ff.net.0.proj"},
    {"x_block.mlp.fc2", "ff.net.2"},
    {"context_block.mlp.fc1", "ff_context.net.0.proj"},
    {"context_block.mlp.fc2", "ff_context.net.2"},
    {"x_block.attn.w1", "attn.w1"},
    {"x_block.attn.q_conv2d", "attn.q_conv2d"},
};
const std::vector<std::pair<std::string, std::vector<std::string>>> fused = {
    {"x_block.attn.", {"attn.to_q", "attn.to_k", "attn.to_v"}},
    {"x_block.attn2.", {"attn2.to_q", "attn2.to_k", "attn2.to_v"}},
    {"context_block.attn.", {"attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"}},
};

Array rows(const Array& array, std::size_t part, std::size_t parts) {
  std::vector<Index> shape = array.shape;
  shape[0] /= static_cast<Index>(parts);
  Array result(shape);
  std::copy_n(array.values.begin() + static_cast<Index>(part * result.values.size()), result.values.size(),
              result.values.begin());
  return result;
}

Array swap_halves(const Array& array) {
  Array result = rows(array, 1, 2);
  const Array first = rows(array, 0, 2);
  result.shape[0] *= 2;
  result.values.insert(result.values.end(), first.values.begin(), first.values.end());
  return result;
}

// The same model as diffusers would write it.
Parameters to_diffusers(const Parameters& official) {
  Parameters result;
  const auto move = [&](const std::string& from, const std::string& to,
                        const std::function<Array(const Array&)>& f) {
    for (const char* kind : {".weight", ".bias", ""})
      if (const auto found = official.find(from + kind); found != official.end())
        result[to + kind] = f(found->second);
  };
  const auto same = [](const Array& a) { return a; };
  move("pos_embed", "pos_embed.pos_embed", same);
  for (const auto& [from, to] : outside)
    move(from, to, to == "norm_out.linear" ? std::function<Array(const Array&)>(swap_halves) : same);
  for (Index i = 0; i < depth; ++i) {
    const std::string from = "joint_blocks." + std::to_string(i) + ".";
    const std::string to = "transformer_blocks." + std::to_string(i) + ".";
    for (const auto& [a, b] : inside)
      move(from + a, to + b,
           b == "norm1_context.linear" && i + 1 == depth ? std::function<Array(const Array&)>(swap_halves)
                                                         : same);
    for (const auto& [a, names] : fused)
      for (std::size_t part = 0; part < 3; ++part)
        move(from + a + "qkv", to + names[part], [&](const Array& array) { return rows(array, part, 3); });
  }
  return result;
}

std::vector<double> values(const Weight& weight) { return sd35::widen<double>(weight); }

// What a checkpoint gives under the canonical names, whatever its layout.
void check_transformer(const Checkpoint& checkpoint, const Parameters& official) {
  for (const auto& [name, array] : official) {
    CAPTURE(name);
    const std::size_t at = name.find(".qkv.");
    if (at == std::string::npos) {
      REQUIRE(checkpoint.has(name));
      CHECK(values(checkpoint.get(name, array.shape)) == array.values);
      continue;
    }
    for (std::size_t part = 0; part < 3; ++part) {
      const std::string one = name.substr(0, at) + "." + "qkv"[part] + name.substr(at + 4);
      CAPTURE(one);
      const Array expected = rows(array, part, 3);
      REQUIRE(checkpoint.has(one));
      CHECK(values(checkpoint.get(one, expected.shape)) == expected.values);
    }
  }
  CHECK_FALSE(checkpoint.has("joint_blocks.1.x_block.attn2.q.weight"));
  CHECK_FALSE(checkpoint.has("joint_blocks.2.context_block.attn.proj.weight"));
  CHECK_FALSE(checkpoint.has("joint_blocks.3.x_block.attn.q.weight"));
}

TEST_CASE("every layout of a transformer reads alike") {
  const Folder folder;
  const Dtype dtype = Dtype::bf16;
  const Parameters official = make_transformer(dtype), diffusers = to_diffusers(official);
  CHECK(diffusers.size() == official.size() + 2 * 2 * (3 + 1 + 3));  // each fused pair becomes three

  SUBCASE("single file") {
    sd35_files::write(folder / "m.safetensors", official, dtype, "model.diffusion_model.");
    const Checkpoint checkpoint = Checkpoint::open(folder / "m.safetensors", Component::transformer);
    CHECK_FALSE(checkpoint.diffusers());
    CHECK(checkpoint.config().is_null());
    CHECK(checkpoint.stored_names().size() == official.size());
    check_transformer(checkpoint, official);
  }
  SUBCASE("bare and misaligned") {
    sd35_files::write(folder / "m.safetensors", official, dtype, "", 1);
    check_transformer(Checkpoint::open(folder / "m.safetensors", Component::transformer), official);
  }
  SUBCASE("diffusers directory") {
    sd35_files::write_text(folder / "model_index.json", "{}");
    sd35_files::write_text(folder / "transformer/config.json", R"({"num_layers": 3, "qk_norm": "rms_norm"})");
    sd35_files::write(folder / "transformer/diffusion_pytorch_model.safetensors", diffusers, dtype);
    const Checkpoint checkpoint = Checkpoint::open(folder.path(), Component::transformer);
    CHECK(checkpoint.diffusers());
    CHECK(checkpoint.config_number<Index>("num_layers", {1, 3}) == 3);
    CHECK(checkpoint.config_text("qk_norm") == "rms_norm");
    CHECK(checkpoint.config_number<Index>("absent", {1, 3}) == std::nullopt);
    CHECK(checkpoint.confirmed("num_layers", 3) == 3);
    CHECK(checkpoint.confirmed("absent", 5) == 5);
    CHECK_THROWS_WITH_AS((void)checkpoint.config_number<Index>("qk_norm", {0, 9}),
                         doctest::Contains("'qk_norm' is \"rms_norm\", expected a whole number from 0 to 9"),
                         std::runtime_error);
    CHECK_THROWS_WITH_AS((void)checkpoint.config_number<Index>("num_layers", {4, 9}),
                         doctest::Contains("'num_layers' is 3, expected a whole number from 4 to 9"),
                         std::runtime_error);
    CHECK_THROWS_WITH_AS((void)checkpoint.confirmed("num_layers", 4),
                         doctest::Contains("'num_layers' is 3, the tensors have 4"), std::runtime_error);
    CHECK_THROWS_WITH_AS((void)checkpoint.config_text("num_layers"), doctest::Contains("expected a string"),
                         std::runtime_error);
    check_transformer(checkpoint, official);
    CHECK_FALSE(Checkpoint::open_if_present(folder.path(), Component::vae).has_value());
    CHECK_THROWS_WITH_AS((void)Checkpoint::open(folder.path(), Component::t5),
                         doctest::Contains("text_encoder_3"), std::runtime_error);
  }
  SUBCASE("shards, misaligned") {
    Parameters parts[2];
    std::string map;
    std::size_t count = 0;
    for (const auto& [name, array] : diffusers) {
      const std::size_t part = count++ % 2;
      parts[part][name] = array;
      map +=
          (map.empty() ? "" : ", ") + ("\"" + name + "\": \"part-" + std::to_string(part) + ".safetensors\"");
    }
    map += R"(, "unrelated.bytes": "part-1.safetensors")";
    sd35_files::write(folder / "t/part-0.safetensors", parts[0], dtype);
    sd35_files::write(folder / "t/part-1.safetensors", parts[1], dtype, "", 3);
    sd35_files::write_text(folder / "t/diffusion_pytorch_model.safetensors.index.json",
                           "{\"weight_map\": {" + map + "}}");
    check_transformer(Checkpoint::open(folder / "t", Component::transformer), official);
    check_transformer(
        Checkpoint::open(folder / "t/diffusion_pytorch_model.safetensors.index.json", Component::transformer),
        official);
  }
}

TEST_CASE("every layout of a VAE reads alike") {
  const Folder folder;
  Parameters official = sd35_files::make_vae(Dtype::f16, {4, 8, 12}, 2, 5);
  official.merge(sd35_files::make_vae_encoder(Dtype::f16, {4, 8, 12}, 2, 5));
  Parameters diffusers;
  for (const auto& [name, array] : official) {
    std::string to = name;
    const auto replace = [&](const std::string& from, const std::string& by) {
      if (const std::size_t at = to.find(from); at != std::string::npos) to.replace(at, from.size(), by);
    };
    replace("coder.norm_out.", "coder.conv_norm_out.");
    replace("mid.block_1.", "mid_block.resnets.0.");
    replace("mid.block_2.", "mid_block.resnets.1.");
    replace("mid.attn_1.norm.", "mid_block.attentions.0.group_norm.");
    replace("mid.attn_1.proj_out.", "mid_block.attentions.0.to_out.0.");
    for (const char* part : {"q", "k", "v"})
      replace(std::string("mid.attn_1.") + part + ".",
              std::string("mid_block.attentions.0.to_") + part + ".");
    for (int level = 0; level < 3; ++level) {
      const auto rename_level = [&](const std::string& from, const std::string& by) {
        if (to.find("coder." + from) == std::string::npos) return;
        replace(from, by);
        replace(by + "block.", by + "resnets.");
        replace(by + "upsample.", by + "upsamplers.0.");
        replace(by + "downsample.", by + "downsamplers.0.");
        replace("nin_shortcut.", "conv_shortcut.");
      };
      if (to.find("_blocks.") != std::string::npos) break;
      rename_level("up." + std::to_string(level) + ".", "up_blocks." + std::to_string(2 - level) + ".");
      rename_level("down." + std::to_string(level) + ".", "down_blocks." + std::to_string(level) + ".");
    }
    diffusers[to] = array;
    // diffusers keeps the projections of the attention as matrices
    if (to.find("attentions.0.to_") != std::string::npos && to.ends_with("weight"))
      diffusers[to].shape.resize(2);
  }
  REQUIRE(diffusers.size() == official.size());
  sd35_files::write(folder / "single.safetensors", official, Dtype::f16, "first_stage_model.");
  sd35_files::write(folder / "vae/diffusion_pytorch_model.safetensors", diffusers, Dtype::f16);
  for (const char* path : {"single.safetensors", "vae"}) {
    CAPTURE(path);
    const Checkpoint checkpoint = Checkpoint::open(folder / path, Component::vae);
    for (const auto& [name, array] : official) {
      CAPTURE(name);
      REQUIRE(checkpoint.has(name));
      const bool matrix = name.find("attn_1") != std::string::npos && array.shape.size() == 4;
      CHECK(values(matrix ? checkpoint.matrix(name, array.size(0), array.size(1))
                          : checkpoint.get(name, array.shape)) == array.values);
    }
  }
}

TEST_CASE("one file may hold every component") {
  const Folder folder;
  const Parameters clip = sd35_files::make_clip(Dtype::f32, {.layers = 1}, 1);
  const Parameters other = sd35_files::make_clip(Dtype::f32, {.layers = 1}, 2);
  Parameters all;
  const auto insert = [&](const std::string& prefix, const Parameters& parameters) {
    for (const auto& [name, array] : parameters) all[prefix + name] = array;
  };
  insert("model.diffusion_model.", make_transformer(Dtype::f32));
  insert("first_stage_model.", sd35_files::make_vae(Dtype::f32, {4, 8}, 1, 5));
  insert("text_encoders.clip_l.transformer.", clip);
  insert("text_encoders.clip_g.transformer.", other);
  sd35_files::write(folder / "all.safetensors", all, Dtype::f32);
  const std::string tensor = "text_model.embeddings.token_embedding.weight";
  constexpr Index any = Checkpoint::any;
  const auto read = [&](Component component) {
    return values(Checkpoint::open(folder / "all.safetensors", component).get(tensor, {any, any}));
  };
  CHECK(read(Component::clip_l) == clip.at(tensor).values);
  CHECK(read(Component::clip_g) == other.at(tensor).values);
  CHECK(Checkpoint::open(folder / "all.safetensors", Component::vae).has("decoder.conv_in.weight"));
  CHECK_FALSE(Checkpoint::open_if_present(folder / "all.safetensors", Component::t5).has_value());
}

TEST_CASE("a tensor is a component's own below its prefix, and loaded by any copy") {
  const Folder folder;
  Parameters all;
  for (const auto& [name, array] : sd35_files::make_clip(Dtype::f32, {.layers = 1}, 1))
    all["text_encoders.clip_l.transformer." + name] = array;
  const auto one = [](const char* name) { return std::pair<const std::string, Array>(name, Array({2})); };
  all.insert(
      {one("text_encoders.clip_l.logit_scale"), one("text_encoders.t5xxl.transformer.x"), one("alphas")});
  sd35_files::write(folder / "all.safetensors", all, Dtype::f32);
  const Checkpoint clip = Checkpoint::open(folder / "all.safetensors", Component::clip_l);
  CHECK(clip.own_name("text_encoders.clip_l.transformer.text_model.x") == "text_model.x");
  CHECK(clip.own_name("text_encoders.clip_l.logit_scale") == "logit_scale");
  for (const char* other :
       {"text_encoders.t5xxl.transformer.x", "text_encoders.clip_g.logit_scale", "alphas"})
    CHECK_FALSE(clip.own_name(other).has_value());

  CHECK_THROWS_WITH((void)sd35::leftovers(clip),
                    doctest::Contains("more are none of the CLIP-L text encoder's"));
  const Checkpoint copy = clip;
  for (const std::string& name : copy.stored_names()) {
    const std::vector<Index> shape = copy.files().find(copy.full_name(name))->shape;
    if (name != "text_model.final_layer_norm.bias") (void)copy.get(name, shape);
  }
  CHECK_THROWS_WITH((void)sd35::leftovers(clip), doctest::Contains("final_layer_norm.bias' is none of"));
  (void)copy.get("text_model.final_layer_norm.bias", {Checkpoint::any});
  const std::vector<nn::Ignored> ignored = sd35::leftovers(clip);
  REQUIRE(ignored.size() == 1);
  CHECK(ignored[0].count == 1);
  CHECK(ignored[0].names.ends_with("logit_scale"));

  // Without a prefix all is the component's own, but for what has the prefix of another.
  all.clear();
  for (const auto& [name, array] : sd35_files::make_clip(Dtype::f32, {.layers = 1}, 1)) all[name] = array;
  sd35_files::write(folder / "clip.safetensors", all, Dtype::f32);
  const Checkpoint alone = Checkpoint::open(folder / "clip.safetensors", Component::clip_l);
  CHECK(alone.own_name("lora_A") == "lora_A");
  CHECK_FALSE(alone.own_name("text_encoders.clip_g.logit_scale").has_value());
  CHECK_FALSE(alone.own_name("model.diffusion_model.x").has_value());
}

TEST_CASE("a weight outlives its checkpoint") {
  const Folder folder;
  const Parameters clip = sd35_files::make_clip(Dtype::f16, {.layers = 1});
  sd35_files::write(folder / "clip.safetensors", clip, Dtype::f16);
  const Weight weight = Checkpoint::open(folder / "clip.safetensors", Component::clip_l)
                            .get("text_projection.weight", {20, Checkpoint::any});
  CHECK(values(weight) == clip.at("text_projection.weight").values);
  CHECK(values(weight.rows(3, 2)) ==
        std::vector<double>(clip.at("text_projection.weight").values.begin() + 3 * 24,
                            clip.at("text_projection.weight").values.begin() + 5 * 24));
  CHECK_THROWS_AS((void)weight.rows(19, 2), std::logic_error);
}

TEST_CASE("errors name the file, the tensor, and what was expected") {
  const Folder folder;
  sd35_files::write(folder / "clip.safetensors", sd35_files::make_clip(Dtype::f16, {}), Dtype::f16);
  Checkpoint clip = Checkpoint::open(folder / "clip.safetensors", Component::clip_l);
  const auto fails = [&](const auto& f, std::initializer_list<std::string> parts) {
    std::string what;
    try {
      f();
    } catch (const std::runtime_error& error) {
      what = error.what();
    }
    REQUIRE(!what.empty());
    CHECK(what.find('\n') == std::string::npos);
    for (const std::string& part : parts) CHECK_MESSAGE(what.find(part) != std::string::npos, what);
  };
  fails(
      [&] {
        (void)clip.get("text_projection.weight", {20, 30});
      },
      {"clip.safetensors", "'text_projection.weight'", "expected [20, 30]", "got [20, 24]"});
  fails([&] { (void)clip.get("text_projection.weight", {20}); }, {"expected [20]", "got [20, 24]"});
  fails(
      [&] {
        (void)clip.get("visual.weight", {Checkpoint::any, 4});
      },
      {"'visual.weight'", "missing", "[any, 4]"});
  fails([&] { (void)Checkpoint::open(folder / "clip.safetensors", Component::transformer); },
        {"clip.safetensors", "SD3.5 transformer", "joint_blocks.0."});
  fails([&] { (void)Checkpoint::open(folder / "none.safetensors", Component::vae); }, {"none.safetensors"});
  CHECK_THROWS_AS((void)Checkpoint::open_if_present(folder / "none.safetensors", Component::vae),
                  std::runtime_error);

  Parameters flux;
  flux["double_blocks.0.img_attn.qkv.weight"] = Array({3, 3});
  sd35_files::write(folder / "flux.safetensors", flux, Dtype::f16);
  fails([&] { (void)Checkpoint::open(folder / "flux.safetensors", Component::transformer); }, {"Flux"});

  Parameters eight = sd35_files::make_clip(Dtype::f16, {});
  sd35_files::write(folder / "f8.safetensors", eight, Dtype::f8_e4m3);
  fails(
      [&] {
        (void)Checkpoint::open(folder / "f8.safetensors", Component::clip_g)
            .get("text_projection.weight", {20, 24});
      },
      {"8-bit", "16-bit", "text_projection.weight"});
  sd35_files::write(folder / "i32.safetensors", eight, Dtype::i32);
  fails(
      [&] {
        (void)Checkpoint::open(folder / "i32.safetensors", Component::clip_g)
            .get("text_projection.weight", {20, 24});
      },
      {"I32 [20, 24]"});

  sd35_files::write(folder / "c/model.safetensors", eight, Dtype::f16);
  sd35_files::write_text(folder / "c/config.json", "{\"a\": 1, \"a\": 2}");
  fails([&] { (void)Checkpoint::open(folder / "c", Component::clip_l); }, {"config.json", "duplicate"});
  sd35_files::write_text(folder / "c/config.json", "[]");
  fails([&] { (void)Checkpoint::open(folder / "c", Component::clip_l); }, {"config.json", "object"});

  std::vector<std::string> loaded;
  clip.on_load = [&](const std::string& name) { loaded.push_back(name); };
  (void)clip.get("text_projection.weight", {20, 24});
  CHECK(clip.has("text_model.final_layer_norm.weight"));
  CHECK(loaded == std::vector<std::string>{"text_projection.weight"});
}

}  // namespace

#include <doctest/doctest.h>
#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include <linattn/weights/inherit.hpp>

#include "checkpoint_builder.hpp"
#include "temporary_folder.hpp"

using namespace linattn;
using namespace support;
namespace fs = std::filesystem;

namespace {

// A model of the family's structure: 5 blocks of 2 heads of 4 channels, attn2 in the first two.
Sd35Model tiny(Sd35Layout layout, const char* prefix = "") {
  return {.layout = layout,
          .prefix = prefix,
          .depth = 5,
          .width = 8,
          .heads = 2,
          .head_dim = 4,
          .channels = 3,
          .patch = 2,
          .positions = 16,
          .frequencies = 6,
          .pooled = 5,
          .context = 7,
          .hidden = 9,
          .outputs = 12,
          .qk_norm = true,
          .dual_blocks = {0, 1}};
}

CheckpointBuilder official(const char* prefix = "model.diffusion_model.") {
  CheckpointBuilder builder(sd35_tensors(tiny(Sd35Layout::official, prefix)));
  builder.set_dtype(Dtype::f16);
  return builder;
}

// A pipeline folder: a transformer in two shards, other components, and things that are no part of a model.
void write_folder(const fs::path& root) {
  std::vector<TensorSpec> specs = sd35_tensors(tiny(Sd35Layout::diffusers));
  for (TensorSpec& spec : specs) spec.dtype = Dtype::bf16;
  fs::create_directories(root / "transformer");
  fs::create_directories(root / "vae/nested");
  fs::create_directories(root / ".cache");
  const auto half_way = specs.begin() + static_cast<Index>(specs.size() / 2);
  CheckpointBuilder({specs.begin(), half_way})
      .write(root / "transformer/part-1.safetensors", {{"format", "pt"}});
  CheckpointBuilder({half_way, specs.end()})
      .write(root / "transformer/part-2.safetensors", {{"format", "pt"}});
  nlohmann::json index{{"metadata", {{"total_size", 0}, {"note", "kept"}}}};
  for (auto spec = specs.begin(); spec != specs.end(); ++spec)
    index["weight_map"][spec->name] = spec < half_way ? "part-1.safetensors" : "part-2.safetensors";
  write_text(root / "transformer/diffusion_pytorch_model.safetensors.index.json", index.dump());
  write_text(root / "transformer/config.json", R"({"zz_first": 1, "_class_name": "SD3Transformer2DModel"})");
  write_text(root / "transformer/diffusion_pytorch_model.fp16.safetensors",
             "other weights of the same model");
  write_text(root / "model_index.json", R"({"_class_name": "StableDiffusion3Pipeline"})");
  write_text(root / "vae/diffusion_pytorch_model.safetensors", std::string(100'000, 'v'));
  write_text(root / "vae/nested/empty", "");
  write_text(root / ".cache/secret", "no part of the model");
  write_text(root / "sd3.5_medium.safetensors", "the same model, unconverted");
}

FileStatus convert(const fs::path& from, const fs::path& to, const InheritOptions& options = {},
                   bool overwrite = false) {
  Checkpoint checkpoint;
  Plan plan;
  if (FileStatus status = open_checkpoint(from, checkpoint); !status.ok()) return status;
  if (FileStatus status = make_plan(checkpoint, options, plan); !status.ok()) return status;
  return apply(checkpoint, plan, options, to, overwrite);
}

}  // namespace

TEST_CASE("sd35: the tensors of the family number as in the published files") {
  // 665 and 923 tensors, 2,243,171,520 and 8,056,627,520 parameters without the table of positions.
  const Sd35Model medium = sd35_medium();
  Sd35Model large = medium;
  large.depth = large.heads = 38;
  large.width = 2432;
  large.hidden = 9728;
  large.positions = 36'864;
  large.dual_blocks.clear();
  const auto count = [](Sd35Model model, Sd35Layout layout) {
    model.layout = layout;
    Index parameters = 0;
    const auto specs = sd35_tensors(model);
    for (const TensorSpec& spec : specs) parameters += spec.elements();
    return std::pair(specs.size(), parameters);
  };
  CHECK(count(medium, Sd35Layout::official) ==
        std::pair<std::size_t, Index>(665, 2'243'171'520 + 226'492'416));
  CHECK(count(large, Sd35Layout::official) == std::pair<std::size_t, Index>(923, 8'056'627'520 + 89'653'248));
  // diffusers splits each of the 24 + 24 + 13 projections in three, weight and bias.
  CHECK(count(medium, Sd35Layout::diffusers) ==
        std::pair<std::size_t, Index>(665 + 4 * (24 + 24 + 13), 2'243'171'520 + 226'492'416));
  CHECK(sd35_label(medium) == "SD3.5 Medium");
  CHECK(sd35_label(large) == "SD3.5 Large");
}

TEST_CASE("inherit: which modules a choice means") {
  const Sd35Model medium = sd35_medium();
  Sd35Model large = medium;
  large.depth = 38;
  large.dual_blocks.clear();
  const auto select = [](const Sd35Model& model, const char* choice) {
    std::vector<AttentionRule> modules;
    const std::string why = select_modules(sd35_rules(model), choice, modules);
    return why.empty() ? describe(modules) : "error: " + why;
  };
  CHECK(select(medium, "paper") == "joint 19-23, attn2 0-12");
  CHECK(select(large, "paper") == "joint 30-37");
  CHECK(select(tiny(Sd35Layout::official), "paper") == "joint 4, attn2 0-1");
  CHECK(select(medium, "all") == "joint 0-23, attn2 0-12");
  CHECK(select(medium, "attn2") == "attn2 0-12");
  CHECK(select(medium, "joint") == "joint 0-23");
  CHECK(select(medium, "attn2:0-12,joint:19-23") == select(medium, "paper"));
  CHECK(select(medium, "joint:7") == "joint 7");
  CHECK(select(medium, "joint:7,joint:9-10,joint:8,attn2:3") == "joint 7-10, attn2 3");
  CHECK(select(medium, "joint:1,joint:3") == "joint 1, 3");
  CHECK(contains(select(large, "attn2"), "error: the model has no attn2"));
  CHECK(contains(select(medium, "attn2:12-13"), "error: block 13 has no attn2"));
  CHECK(contains(select(medium, "joint:23-24"),
                 "error: joint block 24 does not exist: the model has 24 blocks"));
  for (const char* bad : {"", "none", "paper,", "joint:", "joint:5-", "joint:-5", "joint:7-5", "joint:a",
                          "joint:1-2-3", "joint: 3", "attn:3", "PAPER", "joint:99999999999999999999"})
    CHECK_MESSAGE(contains(select(medium, bad), "error: "), bad);
}

TEST_CASE("inherit: a single file") {
  TemporaryFolder folder;
  const std::string p = "model.diffusion_model.";
  CheckpointBuilder builder = official();
  builder.add("first_stage_model.decoder.conv_in.weight", Dtype::f32, {4, 2, 3, 3});  // lies misaligned
  builder.add("text_encoders.t5xxl.transformer.shared.weight", Dtype::f8_e4m3, {5, 3});
  builder.add("model_ema.decay", Dtype::f32, {});
  builder.add("model_ema.joint_blocks", Dtype::f32, {6});
  builder.write(folder / "in.safetensors", {{"format", "pt"}, {"note", "mine"}});

  Checkpoint checkpoint;
  Plan plan;
  require_ok(open_checkpoint(folder / "in.safetensors", checkpoint));
  require_ok(make_plan(checkpoint, {}, plan));
  std::uint64_t last = 0, total = 0;
  require_ok(apply(checkpoint, plan, {}, folder / "out.safetensors", false,
                   [&](std::uint64_t done, std::uint64_t all) {
                     CHECK(done >= last);
                     last = done;
                     total = all;
                     return true;
                   }));
  CHECK(last == total);
  CHECK(folder.names() == std::vector<std::string>{"in.safetensors", "out.safetensors"});
  const Safetensors before = opened(folder / "in.safetensors"), after = opened(folder / "out.safetensors");

  // Everything inherited is there, byte for byte; only the remains of training are gone.
  for (const TensorInfo& info : before.tensors()) {
    const TensorInfo* found = after.find(info.name);
    CHECK((found == nullptr) == info.name.starts_with("model_ema."));
    if (found == nullptr) continue;
    CHECK(found->dtype == info.dtype);
    CHECK(found->shape == info.shape);
    CHECK(same_bytes(*found, info));
    CHECK(reinterpret_cast<std::uintptr_t>(found->bytes.data()) % size_of(found->dtype) == 0);
  }
  // What is new, spelled out.
  std::map<std::string, std::vector<Index>> fresh;
  for (const char* stem :
       {"joint_blocks.0.x_block.attn2", "joint_blocks.1.x_block.attn2", "joint_blocks.4.x_block.attn"}) {
    for (const char* w : {".w1", ".w2", ".w3"}) fresh[p + stem + w] = {1, 2, 4, 4};
    for (const char* conv : {".q_conv2d", ".k_conv2d"}) {
      fresh[p + stem + conv + ".weight"] = {8, 1, 3, 3};
      fresh[p + stem + conv + ".bias"] = {8};
    }
  }
  std::size_t found = 0;
  for (const TensorInfo& info : after.tensors()) {
    if (before.find(info.name) != nullptr) continue;
    ++found;
    REQUIRE_MESSAGE(fresh.contains(info.name), info.name);
    CHECK(info.shape == fresh[info.name]);
    CHECK(info.dtype == Dtype::f16);  // as the module's qkv
    const bool conv = contains(info.name, "conv2d");
    for (const double value : values(after, info.name)) {
      CHECK(conv == (value == 0));
      CHECK(std::abs(value) < 0.1);
    }
  }
  CHECK(found == fresh.size());

  CHECK(after.metadata().at("note") == "mine");
  CHECK(after.metadata().at("linattn.format") == "1");
  CHECK(after.metadata().at("linattn." + p + "joint_blocks.4.x_block.attn.inner_model") == "swiglu");
  CHECK(after.metadata().size() == 2 + 1 + 3 * 5);
  Conversion conversion;
  require_ok(read_conversion(after, conversion));
  CHECK(conversion.size() == 3);
  CHECK(conversion.at(p + "joint_blocks.0.x_block.attn2") == ModuleConversion{});

  // The report accounts for every tensor of both files.
  const auto report = report_json(plan);
  std::map<std::string, std::size_t> outcomes;
  Index inherited = 0;
  for (const auto& entry : report["tensors"]) {
    ++outcomes[entry["outcome"]];
    if (entry["outcome"] == "inherited") inherited += entry["parameters"].get<Index>();
  }
  CHECK(outcomes["inherited"] + outcomes["dropped"] == before.tensors().size());
  CHECK(outcomes["inherited"] + outcomes["new"] == after.tensors().size());
  CHECK(outcomes["dropped"] == 2);
  CHECK(report["source"]["tensors"] == before.tensors().size());
  CHECK(report["target"]["tensors"] == after.tensors().size());
  CHECK(report["inherited"]["parameters"] == inherited);
  CHECK(report["new"]["parameters"] == 3 * (3 * 2 * 4 * 4 + 2 * (8 * 9 + 8)));
  CHECK(report["inherited"]["percent_of_target"].get<double>() +
            report["new"]["percent_of_target"].get<double>() ==
        doctest::Approx(100));
  CHECK(report["mismatched"].empty());
  CHECK(contains(report_table(plan), "replaced: joint 4, attn2 0-1 (3 of 7 attentions)"));
}

TEST_CASE("inherit: new weights depend on the seed and the module, not on layout or choice") {
  TemporaryFolder folder;
  official().write(folder / "in.safetensors");
  CheckpointBuilder bare = official("");
  bare.set_dtype(Dtype::f32);
  bare.write(folder / "bare.safetensors");
  write_folder(folder / "model");
  require_ok(convert(folder / "in.safetensors", folder / "a.safetensors", {.seed = 5}));
  require_ok(convert(folder / "in.safetensors", folder / "b.safetensors", {.seed = 5}));
  require_ok(convert(folder / "in.safetensors", folder / "c.safetensors", {.seed = 6}));
  require_ok(convert(folder / "bare.safetensors", folder / "d.safetensors",
                     {.replace = "all", .init = Initialisation::official, .seed = 5}));
  require_ok(convert(folder / "model", folder / "converted", {.seed = 5}));
  CHECK(read_text(folder / "a.safetensors") == read_text(folder / "b.safetensors"));
  CHECK(read_text(folder / "a.safetensors") != read_text(folder / "c.safetensors"));

  const std::string stem = "joint_blocks.1.x_block.attn2.";
  const Safetensors a = opened(folder / "a.safetensors"), d = opened(folder / "d.safetensors");
  const Safetensors e = opened(folder / "converted/transformer");
  const auto half_values = values(a, "model.diffusion_model." + stem + "w2"),
             float_values = values(d, stem + "w2");
  const auto brain_values = values(e, "transformer_blocks.1.attn2.w2");
  TorchGenerator generator(named_seed(5, stem + "w2"));
  std::vector<float> drawn(2 * 4 * 4);
  generator.normal(drawn);
  for (std::size_t i = 0; i < drawn.size(); ++i) {
    const float value = drawn[i] * 0.02f;
    CHECK(float_values[i] == value);
    CHECK(half_values[i] == static_cast<float>(half(value)));
    CHECK(brain_values[i] == static_cast<float>(bfloat16(value)));
  }
  // official: the convs are uniform on (-1/3, 1/3).
  double least = 1, most = -1, sum = 0, count = 0;
  for (int block = 0; block < 5; ++block)
    for (const char* conv : {"q_conv2d", "k_conv2d"})
      for (const char* part : {".weight", ".bias"})
        for (const double value :
             values(d, "joint_blocks." + std::to_string(block) + ".x_block.attn." + conv + part)) {
          least = std::min(least, value);
          most = std::max(most, value);
          sum += value;
          ++count;
        }
  CHECK(count == 5 * 2 * 80);
  CHECK(least > -1.0 / 3);
  CHECK(least < -0.32);
  CHECK(most < 1.0 / 3);
  CHECK(most > 0.32);
  CHECK(std::abs(sum / count) < 5 / 3.0 / std::sqrt(3 * count));
}

TEST_CASE("inherit: a folder of diffusers becomes a complete folder") {
  TemporaryFolder folder;
  const fs::path in = folder / "model", out = folder / "converted";
  write_folder(in);
  require_ok(convert(in.string() + "/", out.string() + "/"));
  CHECK(folder.names() == std::vector<std::string>{"converted", "model"});

  std::vector<std::string> files;
  for (const auto& entry : fs::recursive_directory_iterator(out))
    if (!entry.is_directory()) files.push_back(entry.path().lexically_relative(out).string());
  std::sort(files.begin(), files.end());
  CHECK(files == std::vector<std::string>{"model_index.json", "transformer/config.json",
                                          "transformer/diffusion_pytorch_model.safetensors.index.json",
                                          "transformer/part-1.safetensors", "transformer/part-2.safetensors",
                                          "vae/diffusion_pytorch_model.safetensors", "vae/nested/empty"});
  for (const char* file : {"model_index.json", "vae/diffusion_pytorch_model.safetensors", "vae/nested/empty"})
    CHECK(read_text(in / file) == read_text(out / file));

  const Safetensors before = opened(in / "transformer"), after = opened(out / "transformer");
  for (const TensorInfo& info : before.tensors()) {
    const TensorInfo* found = after.find(info.name);
    REQUIRE(found != nullptr);
    CHECK(found->dtype == info.dtype);
    CHECK(found->shape == info.shape);
    CHECK(same_bytes(*found, info));
    CHECK(found->shard == info.shard);
  }
  CHECK(after.tensors().size() == before.tensors().size() + 3 * 7);
  // New tensors lie in the shard of their module.
  for (const char* stem : {"transformer_blocks.0.attn2", "transformer_blocks.4.attn"})
    CHECK(after.find(std::string(stem) + ".w1")->shard ==
          after.find(std::string(stem) + ".to_q.weight")->shard);
  const auto index =
      nlohmann::json::parse(read_text(out / "transformer/diffusion_pytorch_model.safetensors.index.json"));
  CHECK(index["metadata"]["note"] == "kept");
  std::size_t bytes = 0;
  for (const TensorInfo& info : after.tensors()) bytes += info.bytes.size();
  CHECK(index["metadata"]["total_size"] == bytes);

  // The configuration keeps its entries and their order.
  const std::string config = read_text(out / "transformer/config.json");
  CHECK(config.find("zz_first") < config.find("_class_name"));
  CHECK(config.find("_class_name") < config.find("linattn"));
  Conversion conversion;
  require_ok(read_conversion(after, conversion, out / "transformer/config.json"));
  CHECK(conversion == Conversion{{"transformer_blocks.0.attn2", {}},
                                 {"transformer_blocks.1.attn2", {}},
                                 {"transformer_blocks.4.attn", {}}});

  Checkpoint checkpoint;
  Plan plan;
  require_ok(open_checkpoint(in, checkpoint));
  require_ok(make_plan(checkpoint, {}, plan));
  CHECK(plan.left_out == std::vector<fs::path>{"sd3.5_medium.safetensors",
                                               "transformer/diffusion_pytorch_model.fp16.safetensors"});
  // A transformer by itself is a model folder too.
  require_ok(convert(in / "transformer", folder / "bare"));
  CHECK(opened(folder / "bare").tensors().size() == after.tensors().size());
}

TEST_CASE("inherit: a checkpoint that does not fit is refused, never filled up with random weights") {
  TemporaryFolder folder;
  const auto in = folder / "in.safetensors", out = folder / "out.safetensors";
  const std::string p = "model.diffusion_model.";
  const auto refused = [&](const CheckpointBuilder& builder, const std::string& expected,
                           const Metadata& metadata = {}) {
    builder.write(in, metadata);
    const FileStatus status = convert(in, out);
    CHECK_FALSE(status.ok());
    CAPTURE(message(status));
    CHECK(contains(message(status), expected));
    CHECK(folder.names() == std::vector<std::string>{"in.safetensors"});
  };
  SUBCASE("a tensor of another shape") {
    CheckpointBuilder builder = official();
    builder.at(p + "joint_blocks.3.x_block.mlp.fc1.weight").shape = {10, 8};
    refused(builder, "tensor '" + p +
                         "joint_blocks.3.x_block.mlp.fc1.weight': is F16 [10, 8], but F16 [9, 8] is needed");
  }
  SUBCASE("a missing tensor") {
    CheckpointBuilder builder = official();
    builder.remove(p + "joint_blocks.3.x_block.attn.proj.bias");
    refused(builder, p + "joint_blocks.3.x_block.attn.proj.bias': is missing, but [8] is needed");
  }
  SUBCASE("a tensor that the family does not have") {
    CheckpointBuilder builder = official();
    builder.add(p + "register", Dtype::f16, {1, 8});
    builder.add(p + "joint_blocks.0.x_block.attn3.qkv.weight", Dtype::f16, {1, 8});
    refused(builder, "is no tensor of this family (and 1 more mismatches)");
  }
  SUBCASE("a missing block") {
    CheckpointBuilder builder = official();
    for (const TensorSpec& spec : sd35_tensors(tiny(Sd35Layout::official, p.c_str())))
      if (spec.name.starts_with(p + "joint_blocks.2.")) builder.remove(spec.name);
    refused(builder, p + "joint_blocks.2.");
  }
  SUBCASE("half a projection of diffusers") {
    CheckpointBuilder builder(sd35_tensors(tiny(Sd35Layout::diffusers)));
    builder.remove("transformer_blocks.0.attn2.to_q.weight");
    refused(builder, "transformer_blocks.0.attn2.to_q.weight': is missing, but [8, 8] is needed");
  }
  SUBCASE("another family") {
    CheckpointBuilder builder({{"blocks.0.attn.qkv.weight", Dtype::f32, {24, 8}}});
    refused(builder, "is no checkpoint of a known family");
  }
  SUBCASE("block numbers out of thin air") {
    CheckpointBuilder builder = official();
    builder.add(p + "joint_blocks.1000000000.x_block.attn.qkv.weight", Dtype::f16, {24, 8});
    refused(builder, "has no block number");
  }
  SUBCASE("no block number") {
    CheckpointBuilder builder = official();
    builder.add(p + "joint_blocks.x", Dtype::f16, {1});
    refused(builder, "has no block number");
  }
  SUBCASE("heads that do not divide the width") {
    CheckpointBuilder builder = official();
    builder.at(p + "joint_blocks.0.x_block.attn.ln_q.weight").shape = {3};
    refused(builder, "no multiple of the 3 channels");
  }
  SUBCASE("an empty axis") {
    CheckpointBuilder builder = official();
    builder.at(p + "joint_blocks.0.x_block.attn.ln_q.weight").shape = {0};
    refused(builder, "no size of this family");
  }
  SUBCASE("a dtype that new weights cannot have") {
    CheckpointBuilder builder = official();
    builder.at(p + "joint_blocks.0.x_block.attn2.qkv.weight").dtype = Dtype::f8_e4m3;
    refused(builder, "new weights can be F64, F32, F16 or BF16");
  }
  SUBCASE("converted already") {
    official().write(in);
    require_ok(convert(in, folder / "t5.safetensors"));
    CHECK(contains(message(convert(folder / "t5.safetensors", out)), "is already converted"));
    CHECK_FALSE(fs::exists(out));
  }
  SUBCASE("converted by half") {
    CheckpointBuilder builder = official();
    builder.add(p + "joint_blocks.0.x_block.attn2.w1", Dtype::f16, {1, 2, 4, 4});
    refused(builder, "w2 is missing");
  }
  SUBCASE("a plan with mismatches still has a report, and cannot be applied") {
    CheckpointBuilder builder = official();
    builder.at(p + "pos_embed").shape = {1, 16, 9};
    builder.remove(p + "context_embedder.bias");
    builder.write(in);
    Checkpoint checkpoint;
    Plan plan;
    require_ok(open_checkpoint(in, checkpoint));
    CHECK_FALSE(make_plan(checkpoint, {}, plan).ok());
    const auto report = report_json(plan);
    REQUIRE(report["mismatched"].size() == 2);
    CHECK(report["mismatched"][0]["name"] == p + "pos_embed");
    CHECK(report["mismatched"][0]["actual"] == "F16 [1, 16, 9]");
    CHECK(report["mismatched"][1]["actual"] == "missing");
    CHECK(contains(report_table(plan), p + "context_embedder.bias is missing, but [8] is needed"));
    CHECK_FALSE(apply(checkpoint, plan, {}, out).ok());
    CHECK_FALSE(fs::exists(out));
  }
}

TEST_CASE("inherit: new weights from a file") {
  TemporaryFolder folder;
  const auto in = folder / "in.safetensors", out = folder / "out.safetensors",
             init = folder / "init.safetensors";
  official().write(in);
  const Sd35Model model = tiny(Sd35Layout::official, "model.diffusion_model.");
  // All modules, in the names of diffusers and float: more than "paper" needs.
  const auto all = [&](ModuleConversion module, Sd35Layout layout, const char* prefix) {
    std::vector<TensorSpec> specs;
    for (const Sd35Module which : model.modules())
      for (TensorSpec& spec : module_tensors(prefix + sd35_stem(layout, which), module, 2, 4, Dtype::f32))
        specs.push_back(std::move(spec));
    return CheckpointBuilder(std::move(specs));
  };
  const auto options = [](const Safetensors& file) {
    return InheritOptions{.init = Initialisation::file, .init_file = &file};
  };
  SUBCASE("by name, in the other layout, rounded to the dtype of the module") {
    for (const auto& [layout, prefix] : {std::pair(Sd35Layout::diffusers, ""),
                                         {Sd35Layout::diffusers, "transformer."},
                                         {Sd35Layout::official, ""},
                                         {Sd35Layout::official, "model.diffusion_model."}}) {
      all({}, layout, prefix).write(init);
      const Safetensors file = opened(init);
      Checkpoint checkpoint;
      Plan plan;
      require_ok(open_checkpoint(in, checkpoint));
      require_ok(make_plan(checkpoint, options(file), plan));
      CHECK(plan.not_needed.size() == 4 * 7);
      require_ok(apply(checkpoint, plan, options(file), out, true));
      const Safetensors result = opened(out);
      for (const AttentionRule& which : plan.replaced)
        for (const char* suffix : {".w1", ".w3", ".q_conv2d.weight", ".k_conv2d.bias"}) {
          const std::string given_stem = sd35_stem(layout, {which.kind == "attn2", which.block});
          const auto given = values(file, prefix + given_stem + suffix);
          const auto taken = values(result, which.stem + suffix);
          for (std::size_t i = 0; i < given.size(); ++i)
            CHECK(taken[i] == static_cast<float>(half(static_cast<float>(given[i]))));
        }
    }
  }
  SUBCASE("byte for byte in the same dtype") {
    CheckpointBuilder builder = all({}, Sd35Layout::official, "");
    builder.set_dtype(Dtype::f16);
    builder.write(init);
    const Safetensors file = opened(init);
    require_ok(convert(in, out, options(file)));
    CHECK(same_bytes(*file.find("joint_blocks.4.x_block.attn.w2"),
                     *opened(out).find("model.diffusion_model.joint_blocks.4.x_block.attn.w2")));
  }
  SUBCASE("with what the file says of itself") {
    const ModuleConversion module{.inner_model = InnerModelKind::mlp,
                                  .inner_loss = InnerLossKind::squared_error,
                                  .inner_lr = 0.1,
                                  .key_norm_eps = 1e-5,
                                  .conv = false};
    Conversion said;
    for (const Sd35Module which : model.modules()) said[sd35_stem(Sd35Layout::official, which)] = module;
    all(module, Sd35Layout::official, "").write(init, conversion_metadata(said));
    const Safetensors file = opened(init);
    require_ok(convert(in, out, options(file)));
    Conversion conversion;
    const Safetensors result = opened(out);
    require_ok(read_conversion(result, conversion));
    CHECK(conversion.size() == 3);
    CHECK(conversion.at("model.diffusion_model.joint_blocks.0.x_block.attn2") == module);
    CHECK(result.find("model.diffusion_model.joint_blocks.0.x_block.attn2.w3") == nullptr);
    InheritOptions other = options(file);
    other.inner_model = InnerModelKind::swiglu;
    CHECK(contains(message(convert(in, out, other, true)), "has inner model mlp, but swiglu is asked for"));
  }
  const auto refused = [&](const CheckpointBuilder& builder, const char* expected) {
    builder.write(init);
    const Safetensors file = opened(init);
    const FileStatus status = convert(in, out, options(file));
    CAPTURE(message(status));
    CHECK(contains(message(status), expected));
    CHECK_FALSE(fs::exists(out));
  };
  CheckpointBuilder builder = all({}, Sd35Layout::diffusers, "");
  SUBCASE("a module is missing") {
    for (const TensorSpec& spec : module_tensors("transformer_blocks.4.attn", {}, 2, 4, Dtype::f32))
      builder.remove(spec.name);
    refused(builder, "joint_blocks.4.x_block.attn.w1': is missing");
  }
  SUBCASE("a tensor is missing") {
    builder.remove("transformer_blocks.4.attn.k_conv2d.bias");
    refused(builder, "transformer_blocks.4.attn.k_conv2d.bias': is missing");
  }
  SUBCASE("an attention that the model does not have") {
    for (TensorSpec& spec : module_tensors("transformer_blocks.2.attn2", {}, 2, 4, Dtype::f32))
      builder.specs().push_back(spec);
    refused(builder, "transformer_blocks.2.attn2.w1': belongs to no attention of the model");
  }
  SUBCASE("a tensor of something else") {
    builder.add("transformer_blocks.2.attn.to_q.weight", Dtype::f32, {8, 8});
    refused(builder, "transformer_blocks.2.attn.to_q.weight': belongs to no attention of the model");
  }
  SUBCASE("names that only look like a module's") {
    for (const char* stem : {"joint_blocks.3.context_block.attn", "joint_blocks.x.x_block.attn",
                             "blocks.3.attn", "joint_blocks.-1.x_block.attn", "joint_blocks.03.x_block.attn",
                             "transformer_blocks.99999999999999999999.attn"}) {
      CheckpointBuilder more = builder;
      for (TensorSpec& spec : module_tensors(stem, {}, 2, 4, Dtype::f32)) more.specs().push_back(spec);
      refused(more, "belongs to no attention of the model");
    }
  }
  SUBCASE("a module twice") {
    for (TensorSpec& spec : module_tensors("joint_blocks.2.x_block.attn", {}, 2, 4, Dtype::f32))
      builder.specs().push_back(spec);
    refused(builder, "the module is there twice");
  }
  SUBCASE("heads of another size") {
    for (TensorSpec& spec : builder.specs())
      if (spec.shape.size() == 4 && spec.shape[0] == 1) spec.shape = {1, 1, 8, 8};
    refused(builder, "is F32 [1, 1, 8, 8], but F16 [1, 2, 4, 4] is needed");
  }
}

TEST_CASE("inherit: an MLP has two matrices") {
  TemporaryFolder folder;
  official().write(folder / "in.safetensors");
  require_ok(convert(folder / "in.safetensors", folder / "out.safetensors",
                     {.replace = "joint:0", .inner_model = InnerModelKind::mlp}));
  const Safetensors file = opened(folder / "out.safetensors");
  const std::string stem = "model.diffusion_model.joint_blocks.0.x_block.attn";
  CHECK(file.find(stem + ".w2") != nullptr);
  CHECK(file.find(stem + ".w3") == nullptr);
  Conversion conversion;
  require_ok(read_conversion(file, conversion));
  CHECK(conversion == Conversion{{stem, {.inner_model = InnerModelKind::mlp}}});
}

TEST_CASE("inherit: a failure leaves everything as it was") {
  TemporaryFolder folder;
  const auto file = folder / "in.safetensors", model = folder / "model";
  official().write(file);
  write_folder(model);
  const auto names = folder.names();
  const std::string before = read_text(file);

  SUBCASE("targets that are refused") {
    write_text(folder / "exists", "mine");
    fs::create_directory(folder / "documents");
    fs::create_symlink(file, folder / "link");
    const auto why = [&](const fs::path& from, const fs::path& to, bool overwrite) {
      return message(convert(from, to, {}, overwrite));
    };
    for (const bool overwrite : {false, true}) {
      CHECK(contains(why(file, file, overwrite), "is the input itself"));
      CHECK(contains(why(file, folder / "link", overwrite), "is the input itself"));
      CHECK(contains(why(file, folder / "model/../in.safetensors", overwrite), "is the input itself"));
      CHECK(contains(why(model, model, overwrite), "is the input itself"));
      CHECK(contains(why(model, model / "t5", overwrite), "lies in the input folder"));
      CHECK(contains(why(model, model / "vae/../t5", overwrite), "lies in the input folder"));
    }
    CHECK(contains(why(file, folder / "exists", false), "exists already"));
    CHECK(contains(why(model, folder / "documents", false), "exists already"));
    CHECK(contains(why(file, folder / "documents", true), "is a folder, but the input is a file"));
    CHECK(contains(why(model, folder / "exists", true), "is a file, but the input is a folder"));
    CHECK(contains(why(model, folder / "documents", true), "holds no model"));
    CHECK(contains(why(file, folder / "none/out", true), "cannot create"));
    CHECK(read_text(folder / "exists") == "mine");
    CHECK(read_text(file) == before);
  }
  SUBCASE("overwriting, when it is allowed") {
    write_text(folder / "exists", "old");
    require_ok(convert(file, folder / "exists", {}, true));
    CHECK(opened(folder / "exists").tensors().size() > 100);
    fs::create_directories(folder / "old/transformer");
    write_text(folder / "old/transformer/config.json", "{}");
    write_text(folder / "old/stale", "");
    require_ok(convert(model, folder / "old", {}, true));
    CHECK_FALSE(fs::exists(folder / "old/stale"));
    CHECK(fs::exists(folder / "old/model_index.json"));
    CHECK(folder.names() == std::vector<std::string>{"exists", "in.safetensors", "model", "old"});
  }
  SUBCASE("stopped half way") {
    for (const fs::path& input : {file, model}) {
      Checkpoint checkpoint;
      Plan plan;
      require_ok(open_checkpoint(input, checkpoint));
      require_ok(make_plan(checkpoint, {}, plan));
      const FileStatus status =
          apply(checkpoint, plan, {}, folder / "out", false,
                [](std::uint64_t done, std::uint64_t total) { return 2 * done < total; });
      CHECK(contains(message(status), "stopped, nothing is written"));
      CHECK(folder.names() == names);
    }
  }
  SUBCASE("the disk is full") {
    ::rlimit old{};
    REQUIRE(::getrlimit(RLIMIT_FSIZE, &old) == 0);
    const auto handler = std::signal(SIGXFSZ, SIG_IGN);
    const ::rlimit small{.rlim_cur = 20'000, .rlim_max = old.rlim_max};
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
    const FileStatus single = convert(file, folder / "out"), whole = convert(model, folder / "out");
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &old) == 0);
    std::signal(SIGXFSZ, handler);
    CHECK(single.status.native == EFBIG);
    CHECK(whole.status.native == EFBIG);
    CHECK(folder.names() == names);
  }
  SUBCASE("folders that are no models") {
    CHECK(contains(message(convert(folder.path(), folder / "out")), "is no model folder"));
    CHECK(contains(message(convert(model / "transformer/diffusion_pytorch_model.safetensors.index.json",
                                   folder / "out")),
                   "name the folder"));
    write_text(model / "transformer/config.json", "{");
    CHECK(contains(message(convert(model, folder / "out")), "config.json: syntax error"));
    write_text(model / "transformer/config.json", "[]");
    CHECK(contains(message(convert(model, folder / "out")), "is not an object"));
    fs::create_directory_symlink(model / "vae", model / "vae2");
    CHECK(contains(message(convert(model, folder / "out")), "link to a folder"));
    CHECK(folder.names() == names);
  }
}

TEST_CASE("inherit: the tiny model that diffusers wrote, with trained-size weights of all its modules") {
  const fs::path model = fs::path(LINATTN_TEST_DATA) / "sd35-tiny";
  const Safetensors init = opened(fs::path(LINATTN_TEST_DATA) / "sd35-tiny-ref/t5.safetensors");
  const Safetensors before = opened(model / "transformer");
  for (const auto& [choice, expected] :
       {std::pair("paper", "joint 3, attn2 0-1"), {"all", "joint 0-3, attn2 0-1"}}) {
    TemporaryFolder folder;
    const InheritOptions options{.replace = choice, .init = Initialisation::file, .init_file = &init};
    Checkpoint checkpoint;
    Plan plan;
    require_ok(open_checkpoint(model, checkpoint));
    require_ok(make_plan(checkpoint, options, plan));
    CHECK(describe(plan.replaced) == expected);
    CHECK(plan.replaced.size() * 7 + plan.not_needed.size() == init.tensors().size());
    require_ok(apply(checkpoint, plan, options, folder / "t5"));
    const Safetensors after = opened(folder / "t5/transformer");
    for (const TensorInfo& info : before.tensors()) CHECK(same_bytes(info, *after.find(info.name)));
    for (const TensorInfo& info : after.tensors())
      if (before.find(info.name) == nullptr) CHECK(same_bytes(info, *init.find(info.name)));
    CHECK(after.tensors().size() == before.tensors().size() + 7 * plan.replaced.size());
    Conversion conversion;
    require_ok(read_conversion(after, conversion, folder / "t5/transformer/config.json"));
    CHECK(conversion.size() == plan.replaced.size());
  }
}

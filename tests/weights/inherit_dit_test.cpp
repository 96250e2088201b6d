#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <linattn/weights/inherit.hpp>

#include "checkpoint_builder.hpp"
#include "conversions.hpp"
#include "temporary_folder.hpp"

using namespace linattn;
using namespace support;
namespace fs = std::filesystem;

namespace {

// A model of the family's structure: 2 blocks of width 8 over 9 patches.
constexpr DitModel tiny{.depth = 2,
                        .width = 8,
                        .channels = 3,
                        .patch = 2,
                        .positions = 9,
                        .frequencies = 6,
                        .hidden = 12,
                        .labels = 5,
                        .outputs = 24};
const InheritOptions two_heads{.family = {.heads = 2}};

CheckpointBuilder dit(const DitModel& model, const std::string& prefix = "") {
  CheckpointBuilder builder(dit_tensors(model));
  for (TensorSpec& spec : builder.specs()) spec.name.insert(0, prefix);
  return builder;
}

DitModel sized(Index width, Index depth) {
  return {.depth = depth,
          .width = width,
          .channels = 4,
          .patch = 2,
          .positions = 256,
          .frequencies = 256,
          .hidden = 4 * width,
          .labels = 1001,
          .outputs = 32};
}

}  // namespace

TEST_CASE("dit: the tensors of a converted model, spelled out") {
  TemporaryFolder folder;
  DitModel model = tiny;
  model.depth = 1;
  dit(model).write(folder / "in.safetensors");
  require_ok(convert(folder / "in.safetensors", folder / "out.safetensors", two_heads));
  std::map<std::string, std::vector<Index>> shapes;
  const Safetensors after = opened(folder / "out.safetensors");
  for (const TensorInfo& info : after.tensors()) shapes[info.name] = info.shape;
  CHECK(shapes ==
        std::map<std::string, std::vector<Index>>{{"pos_embed", {1, 9, 8}},
                                                  {"x_embedder.proj.weight", {8, 3, 2, 2}},
                                                  {"x_embedder.proj.bias", {8}},
                                                  {"t_embedder.mlp.0.weight", {8, 6}},
                                                  {"t_embedder.mlp.0.bias", {8}},
                                                  {"t_embedder.mlp.2.weight", {8, 8}},
                                                  {"t_embedder.mlp.2.bias", {8}},
                                                  {"y_embedder.embedding_table.weight", {5, 8}},
                                                  {"blocks.0.attn.w1", {1, 2, 4, 4}},
                                                  {"blocks.0.attn.w2", {1, 2, 4, 4}},
                                                  {"blocks.0.attn.qk_scale_ttt", {1, 1, 8, 2}},
                                                  {"blocks.0.attn.qk_offset_ttt", {1, 1, 8, 2}},
                                                  {"blocks.0.attn.qkv.weight", {24, 8}},
                                                  {"blocks.0.attn.qkv.bias", {24}},
                                                  {"blocks.0.attn.proj.weight", {8, 8}},
                                                  {"blocks.0.attn.proj.bias", {8}},
                                                  {"blocks.0.attn.q_conv2d.weight", {8, 1, 3, 3}},
                                                  {"blocks.0.attn.q_conv2d.bias", {8}},
                                                  {"blocks.0.attn.k_conv2d.weight", {8, 1, 3, 3}},
                                                  {"blocks.0.attn.k_conv2d.bias", {8}},
                                                  {"blocks.0.mlp.fc1.weight", {12, 8}},
                                                  {"blocks.0.mlp.fc1.bias", {12}},
                                                  {"blocks.0.mlp.fc2.weight", {8, 12}},
                                                  {"blocks.0.mlp.fc2.bias", {8}},
                                                  {"blocks.0.adaLN_modulation.1.weight", {48, 8}},
                                                  {"blocks.0.adaLN_modulation.1.bias", {48}},
                                                  {"final_layer.linear.weight", {24, 8}},
                                                  {"final_layer.linear.bias", {24}},
                                                  {"final_layer.adaLN_modulation.1.weight", {16, 8}},
                                                  {"final_layer.adaLN_modulation.1.bias", {16}}});
}

TEST_CASE("dit: as many parameters as the paper's loader counts, at the published sizes") {
  TemporaryFolder folder;
  const auto path = folder / "in.safetensors";
  // DiT-S/2: 32,963,360 of 33,663,776 parameters are loaded, 97.92 %.
  dit(sized(384, 12)).write_zeros(path);
  Plan plan = planned(path);
  CHECK(totals(plan).inherited.parameters == 32'963'360);
  CHECK(totals(plan).target.parameters == 33'663'776);
  CHECK(totals(plan).created.tensors == 12 * 8);
  CHECK(contains(report_table(plan), "DiT-S/2, official names\nheads: 6, as models of this size have\n"));
  CHECK(contains(report_table(plan), "32,963,360 parameters   97.92 %"));
  CHECK(
      contains(report_table(plan), "by: mlp, squared error, conv, beside neighborhood attention of 5 x 5\n"));

  for (const auto& [width, depth, label, heads] :
       {std::tuple(768, 12, "DiT-B/2", 12), {1024, 24, "DiT-L/2", 16}, {1152, 28, "DiT-XL/2", 16}}) {
    dit(sized(width, depth)).write_zeros(path);
    plan = planned(path);
    CHECK(plan.model.label == label);
    const auto w1 = std::find_if(plan.items.begin(), plan.items.end(),
                                 [](const PlanItem& item) { return item.target.name == "blocks.0.attn.w1"; });
    REQUIRE(w1 != plan.items.end());
    CHECK(w1->target.shape == std::vector<Index>{1, heads, width / heads, width / heads});
  }
  CHECK(plan.model.head_dim == 72);
}

TEST_CASE("dit: byte for byte, and DiT5's own tensors beside") {
  TemporaryFolder folder;
  CheckpointBuilder builder = dit(tiny);
  builder.set_dtype(Dtype::bf16);
  builder.write(folder / "in.safetensors");
  InheritOptions options = two_heads;
  options.init = Initialisation::official;
  options.seed = 3;
  require_ok(convert(folder / "in.safetensors", folder / "out.safetensors", options));
  const Safetensors before = opened(folder / "in.safetensors"), after = opened(folder / "out.safetensors");
  for (const TensorInfo& info : before.tensors()) {
    const TensorInfo* found = after.find(info.name);
    REQUIRE_MESSAGE(found != nullptr, info.name);
    CHECK(found->dtype == info.dtype);
    CHECK(found->shape == info.shape);
    CHECK(same_bytes(*found, info));
  }
  CHECK(after.tensors().size() == before.tensors().size() + 2 * 8);
  for (const char* stem : {"blocks.0.attn", "blocks.1.attn"}) {
    CHECK(values(after, stem + std::string(".qk_scale_ttt")) == std::vector<double>(16, 1.0));
    CHECK(values(after, stem + std::string(".qk_offset_ttt")) == std::vector<double>(16, 0.0));
    CHECK(after.find(stem + std::string(".w3")) == nullptr);
    CHECK(after.find(stem + std::string(".w1"))->dtype == Dtype::bf16);
    TorchGenerator generator(named_seed(3, stem + std::string(".q_conv2d.bias")));
    for (const double value : values(after, stem + std::string(".q_conv2d.bias")))
      CHECK(value == static_cast<float>(bfloat16(generator.uniform() * (2 * (1.0f / 3)) - 1.0f / 3)));
  }

  // What the file says of itself, and what its tensors say without a word.
  Conversion conversion;
  require_ok(read_conversion(after, conversion));
  CHECK(conversion == Conversion{{"blocks.0.attn", dit5_module}, {"blocks.1.attn", dit5_module}});
  CHECK(after.metadata().at("linattn.blocks.1.attn.neighborhood") == "5");
  CHECK(after.metadata().at("linattn.heads") == "2");
  REQUIRE(write_safetensors(folder / "silent.safetensors", after.tensors()).ok());
  Conversion told;
  require_ok(read_conversion(opened(folder / "silent.safetensors"), told));
  CHECK(told == conversion);

  // A reader needs no flag for the heads of either.
  Heads heads;
  require_ok(find_heads(after, 8, std::nullopt, std::nullopt, std::nullopt, heads));
  CHECK(heads.count == 2);

  for (const char* file : {"out.safetensors", "silent.safetensors"})
    CHECK(contains(message(convert(folder / file, folder / "twice", two_heads)), "is already converted"));
}

TEST_CASE("dit: some blocks in a folder, and the trained weights of a file") {
  TemporaryFolder folder;
  fs::create_directory(folder / "in");
  dit(tiny).write(folder / "in/model.safetensors");
  write_text(folder / "in/config.json", R"({"num_heads": 2})");
  CheckpointBuilder(module_tensors("blocks.1.attn", dit5_module, 2, 4, Dtype::f32))
      .write(folder / "init.safetensors");
  const Safetensors init = opened(folder / "init.safetensors");
  require_ok(convert(folder / "in", folder / "out",
                     {.replace = "attn:1", .init = Initialisation::file, .init_file = &init}));
  Checkpoint checkpoint;
  require_ok(open_checkpoint(folder / "out", checkpoint));
  for (const TensorInfo& info : init.tensors()) CHECK(same_bytes(info, *checkpoint.weights.find(info.name)));
  Conversion conversion;
  require_ok(read_conversion(checkpoint.weights, conversion, checkpoint.config()));
  CHECK(conversion == Conversion{{"blocks.1.attn", dit5_module}});
  const auto config = nlohmann::json::parse(read_text(folder / "out/config.json"));
  CHECK(config["linattn"]["modules"]["blocks.1.attn"]["neighborhood"] == 5);
  CHECK(config["linattn"]["heads"] == 2);

  CheckpointBuilder(module_tensors("blocks.1.attn", {}, 2, 4, Dtype::f32)).write(folder / "t5.safetensors");
  const Safetensors t5 = opened(folder / "t5.safetensors");
  CHECK(contains(message(convert(folder / "in", folder / "no",
                                 {.replace = "attn:1", .init = Initialisation::file, .init_file = &t5})),
                 "is not beside neighborhood attention, which does not fit DiT of 2 blocks"));
}

TEST_CASE("dit: a training checkpoint gives its raw weights, or its EMA") {
  TemporaryFolder folder;
  const auto in = folder / "in.safetensors", out = folder / "out.safetensors";
  CheckpointBuilder both = dit(tiny, "model.");
  both.append(dit(tiny, "ema.").specs());
  both.add("opt.state.0.exp_avg", Dtype::f32, {3});
  both.write(in);
  for (const bool ema : {false, true}) {
    InheritOptions options = two_heads;
    if (ema) options.family.weights = WeightSet::ema;
    require_ok(convert(in, out, options, true));
    const Safetensors before = opened(in), after = opened(out);
    for (const TensorSpec& spec : dit_tensors(tiny))
      CHECK(same_bytes(*before.find((ema ? "ema." : "model.") + spec.name), *after.find(spec.name)));
    const Plan plan = planned(in, options);
    CHECK(totals(plan).dropped.tensors == dit_tensors(tiny).size() + 1);
    CHECK(
        contains(report_table(plan), ema ? "weights: EMA, not the raw ones" : "weights: raw, not their EMA"));
  }
}

TEST_CASE("dit: what does not fit is refused") {
  TemporaryFolder folder;
  const auto in = folder / "in.safetensors", out = folder / "out.safetensors";
  const auto refused = [&](const CheckpointBuilder& builder, const InheritOptions& options,
                           const std::string& expected) {
    builder.write(in);
    const std::string why = message(convert(in, out, options));
    CAPTURE(why);
    CHECK(contains(why, expected));
    CHECK_FALSE(fs::exists(out));
  };
  InheritOptions options = two_heads;
  SUBCASE("another form than DiT5's") {
    options.inner_model = InnerModelKind::swiglu;
    refused(dit(tiny), options, "becomes DiT5, whose module has an mlp and convolutions");
    options.inner_model = InnerModelKind::mlp;
    options.conv = false;
    refused(dit(tiny), options, "becomes DiT5, whose module has an mlp and convolutions");
    options.conv = true;
    dit(tiny).write(in);
    CHECK(convert(in, out, options).ok());
  }
  SUBCASE("options of a ViT") {
    options.family.classes = 5;
    refused(dit(tiny), options, "classes is no option for DiT of 2 blocks, width 8");
    options.family.classes = std::nullopt;
    options.family.drop_cls = true;
    refused(dit(tiny), options, "drop-cls is no option for DiT of 2 blocks, width 8");
  }
  SUBCASE("heads that nothing tells") { refused(dit(tiny), {}, "tells no heads"); }
  SUBCASE("a missing tensor") {
    CheckpointBuilder builder = dit(tiny);
    builder.remove("blocks.1.adaLN_modulation.1.bias");
    refused(builder, options, "'blocks.1.adaLN_modulation.1.bias': is missing, but [48] is needed");
  }
  SUBCASE("a tensor that sizes come from") {
    CheckpointBuilder builder = dit(tiny);
    builder.remove("y_embedder.embedding_table.weight");
    refused(builder, options, "'y_embedder.embedding_table.weight': is missing");
  }
  SUBCASE("a tensor of another shape") {
    CheckpointBuilder builder = dit(tiny);
    builder.at("blocks.1.attn.qkv.weight").shape = {16, 8};
    refused(builder, options, "is F32 [16, 8], but F32 [24, 8] is needed");
  }
  SUBCASE("a tensor that the family does not have") {
    CheckpointBuilder builder = dit(tiny);
    builder.add("blocks.1.norm1.weight", Dtype::f32, {8});
    refused(builder, options, "'blocks.1.norm1.weight': is no tensor of this family");
  }
  SUBCASE("block numbers out of thin air") {
    CheckpointBuilder builder = dit(tiny);
    builder.add("blocks.1000000000.attn.qkv.weight", Dtype::f32, {24, 8});
    refused(builder, options, "is of block 1000000000, but no tensor is of block 2");
    builder = dit(tiny);
    builder.add("blocks.3.mlp.fc1.bias", Dtype::f32, {32});
    refused(builder, options, "'blocks.3.mlp.fc1.bias': is of block 3, but no tensor is of block 2");
    for (const char* number : {"-1", "01", "1x", "99999999999999999999", ""}) {
      builder = dit(tiny);
      builder.add("blocks." + std::string(number) + ".x", Dtype::f32, {1});
      refused(builder, options, "has no block number");
    }
  }
  SUBCASE("more blocks than tensors can fill") {
    CheckpointBuilder builder = dit(tiny);
    for (int i = 2; i < 1000; ++i) builder.add("blocks." + std::to_string(i) + ".x", Dtype::f32, {0});
    refused(builder, options, "holds 1018 tensors in 1000 blocks, but a block has at least 10");
  }
  SUBCASE("a dtype that new weights cannot have") {
    CheckpointBuilder builder = dit(tiny);
    builder.at("blocks.0.attn.qkv.weight").dtype = Dtype::i16;
    refused(builder, options, "new weights can be F64, F32, F16 or BF16");
  }
  SUBCASE("converted by half") {
    CheckpointBuilder builder = dit(tiny);
    builder.add("blocks.0.attn.qk_scale_ttt", Dtype::f32, {1, 1, 8, 2});
    refused(builder, options, "w2 is missing");
  }
}

#include <doctest/doctest.h>

#include <string>
#include <utility>
#include <vector>

#include <linattn/weights/inherit.hpp>

#include "checkpoint_builder.hpp"
#include "conversions.hpp"
#include "sd35_checkpoint.hpp"
#include "temporary_folder.hpp"

using namespace linattn;
using namespace support;
namespace fs = std::filesystem;

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

TEST_CASE("sd35: which modules a choice means") {
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

TEST_CASE("sd35: a checkpoint that does not fit is refused, never filled up with random weights") {
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
    refused(builder, "is of block 4, but no tensor is of block 2");
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
    refused(builder, "attn.qkv.weight': is of block 1000000000, but no tensor is of block ");
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

TEST_CASE("sd35: the tiny model that diffusers wrote, with trained-size weights of all its modules") {
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

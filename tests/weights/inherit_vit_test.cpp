#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <cstring>
#include <map>
#include <random>
#include <set>
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

// A model of the family's structure: 3 blocks of width 8 over 3 x 3 patches.
constexpr VitModel tiny{
    .depth = 3, .width = 8, .channels = 3, .patch = 2, .grid = 3, .hidden = 12, .classes = 5};
const InheritOptions two_heads{.family = {.heads = 2}};
const InheritOptions drop_cls{.family = {.heads = 2, .drop_cls = true}};

// Its checkpoint as timm writes it: with a class token, or with none, or with a distillation token as well.
CheckpointBuilder timm(const VitModel& model, Index tokens, const std::string& prefix = "") {
  CheckpointBuilder builder(vit_tensors(model));
  builder.at("pos_embed").shape[1] += tokens;
  if (tokens > 0) builder.add("cls_token", Dtype::f32, {1, 1, model.width});
  if (tokens > 1) {
    builder.add("dist_token", Dtype::f32, {1, 1, model.width});
    builder.add("head_dist.weight", Dtype::f32, {model.classes, model.width});
    builder.add("head_dist.bias", Dtype::f32, {model.classes});
  }
  for (TensorSpec& spec : builder.specs()) spec.name.insert(0, prefix);
  return builder;
}

}  // namespace

TEST_CASE("vit: the tensors of a converted model, spelled out") {
  TemporaryFolder folder;
  VitModel model = tiny;
  model.depth = 1;
  timm(model, 0).write(folder / "in.safetensors");
  require_ok(convert(folder / "in.safetensors", folder / "out.safetensors", two_heads));
  std::map<std::string, std::vector<Index>> shapes;
  const Safetensors after = opened(folder / "out.safetensors");
  for (const TensorInfo& info : after.tensors()) shapes[info.name] = info.shape;
  CHECK(shapes == std::map<std::string, std::vector<Index>>{{"pos_embed", {1, 9, 8}},
                                                            {"patch_embed.proj.weight", {8, 3, 2, 2}},
                                                            {"patch_embed.proj.bias", {8}},
                                                            {"blocks.0.norm1.weight", {8}},
                                                            {"blocks.0.norm1.bias", {8}},
                                                            {"blocks.0.attn.qkv.weight", {24, 8}},
                                                            {"blocks.0.attn.qkv.bias", {24}},
                                                            {"blocks.0.attn.proj.weight", {8, 8}},
                                                            {"blocks.0.attn.proj.bias", {8}},
                                                            {"blocks.0.attn.w1", {1, 2, 4, 4}},
                                                            {"blocks.0.attn.w2", {1, 2, 4, 4}},
                                                            {"blocks.0.attn.w3", {1, 2, 4, 4}},
                                                            {"blocks.0.attn.q_conv2d.weight", {8, 1, 3, 3}},
                                                            {"blocks.0.attn.q_conv2d.bias", {8}},
                                                            {"blocks.0.attn.k_conv2d.weight", {8, 1, 3, 3}},
                                                            {"blocks.0.attn.k_conv2d.bias", {8}},
                                                            {"blocks.0.norm2.weight", {8}},
                                                            {"blocks.0.norm2.bias", {8}},
                                                            {"blocks.0.mlp.fc1.weight", {12, 8}},
                                                            {"blocks.0.mlp.fc1.bias", {12}},
                                                            {"blocks.0.mlp.fc2.weight", {8, 12}},
                                                            {"blocks.0.mlp.fc2.bias", {8}},
                                                            {"norm.weight", {8}},
                                                            {"norm.bias", {8}},
                                                            {"head.weight", {5, 8}},
                                                            {"head.bias", {5}}});
}

TEST_CASE("vit: as many parameters as the paper's loader counts, at the published sizes") {
  TemporaryFolder folder;
  const auto path = folder / "in.safetensors";
  const auto sized = [](Index width, Index depth, Index patch = 16) {
    return VitModel{.depth = depth,
                    .width = width,
                    .channels = 3,
                    .patch = patch,
                    .grid = 14,
                    .hidden = 4 * width,
                    .classes = 1000};
  };
  // DeiT-Tiny: 5,717,032 of 6,205,480 parameters are loaded, 92.13 %.
  timm(sized(192, 12), 0).write_zeros(path);
  Plan plan = planned(path);
  CHECK(totals(plan).inherited.parameters == 5'717'032);
  CHECK(totals(plan).target.parameters == 6'205'480);
  CHECK(totals(plan).created.parameters == 488'448);
  CHECK(totals(plan).created.tensors == 12 * 7);
  CHECK(contains(report_table(plan), "DeiT-Tiny, timm names\nheads: 3, as models of this size have\n"));
  CHECK(contains(report_table(plan), "5,717,032 parameters   92.13 %"));

  // The same from a file with a class token.
  timm(sized(192, 12), 1).write_zeros(path);
  plan = planned(path, {.family = {.drop_cls = true}});
  CHECK(totals(plan).inherited.parameters + totals(plan).relaid.parameters == 5'717'032);
  CHECK(totals(plan).relaid.parameters == 196 * 192);
  CHECK(totals(plan).target.parameters == 6'205'480);
  CHECK(totals(plan).dropped.parameters == 192 + 192);
  CHECK(totals(plan).dropped.tensors == 1);

  for (const auto& [model, label, heads] : {std::tuple(sized(384, 12), "DeiT-Small", 6),
                                            {sized(768, 12), "DeiT-Base", 12},
                                            {sized(768, 12, 32), "ViT-Base/32", 12},
                                            {sized(1024, 24), "ViT-Large/16", 16},
                                            {sized(1280, 32, 14), "ViT-Huge/14", 16}}) {
    timm(model, 0).write_zeros(path);
    plan = planned(path);
    CHECK(plan.model.label == label);
    CHECK(plan.model.heads == heads);
    CHECK(plan.model.head_dim == model.width / heads);
    CHECK(plan.stated_heads() == heads);
  }
}

TEST_CASE("vit: heads are asked for, or in config.json, or known, or guessed, and the report says which") {
  TemporaryFolder folder;
  VitModel wide = tiny;
  wide.width = 128;
  timm(wide, 0).write(folder / "wide.safetensors");
  CHECK(
      contains(report_table(planned(folder / "wide.safetensors")), "heads: 2, a guess: 64 channels each\n"));
  CHECK(contains(report_table(planned(folder / "wide.safetensors", {.family = {.heads = 8}})),
                 "heads: 8, as asked for\n"));

  fs::create_directory(folder / "model");
  timm(wide, 0).write(folder / "model/model.safetensors");
  const auto config = [&](const char* text, const InheritOptions& options = {}) {
    write_text(folder / "model/config.json", text);
    Checkpoint checkpoint;
    Plan plan;
    require_ok(open_checkpoint(folder / "model", checkpoint));
    const FileStatus status = make_plan(checkpoint, options, plan);
    return status.ok() ? report_table(plan) : message(status);
  };
  CHECK(contains(config(R"({"num_heads": 4})"), "heads: 4, as config.json says\n"));
  CHECK(contains(config(R"({"num_attention_heads": 16})"), "heads: 16, as config.json says\n"));
  CHECK(contains(config("{}"), "heads: 2, a guess"));
  CHECK(contains(config(R"({"num_heads": 4})", two_heads), "heads: 2, as asked for\n"));
  for (const char* heads : {"\"4\"", "0", "-4", "-9223372036854775808", "4.0", "true", "4097",
                            "18446744073709551615", "9223372036854775808"})
    CHECK_MESSAGE(contains(config((R"({"num_heads": )" + std::string(heads) + "}").c_str()),
                           "config.json: num_heads is no whole number from 1 to 4096"),
                  heads);
  CHECK(contains(config(R"({"num_heads": 3})"), "a width of 128 cannot be cut into 3 heads"));

  timm(tiny, 0).write(folder / "tiny.safetensors");
  CHECK(contains(message(convert(folder / "tiny.safetensors", folder / "out")),
                 "tells no heads: a width of 8 is no multiple of 64"));
  CHECK(contains(message(convert(folder / "tiny.safetensors", folder / "out", {.family = {.heads = 3}})),
                 "a width of 8 cannot be cut into 3 heads"));
}

TEST_CASE("vit: byte for byte, with a reason for all that is not") {
  TemporaryFolder folder;
  CheckpointBuilder builder = timm(tiny, 2);
  builder.set_dtype(Dtype::bf16);
  builder.write(folder / "in.safetensors", {{"note", "mine"}});
  const Plan plan = planned(folder / "in.safetensors", drop_cls);
  require_ok(convert(folder / "in.safetensors", folder / "out.safetensors", drop_cls));
  const Safetensors before = opened(folder / "in.safetensors"), after = opened(folder / "out.safetensors");

  const std::set<std::string> dropped{"cls_token", "dist_token", "head_dist.weight", "head_dist.bias"};
  for (const TensorInfo& info : before.tensors()) {
    const TensorInfo* found = after.find(info.name);
    CHECK((found == nullptr) == dropped.contains(info.name));
    if (found == nullptr || info.name == "pos_embed") continue;
    CHECK(found->dtype == info.dtype);
    CHECK(found->shape == info.shape);
    CHECK(same_bytes(*found, info));
  }
  // Rows 2.. of the positions.
  const TensorInfo &all = *before.find("pos_embed"), &kept = *after.find("pos_embed");
  CHECK(kept.shape == std::vector<Index>{1, 9, 8});
  REQUIRE(kept.bytes.size() == 9 * 8 * 2);
  CHECK(std::memcmp(kept.bytes.data(), all.bytes.data() + 2 * 8 * 2, kept.bytes.size()) == 0);

  // What the file says of itself.
  Conversion conversion;
  require_ok(read_conversion(after, conversion));
  CHECK(conversion == Conversion{{"blocks.0.attn", {}}, {"blocks.1.attn", {}}, {"blocks.2.attn", {}}});
  CHECK(after.metadata().at("linattn.heads") == "2");
  CHECK(after.metadata().at("note") == "mine");
  CHECK(after.metadata().size() == 3 + 3 * 5);

  // The report accounts for every tensor, and every parameter.
  const auto report = report_json(plan);
  std::map<std::string, std::set<std::string>> outcomes;
  for (const auto& entry : report["tensors"]) outcomes[entry["outcome"]].insert(entry["name"]);
  CHECK(outcomes["dropped"] == dropped);
  CHECK(outcomes["re-laid out"] == std::set<std::string>{"pos_embed"});
  CHECK(outcomes["new"].size() == 3 * 7);
  for (const auto& entry : report["tensors"])
    CHECK((entry["outcome"] == "dropped" || entry["outcome"] == "re-laid out") == entry.contains("reason"));
  const auto parameters = [&](const char* what) { return report[what]["parameters"].get<Index>(); };
  Index elements = 0;
  for (const TensorInfo& info : before.tensors()) elements += info.elements();
  CHECK(parameters("source") == elements);
  CHECK(parameters("source") == parameters("inherited") + parameters("re_laid_out") + parameters("dropped"));
  CHECK(parameters("target") == parameters("inherited") + parameters("re_laid_out") + parameters("new"));
  CHECK(report["linattn"]["heads"] == 2);
  const std::string table = report_table(plan);
  CHECK(contains(table, "    cls_token: the converted model has no class token"));
  CHECK(contains(table, "    pos_embed: without the first two positions, which belong to class and"));

  CHECK(contains(message(convert(folder / "out.safetensors", folder / "twice", two_heads)),
                 "is already converted (blocks.0.attn is a TTT module)"));
}

TEST_CASE("vit: a folder keeps its config.json and gains what the file would say") {
  TemporaryFolder folder;
  fs::create_directory(folder / "in");
  timm(tiny, 1).write(folder / "in/model.safetensors");
  write_text(folder / "in/config.json", R"({"architecture": "deit", "num_heads": 2})");
  write_text(folder / "in/README.md", "mine");
  require_ok(convert(folder / "in", folder / "out", {.family = {.drop_cls = true}}));
  Checkpoint checkpoint;
  require_ok(open_checkpoint(folder / "out", checkpoint));
  Conversion conversion;
  require_ok(read_conversion(checkpoint.weights, conversion, checkpoint.config()));
  CHECK(conversion.size() == 3);
  const auto config = nlohmann::json::parse(read_text(folder / "out/config.json"));
  CHECK(config["architecture"] == "deit");
  CHECK(config["linattn"]["heads"] == 2);
  CHECK(read_text(folder / "out/README.md") == "mine");
  CHECK(checkpoint.weights.metadata().empty());
}

TEST_CASE("vit: positions that do not fit are an error that says what can be done") {
  TemporaryFolder folder;
  const auto in = folder / "in.safetensors", out = folder / "out.safetensors";
  const auto outcome = [&](const CheckpointBuilder& builder, const InheritOptions& options = two_heads) {
    builder.write(in);
    const std::string text = message(convert(in, out, options, true));
    CHECK(fs::exists(out) == (text == "ok"));
    fs::remove(out);
    return text;
  };
  CHECK(outcome(timm(tiny, 0)) == "ok");
  CHECK(contains(outcome(timm(tiny, 1)),
                 "tensor 'pos_embed': is F32 [1, 10, 8], but F32 [1, 9, 8] is needed (--drop-cls leaves out "
                 "the first position, which belongs to the class token)"));
  CHECK(contains(outcome(timm(tiny, 2)),
                 "is F32 [1, 11, 8], but F32 [1, 9, 8] is needed (--drop-cls leaves "
                 "out the first two positions"));
  CHECK(outcome(timm(tiny, 1), drop_cls) == "ok");
  CHECK(outcome(timm(tiny, 2), drop_cls) == "ok");
  // A mismatch is told to machines as well.
  timm(tiny, 1).write(in);
  Checkpoint checkpoint;
  Plan plan;
  require_ok(open_checkpoint(in, checkpoint));
  CHECK_FALSE(make_plan(checkpoint, two_heads, plan).ok());
  CHECK(contains(report_json(plan)["mismatched"][0]["note"], "--drop-cls"));

  // A class token without a position, and positions without their token, are what they are.
  CheckpointBuilder no_position = timm(tiny, 1);
  no_position.at("pos_embed").shape[1] = 9;
  CHECK(outcome(no_position) == "ok");
  no_position.write(in);
  CHECK(contains(report_table(planned(in, drop_cls)), "positions: none belongs to a class token"));
  CheckpointBuilder no_token = timm(tiny, 1);
  no_token.remove("cls_token");
  CHECK(contains(outcome(no_token), "--drop-cls"));
  CHECK(outcome(no_token, drop_cls) == "ok");
  // Two more than a square, but one token: that is no reason to drop two.
  CheckpointBuilder odd = timm(tiny, 1);
  odd.at("pos_embed").shape[1] = 11;
  CHECK(contains(outcome(odd, drop_cls), "is F32 [1, 11, 8], but F32 [1, 9, 8] is needed"));
  for (const Index positions : {1, 2, 3, 8, 12, 17})
    for (const Index tokens : {0, 1, 2}) {
      CheckpointBuilder other = timm(tiny, tokens);
      other.at("pos_embed").shape[1] = positions;
      CAPTURE(positions);
      CAPTURE(tokens);
      const bool square = positions == 1;
      const bool known = square || (positions == 2 && tokens != 2) || (positions == 3 && tokens != 1) ||
                         (positions == 17 && tokens != 2);
      CHECK((outcome(other) == "ok") == square);
      CHECK((outcome(other, drop_cls) == "ok") == known);
    }
}

TEST_CASE("vit: a head of another size is dropped and new, and never silently") {
  TemporaryFolder folder;
  const auto in = folder / "in.safetensors", out = folder / "out.safetensors";
  const auto classes = [](Index n) { return InheritOptions{.family = {.heads = 2, .classes = n}}; };
  timm(tiny, 0).write(in);
  SUBCASE("of the same size it is inherited") {
    const Plan plan = planned(in, classes(5));
    CHECK(totals(plan).dropped.tensors == 0);
    CHECK(plan.model.created.empty());
  }
  SUBCASE("of another size") {
    const Plan plan = planned(in, classes(7));
    CHECK(contains(report_table(plan),
                   "    head.weight, head.bias: has 5 classes, 7 are asked for: the new one is untrained\n"));
    require_ok(convert(in, out, classes(7)));
    const Safetensors after = opened(out);
    CHECK(after.find("head.weight")->shape == std::vector<Index>{7, 8});
    TorchGenerator generator(named_seed(0, "head.weight"));
    std::vector<float> drawn(7 * 8);
    generator.normal(drawn);
    const auto weight = values(after, "head.weight");
    for (std::size_t i = 0; i < drawn.size(); ++i) CHECK(weight[i] == drawn[i] * 0.02f);
    CHECK(values(after, "head.bias") == std::vector<double>(7, 0.0));
  }
  SUBCASE("there is none") {
    CheckpointBuilder headless = timm(tiny, 0);
    headless.remove("head.weight");
    headless.remove("head.bias");
    headless.write(in);
    CHECK(contains(message(convert(in, out, two_heads)), "'head.weight': is missing (--classes N makes"));
    require_ok(convert(in, out, classes(7)));
    CHECK(opened(out).find("head.bias")->shape == std::vector<Index>{7});
  }
  SUBCASE("from a file") {
    CheckpointBuilder init(module_tensors("blocks.1.attn", {}, 2, 4, Dtype::f32));
    InheritOptions options = classes(7);
    options.replace = "attn:1";
    options.init = Initialisation::file;
    const auto outcome = [&](const CheckpointBuilder& builder) {
      builder.write(folder / "init.safetensors");
      const Safetensors file = opened(folder / "init.safetensors");
      options.init_file = &file;
      return message(convert(in, out, options, true));
    };
    CHECK(contains(outcome(init), "'head.weight': is missing"));
    init.add("head.weight", Dtype::f32, {7, 8});
    init.add("head.bias", Dtype::f32, {7});
    CHECK(outcome(init) == "ok");
    CHECK(values(opened(out), "head.weight") == values(opened(folder / "init.safetensors"), "head.weight"));
    init.at("head.bias").shape = {6};
    CHECK(contains(outcome(init), "'head.bias': is F32 [6], but F32 [7] is needed"));
    init.at("head.bias").shape = {7};
    options.family.classes = 5;
    CHECK(contains(outcome(init), "'head.weight': belongs to no attention of the model"));
  }
  for (const Index bad : {Index{0}, Index{-1}, Index{1} << 40})
    CHECK(contains(message(convert(in, out, classes(bad), true)), "is no number of classes"));
}

TEST_CASE("vit: the forms of the paper") {
  TemporaryFolder folder;
  const auto in = folder / "in.safetensors", out = folder / "out.safetensors";
  timm(tiny, 0).write(in);
  const auto form = [&](InheritOptions options) {
    options.family.heads = 2;
    require_ok(convert(in, out, options, true));
    Conversion conversion;
    require_ok(read_conversion(opened(out), conversion));
    return conversion.at("blocks.1.attn");
  };
  SUBCASE("T5") {
    CHECK(form({}) == ModuleConversion{});
    CHECK(values(opened(out), "blocks.2.attn.k_conv2d.weight") == std::vector<double>(72, 0.0));
    CHECK(form({.init = Initialisation::official}) == ModuleConversion{});
    const auto conv = values(opened(out), "blocks.2.attn.k_conv2d.weight");
    TorchGenerator generator(named_seed(0, "blocks.2.attn.k_conv2d.weight"));
    for (const double value : conv) {
      CHECK(std::abs(value) < 1.0 / 3);
      CHECK(value == generator.uniform() * (2 * (1.0f / 3)) - 1.0f / 3);
    }
  }
  SUBCASE("two layers, no convolution") {
    CHECK(form({.inner_model = InnerModelKind::mlp, .conv = false}) ==
          ModuleConversion{.inner_model = InnerModelKind::mlp, .conv = false});
    std::set<std::string> created;
    const Safetensors before = opened(in), after = opened(out);
    for (const TensorInfo& info : after.tensors())
      if (before.find(info.name) == nullptr) created.insert(info.name);
    CHECK(created == std::set<std::string>{"blocks.0.attn.w1", "blocks.0.attn.w2", "blocks.1.attn.w1",
                                           "blocks.1.attn.w2", "blocks.2.attn.w1", "blocks.2.attn.w2"});
    CHECK(contains(report_table(planned(
                       in, {.inner_model = InnerModelKind::mlp, .conv = false, .family = {.heads = 2}})),
                   "by: mlp, inner product, no conv\n"));
  }
  SUBCASE("some blocks, and without a bias of qkv") {
    CheckpointBuilder unbiased = timm(tiny, 0);
    for (const char* block : {"0", "1", "2"})
      unbiased.remove("blocks." + std::string(block) + ".attn.qkv.bias");
    unbiased.write(in);
    CHECK(form({.replace = "attn:1-2"}) == ModuleConversion{});
    CHECK(opened(out).find("blocks.0.attn.w1") == nullptr);
    CHECK(opened(out).metadata().at("linattn.heads") == "2");
    CHECK(describe(planned(in, {.replace = "attn:2,attn:0", .family = {.heads = 2}}).replaced) ==
          "attn 0, 2");
    for (const char* everything : {"paper", "all", "attn"})
      CHECK(planned(in, {.replace = everything, .family = {.heads = 2}}).replaced.size() == 3);
    for (const auto& [bad, why] : {std::pair("joint", "'joint' is none of paper, all, attn, attn:A-B"),
                                   {"attn:3", "attn block 3 does not exist: the model has 3 blocks"},
                                   {"attn:", "'attn:' is none of"},
                                   {"attn2:0", "'attn2:0' is none of"}})
      CHECK(contains(message(convert(in, out, {.replace = bad, .family = {.heads = 2}}, true)), why));
  }
  SUBCASE("a file of new weights must have the form that is asked for") {
    const auto with = [&](const ModuleConversion& module, InheritOptions options) {
      CheckpointBuilder(module_tensors("module.blocks.1.attn", module, 2, 4, Dtype::f32))
          .write(folder / "init.safetensors");
      const Safetensors file = opened(folder / "init.safetensors");
      options.replace = "attn:1";
      options.init = Initialisation::file;
      options.init_file = &file;
      options.family.heads = 2;
      return message(convert(in, out, options, true));
    };
    CHECK(with({}, {}) == "ok");
    CHECK(with({.conv = false}, {}) == "ok");
    CHECK(with({.conv = false}, {.conv = false}) == "ok");
    CHECK(contains(with({}, {.conv = false}), "has convolutions, but none are asked for"));
    CHECK(contains(with(dit5_module, {}), "is beside neighborhood attention, which does not fit ViT of 3"));
  }
}

TEST_CASE("vit: the names of training checkpoints") {
  TemporaryFolder folder;
  const auto in = folder / "in.safetensors", out = folder / "out.safetensors";
  const auto weights = [](WeightSet set) {
    return InheritOptions{.family = {.heads = 2, .weights = set, .drop_cls = true}};
  };
  // Whether all of the target has the bytes of the tensors below a prefix.
  const auto taken = [&](const std::string& prefix) {
    const Safetensors before = opened(in), after = opened(out);
    for (const TensorSpec& spec : vit_tensors(tiny)) {
      const TensorInfo *from = before.find(prefix + spec.name), *to = after.find(spec.name);
      REQUIRE(from != nullptr);
      REQUIRE(to != nullptr);
      if (spec.name != "pos_embed" && !same_bytes(*from, *to)) return false;
    }
    return after.tensors().size() == vit_tensors(tiny).size() + 3 * 7;
  };
  SUBCASE("one set") {
    for (const char* prefix : {"module.", "model.", "state_dict.", "model.module.", "ema.", "model_ema.",
                               "model_ema.module.", "state_dict_ema."}) {
      CAPTURE(prefix);
      const bool ema = contains(prefix, "ema");
      timm(tiny, 1, prefix).write(in);
      require_ok(convert(in, out, drop_cls, true));
      CHECK(taken(prefix));
      CHECK(contains(report_table(planned(in, drop_cls)), "weights: EMA, there are no others") == ema);
      require_ok(convert(in, out, weights(ema ? WeightSet::ema : WeightSet::raw), true));
      CHECK(taken(prefix));
      CHECK(contains(message(convert(in, out, weights(ema ? WeightSet::raw : WeightSet::ema), true)),
                     ema ? "holds no raw weights, only their EMA" : "holds no EMA weights, only raw ones"));
    }
  }
  SUBCASE("both sets: raw unless EMA is asked for, and the other one is dropped by name") {
    for (const auto& [raw, ema] :
         {std::pair("model.", "model_ema."), {"", "ema."}, {"module.", "ema.module."}}) {
      CheckpointBuilder both = timm(tiny, 1, raw);
      both.append(timm(tiny, 1, ema).specs());
      both.add("optimizer.state.0.exp_avg", Dtype::f32, {3});
      both.add("epoch", Dtype::i64, {1});
      both.write(in);
      const std::size_t each = vit_tensors(tiny).size() + 1;
      for (const WeightSet set : {WeightSet::raw, WeightSet::ema}) {
        const bool is_raw = set == WeightSet::raw;
        require_ok(convert(in, out, is_raw ? drop_cls : weights(set), true));
        CHECK(taken(is_raw ? raw : ema));
        CHECK_FALSE(taken(is_raw ? ema : raw));
        const Plan plan = planned(in, is_raw ? drop_cls : weights(set));
        CHECK(totals(plan).dropped.tensors == each + 1 + 2);
        const std::string table = report_table(plan);
        CHECK(contains(table, is_raw ? "weights: raw, not their EMA" : "weights: EMA, not the raw ones"));
        CHECK(contains(table,
                       is_raw ? "EMA weights, the raw ones are taken" : "raw weights, their EMA is taken"));
        CHECK(contains(table, "    epoch, optimizer.state.0.exp_avg: left from training"));
      }
    }
  }
  SUBCASE("what cannot be told apart, or is unknown") {
    CheckpointBuilder twice = timm(tiny, 1, "model.");
    twice.append(timm(tiny, 1, "state_dict.").specs());
    twice.write(in);
    CHECK(contains(message(convert(in, out, drop_cls)),
                   "'patch_embed.proj.weight': is there twice: under 'model.' and 'state_dict.'"));
    timm(tiny, 1, "teacher.").write(in);
    CHECK(contains(message(convert(in, out, drop_cls)), "is no checkpoint of a known family"));
    CheckpointBuilder student = timm(tiny, 1);
    student.append(timm(tiny, 1, "teacher.").specs());
    student.write(in);
    CHECK(contains(message(convert(in, out, drop_cls)), "is no tensor of this family"));
  }
}

TEST_CASE("vit: options of other families are refused") {
  TemporaryFolder folder;
  timm(tiny, 0).write(folder / "vit.safetensors");
  CheckpointBuilder sd35(sd35_tensors(sd35_medium()));
  sd35.write_zeros(folder / "sd35.safetensors");
  const auto why = [&](const char* file, const FamilyOptions& family) {
    return message(convert(folder / file, folder / "out", {.family = family}));
  };
  CHECK(contains(why("sd35.safetensors", {.heads = 24}), "heads is no option for SD3.5 Medium"));
  CHECK(contains(why("sd35.safetensors", {.classes = 3}), "classes is no option for SD3.5 Medium"));
  CHECK(contains(why("sd35.safetensors", {.weights = WeightSet::raw}), "weights is no option for SD3.5"));
  CHECK(contains(why("sd35.safetensors", {.drop_cls = true}), "drop-cls is no option for SD3.5 Medium"));
}

TEST_CASE("vit: a damaged checkpoint is refused, or converted with all of it accounted for") {
  TemporaryFolder folder;
  const auto in = folder / "in.safetensors", out = folder / "out.safetensors";
  std::mt19937 random(7);
  const auto pick = [&](std::size_t n) { return static_cast<std::size_t>(random() % n); };
  int good = 0, refused = 0;
  for (int round = 0; round < 400; ++round) {
    CheckpointBuilder builder = timm(tiny, static_cast<Index>(pick(3)));
    for (std::size_t changes = pick(3); changes > 0; --changes) {
      auto& specs = builder.specs();
      const std::size_t which = pick(specs.size());
      TensorSpec& spec = specs[which];
      const std::size_t axis = spec.shape.empty() ? 0 : pick(spec.shape.size());
      switch (pick(6)) {
        case 0:
          specs.erase(specs.begin() + static_cast<Index>(which));
          break;
        case 1:
          if (!spec.shape.empty()) spec.shape[axis] = static_cast<Index>(pick(20));
          break;
        case 2:
          spec.shape.push_back(1);
          break;
        case 3:
          if (!spec.shape.empty()) spec.shape.pop_back();
          break;
        case 4:
          spec.dtype = dtype_table[pick(dtype_table.size())].dtype;
          break;
        default:
          spec.name.insert(pick(spec.name.size()), std::array{"x", ".", "9", "module."}[pick(4)]);
      }
    }
    std::set<std::string> names;
    for (const TensorSpec& spec : builder.specs()) names.insert(spec.name);
    if (names.size() != builder.specs().size()) continue;
    builder.write(in);
    const FileStatus status = convert(in, out, drop_cls);
    CAPTURE(round);
    CAPTURE(message(status));
    CHECK(status.ok() == fs::exists(out));
    if (!status.ok()) {
      ++refused;
      CHECK_FALSE(status.detail.empty());
      continue;
    }
    ++good;
    const Totals sum = totals(planned(in, drop_cls));
    Index elements = 0;
    for (const TensorSpec& spec : builder.specs()) elements += spec.elements();
    CHECK(sum.source.parameters == elements);
    CHECK(sum.source.tensors == builder.specs().size());
    CHECK(sum.inherited.parameters + sum.relaid.parameters + sum.dropped.parameters == elements);
    Conversion conversion;
    require_ok(read_conversion(opened(out), conversion));
    CHECK(conversion.size() == 3);
    fs::remove(out);
  }
  CHECK(good > 50);
  CHECK(refused > 50);
}

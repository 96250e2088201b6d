#include <doctest/doctest.h>
#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <map>
#include <string>
#include <vector>

#include <linattn/weights/inherit.hpp>

#include "checkpoint_builder.hpp"
#include "conversions.hpp"
#include "sd35_checkpoint.hpp"
#include "temporary_folder.hpp"

using namespace linattn;
using namespace support;
namespace fs = std::filesystem;

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
    builder.append(module_tensors("transformer_blocks.2.attn2", {}, 2, 4, Dtype::f32));
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
      more.append(module_tensors(stem, {}, 2, 4, Dtype::f32));
      refused(more, "belongs to no attention of the model");
    }
  }
  SUBCASE("a module twice") {
    builder.append(module_tensors("joint_blocks.2.x_block.attn", {}, 2, 4, Dtype::f32));
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
    require_ok(convert(model, folder / "old", {}, true));
    CHECK(fs::exists(folder / "old/model_index.json"));
    require_ok(convert(model, folder / "old", {}, true));
    CHECK(folder.names() == std::vector<std::string>{"exists", "in.safetensors", "model", "old"});
  }
  SUBCASE("a folder that holds what no conversion writes stays as it is") {
    const fs::path old = folder / "old";
    require_ok(convert(model, old));
    for (const char* name : {"notes.txt", ".hidden", "vae/notes.txt", "transformer/mine.safetensors"}) {
      write_text(old / name, "mine");
      CHECK(contains(message(convert(model, old, {}, true)), std::string("holds ") + name));
      CHECK(read_text(old / name) == "mine");
      fs::remove(old / name);
    }
    fs::create_directory(old / "mine");
    CHECK(contains(message(convert(model, old, {}, true)), "holds mine"));
    fs::remove(old / "mine");
    fs::remove(old / "model_index.json");
    fs::create_symlink(file, old / "model_index.json");
    CHECK(contains(message(convert(model, old, {}, true)), "holds model_index.json"));
    CHECK(read_text(file) == before);
  }
  SUBCASE("inputs that a replaced output would take along") {
    const fs::path old = folder / "old", init = old / "tuned.safetensors";
    require_ok(convert(model, old));
    require_ok(convert(file, init));
    const Safetensors tuned = opened(init);
    Checkpoint checkpoint;
    Plan plan;
    require_ok(open_checkpoint(model, checkpoint));
    require_ok(make_plan(checkpoint, {}, plan));
    const InheritOptions options{.init_file = &tuned};
    CHECK(contains(message(apply(checkpoint, plan, options, old, true)), "holds the input"));
    CHECK(contains(message(apply(checkpoint, plan, options, init, true)), "is the input itself"));
    CHECK(contains(message(convert(model / "transformer", model, {}, true)), "holds the input"));
    // As in the cache of a model hub.
    const fs::path shard =
        model / "transformer" / opened(model / "transformer").shards()[0].path().filename();
    fs::create_directory(folder / "blobs");
    fs::rename(shard, folder / "blobs/1");
    fs::create_symlink("../../blobs/1", shard);
    CHECK(contains(message(convert(model, folder / "blobs", {}, true)), "holds the input"));
    CHECK(contains(message(convert(model, folder / "blobs/1", {}, true)), "is the input itself"));
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
    write_text(model / "transformer/config.json", "{}");
    fs::create_directory_symlink(model / "vae", model / "vae2");
    CHECK(contains(message(convert(model, folder / "out")), "link to a folder"));
    CHECK(folder.names() == names);
  }
}

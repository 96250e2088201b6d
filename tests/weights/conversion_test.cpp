#include <linattn/weights/conversion.hpp>

#include <doctest/doctest.h>

#include <functional>
#include <string>
#include <utility>

#include "checkpoint_builder.hpp"
#include "temporary_folder.hpp"

using namespace linattn;
using namespace support;

TEST_CASE("conversion: what a file says and what it holds must agree") {
  TemporaryFolder folder;
  const auto path = folder / "t5.safetensors";
  const std::string stem = "transformer_blocks.3.attn";
  const CheckpointBuilder good(module_tensors(stem, {}, 2, 4, Dtype::f32));
  const Metadata said = conversion_metadata({{stem, {}}});
  const auto outcome = [&](const CheckpointBuilder& builder, const Metadata& metadata) {
    builder.write(path, metadata);
    Conversion conversion;
    return message(read_conversion(opened(path), conversion));
  };
  CHECK(outcome(good, said) == "ok");
  CHECK(outcome(good, {}) == "ok");
  CHECK(outcome(CheckpointBuilder({}), {}) == "ok");

  const auto changed = [&](const std::string& key, const char* value) {
    Metadata metadata = said;
    if (value == nullptr)
      metadata.erase(key);
    else
      metadata[key] = value;
    return outcome(good, metadata);
  };
  const std::string dot = "linattn." + stem + ".";
  CHECK(contains(changed("linattn.format", "2"), "linattn.format is not 1"));
  CHECK(contains(changed("linattn.format", nullptr), "linattn.format is not 1"));
  CHECK(contains(changed("linattn.format", "one"), "no number"));
  CHECK(contains(changed("linattn.colour", "blue"), "not known to this version"));
  CHECK(contains(changed(dot + "inner_model", "transformer"), "has inner_model \"transformer\""));
  CHECK(
      contains(changed(dot + "inner_model", "mlp"), "w3': is not a tensor of a module with inner model mlp"));
  CHECK(contains(changed(dot + "inner_loss", "true"), "has inner_loss true"));
  CHECK(contains(changed(dot + "inner_lr", "1x"), "no number"));
  CHECK(contains(changed(dot + "inner_lr", "nan"), "no finite number"));
  CHECK(contains(changed(dot + "inner_lr", "1e300"), "no finite number from -1e6 to 1e6"));
  CHECK(contains(changed(dot + "key_norm_eps", "0"), "no positive number"));
  CHECK(contains(changed(dot + "key_norm_eps", "1e300"), "no positive number up to 1"));
  CHECK(contains(changed(dot + "key_norm_eps", nullptr), "has no key_norm_eps"));
  CHECK(contains(changed(dot + "conv", "false"), "q_conv2d.weight': is not a tensor of a module with"));
  CHECK(contains(changed(dot + "conv", "yes"), "neither true nor false"));
  CHECK(contains(changed(dot + "momentum", "0.9"), "a field that this version does not know"));
  CHECK(contains(outcome(good, {{"linattn.format", "1"}}), "does not list the module"));
  CHECK(contains(outcome(CheckpointBuilder({}), said), stem + ".w1': is missing"));

  const auto with = [&](const std::function<void(CheckpointBuilder&)>& change) {
    CheckpointBuilder builder = good;
    change(builder);
    return outcome(builder, {});
  };
  CHECK(contains(with([&](CheckpointBuilder& b) { b.remove(stem + ".w2"); }), "w2 is missing"));
  CHECK(contains(with([&](CheckpointBuilder& b) { b.remove(stem + ".w1"); }), stem + ".w1': is missing"));
  CHECK(contains(with([&](CheckpointBuilder& b) { b.remove(stem + ".q_conv2d.weight"); }),
                 "is not a tensor of a module"));
  CHECK(contains(with([&](CheckpointBuilder& b) { b.remove(stem + ".q_conv2d.bias"); }),
                 "q_conv2d.bias': is missing"));
  CHECK(contains(with([&](CheckpointBuilder& b) {
                   b.at(stem + ".w1").shape = {2, 4, 4};
                 }),
                 "not [1, heads, head_dim, head_dim]"));
  CHECK(contains(with([&](CheckpointBuilder& b) {
                   b.at(stem + ".w1").shape = {1, 2, 4, 5};
                 }),
                 "not [1, heads, head_dim, head_dim]"));
  CHECK(contains(with([&](CheckpointBuilder& b) {
                   b.at(stem + ".w2").shape = {1, 2, 5, 5};
                 }),
                 "but F32 [1, 2, 4, 4] is needed"));
  CHECK(contains(with([&](CheckpointBuilder& b) { b.at(stem + ".w2").dtype = Dtype::i32; }),
                 "F64, F32, F16 or BF16 is needed"));

  // Two matrices and no word: an MLP.
  CheckpointBuilder two(
      module_tensors(stem, {.inner_model = InnerModelKind::mlp, .conv = false}, 2, 4, Dtype::f32));
  two.write(path);
  Conversion conversion;
  require_ok(read_conversion(opened(path), conversion));
  CHECK(conversion.at(stem) == ModuleConversion{.inner_model = InnerModelKind::mlp, .conv = false});

  // Numbers survive both spellings to the last bit.
  const Conversion odd{{stem, {.inner_lr = 0.1, .key_norm_eps = 1e-300}}};
  good.write(path, conversion_metadata(odd));
  require_ok(read_conversion(opened(path), conversion));
  CHECK(conversion == odd);
  write_text(folder / "config.json",
             nlohmann::json{{"linattn", conversion_json<nlohmann::json>(odd)}}.dump());
  good.write(path);
  require_ok(read_conversion(opened(path), conversion, folder / "config.json"));
  CHECK(conversion == odd);
}

TEST_CASE("conversion: a module beside neighborhood attention") {
  TemporaryFolder folder;
  const auto path = folder / "dit5.safetensors", config = folder / "config.json";
  const std::string stem = "blocks.0.attn", dot = "linattn." + stem + ".";
  const CheckpointBuilder good(module_tensors(stem, dit5_module, 2, 4, Dtype::f32));
  REQUIRE(good.specs().size() == 2 + 4 + 2);
  Conversion conversion;
  const auto outcome = [&](const CheckpointBuilder& builder, const Metadata& metadata) {
    builder.write(path, metadata);
    return message(read_conversion(opened(path), conversion));
  };
  SUBCASE("what it says comes back, in either spelling, and nothing said is the paper's form") {
    ModuleConversion module = dit5_module;
    for (const Index window : {1, 5, 7}) {
      module.neighborhood = window;
      CHECK(outcome(good, conversion_metadata({{stem, module}}, 2)) == "ok");
      CHECK(conversion == Conversion{{stem, module}});
      write_text(config,
                 nlohmann::json{{"linattn", conversion_json<nlohmann::json>({{stem, module}}, 2)}}.dump());
      good.write(path);
      require_ok(read_conversion(opened(path), conversion, config));
      CHECK(conversion == Conversion{{stem, module}});
    }
    CHECK(conversion_metadata({{stem, dit5_module}}, 2).at(dot + "neighborhood") == "5");
    CHECK(conversion_metadata({{stem, dit5_module}}, 2).at("linattn.heads") == "2");
    CHECK_FALSE(conversion_metadata({{stem, {}}}).contains(dot + "neighborhood"));
    CHECK(outcome(good, {}) == "ok");
    CHECK(conversion == Conversion{{stem,
                                    {.inner_model = InnerModelKind::mlp,
                                     .inner_loss = InnerLossKind::squared_error,
                                     .inner_lr = 1,
                                     .key_norm_eps = 1,
                                     .conv = true,
                                     .neighborhood = 5}}});
  }
  SUBCASE("the same without conv") {
    CheckpointBuilder bare = good;
    for (const char* conv : {".q_conv2d", ".k_conv2d"})
      for (const char* part : {".weight", ".bias"}) bare.remove(stem + conv + part);
    CHECK(outcome(bare, {}) == "ok");
    CHECK_FALSE(conversion.at(stem).conv);
  }
  SUBCASE("words that are refused") {
    const auto changed = [&](const std::string& key, const char* value) {
      Metadata metadata = conversion_metadata({{stem, dit5_module}}, 2);
      metadata[key] = value;
      return outcome(good, metadata);
    };
    for (const char* window : {"-1", "2", "4.5", "32770", "1e300", "inf", "nan"})
      CHECK_MESSAGE(contains(changed(dot + "neighborhood", window), "has a neighborhood that is n"), window);
    CHECK(contains(changed(dot + "neighborhood", "five"), "no number"));
    CHECK(contains(changed(dot + "neighborhood", "true"), "no number"));
    CHECK(contains(changed(dot + "neighborhood", "0"),
                   "qk_scale_ttt': is not a tensor of a module with inner model mlp and conv"));
    CHECK(contains(changed("linattn.heads", "3"), "w1': is F32 [1, 2, 4, 4], but linattn.heads is 3"));
    CHECK(contains(changed("linattn.heads", "two"), "no number"));
    write_text(config, R"({"linattn": {"format": 1, "heads": "2", "modules": {"blocks.0.attn": {
        "inner_model": "mlp", "inner_loss": "squared_error", "inner_lr": 1, "key_norm_eps": 1, "conv": true,
        "neighborhood": 5}}}})");
    good.write(path);
    CHECK(contains(message(read_conversion(opened(path), conversion, config)), "linattn.heads is \"2\""));
  }
  SUBCASE("tensors that are refused") {
    const auto with = [&](const std::function<void(CheckpointBuilder&)>& change) {
      CheckpointBuilder builder = good;
      change(builder);
      return outcome(builder, {});
    };
    CHECK(contains(with([&](auto& b) { b.remove(stem + ".qk_offset_ttt"); }), "qk_offset_ttt': is missing"));
    CHECK(contains(with([&](auto& b) { b.remove(stem + ".qk_scale_ttt"); }),
                   "qk_offset_ttt': is not a tensor"));
    CHECK(contains(with([&](auto& b) {
                     b.add(stem + ".w3", Dtype::f32, {1, 2, 4, 4});
                   }),
                   "w3': is not a tensor of a module with inner model mlp and conv beside neighborhood"));
    CHECK(contains(with([&](auto& b) {
                     b.at(stem + ".qk_scale_ttt").shape = {8, 2};
                   }),
                   "but F32 [1, 1, 8, 2] is needed"));
  }
}

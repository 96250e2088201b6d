// The text encoders and the VAE against their formulas, in sizes that divide nothing.
#include <doctest/doctest.h>

#include <algorithm>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include "reference/sd35_models.hpp"
#include "sd35/clip_text.hpp"
#include "sd35/t5_encoder.hpp"
#include "sd35/vae.hpp"
#include "sd35_files.hpp"
#include "support.hpp"

namespace {

using linattn::Dtype;
using linattn::Index;
using linattn::TensorView;
using sd35::Activation;
using sd35::Checkpoint;
using sd35::Component;
using sd35_files::Folder;
using Ids = std::vector<std::int32_t>;

// Depth and width multiply one rounding by some hundreds; the first wrong formula is 1e-3 off and more.
template <class T>
constexpr double tolerance = std::is_same_v<T, double> ? 2e-14 : 5e-6;

template <class T>
void check(const sd35::Tensor<T>& actual, const reference::Array& expected) {
  REQUIRE(static_cast<std::size_t>(actual.elements()) == expected.values.size());
  const Index n = actual.elements();
  support::check_relative(TensorView<const T, 1>{actual.data(), {n}},
                          TensorView<const double, 1>{expected.values.data(), {n}}, tolerance<T>);
}

template <class T>
bool same(const sd35::Tensor<T>& a, const sd35::Tensor<T>& b) {
  return a.shape() == b.shape() && support::same_bits(TensorView<const T, 1>{a.data(), {a.elements()}},
                                                      TensorView<const T, 1>{b.data(), {b.elements()}});
}

Ids random_ids(std::size_t count, Index below, std::uint64_t seed) {
  support::Random random(seed);
  Ids ids(count);
  for (auto& id : ids) id = static_cast<std::int32_t>(random.below(below));
  return ids;
}

template <class T>
void check_clip(Dtype dtype, Activation activation, double (*formula)(double)) {
  const Folder folder;
  const sd35_files::ClipSize size;
  const sd35_files::Parameters parameters = sd35_files::make_clip(dtype, size);
  sd35_files::write(folder / "clip.safetensors", parameters, dtype);
  const Checkpoint checkpoint = Checkpoint::open(folder / "clip.safetensors", Component::clip_l);
  sd35::ClipConfig config;
  {
    // A file alone does not tell 3 heads of 8 channels.
    CHECK_THROWS_WITH_AS((void)sd35::ClipConfig::of(checkpoint, Component::clip_l),
                         doctest::Contains("config.json"), std::runtime_error);
    sd35_files::write(folder / "clip/model.safetensors", parameters, dtype);
    sd35_files::write_text(folder / "clip/config.json", R"({"num_attention_heads": 3})");
    config = sd35::ClipConfig::of(Checkpoint::open(folder / "clip", Component::clip_l), Component::clip_l);
    CHECK(config.heads == 3);
    CHECK(config.layers == 3);
    CHECK(config.project);
  }
  config.activation = activation;
  config.eps = 1e-3;
  config.project = false;
  const sd35::ClipText<T> model(checkpoint, config);

  const Index tokens = 13;
  Ids ids = random_ids(2 * 13, 40, 3);
  ids[4] = ids[9] = 45;  // the first of the largest counts
  ids[13 + 12] = 49;     // the last position
  const auto expected = reference::clip_text(parameters, ids, 2, size.layers, size.heads, formula, 1e-3);
  sd35::Runtime rt(1);
  const sd35::ClipFeatures<T> features = model.encode(rt, ids, 2);
  check(features.hidden, expected.hidden);
  check(features.last_hidden, expected.last);
  reference::Array pooled({2, 1, size.width()});
  for (Index c = 0; c < size.width(); ++c) {
    pooled(0, 0, c) = expected.last(0, 4, c);
    pooled(1, 0, c) = expected.last(1, tokens - 1, c);
  }
  check(features.pooled, pooled);
  check(features.projected, reference::linear(parameters, "text_projection", pooled, false));
  CHECK(model.pooled(features).data() == features.pooled.data());

  sd35::Runtime more(3);
  CHECK(same(model.encode(more, ids, 2).last_hidden, features.last_hidden));

  // An EOS that is not the largest id.
  config.eos = ids[7];
  const auto first = std::find(ids.begin(), ids.begin() + tokens, ids[7]) - ids.begin();
  const sd35::ClipFeatures<T> other = sd35::ClipText<T>(checkpoint, config).encode(rt, ids, 2);
  CHECK(std::equal(other.pooled.data(), other.pooled.data() + size.width(),
                   other.last_hidden.data() + first * size.width()));

  CHECK_THROWS_WITH_AS((void)model.encode(rt, Ids{1, 2, 50}, 1), doctest::Contains("token id 50"),
                       std::runtime_error);
  CHECK_THROWS_AS((void)model.encode(rt, Ids(78, 1), 1), std::runtime_error);
  CHECK_THROWS_AS((void)model.encode(rt, Ids{}, 1), std::runtime_error);
}

TEST_CASE("CLIP follows its formula") {
  SUBCASE("float, f16, quick_gelu") {
    check_clip<float>(Dtype::f16, Activation::quick_gelu, reference::quick_gelu);
  }
  SUBCASE("float, f32, erf") { check_clip<float>(Dtype::f32, Activation::gelu_erf, reference::gelu_erf); }
  SUBCASE("double, bf16, erf") { check_clip<double>(Dtype::bf16, Activation::gelu_erf, reference::gelu_erf); }
  SUBCASE("double, f64, tanh") {
    check_clip<double>(Dtype::f64, Activation::gelu_tanh, reference::gelu_tanh);
  }
}

TEST_CASE("a CLIP without config.json takes its family's settings") {
  const Folder folder;
  const sd35_files::ClipSize size{.layers = 2, .heads = 2, .head_dim = 64};
  sd35_files::write(folder / "clip.safetensors", sd35_files::make_clip(Dtype::f16, size), Dtype::f16);
  for (const Component component : {Component::clip_l, Component::clip_g}) {
    const auto config =
        sd35::ClipConfig::of(Checkpoint::open(folder / "clip.safetensors", component), component);
    const bool l = component == Component::clip_l;
    CHECK(config.heads == 2);
    CHECK(config.activation == (l ? Activation::quick_gelu : Activation::gelu_erf));
    CHECK(config.project == !l);
    CHECK(config.eps == 1e-5);
    CHECK(!config.eos);
  }
  sd35_files::write(folder / "b/model.safetensors", sd35_files::make_clip(Dtype::f16, size), Dtype::f16);
  sd35_files::write_text(folder / "b/config.json",
                         R"({"hidden_act": "gelu", "layer_norm_eps": 1e-6, "eos_token_id": 49})");
  const auto config =
      sd35::ClipConfig::of(Checkpoint::open(folder / "b", Component::clip_l), Component::clip_l);
  CHECK(config.activation == Activation::gelu_erf);
  CHECK(config.eps == 1e-6);
  CHECK(config.eos == 49);
  CHECK(config.project);
  CHECK_THROWS_WITH_AS((void)sd35::clip_activation("relu"), doctest::Contains("relu"), std::runtime_error);
}

template <class T>
void check_t5(Dtype dtype) {
  const Folder folder;
  const sd35_files::T5Size size;
  const sd35_files::Parameters parameters = sd35_files::make_t5(dtype, size);
  sd35_files::write(folder / "t5.safetensors", parameters, dtype, "text_encoders.t5xxl.transformer.");
  const sd35::T5Encoder<T> model(Checkpoint::open(folder / "t5.safetensors", Component::t5));
  CHECK(model.width() == size.width);
  for (const auto& extents : {std::pair<Index, Index>{2, 9}, {1, 1}, {1, 137}}) {
    const Index batch = extents.first, tokens = extents.second;
    CAPTURE(tokens);
    const Ids ids = random_ids(static_cast<std::size_t>(batch * tokens), size.vocabulary, 5);
    sd35::Runtime rt(1), more(3);
    const sd35::Tensor<T> hidden = model.encode(rt, ids, batch);
    check(hidden, reference::t5_encoder(parameters, ids, batch, size.blocks));
    CHECK(same(hidden, model.encode(more, ids, batch)));
  }
}

TEST_CASE("T5 follows its formula, with heads that do not make up the width") {
  SUBCASE("float, f16") { check_t5<float>(Dtype::f16); }
  SUBCASE("double, bf16") { check_t5<double>(Dtype::bf16); }
}

// The reference gets what the file says: elements times scale.
TEST_CASE("T5 takes 8-bit weights, plain and scaled") {
  for (const bool scaled : {false, true}) {
    CAPTURE(scaled);
    const Folder folder;
    const sd35_files::T5Size size;
    sd35_files::Parameters stored = sd35_files::make_t5(Dtype::f8_e4m3, size), values = stored, scales;
    if (scaled) {
      double scale = 0.37;
      for (auto& [name, array] : values) {
        if (name.find("SelfAttention.") == std::string::npos && name.find("Dense") == std::string::npos &&
            name != "shared.weight")
          continue;
        if (name.find("relative") != std::string::npos) continue;
        reference::Array factor(name.ends_with("q.weight") ? std::vector<Index>{} : std::vector<Index>{1});
        scale = static_cast<double>(static_cast<float>(2.1 - scale));
        factor.values[0] = scale;
        for (double& value : array.values) value *= scale;
        scales[name.substr(0, name.size() - 6) + "scale_weight"] = factor;
        // What a file for 8-bit products has besides changes nothing here.
        scales[name.substr(0, name.size() - 6) + "scale_input"] = factor;
      }
      stored["scaled_fp8"] = reference::Array({2});
    }
    sd35_files::write(folder / "t5.safetensors", stored, Dtype::f8_e4m3, "text_encoders.t5xxl.transformer.",
                      0, {}, scales);
    const Checkpoint checkpoint = Checkpoint::open(folder / "t5.safetensors", Component::t5);
    const Ids ids = random_ids(2 * 9, size.vocabulary, 5);
    sd35::Runtime rt(2);
    check(sd35::T5Encoder<float>(checkpoint).encode(rt, ids, 2),
          reference::t5_encoder(values, ids, 2, size.blocks));
    check(sd35::T5Encoder<double>(checkpoint).encode(rt, ids, 2),
          reference::t5_encoder(values, ids, 2, size.blocks));
  }
}

TEST_CASE("a scale is never passed over") {
  const Folder folder;
  const std::string q = "encoder.block.0.layer.0.SelfAttention.q.";
  const sd35_files::Parameters f8 = sd35_files::make_t5(Dtype::f8_e4m3, {});
  const auto said = [&](Dtype dtype, const std::string& name, const reference::Array& scale) {
    sd35_files::write(folder / "t5.safetensors", f8, dtype, "", 0, {}, {{name, scale}});
    try {
      (void)sd35::T5Encoder<float>(Checkpoint::open(folder / "t5.safetensors", Component::t5));
    } catch (const std::runtime_error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  const auto has = [](const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
  };
  reference::Array one({1}), two({2}), endless({1});
  one.values = {2};
  endless.values = {1e39};
  CHECK(said(Dtype::f8_e4m3, q + "scale_weight", one).empty());
  for (const std::string& error :
       {said(Dtype::f16, q + "scale_weight", one), said(Dtype::f8_e4m3, q + "scale_weight", two),
        said(Dtype::f8_e4m3, q + "scale_weight", endless), said(Dtype::f8_e4m3, q + "weight_scale", one)}) {
    CAPTURE(error);
    CHECK(has(error, "t5.safetensors: tensor '" + q));
  }
  CHECK(has(said(Dtype::f16, q + "scale_weight", one), "F16"));
  CHECK(has(said(Dtype::f8_e4m3, q + "scale_weight", two), "F32 [2]"));
  CHECK(has(said(Dtype::f8_e5m2, "other", one), "F8_E5M2"));
}

TEST_CASE("T5's relative buckets") {
  for (Index relative = -1000; relative <= 1000; ++relative) {
    CAPTURE(relative);
    CHECK(sd35::t5_bucket(relative) == reference::t5_bucket(relative));
  }
}

TEST_CASE("T5 refuses what it does not compute") {
  const Folder folder;
  sd35_files::Parameters parameters = sd35_files::make_t5(Dtype::f32, {});
  sd35_files::write(folder / "t5/model.safetensors", parameters, Dtype::f32);
  sd35_files::write_text(folder / "t5/config.json", R"({"feed_forward_proj": "relu"})");
  CHECK_THROWS_WITH_AS(sd35::T5Encoder<float>(Checkpoint::open(folder / "t5", Component::t5)),
                       doctest::Contains("relu"), std::runtime_error);
  parameters.erase("encoder.block.1.layer.1.DenseReluDense.wo.weight");
  sd35_files::write(folder / "cut.safetensors", parameters, Dtype::f32);
  CHECK_THROWS_WITH_AS(sd35::T5Encoder<float>(Checkpoint::open(folder / "cut.safetensors", Component::t5)),
                       doctest::Contains("encoder.block.1.layer.1.DenseReluDense.wo.weight"),
                       std::runtime_error);
}

template <class T>
void check_vae(Dtype dtype, const std::vector<Index>& channels, int blocks, Index batch, Index height,
               Index width) {
  CAPTURE(height);
  CAPTURE(width);
  const Folder folder;
  const Index latent_channels = 5, groups = 4;
  const sd35_files::Parameters parameters = sd35_files::make_vae(dtype, channels, blocks, latent_channels);
  sd35_files::write(folder / "vae.safetensors", parameters, dtype, "first_stage_model.");
  const Checkpoint checkpoint = Checkpoint::open(folder / "vae.safetensors", Component::vae);
  sd35::VaeConfig config = sd35::VaeConfig::of(checkpoint);
  CHECK(config.groups == 32);
  config.groups = groups;
  const sd35::VaeDecoder<T> model(checkpoint, config);
  CHECK(model.latent_channels() == latent_channels);
  CHECK(model.factor() == Index{1} << (channels.size() - 1));

  reference::Array latent({batch, latent_channels, height, width});
  support::fill_normal(
      TensorView<double, 1>{latent.values.data(), {static_cast<Index>(latent.values.size())}}, 4);
  for (double& value : latent.values) value = static_cast<double>(static_cast<float>(value));
  const std::vector<T> values(latent.values.begin(), latent.values.end());
  const TensorView<const T, 4> view{values.data(), {batch, latent_channels, height, width}};

  const int levels = static_cast<int>(channels.size());
  const reference::Array expected =
      reference::to_tokens(reference::vae_decoder(parameters, latent, levels, blocks, groups));
  sd35::Runtime rt(1), more(3);
  const sd35::Tensor<T> picture = model.decode(rt, view);
  CHECK(picture.shape() == std::vector<Index>{batch, height * model.factor(), width * model.factor(), 3});
  check(picture, expected);
  CHECK(same(picture, model.decode(more, view)));

  // Bands of rows leave out intermediates and change nothing.
  CHECK(same(picture, model.decode(rt, view, {}, sd35::VaeMemory::bands)));
  CHECK(same(picture, model.decode(more, view, {}, sd35::VaeMemory::bands)));

  // The latent may lie in memory as it likes.
  support::Buffer<T, 4> permuted(
      {batch, latent_channels, height, width},
      {height * width * latent_channels, 1, width * latent_channels, latent_channels}, 0);
  support::copy(view, permuted.view());
  CHECK(same(picture, model.decode(rt, permuted.view())));
}

TEST_CASE("the VAE decoder follows its formula, whatever the tiles cut") {
  SUBCASE("one position") { check_vae<double>(Dtype::f16, {4, 8}, 1, 1, 1, 1); }
  SUBCASE("three levels, batch of two") { check_vae<double>(Dtype::bf16, {4, 12, 8}, 2, 2, 3, 5); }
  SUBCASE("no upsampling") { check_vae<double>(Dtype::f32, {8}, 1, 1, 9, 33); }
  SUBCASE("beyond a tile in both axes") { check_vae<double>(Dtype::f64, {4, 8}, 1, 1, 9, 17); }
  SUBCASE("tiles of other shapes at the edges") { check_vae<float>(Dtype::f16, {32, 64}, 1, 1, 6, 10); }
  SUBCASE("several bands and a part of one") { check_vae<float>(Dtype::bf16, {4, 8}, 2, 1, 41, 3); }
  SUBCASE("float") { check_vae<float>(Dtype::f16, {4, 8}, 1, 1, 5, 18); }
}

template <class T>
void check_vae_encoder(Dtype dtype, const std::vector<Index>& channels, int blocks, Index batch, Index height,
                       Index width, bool quant = false) {
  CAPTURE(height);
  CAPTURE(width);
  const Folder folder;
  const Index latent_channels = 3, groups = 4;
  sd35_files::Parameters parameters = sd35_files::make_vae_encoder(dtype, channels, blocks, latent_channels);
  if (quant) {
    sd35_files::Maker maker(dtype, 11);
    maker.conv("quant_conv", 2 * latent_channels, 2 * latent_channels, 1);
    parameters.merge(maker.parameters);
  }
  sd35_files::write(folder / "vae.safetensors", parameters, dtype, "first_stage_model.");
  const Checkpoint checkpoint = Checkpoint::open(folder / "vae.safetensors", Component::vae);
  sd35::VaeConfig config = sd35::VaeConfig::of(checkpoint);
  CHECK(config.scaling == (quant ? 0.18215 : 1.5305));
  CHECK(config.shift == (quant ? 0 : 0.0609));
  config.groups = groups;
  const sd35::VaeEncoder<T> model(checkpoint, config);
  CHECK(model.latent_channels() == latent_channels);
  CHECK(model.factor() == Index{1} << (channels.size() - 1));

  reference::Array picture({batch, 3, height, width});
  support::fill_normal(
      TensorView<double, 1>{picture.values.data(), {static_cast<Index>(picture.values.size())}}, 4);
  for (double& value : picture.values) value = static_cast<double>(static_cast<float>(value));
  const std::vector<T> values(picture.values.begin(), picture.values.end());
  const TensorView<const T, 4> view{values.data(), {batch, 3, height, width}};

  const reference::Array expected =
      reference::vae_encoder(parameters, picture, static_cast<int>(channels.size()), blocks, groups);
  sd35::Runtime rt(1), more(3);
  const sd35::Tensor<T> moments = model.moments(rt, view);
  CHECK(moments.shape() ==
        std::vector<Index>{batch, height / model.factor(), width / model.factor(), 2 * latent_channels});
  check(moments, reference::to_tokens(expected));
  CHECK(same(moments, model.moments(more, view)));
  CHECK(same(moments, model.moments(more, view, {}, sd35::VaeMemory::bands)));

  const sd35::Tensor<T> latent = model.latent(moments);
  reference::Array mean({batch, latent_channels, expected.size(2), expected.size(3)});
  support::for_each_index(latent.template view<4>().extents, [&](const auto& i) {
    mean(i[0], i[1], i[2], i[3]) = (expected(i[0], i[1], i[2], i[3]) - config.shift) * config.scaling;
  });
  check(latent, mean);
}

TEST_CASE("the VAE encoder follows its formula") {
  SUBCASE("the smallest picture") { check_vae_encoder<double>(Dtype::f16, {4, 8}, 1, 1, 2, 2); }
  SUBCASE("three levels, batch of two") { check_vae_encoder<double>(Dtype::bf16, {4, 12, 8}, 2, 2, 12, 20); }
  SUBCASE("sides that the factor does not divide") {
    check_vae_encoder<double>(Dtype::f32, {8, 4}, 1, 1, 9, 35);
  }
  SUBCASE("several bands, quant_conv") { check_vae_encoder<float>(Dtype::f16, {4, 8}, 1, 1, 70, 34, true); }
}

// post_quant_conv is a linear map of the latent: the reference gets the mapped one, its own scale undone.
TEST_CASE("a VAE with a post_quant_conv applies it first, and has another scale") {
  const Folder folder;
  sd35_files::Parameters parameters = sd35_files::make_vae(Dtype::f32, {4, 8}, 1, 5);
  sd35_files::Maker maker(Dtype::f32, 11);
  maker.conv("post_quant_conv", 5, 3, 1);
  parameters.merge(maker.parameters);
  sd35_files::write(folder / "vae.safetensors", parameters, Dtype::f32, "first_stage_model.");
  const Checkpoint checkpoint = Checkpoint::open(folder / "vae.safetensors", Component::vae);
  sd35::VaeConfig config = sd35::VaeConfig::of(checkpoint);
  CHECK(config.scaling == 0.18215);
  CHECK(config.shift == 0);
  config.groups = 4;
  const sd35::VaeDecoder<double> model(checkpoint, config);
  CHECK(model.latent_channels() == 3);

  reference::Array latent({2, 3, 4, 6}), mapped({2, 5, 4, 6});
  const TensorView<double, 4> z{latent.values.data(), {2, 3, 4, 6}}, out{mapped.values.data(), {2, 5, 4, 6}};
  support::fill_normal(z, 4);
  const std::vector<double>&weight = parameters.at("post_quant_conv.weight").values,
        &bias = parameters.at("post_quant_conv.bias").values;
  support::for_each_index(out.extents, [&](const auto& i) {
    double sum = bias[static_cast<std::size_t>(i[1])];
    for (Index c = 0; c < 3; ++c)
      sum += weight[static_cast<std::size_t>(i[1] * 3 + c)] * z(i[0], c, i[2], i[3]) / 0.18215;
    support::element(out, i) = (sum - 0.0609) * 1.5305;
  });
  sd35::Runtime rt(2);
  const auto picture = model.decode(rt, z);
  const auto expected = reference::to_tokens(reference::vae_decoder(parameters, mapped, 2, 1, 4));
  support::check_relative(TensorView<const double, 1>{picture.data(), {picture.elements()}},
                          TensorView<const double, 1>{expected.values.data(), {picture.elements()}}, 1e-12);
}

TEST_CASE("the group norm keeps its digits beside a large offset") {
  const Folder folder;
  sd35_files::Parameters parameters = sd35_files::make_vae(Dtype::f32, {4, 8}, 1, 5);
  for (double& value : parameters.at("decoder.conv_in.bias").values)
    value = static_cast<double>(static_cast<float>(value + 1000));
  sd35_files::write(folder / "vae.safetensors", parameters, Dtype::f32);
  const Checkpoint checkpoint = Checkpoint::open(folder / "vae.safetensors", Component::vae);
  reference::Array latent({1, 5, 4, 6});
  support::fill_normal(TensorView<double, 1>{latent.values.data(), {5 * 4 * 6}}, 4);
  const sd35::VaeDecoder<double> model(checkpoint, {.groups = 4});
  sd35::Runtime rt(1);
  const auto picture = model.decode(rt, TensorView<const double, 4>{latent.values.data(), {1, 5, 4, 6}});
  const auto expected = reference::to_tokens(reference::vae_decoder(parameters, latent, 2, 1, 4));
  support::check_relative(TensorView<const double, 1>{picture.data(), {picture.elements()}},
                          TensorView<const double, 1>{expected.values.data(), {picture.elements()}}, 1e-11);
}

TEST_CASE("the VAE refuses what does not fit") {
  const Folder folder;
  sd35_files::Parameters parameters = sd35_files::make_vae(Dtype::f16, {4, 8}, 1, 5);
  sd35_files::write(folder / "vae.safetensors", parameters, Dtype::f16);
  const Checkpoint checkpoint = Checkpoint::open(folder / "vae.safetensors", Component::vae);
  CHECK_THROWS_WITH_AS(sd35::VaeDecoder<float>(checkpoint, {.groups = 3}), doctest::Contains("3 groups"),
                       std::runtime_error);
  const sd35::VaeDecoder<float> model(checkpoint, {.groups = 4});
  const std::vector<float> latent(6 * 4);
  sd35::Runtime rt(1);
  CHECK_THROWS_WITH_AS((void)model.decode(rt, {latent.data(), {1, 6, 2, 2}}),
                       doctest::Contains("[1, 6, 2, 2]"), std::runtime_error);
  parameters["post_quant_conv.weight"] = reference::Array({6, 6, 1, 1});
  parameters["post_quant_conv.bias"] = reference::Array({6});
  sd35_files::write(folder / "other.safetensors", parameters, Dtype::f16);
  CHECK_THROWS_WITH_AS(
      sd35::VaeDecoder<float>(Checkpoint::open(folder / "other.safetensors", Component::vae), {.groups = 4}),
      doctest::Contains("expected [any, 6, 3, 3]"), std::runtime_error);

  // A file may hold one half.
  CHECK_THROWS_WITH_AS(sd35::VaeEncoder<float>(checkpoint, {.groups = 4}),
                       doctest::Contains("encoder.conv_in.weight"), std::runtime_error);
  parameters = sd35_files::make_vae_encoder(Dtype::f16, {4, 8}, 1, 5);
  sd35_files::write(folder / "encoder.safetensors", parameters, Dtype::f16);
  const Checkpoint half = Checkpoint::open(folder / "encoder.safetensors", Component::vae);
  CHECK_THROWS_WITH_AS(sd35::VaeDecoder<float>(half, {.groups = 4}),
                       doctest::Contains("decoder.conv_in.weight"), std::runtime_error);
  const sd35::VaeEncoder<float> encoder(half, {.groups = 4});
  CHECK_THROWS_WITH_AS((void)encoder.moments(rt, {latent.data(), {1, 3, 1, 8}}),
                       doctest::Contains("[1, 3, 1, 8]"), std::runtime_error);
}

}  // namespace

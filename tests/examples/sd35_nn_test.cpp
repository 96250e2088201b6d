// The operations between the models' layers, the official tokenization, and how prompts are put together.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numbers>
#include <string>
#include <vector>

#include "nn/nn.hpp"
#include "reference/sd35_models.hpp"
#include "sd35/clip_text.hpp"
#include "sd35/conditioning.hpp"
#include "sd35/t5_encoder.hpp"
#include "sd35/t5_tokenizer.hpp"
#include "sd35_files.hpp"
#include "support.hpp"

namespace {

namespace fs = std::filesystem;
using linattn::Dtype;
using linattn::Index;
using linattn::TensorView;
using sd35::Activation;
using sd35::Runtime;
using sd35::Tensor;
using sd35_files::Folder;

#ifdef LINATTN_TEST_DATA
const fs::path tokenizer_data = fs::path(LINATTN_TEST_DATA) / "tokenizers";
#else
const fs::path tokenizer_data = fs::path(__FILE__).parent_path().parent_path() / "data" / "tokenizers";
#endif

template <class T>
constexpr double eps = support::unit_roundoff<T>;

TEST_CASE_TEMPLATE("activations, from -100 to 100", T, float, double) {
  std::vector<T> x;
  for (int i = -1000; i <= 1000; ++i) x.push_back(static_cast<T>(0.1 * i + 0.001));
  x.insert(x.end(), {T(0), T(-0.0), T(-1e4), T(1e4), std::numeric_limits<T>::denorm_min()});
  const std::array<std::pair<Activation, double (*)(double)>, 4> cases{
      {{Activation::silu, reference::silu},
       {Activation::quick_gelu, reference::quick_gelu},
       {Activation::gelu_tanh, reference::gelu_tanh},
       {Activation::gelu_erf, reference::gelu_erf}}};
  for (const auto& [activation, formula] : cases) {
    std::vector<T> out(x.size());
    sd35::activate_row<T>(activation, x.data(), out.data(), static_cast<Index>(x.size()));
    for (std::size_t i = 0; i < x.size(); ++i) {
      CAPTURE(x[i]);
      const double u = static_cast<double>(x[i]);
      // Where the gate vanishes, its own rounding is what u multiplies.
      CHECK(std::abs(static_cast<double>(out[i]) - formula(u)) <= 8 * eps<T> * std::max(std::abs(u), 1e-30));
    }
  }
  std::vector<T> bad(40, std::numeric_limits<T>::quiet_NaN());
  for (const auto& [activation, formula] : cases) {
    sd35::activate_row<T>(activation, bad.data(), bad.data(), 40);
    CHECK(std::all_of(bad.begin(), bad.end(), [](T value) { return std::isnan(value); }));
  }
}

template <class T>
Tensor<T> random_tensor(std::vector<Index> shape, std::uint64_t seed, double mean = 0) {
  Tensor<T> tensor(std::move(shape));
  support::fill_normal(TensorView<T, 1>{tensor.data(), {tensor.elements()}}, seed, 1.0, mean);
  return tensor;
}

TEST_CASE_TEMPLATE("layer norm, affine and modulated", T, float, double) {
  for (const Index channels : {1, 7, 16, 67}) {
    CAPTURE(channels);
    const Tensor<T> x = random_tensor<T>({2, 5, channels}, 1, 3);
    const Tensor<T> weight = random_tensor<T>({channels}, 2), bias = random_tensor<T>({channels}, 3);
    const Tensor<T> scale = random_tensor<T>({2, channels}, 4), shift = random_tensor<T>({2, channels}, 5);
    Tensor<T> plain(x.shape()), full(x.shape());
    Runtime rt(2);
    sd35::layer_norm<T>(rt, x.template view<3>(), {.eps = 0.5}, plain.template view<3>());
    sd35::layer_norm<T>(rt, x.template view<3>(),
                        {.eps = 0.5,
                         .weight = weight.template view<1>(),
                         .bias = bias.template view<1>(),
                         .scale = scale.template view<2>(),
                         .shift = shift.template view<2>()},
                        full.template view<3>());
    const auto v = x.template view<3>();
    for (Index b = 0; b < 2; ++b)
      for (Index r = 0; r < 5; ++r) {
        double mean = 0, variance = 0;
        const double n = static_cast<double>(channels);
        for (Index c = 0; c < channels; ++c) mean += static_cast<double>(v(b, r, c)) / n;
        for (Index c = 0; c < channels; ++c)
          variance += std::pow(static_cast<double>(v(b, r, c)) - mean, 2) / n;
        for (Index c = 0; c < channels; ++c) {
          const double y = (static_cast<double>(v(b, r, c)) - mean) / std::sqrt(variance + 0.5);
          CHECK(std::abs(static_cast<double>(plain.template view<3>()(b, r, c)) - y) <= 50 * eps<T>);
          const double z = (y * static_cast<double>(weight.data()[c]) + static_cast<double>(bias.data()[c])) *
                               (1 + static_cast<double>(scale.template view<2>()(b, c))) +
                           static_cast<double>(shift.template view<2>()(b, c));
          CHECK(std::abs(static_cast<double>(full.template view<3>()(b, r, c)) - z) <= 200 * eps<T>);
        }
      }
    // In place, and one modulation for all batches.
    Tensor<T> same = x.clone();
    const TensorView<const T, 2> first{scale.data(), {2, channels}, {0, 1}};
    sd35::layer_norm<T>(rt, same.template view<3>(), {.eps = 0.5, .scale = first}, same.template view<3>());
    const auto p = plain.template view<3>();
    for (Index c = 0; c < channels; ++c)
      CHECK(std::abs(same.template view<3>()(1, 4, c) - p(1, 4, c) * (1 + scale.data()[c])) <=
            static_cast<T>(20 * eps<T>));
  }
}

TEST_CASE("sums, gated and not") {
  Runtime rt(2);
  Tensor<float> x = random_tensor<float>({2, 3, 19}, 1);
  const Tensor<float> before = x.clone(), y = random_tensor<float>({2, 3, 19}, 2),
                      gate = random_tensor<float>({2, 19}, 3);
  sd35::add<float>(rt, x.view<3>(), y.view<3>());
  sd35::add_gated<float>(rt, x.view<3>(), gate.view<2>(), y.view<3>());
  for (Index b = 0; b < 2; ++b)
    for (Index r = 0; r < 3; ++r)
      for (Index c = 0; c < 19; ++c)
        CHECK(x.view<3>()(b, r, c) ==
              doctest::Approx(before.view<3>()(b, r, c) + (1 + gate.view<2>()(b, c)) * y.view<3>()(b, r, c))
                  .epsilon(1e-6));
  Tensor<float> product = before.clone();
  sd35::activate_gated<float>(rt, Activation::gelu_tanh, product.view<3>(), y.view<3>());
  for (Index i = 0; i < product.elements(); ++i)
    CHECK(product.data()[i] ==
          doctest::Approx(reference::gelu_tanh(before.data()[i]) * y.data()[i]).epsilon(1e-5));
  CHECK_THROWS_AS(sd35::add<float>(rt, x.view<3>(), random_tensor<float>({2, 3, 18}, 1).view<3>()),
                  std::logic_error);
}

TEST_CASE("a runtime turns a failed status into a sentence, and gives scratch as asked") {
  Runtime rt(1);
  const auto failing = [](const auto&) {
    return linattn::detail::fail(linattn::Code::shape, "k, tokens", 7, 8);
  };
  CHECK_THROWS_WITH_AS(rt.run(
                           "block 3", [](const auto&) { return std::size_t{0}; }, failing),
                       "block 3: shape mismatch: k, tokens: expected 7, got 8", std::runtime_error);
  for (const std::size_t bytes : {100, 10, 5000}) CHECK(rt.scratch(bytes).size >= bytes);
  std::vector<int> seen(1000);
  Runtime(3).parallel_rows(1000, 100, [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) ++seen[static_cast<std::size_t>(i)];
  });
  CHECK(std::all_of(seen.begin(), seen.end(), [](int count) { return count == 1; }));
  CHECK_THROWS_AS((void)Tensor<float>({2, 3}).view<3>(), std::logic_error);
}

// ---- the official tokenization ----

std::vector<std::int32_t> ids_of(const sd35::ClipTokenizer& tokenizer, const std::vector<std::string>& words,
                                 std::size_t length, std::int32_t pad) {
  std::vector<std::int32_t> ids{tokenizer.bos_id()};
  for (const std::string& word : words) {
    const auto more = tokenizer.encode(word);
    ids.insert(ids.end(), more.begin(), more.end());
  }
  REQUIRE(ids.size() < length);
  ids.push_back(tokenizer.eos_id());
  ids.resize(length, pad);
  return ids;
}

TEST_CASE("the official tokenization drops weights and cuts at words") {
  const auto tokenizer = sd35::ClipTokenizer::load(tokenizer_data / "clip");
  const auto check = [&](const std::string& text, const std::vector<std::string>& words) {
    CAPTURE(text);
    CHECK(sd35::official_clip_ids(tokenizer, text, 0) == ids_of(tokenizer, words, 77, 0));
  };
  check("", {});
  check("a photo  of\na cat", {"a", "photo", "of", "a", "cat"});
  check("(cat:1.3), (a photo), red", {"cat", ",", "a", "photo", ",", "red"});
  check("((cat:1.2) red:0.5)", {"cat", "red"});
  check("cat:1.3 (a:b) (red:)", {"cat:1.3", "a:b", "red:"});
  check("(cat: +1.5 )", {"cat"});
  check("\\(cat\\) stays", {"(cat)", "stays"});
  check("(unclosed cat", {"(unclosed", "cat"});
  check("a) (b) c", {"a)", "(b)", "c"});  // a stray parenthesis hides the next pair
  check("((a)", {"(a"});
  check(std::string(1000, '(') + "a" + std::string(1000, ')'), {"a"});
  CHECK_THROWS_WITH_AS(
      (void)sd35::official_clip_ids(tokenizer, std::string(200000, '(') + std::string(200000, ')'), 0),
      doctest::Contains("parentheses"), std::runtime_error);

  // A short word that does not fit ends the row; a long one fills it.
  const std::string word = "red";
  const auto red = tokenizer.encode(word).size();
  REQUIRE(red >= 1);
  REQUIRE(red < 8);
  std::string text;
  std::vector<std::string> words;
  for (std::size_t count = 1; count + red <= 76; count += red) {
    text += word + " ";
    words.push_back(word);
  }
  check(text, words);
  check(text + "red a", words);
  const auto long_word = tokenizer.encode("0123456789012345");
  REQUIRE(long_word.size() >= 8);
  auto expected = ids_of(
      tokenizer, {"0123456789012345", "0123456789012345", "0123456789012345", "0123456789012345"}, 77, 0);
  const auto five = sd35::official_clip_ids(
      tokenizer, "0123456789012345 0123456789012345 0123456789012345 0123456789012345 0123456789012345 a", 5);
  const std::size_t used = 1 + 4 * long_word.size();
  REQUIRE(used < 76);
  std::copy_n(long_word.begin(), 76 - used, expected.begin() + static_cast<Index>(used));
  expected[76] = tokenizer.eos_id();
  CHECK(five == expected);
}

// ---- conditioning ----

struct Sources {
  Folder folder;
  sd35::TextSources files;
  Index l_width = 24, g_width = 16, t5_width = 48;

  Sources() {
    const auto tokenizer = sd35::ClipTokenizer::load(tokenizer_data / "clip");
    const auto t5_tokenizer = sd35::T5Tokenizer::load(tokenizer_data / "t5");
    const auto clip = [&](const std::string& name, Index heads, Index projection, const std::string& act,
                          unsigned seed) {
      sd35_files::write(
          folder / (name + "/model.safetensors"),
          sd35_files::make_clip(
              Dtype::f16,
              {.layers = 2, .heads = heads, .vocabulary = tokenizer.vocab_size(), .projection = projection},
              seed),
          Dtype::f16);
      sd35_files::write_text(folder / (name + "/config.json"),
                             "{\"num_attention_heads\": " + std::to_string(heads) + ", \"hidden_act\": \"" +
                                 act + "\", \"eos_token_id\": " + std::to_string(tokenizer.eos_id()) + "}");
    };
    clip("text_encoder", 3, l_width, "quick_gelu", 1);
    clip("text_encoder_2", 2, g_width, "gelu", 2);
    sd35_files::write(
        folder / "text_encoder_3/model.safetensors",
        sd35_files::make_t5(Dtype::f16, {.width = t5_width, .vocabulary = t5_tokenizer.vocab_size()}),
        Dtype::f16);
    fs::create_directories(folder / "tokenizers");
    fs::copy(tokenizer_data / "clip", folder / "tokenizers/tokenizer", fs::copy_options::recursive);
    fs::copy(tokenizer_data / "t5", folder / "tokenizers/tokenizer_3", fs::copy_options::recursive);
    sd35_files::write_text(folder / "model_index.json", "{}");
    files = {folder.path(), folder.path(), folder.path(), folder / "tokenizers"};
    fs::copy(folder / "tokenizers/tokenizer", folder / "tokenizers/tokenizer_2", fs::copy_options::recursive);
    fs::remove(folder / "tokenizers/tokenizer_2/tokenizer_config.json");
    fs::remove(folder / "tokenizers/tokenizer_2/special_tokens_map.json");
  }
};

TEST_CASE("prompts become L | G | zeros above T5, and pooled L | G") {
  const Sources s;
  const std::vector<std::string> prompts = {"a photo of a cat", ""};
  Runtime rt(2);
  std::vector<std::string> order;
  const sd35::ConditioningOptions options{
      .t5_tokens = 12, .on_encoder = [&](std::string_view name) { order.emplace_back(name); }};
  const auto all =
      sd35::encode_prompts<float>(rt, s.files, prompts, s.t5_width, s.l_width + s.g_width, options);
  CHECK(order.size() == 3);
  REQUIRE(all.context.shape() == std::vector<Index>{2, 77 + 12, s.t5_width});
  REQUIRE(all.pooled.shape() == std::vector<Index>{2, 1, s.l_width + s.g_width});

  // Each part by the encoder alone.
  const auto tokenizer = sd35::ClipTokenizer::load(tokenizer_data / "clip");
  const auto t5_tokenizer = sd35::T5Tokenizer::load(tokenizer_data / "t5");
  const auto context = all.context.view<3>();
  const auto pooled = all.pooled.view<3>();
  for (const auto component : {sd35::Component::clip_l, sd35::Component::clip_g}) {
    const bool l = component == sd35::Component::clip_l;
    const auto checkpoint = sd35::Checkpoint::open(s.folder.path(), component);
    const sd35::ClipText<float> model(checkpoint, sd35::ClipConfig::of(checkpoint, component));
    std::vector<std::int32_t> ids;
    for (const std::string& prompt : prompts) {
      const auto row = tokenizer.encode_padded(prompt, 77, l ? tokenizer.eos_id() : 0);
      ids.insert(ids.end(), row.begin(), row.end());
    }
    const auto features = model.encode(rt, ids, 2);
    const Index channels = l ? s.l_width : s.g_width, first = l ? 0 : s.l_width;
    for (Index b = 0; b < 2; ++b) {
      for (Index r = 0; r < 77; ++r)
        CHECK(std::equal(context.pointer(b, r, first), context.pointer(b, r, first) + channels,
                         features.hidden.view<3>().pointer(b, r)));
      CHECK(std::equal(pooled.pointer(b, Index{0}, first), pooled.pointer(b, Index{0}, first) + channels,
                       features.projected.view<3>().pointer(b)));
    }
  }
  std::vector<std::int32_t> ids;
  for (const std::string& prompt : prompts) {
    const auto row = t5_tokenizer.encode_padded(prompt, 12);
    ids.insert(ids.end(), row.begin(), row.end());
  }
  const auto t5 =
      sd35::T5Encoder<float>(sd35::Checkpoint::open(s.folder.path(), sd35::Component::t5)).encode(rt, ids, 2);
  for (Index b = 0; b < 2; ++b) {
    CHECK(std::equal(t5.view<3>().pointer(b), t5.view<3>().pointer(b) + 12 * s.t5_width,
                     context.pointer(b, 77)));
    for (Index r = 0; r < 77; ++r)
      CHECK(std::all_of(context.pointer(b, r, s.l_width + s.g_width), context.pointer(b, r + 1),
                        [](float value) { return value == 0; }));
  }

  // Without an encoder, zeros are in its place and the rest stays.
  for (int missing = 0; missing < 8; ++missing) {
    CAPTURE(missing);
    sd35::TextSources some = s.files;
    if (missing & 1) some.clip_l.clear();
    if (missing & 2) some.clip_g.clear();
    if (missing & 4) some.t5.clear();
    const auto part =
        sd35::encode_prompts<float>(rt, some, prompts, s.t5_width, s.l_width + s.g_width, {.t5_tokens = 12});
    for (Index b = 0; b < 2; ++b) {
      for (Index r = 0; r < 89; ++r)
        for (Index c = 0; c < s.t5_width; ++c) {
          const bool gone = r >= 77 ? missing & 4 : c < s.l_width ? missing & 1 : missing & 2;
          CHECK(part.context.view<3>()(b, r, c) == (gone ? 0 : context(b, r, c)));
        }
      for (Index c = 0; c < s.l_width + s.g_width; ++c)
        CHECK(part.pooled.view<3>()(b, Index{0}, c) ==
              ((c < s.l_width ? missing & 1 : missing & 2) ? 0 : pooled(b, Index{0}, c)));
    }
  }
}

TEST_CASE("the official way takes as many T5 tokens as there are, and at least 77") {
  const Sources s;
  Runtime rt(1);
  sd35::TextSources t5 = s.files;
  t5.clip_l.clear();
  t5.clip_g.clear();
  const auto tokens = [&](const std::string& prompt) {
    const std::vector<std::string> prompts = {prompt};
    return sd35::encode_prompts<float>(rt, t5, prompts, s.t5_width, 40, {.official = true})
               .context.extent(1) -
           77;
  };
  CHECK(tokens("") == 77);
  const auto tokenizer = sd35::T5Tokenizer::load(tokenizer_data / "t5");
  std::string text;
  while (text.size() < 300) text += "0%";
  const auto expected = static_cast<Index>(tokenizer.encode(text.substr(0, 226)).size());
  REQUIRE(expected > 77);
  CHECK(tokens(text) == expected);
  // 226 characters, not bytes.
  CHECK(tokens("é" + text) == static_cast<Index>(tokenizer.encode("é" + text.substr(0, 225)).size()));
}

TEST_CASE("conditioning says what does not fit, and what to fetch") {
  const Sources s;
  Runtime rt(1);
  const std::vector<std::string> prompts = {"a"};
  const auto encode = [&](const sd35::TextSources& files, Index context, Index pooled) {
    (void)sd35::encode_prompts<float>(rt, files, prompts, context, pooled, {.t5_tokens = 4});
  };
  CHECK_THROWS_WITH_AS(encode(s.files, 50, 40),
                       doctest::Contains("48 channels, but the transformer takes 50"), std::runtime_error);
  CHECK_THROWS_WITH_AS(encode(s.files, 48, 41), doctest::Contains("takes 41"), std::runtime_error);
  sd35::TextSources clip = s.files;
  clip.t5.clear();
  CHECK_THROWS_WITH_AS(encode(clip, 30, 40), doctest::Contains("takes 30"), std::runtime_error);
  clip.clip_l.clear();
  CHECK_THROWS_AS(encode(clip, 48, 15), std::runtime_error);
  clip = s.files;
  clip.tokenizers = s.folder / "nowhere";
  CHECK_THROWS_WITH_AS(encode(clip, 48, 40), doctest::Contains("tokenizer_3/spiece.model"),
                       std::runtime_error);
  clip.t5.clear();
  CHECK_THROWS_WITH_AS(encode(clip, 48, 40), doctest::Contains("tokenizer/merges.txt"), std::runtime_error);
}

}  // namespace

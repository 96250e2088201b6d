// Vision transformers against their formulas in double and against PyTorch, and what surrounds them: heads, names,
// preprocessing, labels.
#include <doctest/doctest.h>

#include <array>
#include <fstream>
#include <set>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "deit/preprocess.hpp"
#include "deit/vit.hpp"
#include "nn/image.hpp"
#include "reference/vit.hpp"
#include "sd35_files.hpp"
#include "support.hpp"

namespace {

namespace fs = std::filesystem;
using deit::Index;
using deit::Runtime;
using deit::Tensor;
using deit::TensorView;
using deit::Vit;
using deit::VitConfig;
using linattn::Dtype;
using reference::Array;
using reference::Parameters;
using sd35_files::Folder;
using sd35_files::Maker;

const fs::path tiny = fs::path(LINATTN_TEST_DATA) / "deit-tiny";

enum class Attention { softmax, t5, mlp };  // mlp: two matrices, no convolution

struct Size {
  std::vector<Attention> blocks{Attention::softmax, Attention::softmax};
  Index special = 0;
  Index heads = 3, head_dim = 8, mlp = 40, patch = 4, grid = 3, channels = 3, classes = 7;
  bool qkv_bias = true;
  [[nodiscard]] Index width() const { return heads * head_dim; }
};

Parameters make_vit(Dtype dtype, const Size& s, std::uint64_t seed = 11) {
  Maker m(dtype, seed);
  const Index width = s.width();
  const double root = std::sqrt(static_cast<double>(width));
  if (s.special > 0) m.add("cls_token", {1, 1, width}, root);
  if (s.special > 1) m.add("dist_token", {1, 1, width}, root);
  const Index positions = s.special + s.grid * s.grid;
  m.add("pos_embed", {1, positions, width}, root * std::sqrt(static_cast<double>(positions)));
  m.conv("patch_embed.proj", width, s.channels, s.patch);
  for (std::size_t i = 0; i < s.blocks.size(); ++i) {
    const std::string block = "blocks." + std::to_string(i) + ".", attn = block + "attn";
    m.norm(block + "norm1", width);
    m.norm(block + "norm2", width);
    m.linear(attn + ".qkv", 3 * width, width, s.qkv_bias);
    m.linear(attn + ".proj", width, width);
    m.linear(block + "mlp.fc1", s.mlp, width);
    m.linear(block + "mlp.fc2", width, s.mlp);
    if (s.blocks[i] == Attention::softmax) continue;
    const double gain = std::sqrt(static_cast<double>(s.width() * s.head_dim));  // N(0, 1)
    for (const char* w : {".w1", ".w2", ".w3"})
      if (s.blocks[i] == Attention::t5 || std::string(w) != ".w3")
        m.add(attn + w, {1, s.heads, s.head_dim, s.head_dim},
              gain / std::sqrt(static_cast<double>(s.head_dim)));
    if (s.blocks[i] == Attention::t5)
      for (const char* conv : {".q_conv2d", ".k_conv2d"}) {
        m.add(attn + conv + ".weight", {width, 1, 3, 3});
        m.add(attn + conv + ".bias", {width}, 0.2);
      }
  }
  m.norm("norm", width);
  m.linear("head", s.classes, width);
  if (s.special > 1) m.linear("head_dist", s.classes, width);
  return std::move(m.parameters);
}

Array random_pictures(Index batch, Index channels, Index height, Index width) {
  Array pictures({batch, channels, height, width});
  support::Random random(5);
  for (double& value : pictures.values) value = static_cast<double>(static_cast<float>(random.normal()));
  return pictures;
}

template <class T>
Tensor<T> to_tensor(const Array& array) {
  Tensor<T> tensor({array.shape.begin(), array.shape.end()});
  std::transform(array.values.begin(), array.values.end(), tensor.data(),
                 [](double v) { return static_cast<T>(v); });
  return tensor;
}

template <class T, int R>
TensorView<const T, 1> flat(const TensorView<T, R>& view) {
  return {view.data, {view.elements()}};
}
TensorView<const double, 1> flat(const Array& array) {
  return {array.values.data(), {static_cast<Index>(array.values.size())}};
}

// Two blocks multiply one rounding by some tens; the first wrong formula is 1e-3 off and more.
template <class T>
constexpr double tolerance = std::is_same_v<T, double> ? 1e-14 : 2e-6;

template <class T>
void check_model(const Size& size, Dtype dtype, const reference::VitSettings& inner = {},
                 const linattn::Metadata& metadata = {}) {
  const Folder folder;
  const Parameters parameters = make_vit(dtype, size);
  sd35_files::write(folder / "vit.safetensors", parameters, dtype, "", 0, metadata);
  const Vit<T> model(deit::open(folder / "vit.safetensors"), size.heads);
  CHECK(model.config().special == size.special);
  CHECK(model.config().grid == size.grid);
  CHECK(model.converted_blocks() ==
        static_cast<Index>(size.blocks.size()) -
            std::count(size.blocks.begin(), size.blocks.end(), Attention::softmax));
  reference::VitSettings settings = inner;
  settings.heads = size.heads;
  settings.patch = size.patch;
  for (const auto& cells : {std::pair<Index, Index>{size.grid, size.grid}, {5, 2}, {1, 1}, {2, 7}}) {
    const Index rows = cells.first, columns = cells.second;
    CAPTURE(rows);
    const Array pictures = random_pictures(2, size.channels, rows * size.patch, columns * size.patch);
    const reference::VitResult expected = reference::vit(parameters, pictures, settings);
    const Tensor<T> input = to_tensor<T>(pictures);
    Runtime rt(1), more(3);
    std::set<std::string> seen;
    const Tensor<T> logits = model.forward(
        rt, input.template view<4>(), [&](const std::string& name, const TensorView<const T, 3>& values) {
          CAPTURE(name);
          REQUIRE(expected.steps.contains(name));
          CHECK(seen.insert(name).second);
          Tensor<T> dense({values.extent(0), values.extent(1), values.extent(2)});
          support::copy(values, dense.template view<3>());
          support::check_relative(flat(std::as_const(dense).template view<3>()),
                                  flat(expected.steps.at(name)), tolerance<T>);
        });
    CHECK(seen.size() == expected.steps.size());
    CHECK(logits.shape() == std::vector<Index>{2, size.classes});
    support::check_relative(flat(logits.template view<2>()), flat(expected.logits), tolerance<T>);
    const Tensor<T> again = model.forward(more, input.template view<4>());
    CHECK(support::same_bits(again.template view<2>(), logits.template view<2>()));
  }
}

constexpr auto softmax = Attention::softmax, t5 = Attention::t5, mlp = Attention::mlp;

TEST_CASE("softmax: a class token, a distillation token, or the mean of all") {
  for (const Index special : {0, 1, 2}) {
    CAPTURE(special);
    check_model<float>({.special = special}, Dtype::f32);
    check_model<double>({.special = special, .channels = 1}, Dtype::f64);
  }
  check_model<float>({.special = 1, .qkv_bias = false}, Dtype::f16);
}

TEST_CASE("T5: three matrices and convolutions") {
  check_model<float>({.blocks = {t5, t5}}, Dtype::f32);
  check_model<double>({.blocks = {t5}, .heads = 2, .head_dim = 5}, Dtype::bf16);
  check_model<float>({.blocks = {t5}, .heads = 1, .head_dim = 20, .qkv_bias = false}, Dtype::bf16);
}

TEST_CASE("the first T5: two matrices, no convolution") {
  check_model<float>({.blocks = {mlp, mlp}}, Dtype::f32);
  check_model<double>({.blocks = {mlp, mlp}}, Dtype::f16);
}

TEST_CASE("a model of both, where convolutions pass the class token by") {
  check_model<float>({.blocks = {softmax, t5, mlp}, .special = 1}, Dtype::f32);
  check_model<double>({.blocks = {t5, softmax}, .special = 2}, Dtype::f64);
}

TEST_CASE("what the metadata say counts: loss, learning rate, eps") {
  const linattn::ModuleConversion module{.inner_model = linattn::InnerModelKind::mlp,
                                         .inner_loss = linattn::InnerLossKind::squared_error,
                                         .inner_lr = 0.5,
                                         .key_norm_eps = 1e-3,
                                         .conv = false};
  const reference::VitSettings settings{.inner_lr = 0.5, .key_norm_eps = 1e-3, .squared_error = true};
  const linattn::Metadata metadata =
      linattn::conversion_metadata({{"blocks.0.attn", module}, {"blocks.1.attn", module}}, 3);
  check_model<float>({.blocks = {mlp, mlp}}, Dtype::f32, settings, metadata);
  check_model<double>({.blocks = {mlp, mlp}}, Dtype::f64, settings, metadata);
}

nlohmann::json recorded() {
  std::ifstream file(tiny / "reference.json");
  return nlohmann::json::parse(file);
}

TEST_CASE_TEMPLATE("positions are resampled as torch does", T, float, double) {
  const nlohmann::json json = recorded();
  const auto table = json["table"].get<std::vector<double>>();
  const std::vector<T> rounded(table.begin(), table.end());
  const Array array = [&] {
    Array a({25, 3});
    a.values = table;
    return a;
  }();
  for (const auto& entry : json["resampled"]) {
    const Index rows = entry["rows"], columns = entry["columns"];
    CAPTURE(rows);
    const auto expected = entry["values"].get<std::vector<double>>();
    std::vector<T> out(expected.size());
    deit::resample_positions(rounded.data(), 5, 3, rows, columns, out.data());
    // The kernel's terms are up to eight times as large as what is left of them, in either axis.
    const TensorView<const double, 1> view{expected.data(), {static_cast<Index>(expected.size())}};
    support::check_rounding<T>(TensorView<const T, 1>{out.data(), {view.extent(0)}}, view, 64);
    support::check_rounding<double>(flat(reference::resample(array, 5, rows, columns)), view, 64);
  }
}

TEST_CASE("a picture through the tiny DeiT, from the file to the logits, as PyTorch and PIL have it") {
  const deit::Checkpoint checkpoint = deit::open(tiny);
  const Vit<float> model(checkpoint);
  CHECK(model.config().heads == 3);
  CHECK(model.config().special == 1);
  const deit::Preprocessing preprocessing = deit::Preprocessing::of(checkpoint);
  const deit::Image image = deit::read_image(tiny / "picture.png");
  Runtime rt;
  const nlohmann::json json = recorded();
  for (const auto& entry : json["logits"]) {
    const Index height = entry["height"], width = entry["width"];
    CAPTURE(height);
    const Tensor<float> picture = deit::preprocess(image, height, width, preprocessing);
    double mean = 0;
    for (Index i = 0; i < picture.elements(); ++i)
      mean += static_cast<double>(picture.data()[i]) / static_cast<double>(picture.elements());
    CHECK(std::abs(mean - entry["input_mean"].get<double>()) < 1e-6);
    const auto expected = entry["logits"].get<std::vector<double>>();
    const Tensor<float> logits = model.forward(rt, picture.view<4>());
    support::check_relative(
        flat(logits.view<2>()),
        TensorView<const double, 1>{expected.data(), {static_cast<Index>(expected.size())}},
        tolerance<float>);
  }
}

// ---- what a checkpoint tells ----

std::string error_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}
bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

TEST_CASE("heads: what is asked for, fast weights, config.json, published sizes") {
  const Folder folder;
  const auto heads_of = [](const fs::path& path, std::optional<Index> asked = {}) {
    return VitConfig::of(deit::open(path), asked).heads;
  };
  const Size size{.blocks = {softmax}};
  const fs::path plain = folder / "plain/model.safetensors";
  sd35_files::write(plain, make_vit(Dtype::f32, size), Dtype::f32);
  CHECK(has(error_of([&] { (void)heads_of(plain); }), "tells no heads"));
  CHECK(heads_of(plain, 2) == 2);
  CHECK(has(error_of([&] { (void)heads_of(plain, 5); }), "24 cannot be cut into 5 heads"));
  CHECK(error_of([&] { (void)heads_of(plain, -1); }) != "");
  sd35_files::write_text(folder / "plain/config.json", R"({"num_heads": 4})");
  CHECK(heads_of(folder / "plain") == 4);
  CHECK(heads_of(folder / "plain", 6) == 6);
  sd35_files::write_text(folder / "plain/config.json", R"({"num_attention_heads": 12})");
  CHECK(heads_of(folder / "plain") == 12);
  sd35_files::write_text(folder / "plain/config.json", R"({"num_heads": "many"})");
  CHECK(has(error_of([&] { (void)heads_of(folder / "plain"); }), "num_heads"));

  sd35_files::write(folder / "t5.safetensors", make_vit(Dtype::f32, {.blocks = {softmax, t5}}), Dtype::f32);
  CHECK(heads_of(folder / "t5.safetensors") == 3);
  const fs::path wide = folder / "wide.safetensors";
  sd35_files::write(wide, make_vit(Dtype::f32, {.blocks = {softmax}, .heads = 3, .head_dim = 64}),
                    Dtype::f32);
  CHECK(heads_of(wide) == 3);
}

TEST_CASE("a prefix of training code is found, and two models are one too many") {
  const Folder folder;
  const Size size{.blocks = {softmax, t5}, .special = 1};
  const Parameters parameters = make_vit(Dtype::f32, size);
  sd35_files::write(folder / "a.safetensors", parameters, Dtype::f32);
  sd35_files::write(folder / "b.safetensors", parameters, Dtype::f32, "model.");
  const Vit<float> a(deit::open(folder / "a.safetensors")), b(deit::open(folder / "b.safetensors"));
  const Tensor<float> picture = to_tensor<float>(random_pictures(1, 3, 12, 12));
  Runtime rt;
  CHECK(support::same_bits(a.forward(rt, picture.view<4>()).view<2>(),
                           b.forward(rt, picture.view<4>()).view<2>()));
  CHECK(b.converted_blocks() == 1);
  Parameters both;
  for (const auto& [name, array] : parameters) both["model." + name] = both["ema." + name] = array;
  for (double& value : both["ema.head.bias"].values) value += 1;
  sd35_files::write(folder / "c.safetensors", both, Dtype::f32);
  const Vit<float> c(deit::open(folder / "c.safetensors"));
  CHECK(support::same_bits(a.forward(rt, picture.view<4>()).view<2>(),
                           c.forward(rt, picture.view<4>()).view<2>()));
  for (const auto& [name, array] : parameters) both["module." + name] = array;
  sd35_files::write(folder / "c.safetensors", both, Dtype::f32);
  CHECK(has(error_of([&] { (void)deit::open(folder / "c.safetensors"); }), "2 models"));
  sd35_files::write(folder / "d.safetensors", {{"weight", Array({2})}}, Dtype::f32);
  CHECK(has(error_of([&] { (void)deit::open(folder / "d.safetensors"); }), "patch_embed.proj.weight"));
}

TEST_CASE("tensors that are missing, misshaped or too many are named") {
  const Folder folder;
  const Size size{.blocks = {softmax, t5}, .special = 2};
  const auto load = [&](const std::function<void(Parameters&)>& change) {
    Parameters parameters = make_vit(Dtype::f32, size);
    change(parameters);
    sd35_files::write(folder / "vit.safetensors", parameters, Dtype::f32);
    return error_of([&] { Vit<float>(deit::open(folder / "vit.safetensors"), 3); });
  };
  CHECK(load([](Parameters&) {}) == "");
  for (const char* name :
       {"blocks.1.mlp.fc2.bias", "blocks.0.attn.proj.weight", "norm.bias", "pos_embed", "head.weight",
        "head_dist.bias", "blocks.1.attn.w2", "blocks.1.attn.k_conv2d.bias"}) {
    CAPTURE(name);
    const std::string error = load([&](Parameters& p) { p.erase(name); });
    CHECK_MESSAGE(has(error, name), error);
    CHECK_MESSAGE(has(error, "missing"), error);
    CHECK(has(error, "vit.safetensors"));
  }
  const auto misshaped = [&](const char* name, const std::vector<Index>& shape, const char* expected) {
    CAPTURE(name);
    const std::string error = load([&](Parameters& p) { p[name] = Array(shape); });
    CHECK_MESSAGE(has(error, name), error);
    CHECK_MESSAGE(has(error, expected), error);
  };
  misshaped("head_dist.weight", {6, 24}, "[7, 24]");
  misshaped("head.bias", {6}, "[7]");
  misshaped("cls_token", {1, 2, 24}, "[1, 1, 24]");
  misshaped("pos_embed", {1, 12, 24}, "[1, 11, 24]");
  misshaped("patch_embed.proj.weight", {24, 3, 4, 5}, "[24, 3, 4, 4]");
  misshaped("blocks.1.attn.w3", {1, 3, 8, 9}, "[1, 3, 8, 8]");
  misshaped("blocks.0.attn.qkv.weight", {48, 24}, "[72, 24]");
  CHECK(has(load([](Parameters& p) { p["blocks.0.ls1.gamma"] = Array({24}); }), "blocks.0.ls1.gamma"));
  CHECK(has(load([](Parameters& p) {
              for (const char* w : {".w1", ".w2", ".w3"})
                p[std::string("other.attn") + w] = Array({1, 3, 8, 8});
            }),
            "other.attn"));
  const auto error = error_of([&] { Vit<float>(deit::open(folder / "vit.safetensors"), 2); });
  CHECK_MESSAGE(has(error, "[1, 2, 12, 12]"), error);
}

TEST_CASE("a module beside neighborhood attention is refused") {
  const Folder folder;
  Parameters parameters = make_vit(Dtype::f32, {.blocks = {mlp}});
  parameters["blocks.0.attn.qk_scale_ttt"] = parameters["blocks.0.attn.qk_offset_ttt"] = Array({1, 1, 24, 2});
  sd35_files::write(folder / "vit.safetensors", parameters, Dtype::f32);
  CHECK(has(error_of([&] { Vit<float>(deit::open(folder / "vit.safetensors")); }), "neighborhood"));
}

TEST_CASE("a picture of another size is refused") {
  const Folder folder;
  sd35_files::write(folder / "vit.safetensors", make_vit(Dtype::f32, {}), Dtype::f32);
  const Vit<float> model(deit::open(folder / "vit.safetensors"), 3);
  Runtime rt;
  for (const std::array<Index, 4> shape :
       {std::array<Index, 4>{1, 1, 12, 12}, {1, 3, 13, 12}, {1, 3, 12, 6}, {1, 3, 0, 12}, {0, 3, 12, 12}}) {
    const Tensor<float> picture = Tensor<float>::zeros({shape.begin(), shape.end()});
    CHECK(
        has(error_of([&] { (void)model.forward(rt, picture.view<4>()); }), "3 channels and multiples of 4"));
  }
}

// ---- preprocessing and labels ----

TEST_CASE("preprocessing: ImageNet's, or what timm's config says") {
  const Folder folder;
  sd35_files::write(folder / "model.safetensors", make_vit(Dtype::f32, {}), Dtype::f32);
  const auto read = [&](const char* config) {
    sd35_files::write_text(folder / "config.json", config);
    return deit::Preprocessing::of(deit::open(folder.path()));
  };
  CHECK(read("{}").crop == 0.875);
  CHECK(read("{}").mean[1] == 0.456);
  const deit::Preprocessing said = read(
      R"({"pretrained_cfg": {"crop_pct": 0.9, "mean": [0.5, 0.25, 0.125], "std": [0.5, 0.5, 1], "interpolation": "bicubic"}})");
  CHECK(said.crop == 0.9);
  CHECK(said.mean == std::array{0.5, 0.25, 0.125});
  CHECK(said.deviation == std::array{0.5, 0.5, 1.0});
  for (const auto& wrong : {std::pair<const char*, const char*>{R"({"pretrained_cfg": 1})", "pretrained_cfg"},
                            {R"({"pretrained_cfg": {"crop_pct": 0}})", "crop_pct"},
                            {R"({"pretrained_cfg": {"crop_pct": 1.5}})", "crop_pct"},
                            {R"({"pretrained_cfg": {"mean": [1, 2]}})", "mean"},
                            {R"({"pretrained_cfg": {"mean": ["a", 1, 2]}})", "mean"},
                            {R"({"pretrained_cfg": {"std": [1, 0, 1]}})", "std"},
                            {R"({"pretrained_cfg": {"interpolation": "random"}})", "random"}}) {
    CAPTURE(wrong.first);
    CHECK(has(error_of([&] { (void)read(wrong.first); }), wrong.second));
  }

  deit::Image image{3, 2, std::vector<std::uint8_t>(18)};  // all red
  for (std::size_t i = 0; i < 18; i += 3) image.rgb[i] = 255;
  const Tensor<float> x = deit::preprocess(image, 4, 8, said);
  CHECK(x.shape() == std::vector<Index>{1, 3, 4, 8});
  for (Index i = 0; i < 32; ++i) {
    CHECK(x.data()[i] == 1.0f);
    CHECK(x.data()[32 + i] == -0.5f);
    CHECK(x.data()[64 + i] == -0.125f);
  }
}

TEST_CASE("labels: lines, a JSON list, a JSON object") {
  const Folder folder;
  const auto read = [&](const char* text) {
    sd35_files::write_text(folder / "labels", text);
    return deit::read_labels(folder / "labels");
  };
  const std::vector<std::string> expected{"tench", "great white shark, white shark", "caf\u00e9"};
  CHECK(read("tench\ngreat white shark, white shark\ncaf\u00e9\n") == expected);
  CHECK(read("tench\r\ngreat white shark, white shark\r\ncaf\u00e9") == expected);
  CHECK(read(R"(["tench", "great white shark, white shark", "café"])") == expected);
  CHECK(read(R"( {"1": "great white shark, white shark", "0": "tench", "2": "café"})") == expected);
  for (const char* wrong : {"", "{", "[1]", "[]", "{}", R"({"0": "a", "2": "b"})", R"({"a": "b"})",
                            R"({"0": "a", "00": "b"})", R"({"-1": "a"})", R"({"0": 1})"}) {
    CAPTURE(wrong);
    CHECK(has(error_of([&, text = wrong] { (void)read(text); }), "labels"));
  }
  CHECK(deit::labels_of(deit::open(tiny)).at(5) == "no \u00e9p\u00e9e");

  sd35_files::write(folder / "model.safetensors", make_vit(Dtype::f32, {}), Dtype::f32);
  CHECK(deit::labels_of(deit::open(folder.path())).empty());
  sd35_files::write_text(folder / "config.json", R"({"id2label": {"0": "a", "1": "b"}})");
  CHECK(deit::labels_of(deit::open(folder.path())) == std::vector<std::string>{"a", "b"});
}

}  // namespace

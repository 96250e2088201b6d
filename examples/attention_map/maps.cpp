#include "maps.hpp"

#include <algorithm>
#include <cmath>
#include <span>
#include <stdexcept>
#include <utility>

#include <linattn/diagnostics/attention_map_cpu.hpp>
#include <linattn/diagnostics/key_shift_ratio_cpu.hpp>

#include "deit/preprocess.hpp"
#include "deit/timm_config.hpp"
#include "deit/vit.hpp"
#include "nn/finite.hpp"

namespace attention_map {
namespace {

[[nodiscard]] TensorView<const float, 4> view(const Tensor<float>& x) { return x.view<4>(); }

[[nodiscard]] std::span<const float> values_of(const Tensor<float>& x) {
  return {x.data(), static_cast<std::size_t>(x.elements())};
}

[[nodiscard]] Tensor<float> read(const Checkpoint& file, const char* name, const std::vector<Index>& shape) {
  const Weight weight = file.get(name, shape);
  const std::vector<float> values = widen<float>(weight);
  Tensor<float> tensor({1, weight.extent(0), weight.extent(1), weight.extent(2)});
  std::copy(values.begin(), values.end(), tensor.data());
  expect_finite<float>(file.path().string() + ", tensor '" + name + "'", values);
  return tensor;
}

// The inputs of one block's attention, as the picture passes through the model.
[[nodiscard]] Inputs observe(Runtime& rt, const Checkpoint& checkpoint, const deit::Vit<float>& vit,
                             const Tensor<float>& picture, Index block) {
  const deit::VitConfig& config = vit.config();
  const Index rows = picture.extent(2) / config.patch, columns = picture.extent(3) / config.patch;
  const std::string name = "block" + std::to_string(block) + ".";
  Inputs inputs;
  inputs.grid = {config.special, rows, columns};
  const auto take = [&](const std::string& what, const TensorView<const float, 3>& x) {
    for (const auto& [part, to] :
         {std::pair("q", &inputs.q), std::pair("k", &inputs.k), std::pair("v", &inputs.v)})
      if (what == name + part) {
        *to = Tensor<float>({1, x.extent(1), config.heads, config.head_dim()});
        for (Index n = 0; n < x.extent(1); ++n)
          std::copy_n(x.pointer(0, n), config.width, to->data() + n * config.width);
      }
  };
  with_weights_of(checkpoint, [&] {
    in_stage(checkpoint.path().string(), [&] { (void)vit.forward(rt, picture.view<4>(), take); });
  });
  return inputs;
}

// (1, 3, height, width), normalised, as pixels.
[[nodiscard]] Image as_image(const Tensor<float>& picture, const deit::Preprocessing& preprocessing) {
  const Index height = picture.extent(2), width = picture.extent(3);
  std::vector<float> pixels(static_cast<std::size_t>(3 * height * width));
  for (Index i = 0; i < height * width; ++i)
    for (std::size_t c = 0; c < 3; ++c) {
      const double x = static_cast<double>(picture.data()[static_cast<Index>(c) * height * width + i]);
      const double level = x * preprocessing.deviation[c] + preprocessing.mean[c];
      pixels[static_cast<std::size_t>(3 * i) + c] = static_cast<float>(2 * level - 1);
    }
  return to_image<float>(pixels, width, height);
}

// The map of the tokens of the grid alone.
[[nodiscard]] Map crop(const Tensor<float>& map, const linattn::TokenGrid& grid) {
  Map result({map.extent(1), map.extent(2), grid.tokens()});
  for (Index row = 0; row < map.extent(1) * map.extent(2); ++row)
    std::copy_n(map.data() + row * map.extent(3) + grid.offset, grid.tokens(),
                result.data() + row * grid.tokens());
  return result;
}

[[nodiscard]] std::vector<Index> as_tokens(std::vector<Index> queries, const linattn::TokenGrid& grid) {
  for (Index& query : queries) query += grid.offset;
  return queries;
}

}  // namespace

Layers read_layer(const std::filesystem::path& path, Index height, Index width) {
  constexpr Index any = Checkpoint::any;
  const Checkpoint file = Checkpoint::open(path);
  const linattn::Conversion conversion = read_conversion(file);
  if (conversion.size() != 1)
    throw std::runtime_error(path.string() + ": holds " + std::to_string(conversion.size()) +
                             " converted attentions (tensors '<layer>.attn.w1', ...), one is expected");
  const auto& [stem, module] = *conversion.begin();
  if (module.neighborhood > 0)
    throw std::runtime_error(path.string() + ": '" + stem +
                             "' sits beside neighborhood attention, whose map is not drawn");

  Layers layers;
  layers.name = stem;
  layers.softmax.q = read(file, "q", {any, any, any});
  const std::vector<Index> shape(layers.softmax.q.shape().begin() + 1, layers.softmax.q.shape().end());
  layers.softmax.k = read(file, "k", shape);
  layers.softmax.v = read(file, "v", shape);
  layers.module = TttModule<float>::load(file, stem, module, shape[1], shape[2]);
  (void)leftovers(file, "a layer, which is q, k, v and one converted attention");

  if (height == 0) height = width = static_cast<Index>(std::sqrt(static_cast<double>(shape[0])));
  constexpr Index most_special = 2;
  const bool fits = height >= 1 && width >= 1 && height <= shape[0] / width;
  const Index special = fits ? shape[0] - height * width : 0;
  if (!fits || special > most_special)
    throw std::runtime_error(path.string() + ": tensor 'q': " + std::to_string(shape[0]) +
                             " tokens are no grid of " + std::to_string(height) + " x " +
                             std::to_string(width) + " behind at most " + std::to_string(most_special) +
                             " others; say it with --grid");
  layers.softmax.grid = {special, height, width};
  layers.ttt = {layers.softmax.q.clone(), layers.softmax.k.clone(), layers.softmax.v.clone(),
                layers.softmax.grid};
  return layers;
}

Layers run_models(Runtime& rt, const std::filesystem::path& softmax, const std::filesystem::path& ttt,
                  const std::filesystem::path& picture, Index block) {
  const Checkpoint original = deit::open(softmax), converted = deit::open(ttt);
  const deit::Vit<float> before(original), after(converted);
  const deit::VitConfig &from = before.config(), &to = after.config();
  if (from.depth != to.depth || from.heads != to.heads || from.width != to.width || from.patch != to.patch)
    throw std::runtime_error(ttt.string() + ": is no conversion of " + softmax.string() +
                             ": depth, heads, width or patch differ");
  if (block < 0 || block >= from.depth)
    throw std::runtime_error("--block " + std::to_string(block) + ": " + softmax.string() + " has " +
                             std::to_string(from.depth) + " blocks");
  deit::TimmConfig(original).check(from);
  Layers layers;
  layers.name = "blocks." + std::to_string(block) + ".attn";
  const linattn::Conversion known = read_conversion(original), conversion = read_conversion(converted);
  if (known.contains(original.full_name(layers.name)))
    throw std::runtime_error(softmax.string() + ": '" + layers.name + "' is converted, softmax is expected");
  const auto module = conversion.find(converted.full_name(layers.name));
  if (module == conversion.end())
    throw std::runtime_error(ttt.string() + ": '" + layers.name +
                             "' is softmax attention, a converted one is expected");
  layers.module = TttModule<float>::load(converted, layers.name, module->second, to.heads, to.head_dim());

  const deit::Preprocessing preprocessing = deit::Preprocessing::of(original);
  const Index size = from.grid * from.patch;
  const Tensor<float> pixels = deit::preprocess(read_image(picture), size, size, preprocessing);
  layers.softmax = observe(rt, original, before, pixels, block);
  layers.ttt = observe(rt, converted, after, pixels, block);
  layers.photo = as_image(pixels, preprocessing);
  for (const deit::Vit<float>* vit : {&before, &after})
    layers.ignored.insert(layers.ignored.end(), vit->ignored().begin(), vit->ignored().end());
  return layers;
}

Map softmax_map(Runtime& rt, const Layers& layers, const std::vector<Index>& queries) {
  const Inputs& in = layers.softmax;
  const std::vector<Index> tokens = as_tokens(queries, in.grid);
  const Index rows = static_cast<Index>(tokens.size());
  Tensor<float> map({1, in.heads(), rows, in.tokens()});
  rt.run(
      "softmax map", [](const auto&) { return std::size_t{0}; },
      [&](const auto& context) {
        return linattn::softmax_attention_map(context, view(in.q), view(in.k), map.view<4>(),
                                              {.queries = {tokens.data(), {rows}}});
      });
  expect_finite<float>(layers.name + ", softmax map", values_of(map));
  return crop(map, in.grid);
}

Map ttt_map(Runtime& rt, const Layers& layers, const std::vector<Index>& queries) {
  const Inputs& in = layers.ttt;
  const std::vector<Index> tokens = as_tokens(queries, in.grid);
  const Index rows = static_cast<Index>(tokens.size());
  Tensor<float> map({1, in.heads(), rows, in.tokens()});
  const auto weights = layers.module.weights<float>({});
  linattn::TttMapOptions<float> options;
  options.queries = {tokens.data(), {rows}};
  options.ttt.inner_lr = layers.module.conversion.inner_lr;
  options.ttt.prologue = {true,
                          layers.module.conversion.key_norm_eps,
                          weights.q_conv,
                          weights.k_conv,
                          weights.q_conv_bias,
                          weights.k_conv_bias,
                          in.grid};
  layers.module.visit([&]<class Model, class Loss>(Model, Loss) {
    rt.run(
        layers.name,
        [&](const auto& context) {
          return linattn::ttt_attention_map_workspace<Model, Loss>(
              context, view(in.q), view(in.k), view(in.v), weights.inner, map.view<4>(), options);
        },
        [&](const auto& context) {
          return linattn::ttt_attention_map<Model, Loss>(context, view(in.q), view(in.k), view(in.v),
                                                         weights.inner, map.view<4>(), options);
        });
  });
  expect_finite<float>(layers.name + ", TTT map", values_of(map));
  return crop(map, in.grid);
}

std::vector<float> key_shift_ratios(Runtime& rt, const Inputs& inputs) {
  std::vector<float> ratios(static_cast<std::size_t>(inputs.heads()));
  const TensorView<float, 2> out(ratios.data(), {1, inputs.heads()});
  rt.run(
      "key shift ratio",
      [&](const auto& context) { return linattn::key_shift_ratio_workspace(context, view(inputs.k), out); },
      [&](const auto& context) { return linattn::key_shift_ratio(context, view(inputs.k), out); });
  expect_finite<float>("key shift ratio", ratios);
  return ratios;
}

}  // namespace attention_map

#include "maps.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

#include <linattn/diagnostics/attention_map_cpu.hpp>
#include <linattn/diagnostics/key_shift_ratio_cpu.hpp>

namespace attention_map {
namespace {

[[nodiscard]] TensorView<const float, 4> view(const Tensor<float>& x) { return x.view<4>(); }

[[nodiscard]] Tensor<float> read(const Checkpoint& file, const char* name, const std::vector<Index>& shape) {
  const Weight weight = file.get(name, shape);
  const std::vector<float> values = widen<float>(weight);
  Tensor<float> tensor({1, weight.extent(0), weight.extent(1), weight.extent(2)});
  std::copy(values.begin(), values.end(), tensor.data());
  return tensor;
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
  layers.ttt = {layers.softmax.q.clone(), layers.softmax.k.clone(), layers.softmax.v.clone()};
  layers.module = TttModule<float>::load(file, stem, module, shape[1], shape[2]);

  if (height == 0) height = width = static_cast<Index>(std::sqrt(static_cast<double>(shape[0])));
  constexpr Index most_special = 2;
  const bool fits = height >= 1 && width >= 1 && height <= shape[0] / width;
  const Index special = fits ? shape[0] - height * width : 0;
  if (!fits || special > most_special)
    throw std::runtime_error(path.string() + ": tensor 'q': " + std::to_string(shape[0]) +
                             " tokens are no grid of " + std::to_string(height) + " x " +
                             std::to_string(width) + " behind at most " + std::to_string(most_special) +
                             " others; say it with --grid");
  layers.grid = {special, height, width};
  return layers;
}

Map softmax_map(Runtime& rt, const Layers& layers, const std::vector<Index>& queries) {
  const Inputs& in = layers.softmax;
  const Index rows = static_cast<Index>(queries.size());
  Tensor<float> map({1, in.heads(), rows, in.tokens()});
  rt.run(
      "softmax map", [](const auto&) { return std::size_t{0}; },
      [&](const auto& context) {
        return linattn::softmax_attention_map(context, view(in.q), view(in.k), map.view<4>(),
                                              {.queries = {queries.data(), {rows}}});
      });
  return std::move(map).reshaped({in.heads(), rows, in.tokens()});
}

Map ttt_map(Runtime& rt, const Layers& layers, const std::vector<Index>& queries) {
  const Inputs& in = layers.ttt;
  const Index rows = static_cast<Index>(queries.size());
  Tensor<float> map({1, in.heads(), rows, in.tokens()});
  const auto weights = layers.module.weights<float>({});
  linattn::TttMapOptions<float> options;
  options.queries = {queries.data(), {rows}};
  options.ttt.inner_lr = layers.module.conversion.inner_lr;
  options.ttt.prologue = {true,
                          layers.module.conversion.key_norm_eps,
                          weights.q_conv,
                          weights.k_conv,
                          weights.q_conv_bias,
                          weights.k_conv_bias,
                          layers.grid};
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
  return std::move(map).reshaped({in.heads(), rows, in.tokens()});
}

std::vector<float> key_shift_ratios(Runtime& rt, const Inputs& inputs) {
  std::vector<float> ratios(static_cast<std::size_t>(inputs.heads()));
  const TensorView<float, 2> out(ratios.data(), {1, inputs.heads()});
  rt.run(
      "key shift ratio",
      [&](const auto& context) { return linattn::key_shift_ratio_workspace(context, view(inputs.k), out); },
      [&](const auto& context) { return linattn::key_shift_ratio(context, view(inputs.k), out); });
  return ratios;
}

}  // namespace attention_map

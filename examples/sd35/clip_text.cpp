#include "clip_text.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "nn/finite.hpp"

namespace sd35 {
Activation clip_activation(std::string_view hidden_act) {
  if (hidden_act == "quick_gelu") return Activation::quick_gelu;
  if (hidden_act == "gelu") return Activation::gelu_erf;
  if (hidden_act == "gelu_new" || hidden_act == "gelu_pytorch_tanh") return Activation::gelu_tanh;
  throw std::runtime_error("CLIP text model: hidden_act '" + std::string(hidden_act) +
                           "' is not supported (quick_gelu, gelu, gelu_new)");
}

ClipConfig ClipConfig::of(const Checkpoint& checkpoint, Component component) {
  const bool large = component == Component::clip_l;
  ClipConfig config;
  const Weight tokens =
      checkpoint.get("text_model.embeddings.token_embedding.weight", {Checkpoint::any, Checkpoint::any});
  config.vocabulary = checkpoint.confirmed("vocab_size", tokens.extent(0));
  config.width = checkpoint.confirmed("hidden_size", tokens.extent(1));
  config.positions = checkpoint.confirmed(
      "max_position_embeddings",
      checkpoint.get("text_model.embeddings.position_embedding.weight", {Checkpoint::any, config.width})
          .extent(0));
  while (checkpoint.has("text_model.encoder.layers." + std::to_string(config.layers) + ".layer_norm1.weight"))
    ++config.layers;
  checkpoint.confirmed("num_hidden_layers", config.layers);
  config.heads =
      checkpoint.config_number<Index>("num_attention_heads", {1, config.width}).value_or(config.width / 64);
  if (config.layers < 1 || config.heads < 1 || config.width % config.heads != 0)
    throw std::runtime_error(checkpoint.path().string() + ": " + std::to_string(config.width) +
                             " channels in " + std::to_string(config.heads) + " heads and " +
                             std::to_string(config.layers) +
                             " layers are no CLIP text model (a small model needs its config.json)");
  config.activation =
      clip_activation(checkpoint.config_text("hidden_act").value_or(large ? "quick_gelu" : "gelu"));
  config.eps = checkpoint.config_number("layer_norm_eps", norm_eps_range).value_or(1e-5);
  // 2 is what old configurations say, whatever the vocabulary; the largest id is meant.
  constexpr std::int32_t unknown = 2, most = std::numeric_limits<std::int32_t>::max();
  const std::int32_t eos =
      checkpoint.config_number<std::int32_t>("eos_token_id", {0, most}).value_or(unknown);
  if (eos != unknown) config.eos = eos;
  config.project = !large || (!checkpoint.config().is_null() && checkpoint.has("text_projection.weight"));
  return config;
}

template <class T>
ClipText<T>::ClipText(const Checkpoint& checkpoint, const ClipConfig& config) : config_(config) {
  const Index width = config.width;
  const auto norm = [&](const std::string& name) {
    return Norm{checkpoint.vector<T>(name + ".weight", width), checkpoint.vector<T>(name + ".bias", width)};
  };
  token_embedding_ =
      checkpoint.get("text_model.embeddings.token_embedding.weight", {config.vocabulary, width});
  position_embedding_ =
      widen<T>(checkpoint.get("text_model.embeddings.position_embedding.weight", {config.positions, width}));
  for (Index i = 0; i < config.layers; ++i) {
    const std::string name = "text_model.encoder.layers." + std::to_string(i) + ".";
    Layer layer;
    layer.norm1 = norm(name + "layer_norm1");
    layer.norm2 = norm(name + "layer_norm2");
    layer.q = checkpoint.linear<T>(name + "self_attn.q_proj", width, width);
    layer.k = checkpoint.linear<T>(name + "self_attn.k_proj", width, width);
    layer.v = checkpoint.linear<T>(name + "self_attn.v_proj", width, width);
    layer.out = checkpoint.linear<T>(name + "self_attn.out_proj", width, width);
    layer.fc1 = checkpoint.linear<T>(name + "mlp.fc1", Checkpoint::any, width);
    layer.fc2 = checkpoint.linear<T>(name + "mlp.fc2", width, layer.fc1.out());
    layers_.push_back(std::move(layer));
  }
  final_norm_ = norm("text_model.final_layer_norm");
  if (config.project || checkpoint.has("text_projection.weight"))
    projection_ = checkpoint.linear_without_bias<T>("text_projection", Checkpoint::any, width);
}

template <class T>
ClipFeatures<T> ClipText<T>::encode(Runtime& rt, std::span<const std::int32_t> tokens, Index batch,
                                    const Observer<T>& observe) const {
  const Index width = config_.width, count = batch > 0 ? static_cast<Index>(tokens.size()) / batch : 0;
  if (count < 1 || count > config_.positions || count * batch != static_cast<Index>(tokens.size()))
    throw std::runtime_error("CLIP text model: " + std::to_string(tokens.size()) + " tokens in " +
                             std::to_string(batch) + " rows, at most " + std::to_string(config_.positions) +
                             " each");
  Tensor<T> x = embed<T>(rt, token_embedding_, tokens, batch);
  const TensorView<const T, 3> positions{position_embedding_.data(), {batch, count, width}, {0, width, 1}};
  add<T>(rt, x.template view<3>(), positions);
  const auto expect = [&](const std::string& place, const Tensor<T>& values) {
    expect_finite<T>(rt, place, values.template view<3>());
  };
  expect("embedding", x);

  ClipFeatures<T> features;
  Tensor<T> normed({batch, count, width});
  for (Index i = 0; i < config_.layers; ++i) {
    const Layer& layer = layers_[static_cast<std::size_t>(i)];
    if (i == config_.layers - 1) features.hidden = x.clone();
    const TensorView<T, 3> n = normed.template view<3>();
    layer_norm<T>(rt, x.template view<3>(), norm_options(layer.norm1), n);
    Tensor<T> q = linear<T>(rt, n, layer.q), k = linear<T>(rt, n, layer.k), v = linear<T>(rt, n, layer.v);
    const auto heads = [&](Tensor<T>& tensor) {
      return linattn::split_heads(tensor.template view<3>(), config_.heads);
    };
    attention<T>(rt, "CLIP attention", heads(q), heads(k), heads(v), heads(normed), {.causal = true});
    add<T>(rt, x.template view<3>(), linear<T>(rt, n, layer.out).template view<3>());

    layer_norm<T>(rt, x.template view<3>(), norm_options(layer.norm2), n);
    Tensor<T> mlp = linear<T>(rt, n, layer.fc1);
    activate<T>(rt, config_.activation, mlp.template view<3>());
    linear<T>(rt, mlp.template view<3>(), layer.fc2, n);
    add<T>(rt, x.template view<3>(), n);
    expect("block " + std::to_string(i), x);
    if (observe) observe("layer" + std::to_string(i), x.template view<3>());
  }
  layer_norm<T>(rt, x.template view<3>(), norm_options(final_norm_), x.template view<3>());
  expect("final norm", x);

  features.pooled = Tensor<T>({batch, 1, width});
  for (Index b = 0; b < batch; ++b) {
    const auto row = tokens.subspan(static_cast<std::size_t>(b * count), static_cast<std::size_t>(count));
    auto eos = config_.eos ? std::find(row.begin(), row.end(), *config_.eos) : row.end();
    if (eos == row.end()) eos = std::max_element(row.begin(), row.end());
    std::copy_n(x.data() + (b * count + (eos - row.begin())) * width, width,
                features.pooled.data() + b * width);
  }
  if (projection_) {
    features.projected = linear<T>(rt, features.pooled.template view<3>(), *projection_);
    if (config_.project) expect("text projection", features.projected);
  }
  features.last_hidden = std::move(x);
  return features;
}

template class ClipText<float>;
template class ClipText<double>;

}  // namespace sd35

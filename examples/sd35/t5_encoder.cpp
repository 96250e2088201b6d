#include "t5_encoder.hpp"

#include <stdexcept>

#include "nn/finite.hpp"

namespace sd35 {

template <class T>
T5Encoder<T>::T5Encoder(const Checkpoint& checkpoint) {
  constexpr Index any = Checkpoint::any;
  constexpr Index buckets = 32, distance = 128;  // what t5_bucket knows
  const std::string activation = checkpoint.config_text("feed_forward_proj").value_or("gated-gelu");
  if (activation != "gated-gelu")
    throw std::runtime_error(checkpoint.path().string() +
                             ": config.json: only gated-gelu is supported, got " + activation);
  (void)checkpoint.config_number<Index>("relative_attention_max_distance", {distance, distance});
  embedding_ = checkpoint.get(
      checkpoint.has("shared.weight") ? "shared.weight" : "encoder.embed_tokens.weight", {any, any});
  checkpoint.confirmed("vocab_size", embedding_.extent(0));
  const Index width = checkpoint.confirmed("d_model", embedding_.extent(1));
  const Weight bias =
      checkpoint.get("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", {buckets, any});
  heads_ = checkpoint.confirmed("num_heads", bias.extent(1));
  checkpoint.confirmed("relative_attention_num_buckets", buckets);
  relative_bias_ = widen<T>(bias);
  eps_ = checkpoint.config_number("layer_norm_epsilon", norm_eps_range).value_or(1e-6);

  const auto matrix = [&](const std::string& name, Index out, Index in) {
    return checkpoint.linear_without_bias<T>(name, out, in);
  };
  for (std::string name; name = "encoder.block." + std::to_string(blocks_.size()) + ".",
                         checkpoint.has(name + "layer.0.layer_norm.weight");) {
    const std::string attention = name + "layer.0.SelfAttention.", mlp = name + "layer.1.DenseReluDense.";
    Block block;
    block.norm1 = checkpoint.vector<T>(name + "layer.0.layer_norm.weight", width);
    block.norm2 = checkpoint.vector<T>(name + "layer.1.layer_norm.weight", width);
    block.q = matrix(attention + "q", any, width);
    const Index inner = block.q.out();  // heads x d_kv, which need not be the width
    if (heads_ < 1 || inner % heads_ != 0)
      throw std::runtime_error(checkpoint.path().string() + ": tensor '" + block.q.weight.name +
                               "': " + std::to_string(inner) + " rows do not divide into " +
                               std::to_string(heads_) + " heads");
    checkpoint.confirmed("d_kv", inner / heads_);
    block.k = matrix(attention + "k", inner, width);
    block.v = matrix(attention + "v", inner, width);
    block.o = matrix(attention + "o", width, inner);
    block.wi_0 = matrix(mlp + "wi_0", any, width);
    checkpoint.confirmed("d_ff", block.wi_0.out());
    block.wi_1 = matrix(mlp + "wi_1", block.wi_0.out(), width);
    block.wo = matrix(mlp + "wo", width, block.wi_0.out());
    blocks_.push_back(std::move(block));
  }
  checkpoint.confirmed("num_layers", static_cast<Index>(blocks_.size()));
  final_norm_ = checkpoint.vector<T>("encoder.final_layer_norm.weight", width);
}

template <class T>
Tensor<T> T5Encoder<T>::encode(Runtime& rt, std::span<const std::int32_t> tokens, Index batch,
                               const Observer<T>& observe) const {
  const Index count = batch > 0 ? static_cast<Index>(tokens.size()) / batch : 0;
  if (count < 1 || count * batch != static_cast<Index>(tokens.size()))
    throw std::runtime_error("T5 encoder: " + std::to_string(tokens.size()) + " tokens in " +
                             std::to_string(batch) + " rows");
  Tensor<T> x = embed<T>(rt, embedding_, tokens, batch);
  const auto expect = [&](const std::string& place) {
    expect_finite<T>(rt, place, std::as_const(x).template view<3>());
  };
  expect("embedding");
  // A bias of -Inf would hide a key.
  expect_finite<T>("relative attention bias", relative_bias_);

  // The bias depends on key - query alone: a row of 2 N - 1 values a head, and a view that steps back by one
  // for each query.
  const Index span = 2 * count - 1;
  std::vector<T> diagonals(static_cast<std::size_t>(heads_ * span));
  for (Index head = 0; head < heads_; ++head)
    for (Index i = 0; i < span; ++i)
      diagonals[static_cast<std::size_t>(head * span + i)] =
          relative_bias_[static_cast<std::size_t>(t5_bucket(i - (count - 1)) * heads_ + head)];
  const TensorView<const T, 4> bias{
      diagonals.data() + (count - 1), {batch, heads_, count, count}, {0, span, -1, 1}};

  Tensor<T> normed({batch, count, width()});
  const TensorView<T, 3> n = normed.template view<3>();
  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    const Block& block = blocks_[i];
    rms_norm<T>(rt, "T5 norm", x.template view<3>(), block.norm1, eps_, n);
    Tensor<T> q = linear<T>(rt, n, block.q), k = linear<T>(rt, n, block.k), v = linear<T>(rt, n, block.v);
    const auto heads = [&](Tensor<T>& tensor) {
      return linattn::split_heads(tensor.template view<3>(), heads_);
    };
    Tensor<T> mixed(q.shape());
    attention<T>(rt, "T5 attention", heads(q), heads(k), heads(v), heads(mixed),
                 {.scale = 1.0, .bias = bias});
    linear<T>(rt, mixed.template view<3>(), block.o, n);
    add<T>(rt, x.template view<3>(), n);

    rms_norm<T>(rt, "T5 norm", x.template view<3>(), block.norm2, eps_, n);
    Tensor<T> hidden = linear<T>(rt, n, block.wi_0);
    activate_gated<T>(rt, Activation::gelu_tanh, hidden.template view<3>(),
                      linear<T>(rt, n, block.wi_1).template view<3>());
    linear<T>(rt, hidden.template view<3>(), block.wo, n);
    add<T>(rt, x.template view<3>(), n);
    for (const auto* weights : {&block.q, &block.k, &block.v, &block.o, &block.wi_0, &block.wi_1, &block.wo})
      release(weights->weight);
    expect("block " + std::to_string(i));
    if (observe) observe("block" + std::to_string(i), x.template view<3>());
  }
  rms_norm<T>(rt, "T5 norm", x.template view<3>(), final_norm_, eps_, x.template view<3>());
  expect("final norm");
  return x;
}

template class T5Encoder<float>;
template class T5Encoder<double>;

}  // namespace sd35

#include "mmdit.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include <linattn/cpu.hpp>
#include <linattn/weights/sd35.hpp>

#include "nn/finite.hpp"
#include "nn/patches.hpp"

namespace sd35 {
namespace {

constexpr double norm_eps = 1e-6;

template <class P>
std::array<decltype(&std::declval<P&>().q), 10> all_of(P& p) {
  return {&p.q, &p.k, &p.v, &p.out, &p.q_bias, &p.k_bias, &p.v_bias, &p.out_bias, &p.q_norm, &p.k_norm};
}

// A layer takes weights of one type. With T = float that is the file's, f32 where the tensors of a module differ or
// are f64; in double, which checks the model and does not run it, always f64: fewer layers to compile.
template <class T, class P>
void unify(P& first, P* second = nullptr) {
  std::vector<Weight*> weights;
  for (P* p : {&first, second})
    if (p != nullptr)
      for (Weight* weight : all_of(*p))
        if (!weight->empty()) weights.push_back(weight);
  const auto as_stored = [&](const Weight* w) {
    return std::is_same_v<T, float> && w->dtype == first.q.dtype && w->dtype != Dtype::f64;
  };
  if (std::all_of(weights.begin(), weights.end(), as_stored)) return;
  for (Weight* weight : weights) {
    const auto values = std::make_shared<const std::vector<T>>(widen<T>(*weight));
    weight->dtype = std::is_same_v<T, float> ? Dtype::f32 : Dtype::f64;
    weight->data = values->data();
    weight->owner = values;
  }
}

// visit() for a weight that went through unify<T>.
template <class T, class F>
void visit_unified(const Weight& weight, const F& f) {
  if constexpr (std::is_same_v<T, double>) {
    f(static_cast<const double*>(weight.data));
  } else if (weight.dtype == Dtype::f16) {
    f(static_cast<const linattn::half*>(weight.data));
  } else if (weight.dtype == Dtype::bf16) {
    f(static_cast<const linattn::bfloat16*>(weight.data));
  } else {
    f(static_cast<const float*>(weight.data));
  }
}

template <class W, class P>
linattn::AttentionWeights<W> views(const P& p) {
  const auto vector = [](const Weight& w) {
    return w.empty() ? TensorView<const W, 1>()
                     : TensorView<const W, 1>(static_cast<const W*>(w.data), {w.extent(0)});
  };
  const auto projection = [&](const Weight& w, const Weight& bias) {
    if (w.empty()) return linattn::Projection<W>{};
    return linattn::Projection<W>{{static_cast<const W*>(w.data), {w.extent(0), w.extent(1)}}, vector(bias)};
  };
  return {projection(p.q, p.q_bias),     projection(p.k, p.k_bias), projection(p.v, p.v_bias),
          projection(p.out, p.out_bias), vector(p.q_norm),          vector(p.k_norm)};
}

std::string block_name(Index i) { return "joint_blocks." + std::to_string(i) + "."; }

[[noreturn]] void fail(const Checkpoint& checkpoint, const std::string& what) {
  throw std::runtime_error(checkpoint.path().string() + ": " + what);
}

// The blocks of the file.
Index count_blocks(const Checkpoint& checkpoint) {
  const bool diffusers = checkpoint.diffusers();
  const std::string blocks = checkpoint.full_name("") + (diffusers ? "transformer_blocks." : "joint_blocks.");
  Index count = 0;
  const linattn::FileStatus status = linattn::count_blocks(
      checkpoint.files(), blocks,
      sd35_least(diffusers ? linattn::Sd35Layout::diffusers : linattn::Sd35Layout::official), count);
  if (!status.ok()) throw std::runtime_error(message(status));
  return count;
}

}  // namespace

MmditConfig MmditConfig::of(const Checkpoint& checkpoint) {
  constexpr Index any = Checkpoint::any;
  MmditConfig config;
  const std::vector<Index> patches = checkpoint.get("x_embedder.proj.weight", {any, any, any, any}).shape;
  config.patch = checkpoint.confirmed("patch_size", patches[2]);
  config.in_channels = checkpoint.confirmed("in_channels", patches[1]);
  config.width = checkpoint.confirmed("caption_projection_dim", patches[0]);
  config.depth = checkpoint.confirmed("num_layers", count_blocks(checkpoint));
  config.context_width = checkpoint.confirmed(
      "joint_attention_dim", checkpoint.matrix("context_embedder.weight", any, any).extent(1));
  config.pooled_width = checkpoint.confirmed(
      "pooled_projection_dim", checkpoint.matrix("y_embedder.mlp.0.weight", any, any).extent(1));
  config.time_width = checkpoint.matrix("t_embedder.mlp.0.weight", any, any).extent(1);
  config.mlp_width = checkpoint.matrix("joint_blocks.0.x_block.mlp.fc1.weight", any, any).extent(0);

  const std::string norm = checkpoint.config_text("qk_norm").value_or(
      checkpoint.has("joint_blocks.0.context_block.attn.ln_k.weight") ? "rms_norm" : "");
  if (norm != "rms_norm" && norm != "")
    fail(checkpoint, "qk_norm '" + norm + "' is not supported, only rms_norm");
  config.qk_norm = norm == "rms_norm";
  const Index head_dim =
      config.qk_norm
          ? checkpoint.confirmed("attention_head_dim",
                                 checkpoint.get("joint_blocks.0.x_block.attn.ln_q.weight", {any}).extent(0))
          : checkpoint.config_number<Index>("attention_head_dim", {1, config.width}).value_or(64);
  if (head_dim < 1 || config.width % head_dim != 0)
    fail(checkpoint, "a width of " + std::to_string(config.width) + " is not made of heads of " +
                         std::to_string(head_dim));
  config.heads = checkpoint.confirmed("num_attention_heads", config.width / head_dim);

  const Index rows = checkpoint.get("pos_embed", {1, any, config.width}).extent(1);
  config.position_grid = checkpoint.confirmed(
      "pos_embed_max_size", static_cast<Index>(std::lround(std::sqrt(static_cast<double>(rows)))));

  const Index final_rows = checkpoint.matrix("final_layer.linear.weight", any, config.width).extent(0);
  const Index area = config.patch * config.patch;
  if (config.patch < 1 || config.depth < 1 || config.heads < 1 || config.heads * head_dim != config.width ||
      final_rows % area != 0)
    fail(checkpoint, "no transformer of SD3: depth " + std::to_string(config.depth) + ", " +
                         std::to_string(config.heads) + " heads of " + std::to_string(head_dim) +
                         " channels for a width of " + std::to_string(config.width) + ", patch " +
                         std::to_string(config.patch) + ", " + std::to_string(final_rows) +
                         " outputs a patch");
  config.out_channels = checkpoint.confirmed("out_channels", final_rows / area);

  for (Index i = 0; i < config.depth; ++i)
    config.dual.push_back(checkpoint.has(block_name(i) + "x_block.attn2.q.weight"));
  const nlohmann::json& json = checkpoint.config();
  if (!json.contains("dual_attention_layers")) return config;
  const nlohmann::json& listed = json["dual_attention_layers"];
  const auto is_block = [&](const nlohmann::json& layer) {
    return json_number(layer, Range<Index>{0, config.depth - 1}).has_value();
  };
  if (!listed.is_array() || !std::all_of(listed.begin(), listed.end(), is_block))
    checkpoint.fail_config("dual_attention_layers",
                           "expected numbers of blocks, 0 to " + std::to_string(config.depth - 1));
  config.dual.assign(config.dual.size(), false);
  for (const nlohmann::json& layer : listed) config.dual[layer.get<std::size_t>()] = true;
  return config;
}

template <class T>
typename Mmdit<T>::Projections Mmdit<T>::load_projections(const Checkpoint& checkpoint,
                                                          const std::string& name, bool with_out) const {
  const Index width = config_.width;
  Projections p;
  const auto load = [&](const std::string& module, Weight& weight, Weight& bias) {
    weight = checkpoint.matrix(name + module + ".weight", width, width);
    bias = checkpoint.get(name + module + ".bias", {width});
  };
  load(".q", p.q, p.q_bias);
  load(".k", p.k, p.k_bias);
  load(".v", p.v, p.v_bias);
  if (with_out) load(".proj", p.out, p.out_bias);
  if (config_.qk_norm) {
    p.q_norm = checkpoint.get(name + ".ln_q.weight", {config_.head_dim()});
    p.k_norm = checkpoint.get(name + ".ln_k.weight", {config_.head_dim()});
  }
  return p;
}

template <class T>
typename Mmdit<T>::Mlp Mmdit<T>::load_mlp(const Checkpoint& checkpoint, const std::string& name) const {
  return {checkpoint.linear<T>(name + ".fc1", config_.mlp_width, config_.width),
          checkpoint.linear<T>(name + ".fc2", config_.width, config_.mlp_width)};
}

template <class T>
Mmdit<T>::Mmdit(const Checkpoint& checkpoint, const MmditConfig& config) : config_(config) {
  const Index width = config_.width, area = config_.patch * config_.patch;
  positions_ = checkpoint.get("pos_embed", {1, config_.position_grid * config_.position_grid, width});
  patches_.weight =
      checkpoint.get("x_embedder.proj.weight", {width, config_.in_channels, config_.patch, config_.patch})
          .matrix();
  patches_.bias = checkpoint.vector<T>("x_embedder.proj.bias", width);
  time1_ = checkpoint.linear<T>("t_embedder.mlp.0", width, config_.time_width);
  time2_ = checkpoint.linear<T>("t_embedder.mlp.2", width, width);
  pooled1_ = checkpoint.linear<T>("y_embedder.mlp.0", width, config_.pooled_width);
  pooled2_ = checkpoint.linear<T>("y_embedder.mlp.2", width, width);
  context_embedder_ = checkpoint.linear<T>("context_embedder", width, config_.context_width);
  final_modulation_ = checkpoint.linear<T>("final_layer.adaLN_modulation.1", 2 * width, width);
  final_ = checkpoint.linear<T>("final_layer.linear", area * config_.out_channels, width);

  linattn::Conversion conversion = read_conversion(checkpoint);
  const auto take_ttt = [&](const std::string& stem) {
    return TttModule<T>::take(checkpoint, stem, conversion, config_.heads, config_.head_dim());
  };
  for (Index i = 0; i < config_.depth; ++i) {
    const bool last = i + 1 == config_.depth, dual = config_.dual[static_cast<std::size_t>(i)];
    const std::string image = block_name(i) + "x_block.", context = block_name(i) + "context_block.";
    Block block;
    block.image_modulation =
        checkpoint.linear<T>(image + "adaLN_modulation.1", (dual ? 9 : 6) * width, width);
    block.context_modulation =
        checkpoint.linear<T>(context + "adaLN_modulation.1", (last ? 2 : 6) * width, width);
    block.joint = {load_projections(checkpoint, image + "attn", true), take_ttt(image + "attn")};
    block.context = load_projections(checkpoint, context + "attn", !last);
    unify<T>(block.joint.image, &block.context);
    if (dual)
      block.second =
          Attention{load_projections(checkpoint, image + "attn2", true), take_ttt(image + "attn2")};
    if (dual) unify<T>(block.second->image);
    block.image_mlp = load_mlp(checkpoint, image + "mlp");
    if (!last) block.context_mlp = load_mlp(checkpoint, context + "mlp");
    blocks_.push_back(std::move(block));
  }
  if (!conversion.empty())
    fail(checkpoint,
         "the converted module '" + conversion.begin()->first + "' is no attention of this model");
}

template <class T>
Index Mmdit<T>::modules() const {
  return config_.depth + std::count(config_.dual.begin(), config_.dual.end(), true);
}

template <class T>
Index Mmdit<T>::converted_modules() const {
  Index count = 0;
  for (const Block& block : blocks_)
    count += (block.joint.ttt ? 1 : 0) + (block.second && block.second->ttt ? 1 : 0);
  return count;
}

template <class T>
Modulations<T> Mmdit<T>::modulate(Runtime& rt, In<T, 2> sinusoids, In<T, 2> pooled,
                                  const Observer<T>& observe) const {
  const auto embed = [&](const LinearWeights<T>& first, const LinearWeights<T>& second, In<T, 2> in,
                         const char* name, const char* place) {
    const TensorView<const T, 3> rows(in.data, {1, in.extent(0), in.extent(1)},
                                      {in.extent(0) * in.stride(0), in.stride(0), in.stride(1)});
    Tensor<T> hidden = linear<T>(rt, rows, first);
    activate<T>(rt, Activation::silu, hidden.template view<3>());
    Tensor<T> out = linear<T>(rt, std::as_const(hidden).template view<3>(), second);
    expect_finite<T>(rt, place, std::as_const(out).template view<3>());
    if (observe) observe(name, std::as_const(out).template view<3>());
    return out;
  };
  Tensor<T> c = embed(time1_, time2_, sinusoids, "t_emb", "time embedding");
  const Tensor<T> text = embed(pooled1_, pooled2_, pooled, "y_emb", "pooled text embedding");
  add<T>(rt, c.template view<3>(), text.template view<3>());
  activate<T>(rt, Activation::silu, c.template view<3>());

  Modulations<T> result;
  const auto append = [&](const LinearWeights<T>& weights, const std::string& place) {
    result.layers.push_back(linear<T>(rt, std::as_const(c).template view<3>(), weights));
    expect_finite<T>(rt, place, std::as_const(result.layers.back()).template view<3>());
  };
  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    const std::string place = "block " + std::to_string(i);
    append(blocks_[i].image_modulation, place + ", modulation of the image");
    append(blocks_[i].context_modulation, place + ", modulation of the text");
  }
  append(final_modulation_, "final layer, modulation");
  return result;
}

template <class T>
Tensor<T> Mmdit<T>::embed_context(Runtime& rt, In<T, 3> context, const Observer<T>& observe) const {
  Tensor<T> out = linear<T>(rt, context, context_embedder_);
  expect_finite<T>(rt, "context embedder", std::as_const(out).template view<3>());
  if (observe) observe("context_embed", std::as_const(out).template view<3>());
  return out;
}

// The position embedding of a patch is that of the centre of the table's grid.
template <class T>
Tensor<T> Mmdit<T>::embed_patches(Runtime& rt, In<T, 4> x, const Observer<T>& observe) const {
  const Index batch = x.extent(0), p = config_.patch, height = x.extent(2) / p, width = x.extent(3) / p;
  const Tensor<T> patches = to_patches<T>(rt, x, p);
  Tensor<T> tokens = linear<T>(rt, patches.template view<3>(), patches_);
  if (observe) observe("patch_embed", std::as_const(tokens).template view<3>());

  const Index grid = config_.position_grid, channels_out = config_.width;
  const Index top = (grid - height) / 2, left = (grid - width) / 2;
  visit(positions_, [&](const auto* table) {
    const auto* const centre = table + (top * grid + left) * channels_out;
    rt.parallel_rows(batch * height, width * channels_out, [&](Index begin, Index end) {
      for (Index row = begin; row < end; ++row) {
        T* const out = tokens.data() + row * width * channels_out;
        const auto* const position = centre + row % height * grid * channels_out;
        for (Index i = 0; i < width * channels_out; ++i) out[i] += linattn::convert<T>(position[i]);
      }
    });
    if (observe) {
      Tensor<T> crop({1, height * width, channels_out});
      for (Index row = 0; row < height; ++row)
        for (Index i = 0; i < width * channels_out; ++i)
          crop.data()[row * width * channels_out + i] =
              linattn::convert<T>(centre[row * grid * channels_out + i]);
      observe("cropped_pos", std::as_const(crop).template view<3>());
    }
  });
  return tokens;
}

// Attention of `image` tokens, in place, and, where they are not empty, of text tokens; the text's results go
// to `text_out`, which the last block leaves empty.
template <class T>
void Mmdit<T>::attend(Runtime& rt, const std::string& what, const Attention& attention,
                      const Projections& text_weights, TensorView<T, 3> image, In<T, 3> text,
                      TensorView<T, 3> text_out, Index rows, Index columns) const {
  visit_unified<T>(attention.image.q, [&](const auto* pointer) {
    using W = std::remove_const_t<std::remove_pointer_t<decltype(pointer)>>;
    const linattn::AttentionWeights<W> own = views<W>(attention.image), other = views<W>(text_weights);
    if (!attention.ttt) {
      const linattn::SoftmaxLayerOptions options{.heads = config_.heads, .qk_norm_eps = norm_eps};
      return rt.run(
          what,
          [&](const auto& context) {
            return joint_attention_workspace(context, image, text, own, other, image, text_out, options);
          },
          [&](const auto& context) {
            return joint_attention(context, image, text, own, other, image, text_out, options);
          });
    }
    const TttModule<T>& ttt = *attention.ttt;
    const linattn::TttAttentionWeights<W, T> weights = ttt.weights(own);
    const linattn::TttLayerOptions options{.heads = config_.heads,
                                           .grid = {0, rows, columns},
                                           .inner_lr = ttt.conversion.inner_lr,
                                           .key_norm_eps = ttt.conversion.key_norm_eps,
                                           .qk_norm_eps = norm_eps};
    ttt.visit([&]<class Model, class Loss>(Model, Loss) {
      rt.run(
          what,
          [&](const auto& context) {
            return linattn::joint_ttt_attention_workspace<Model, Loss>(context, image, text, weights, other,
                                                                       image, text_out, options);
          },
          [&](const auto& context) {
            return linattn::joint_ttt_attention<Model, Loss>(context, image, text, weights, other, image,
                                                             text_out, options);
          });
    });
  });
}

// x += gate fc2(gelu(fc1(mod(x)))), as many rows at a time as `hidden` holds, so that the wide activation stays
// small.
template <class T>
void Mmdit<T>::add_mlp(Runtime& rt, const Mlp& mlp, TensorView<T, 3> x, const TensorView<const T, 2>& shift,
                       const TensorView<const T, 2>& scale, const TensorView<const T, 2>& gate,
                       TensorView<T, 3> scratch, Tensor<T>& hidden) const {
  const Index rows = x.extent(0) * x.extent(1), width = config_.width, most = hidden.extent(1);
  layer_norm<T>(rt, x, {.eps = norm_eps, .scale = scale, .shift = shift}, scratch);
  for (Index begin = 0; begin < rows; begin += most) {
    const Index count = std::min(most, rows - begin);
    const TensorView<T, 3> part(scratch.data + begin * width, {1, count, width});
    const TensorView<T, 3> wide(hidden.data(), {1, count, config_.mlp_width});
    linear<T>(rt, part, mlp.fc1, wide);
    activate<T>(rt, Activation::gelu_tanh, wide);
    linear<T>(rt, wide, mlp.fc2, part);
  }
  add_gated<T>(rt, x, gate, scratch);
}

template <class T>
void Mmdit<T>::forward(Runtime& rt, In<T, 4> x, In<T, 3> context, const Modulations<T>& modulations,
                       Index first_pair, std::span<const int> skip, TensorView<T, 4> v,
                       const Observer<T>& observe) const {
  const Index batch = x.extent(0), p = config_.patch, width = config_.width;
  const Index rows = x.extent(2) / p, columns = x.extent(3) / p, image = rows * columns;
  const Index text = context.extent(1);
  if (x.extent(1) != config_.in_channels || x.extent(2) % p != 0 || x.extent(3) % p != 0 || image == 0)
    throw std::runtime_error("latent: expected " + std::to_string(config_.in_channels) +
                             " channels and multiples of " + std::to_string(p) + ", got " +
                             to_string({x.extent(1), x.extent(2), x.extent(3)}));
  if (rows > config_.position_grid || columns > config_.position_grid)
    throw std::runtime_error("latent: the position table has " + std::to_string(config_.position_grid) +
                             " x " + std::to_string(config_.position_grid) + " patches, got " +
                             std::to_string(rows) + " x " + std::to_string(columns));
  if (context.extent(0) != batch || context.extent(2) != width || text == 0 ||
      first_pair + batch > modulations.layers.at(0).extent(1))
    throw std::logic_error("context or modulations of another batch");
  const auto show = [&](const std::string& name, const TensorView<const T, 3>& values) {
    if (observe) observe(name, values);
  };

  Tensor<T> image_tokens = embed_patches(rt, x, observe);
  expect_finite<T>(rt, "patches", std::as_const(image_tokens).template view<3>());
  Tensor<T> text_tokens({batch, text, width});
  for (Index b = 0; b < batch; ++b)
    for (Index row = 0; row < text; ++row)
      std::copy_n(context.pointer(b, row), width, text_tokens.data() + (b * text + row) * width);
  const TensorView<T, 3> X = image_tokens.template view<3>(), C = text_tokens.template view<3>();

  // What goes into a layer and, in place, what comes out of it.
  Tensor<T> image_memory({batch, image, width}), text_memory({batch, text, width});
  Tensor<T> second_memory;
  if (std::count(config_.dual.begin(), config_.dual.end(), true) > 0)
    second_memory = Tensor<T>({batch, image, width});
  const TensorView<T, 3> image_work = image_memory.template view<3>();
  const TensorView<T, 3> text_work = text_memory.template view<3>();
  constexpr Index mlp_rows = 1024;
  Tensor<T> hidden({1, std::min(mlp_rows, batch * std::max(image, text)), config_.mlp_width});

  for (Index i = 0; i < config_.depth; ++i) {
    if (std::find(skip.begin(), skip.end(), i) != skip.end()) continue;
    const Block& block = blocks_[static_cast<std::size_t>(i)];
    const bool last = !block.context_mlp.has_value();
    const std::string name = "block" + std::to_string(i) + ".";
    const auto chunk = [&](bool of_text, Index index) {
      return modulations.chunk(static_cast<std::size_t>(2 * i + of_text), index, first_pair, batch, width);
    };
    const auto modulate = [&](bool of_text, Index first, const TensorView<T, 3>& tokens,
                              const TensorView<T, 3>& out, const char* what) {
      layer_norm<T>(rt, tokens,
                    {.eps = norm_eps, .scale = chunk(of_text, first + 1), .shift = chunk(of_text, first)},
                    out);
      show(name + what, out);
    };

    if (block.second) {
      // Runs before X changes: it reads the same LN(X) as the joint attention.
      const TensorView<T, 3> second = second_memory.template view<3>();
      modulate(false, 6, X, second, "attn2.x");
      attend(rt, name + "attn2", *block.second, {}, second, {}, {}, rows, columns);
    }
    modulate(true, 0, C, text_work, "attn.context");
    modulate(false, 0, X, image_work, "attn.x");
    // The last block drops its text: nobody reads the attention of its text queries.
    attend(rt, name + "attn", block.joint, block.context, image_work, text_work,
           last ? TensorView<T, 3>() : text_work, rows, columns);

    add_gated<T>(rt, X, chunk(false, 2), image_work);
    if (block.second) add_gated<T>(rt, X, chunk(false, 8), std::as_const(second_memory).template view<3>());
    add_mlp(rt, block.image_mlp, X, chunk(false, 3), chunk(false, 4), chunk(false, 5), image_work, hidden);
    if (!last) {
      add_gated<T>(rt, C, chunk(true, 2), text_work);
      add_mlp(rt, *block.context_mlp, C, chunk(true, 3), chunk(true, 4), chunk(true, 5), text_work, hidden);
      expect_finite<T>(rt, "block " + std::to_string(i) + ", text", C);
      show(name + "context", C);
    }
    expect_finite<T>(rt, "block " + std::to_string(i), X);
    show(name + "x", X);
  }

  const std::size_t final = modulations.layers.size() - 1;
  layer_norm<T>(rt, X,
                {.eps = norm_eps,
                 .scale = modulations.chunk(final, 1, first_pair, batch, width),
                 .shift = modulations.chunk(final, 0, first_pair, batch, width)},
                image_work);
  const Tensor<T> patches = linear<T>(rt, image_work, final_);
  expect_finite<T>(rt, "final layer", patches.template view<3>());
  show("final_layer", patches.template view<3>());

  from_patches<T>(rt, patches.template view<3>(), p, v);
}

template class Mmdit<float>;
template class Mmdit<double>;

}  // namespace sd35

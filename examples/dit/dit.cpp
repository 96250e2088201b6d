#include "dit.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include <linattn/cpu.hpp>

#include "nn/finite.hpp"
#include "nn/patches.hpp"
#include "sd35/embeddings.hpp"

namespace dit {
namespace {

constexpr double norm_eps = 1e-6;

[[noreturn]] void fail(const Checkpoint& checkpoint, const std::string& what) {
  throw std::runtime_error(checkpoint.path().string() + ": " + what);
}

std::string block_name(Index i) { return "blocks." + std::to_string(i) + "."; }

// Chunk `index` of the modulations of a layer, [batch, width].
template <class T>
TensorView<const T, 2> chunk(const Tensor<T>& modulation, Index index, Index width) {
  return slice<1>(at(modulation.template view<3>(), 0), index * width, width);
}

}  // namespace

Checkpoint open_checkpoint(const std::filesystem::path& path) {
  using linattn::WeightSet;
  const Checkpoint whole = Checkpoint::open(path);
  for (const WeightSet set : {WeightSet::ema, WeightSet::raw}) {
    const auto prefixes = linattn::dit_prefixes(whole.files(), set);
    if (prefixes.size() > 1)
      fail(whole, "holds two diffusion transformers, below '" + prefixes[0] + "' and '" + prefixes[1] + "'");
    if (!prefixes.empty()) return Checkpoint::open(path, prefixes[0]);
  }
  fail(whole, "holds no DiT (no tensor '" + std::string(linattn::detail::dit_anchor) + "')" +
                  (whole.files().holds_below("transformer_blocks.")
                       ? "; names are those of diffusers, the official ones are expected"
                       : ""));
}

DitConfig DitConfig::of(const Checkpoint& checkpoint, std::optional<Index> heads) {
  DitConfig config;
  const std::string prefix = checkpoint.full_name("");
  linattn::DitModel& shapes = config.shapes;
  if (const linattn::FileStatus status = linattn::recognise_dit(checkpoint.files(), prefix, shapes);
      !status.ok())
    throw std::runtime_error(message(status));
  linattn::Heads found;
  if (const linattn::FileStatus status = find_heads(checkpoint.files(), shapes.width, heads,
                                                    checkpoint.config_heads(), dit_heads(shapes), found);
      !status.ok())
    throw std::runtime_error(message(status));
  config.heads = found.count;

  const Index area = shapes.patch * shapes.patch, grid = config.grid();
  if (shapes.depth < 1 || shapes.width % 4 != 0 || shapes.frequencies % 2 != 0 || shapes.labels < 2 ||
      shapes.outputs % area != 0 || (config.out_channels() != shapes.channels && !config.learns_variance()))
    fail(checkpoint, "no DiT: depth " + std::to_string(shapes.depth) + ", width " +
                         std::to_string(shapes.width) + ", " + std::to_string(shapes.frequencies) +
                         " frequencies, " + std::to_string(shapes.labels) + " labels, " +
                         std::to_string(shapes.outputs) + " outputs for a patch of " +
                         std::to_string(shapes.patch) + " x " + std::to_string(shapes.patch) + " of " +
                         std::to_string(shapes.channels) + " channels");
  if (grid * grid != shapes.positions)
    fail(checkpoint, "tensor '" + checkpoint.full_name("pos_embed") +
                         "': " + std::to_string(shapes.positions) + " positions are no square grid");
  return config;
}

Index DitConfig::grid() const {
  return static_cast<Index>(std::lround(std::sqrt(static_cast<double>(shapes.positions))));
}

template <class T>
typename Dit<T>::Block Dit<T>::load_block(const Checkpoint& checkpoint, const std::string& name,
                                          linattn::Conversion& conversion) const {
  const Index width = config_.shapes.width, hidden = config_.shapes.hidden;
  const std::string attn = name + "attn";
  Block block;
  block.qkv = stored_as<T>(checkpoint.matrix(attn + ".qkv.weight", 3 * width, width));
  block.qkv_bias = checkpoint.vector<T>(attn + ".qkv.bias", 3 * width);
  block.proj = stored_as<T>(checkpoint.matrix(attn + ".proj.weight", width, width));
  block.proj_bias = checkpoint.vector<T>(attn + ".proj.bias", width);
  block.fc1 = checkpoint.linear<T>(name + "mlp.fc1", hidden, width);
  block.fc2 = checkpoint.linear<T>(name + "mlp.fc2", width, hidden);
  block.modulation = checkpoint.linear<T>(name + "adaLN_modulation.1", 6 * width, width);
  block.ttt = TttModule<T>::take(checkpoint, attn, conversion, config_.heads, width / config_.heads, true);
  if (block.ttt && block.ttt->conversion.neighborhood > 0) {
    block.qk_scale = widen<T>(checkpoint.get(attn + ".qk_scale_ttt", {1, 1, width, 2}));
    block.qk_offset = widen<T>(checkpoint.get(attn + ".qk_offset_ttt", {1, 1, width, 2}));
  }
  return block;
}

template <class T>
Dit<T>::Dit(const Checkpoint& checkpoint, const DitConfig& config) : config_(config) {
  const linattn::DitModel& shapes = config_.shapes;
  const Index width = shapes.width;
  positions_ = checkpoint.get("pos_embed", {1, shapes.positions, width});
  patches_.weight =
      checkpoint.get("x_embedder.proj.weight", {width, shapes.channels, shapes.patch, shapes.patch}).matrix();
  patches_.bias = checkpoint.vector<T>("x_embedder.proj.bias", width);
  time1_ = checkpoint.linear<T>("t_embedder.mlp.0", width, shapes.frequencies);
  time2_ = checkpoint.linear<T>("t_embedder.mlp.2", width, width);
  classes_ = checkpoint.get("y_embedder.embedding_table.weight", {shapes.labels, width});
  final_modulation_ = checkpoint.linear<T>("final_layer.adaLN_modulation.1", 2 * width, width);
  final_ = checkpoint.linear<T>("final_layer.linear", shapes.outputs, width);

  linattn::Conversion conversion = read_conversion(checkpoint);
  for (Index i = 0; i < shapes.depth; ++i)
    blocks_.push_back(load_block(checkpoint, block_name(i), conversion));
  if (!conversion.empty())
    fail(checkpoint,
         "the converted module '" + conversion.begin()->first + "' is no attention of this model");
  ignored_ = leftovers(checkpoint, "a DiT or DiT5 model");
}

template <class T>
Index Dit<T>::converted_modules() const {
  return std::count_if(blocks_.begin(), blocks_.end(),
                       [](const Block& block) { return block.ttt.has_value(); });
}

template <class T>
void Dit<T>::expect_size(Index height, Index width) const {
  const Index p = config_.shapes.patch, rows = height / p, columns = width / p;
  if (height < 1 || width < 1 || height % p != 0 || width % p != 0)
    throw std::runtime_error("latents of " + std::to_string(height) + " x " + std::to_string(width) +
                             ": positive multiples of the patch, " + std::to_string(p) + ", are needed");
  Index window = 0;
  for (const Block& block : blocks_)
    if (block.ttt) window = std::max(window, block.ttt->conversion.neighborhood);
  if (std::min(rows, columns) < window)
    throw std::runtime_error("latents of " + std::to_string(height) + " x " + std::to_string(width) +
                             ": a grid of " + std::to_string(rows) + " x " + std::to_string(columns) +
                             " tokens is smaller than the window of the neighborhood attention, " +
                             std::to_string(window) + " x " + std::to_string(window));
}

template <class T>
Modulations<T> Dit<T>::modulate(Runtime& rt, In<T, 2> sinusoids, std::span<const std::int32_t> classes,
                                const Observer<T>& observe) const {
  const Index batch = sinusoids.extent(0);
  if (static_cast<Index>(classes.size()) != batch) throw std::logic_error("as many classes as times");
  const TensorView<const T, 3> rows(sinusoids.data, {1, batch, sinusoids.extent(1)},
                                    {batch * sinusoids.stride(0), sinusoids.stride(0), sinusoids.stride(1)});
  Tensor<T> hidden = linear<T>(rt, rows, time1_);
  activate<T>(rt, Activation::silu, hidden.template view<3>());
  Tensor<T> c = linear<T>(rt, std::as_const(hidden).template view<3>(), time2_);
  if (observe) observe("t_emb", c.template view<3>());
  const Tensor<T> label = embed<T>(rt, classes_, classes, 1);
  if (observe) observe("y_emb", label.template view<3>());
  add<T>(rt, c.template view<3>(), label.template view<3>());
  expect_finite<T>(rt, "time and class embedding", std::as_const(c).template view<3>());
  activate<T>(rt, Activation::silu, c.template view<3>());

  Modulations<T> result;
  const auto append = [&](const LinearWeights<T>& weights, const std::string& place) {
    result.push_back(linear<T>(rt, std::as_const(c).template view<3>(), weights));
    expect_finite<T>(rt, place, std::as_const(result.back()).template view<3>());
  };
  for (std::size_t i = 0; i < blocks_.size(); ++i)
    append(blocks_[i].modulation, "block " + std::to_string(i) + ", modulation");
  append(final_modulation_, "final layer, modulation");
  return result;
}

template <class T>
void Dit<T>::add_positions(Runtime& rt, TensorView<T, 3> x, Index rows, Index columns) const {
  const Index width = config_.shapes.width;
  if (rows == config_.grid() && columns == config_.grid()) {
    const std::vector<T> table = widen<T>(positions_);
    return add<T>(rt, x, {table.data(), x.extents, {0, width, 1}});
  }
  // A position's embedding does not depend on the extents of its grid: the corner of a larger square.
  const Index side = std::max(rows, columns);
  const std::vector<double> square = sd35::position_table(width, side);
  Tensor<T> table({1, rows * columns, width});
  for (Index row = 0; row < rows; ++row)
    std::transform(square.begin() + row * side * width, square.begin() + (row * side + columns) * width,
                   table.data() + row * columns * width, [](double value) { return static_cast<T>(value); });
  add<T>(rt, x, {table.data(), x.extents, {0, width, 1}});
}

template <class T>
void Dit<T>::attend(Runtime& rt, const std::string& what, const Block& block, const linattn::TokenGrid& grid,
                    TensorView<T, 3> x) const {
  linattn::AttentionWeights<T> projections =
      linattn::split_qkv<T>(as_matrix<T>(block.qkv), as_view(block.qkv_bias));
  projections.out = {as_matrix<T>(block.proj), as_view(block.proj_bias)};
  const In<T, 3> in = x;
  if (!block.ttt) {
    const linattn::SoftmaxLayerOptions options{.heads = config_.heads};
    return rt.run(
        what,
        [&](const auto& context) {
          return softmax_attention_layer_workspace(context, in, projections, x, options);
        },
        [&](const auto& context) { return softmax_attention_layer(context, in, projections, x, options); });
  }
  const linattn::ModuleConversion& conversion = block.ttt->conversion;
  const linattn::TttAttentionWeights<T> ttt = block.ttt->weights(projections);
  block.ttt->visit([&]<class Model, class Loss>(Model, Loss) {
    if (conversion.neighborhood == 0) {
      const linattn::TttLayerOptions options{.heads = config_.heads,
                                             .grid = grid,
                                             .inner_lr = conversion.inner_lr,
                                             .key_norm_eps = conversion.key_norm_eps};
      return rt.run(
          what,
          [&](const auto& context) {
            return linattn::ttt_attention_layer_workspace<Model, Loss>(context, in, ttt, x, options);
          },
          [&](const auto& context) {
            return linattn::ttt_attention_layer<Model, Loss>(context, in, ttt, x, options);
          });
    }
    const auto pairs = [&](const std::vector<T>& values) {
      return TensorView<const T, 2>(values.data(), {config_.shapes.width, 2});
    };
    const linattn::MixedAttentionWeights<T> weights{ttt, pairs(block.qk_scale), pairs(block.qk_offset)};
    const linattn::MixedLayerOptions options{.heads = config_.heads,
                                             .grid = grid,
                                             .kernel = {conversion.neighborhood, conversion.neighborhood},
                                             .inner_lr = conversion.inner_lr,
                                             .key_norm_eps = conversion.key_norm_eps};
    rt.run(
        what,
        [&](const auto& context) {
          return linattn::mixed_attention_layer_workspace<Model, Loss>(context, in, weights, x, options);
        },
        [&](const auto& context) {
          return linattn::mixed_attention_layer<Model, Loss>(context, in, weights, x, options);
        });
  });
}

template <class T>
void Dit<T>::apply_mlp(Runtime& rt, const Block& block, TensorView<T, 3> x, Tensor<T>& hidden) const {
  const Index rows = x.extent(0) * x.extent(1), width = config_.shapes.width, most = hidden.extent(1);
  for (Index begin = 0; begin < rows; begin += most) {
    const Index count = std::min(most, rows - begin);
    const TensorView<T, 3> part(x.data + begin * width, {1, count, width});
    const TensorView<T, 3> wide(hidden.data(), {1, count, config_.shapes.hidden});
    linear<T>(rt, part, block.fc1, wide);
    activate<T>(rt, Activation::gelu_tanh, wide);
    linear<T>(rt, wide, block.fc2, part);
  }
}

template <class T>
void Dit<T>::forward(Runtime& rt, In<T, 4> x, const Modulations<T>& modulations, TensorView<T, 4> out,
                     const Observer<T>& observe) const {
  const linattn::DitModel& shapes = config_.shapes;
  const Index batch = x.extent(0), p = shapes.patch, width = shapes.width;
  const linattn::TokenGrid grid{0, x.extent(2) / p, x.extent(3) / p};
  const Index tokens = grid.height * grid.width;
  expect_size(x.extent(2), x.extent(3));
  if (x.extent(1) != shapes.channels)
    throw std::runtime_error("latents of " + std::to_string(x.extent(1)) + " channels: the model has " +
                             std::to_string(shapes.channels));
  if (modulations.size() != blocks_.size() + 1 || modulations[0].extent(1) != batch)
    throw std::logic_error("modulations of another model or batch");
  const auto show = [&](const std::string& name, const TensorView<const T, 3>& values) {
    if (observe) observe(name, values);
  };

  const Tensor<T> patches = to_patches<T>(rt, x, p);
  Tensor<T> memory = linear<T>(rt, patches.template view<3>(), patches_), work_memory({batch, tokens, width});
  const TensorView<T, 3> X = memory.template view<3>(), work = work_memory.template view<3>();
  show("x_embed", X);
  add_positions(rt, X, grid.height, grid.width);
  expect_finite<T>(rt, "patches", X);
  constexpr Index mlp_rows = 1024;
  Tensor<T> hidden({1, std::min(mlp_rows, batch * tokens), shapes.hidden});
  // work = LN(X) (1 + scale) + shift, chunks `first` and `first` + 1 being shift and scale
  const auto modulate_into_work = [&](const Tensor<T>& modulation, Index first) {
    layer_norm<T>(rt, X,
                  {.eps = norm_eps,
                   .scale = chunk(modulation, first + 1, width),
                   .shift = chunk(modulation, first, width)},
                  work);
  };

  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    const std::string name = "block" + std::to_string(i);
    modulate_into_work(modulations[i], 0);
    attend(rt, name + ".attn", blocks_[i], grid, work);
    show(name + ".attn", work);
    add_gated<T>(rt, X, chunk(modulations[i], 2, width), work);
    modulate_into_work(modulations[i], 3);
    apply_mlp(rt, blocks_[i], work, hidden);
    add_gated<T>(rt, X, chunk(modulations[i], 5, width), work);
    expect_finite<T>(rt, "block " + std::to_string(i), X);
    show(name, X);
  }
  modulate_into_work(modulations.back(), 0);
  const Tensor<T> result = linear<T>(rt, work, final_);
  expect_finite<T>(rt, "final layer", result.template view<3>());
  show("final", result.template view<3>());
  from_patches<T>(rt, result.template view<3>(), p, out);
}

template class Dit<float>;
template class Dit<double>;

}  // namespace dit

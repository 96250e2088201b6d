#include "vit.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include <linattn/cpu.hpp>
#include <linattn/weights/vit.hpp>

#include "nn/finite.hpp"
#include "nn/patches.hpp"
#include "nn/rows.hpp"

namespace deit {
namespace {

constexpr double norm_eps = 1e-6;
constexpr const char* patch_weight = "patch_embed.proj.weight";

[[noreturn]] void fail(const Checkpoint& checkpoint, const std::string& what) {
  throw std::runtime_error(checkpoint.path().string() + ": " + what);
}

std::string block_name(Index i) { return "blocks." + std::to_string(i) + "."; }

void require(const linattn::FileStatus& status) {
  if (!status.ok()) throw std::runtime_error(message(status));
}

// Where an output cell of bicubic interpolation reads, and with which weights.
struct Taps {
  std::array<Index, 4> index{};
  std::array<double, 4> weight{};
};

// The kernel of R. Keys, Cubic convolution interpolation for digital image processing, 1981, at distance x.
double cubic(double x) {
  constexpr double a = -0.75;
  x = std::abs(x);
  if (x <= 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a;
  return 0;
}

std::vector<Taps> taps(Index in, Index out) {
  std::vector<Taps> result(static_cast<std::size_t>(out));
  for (Index i = 0; i < out; ++i) {
    const double centre =
        (static_cast<double>(i) + 0.5) * static_cast<double>(in) / static_cast<double>(out) - 0.5;
    const double first = std::floor(centre) - 1;
    for (std::size_t j = 0; j < 4; ++j) {
      const double at = first + static_cast<double>(j);
      result[static_cast<std::size_t>(i)].index[j] = std::clamp<Index>(static_cast<Index>(at), 0, in - 1);
      result[static_cast<std::size_t>(i)].weight[j] = cubic(centre - at);
    }
  }
  return result;
}

}  // namespace

template <class T>
void resample_positions(const T* table, Index grid, Index width, Index rows, Index columns, T* out) {
  const std::vector<Taps> vertical = taps(grid, rows), horizontal = taps(grid, columns);
  for (const Taps& y : vertical)
    for (const Taps& x : horizontal) {
      std::fill_n(out, width, T(0));
      for (std::size_t i = 0; i < 4; ++i)
        for (std::size_t j = 0; j < 4; ++j) {
          const T weight = static_cast<T>(y.weight[i] * x.weight[j]);
          const T* const from = table + (y.index[i] * grid + x.index[j]) * width;
          for (Index c = 0; c < width; ++c) out[c] += weight * from[c];
        }
      out += width;
    }
}
template void resample_positions<float>(const float*, Index, Index, Index, Index, float*);
template void resample_positions<double>(const double*, Index, Index, Index, Index, double*);

Checkpoint open(const std::filesystem::path& path) {
  const Checkpoint whole = Checkpoint::open(path);
  std::vector<std::string> prefixes = linattn::vit_prefixes(whole.files(), linattn::WeightSet::raw);
  if (prefixes.empty()) prefixes = linattn::vit_prefixes(whole.files(), linattn::WeightSet::ema);
  if (prefixes.empty())
    fail(whole,
         "no vision transformer under timm's names: there is no tensor '" + std::string(patch_weight) + "'");
  if (prefixes.size() > 1)
    fail(whole, "holds " + std::to_string(prefixes.size()) + " models, those below '" + prefixes[0] +
                    "' and '" + prefixes[1] + "' among them; one is expected");
  return Checkpoint::open(path, prefixes[0]);
}

VitConfig VitConfig::of(const Checkpoint& checkpoint, std::optional<Index> heads) {
  linattn::VitModel model;
  require(recognise_vit(checkpoint.files(), checkpoint.full_name(""), model));
  linattn::Heads found;
  require(
      find_heads(checkpoint.files(), model.width, heads, checkpoint.config_heads(), vit_heads(model), found));
  return {.depth = model.depth,
          .width = model.width,
          .heads = found.count,
          .mlp_width = model.hidden,
          .channels = model.channels,
          .patch = model.patch,
          .grid = model.grid,
          .classes = model.classes,
          .special = checkpoint.has("cls_token") ? (checkpoint.has("dist_token") ? 2 : 1) : 0};
}

template <class T>
typename Vit<T>::Norm Vit<T>::load_norm(const Checkpoint& checkpoint, const std::string& name) const {
  return {checkpoint.vector<T>(name + ".weight", config_.width),
          checkpoint.vector<T>(name + ".bias", config_.width)};
}

template <class T>
typename Vit<T>::Block Vit<T>::load_block(const Checkpoint& checkpoint, const std::string& name,
                                          linattn::Conversion& conversion) const {
  const Index width = config_.width;
  const std::string attn = name + "attn";
  Block block;
  block.norm1 = load_norm(checkpoint, name + "norm1");
  block.norm2 = load_norm(checkpoint, name + "norm2");
  block.qkv = stored_as<T>(checkpoint.matrix(attn + ".qkv.weight", 3 * width, width));
  if (checkpoint.has(attn + ".qkv.bias"))
    block.qkv_bias = checkpoint.vector<T>(attn + ".qkv.bias", 3 * width);
  block.proj = stored_as<T>(checkpoint.matrix(attn + ".proj.weight", width, width));
  block.proj_bias = checkpoint.vector<T>(attn + ".proj.bias", width);
  block.fc1 = checkpoint.linear<T>(name + "mlp.fc1", config_.mlp_width, width);
  block.fc2 = checkpoint.linear<T>(name + "mlp.fc2", width, config_.mlp_width);
  block.ttt = TttModule<T>::take(checkpoint, attn, conversion, config_.heads, config_.head_dim());
  return block;
}

template <class T>
Vit<T>::Vit(const Checkpoint& checkpoint, const VitConfig& config) : config_(config) {
  const Index width = config_.width, patch = config_.patch;
  patches_.weight = checkpoint.get(patch_weight, {width, config_.channels, patch, patch}).matrix();
  patches_.bias = checkpoint.vector<T>("patch_embed.proj.bias", width);
  for (const char* token : {"cls_token", "dist_token"})
    if (checkpoint.has(token)) {
      const std::vector<T> values = widen<T>(checkpoint.get(token, {1, 1, width}));
      special_.insert(special_.end(), values.begin(), values.end());
    }
  positions_ =
      widen<T>(checkpoint.get("pos_embed", {1, config_.special + config_.grid * config_.grid, width}));
  linattn::Conversion conversion = read_conversion(checkpoint);
  for (Index i = 0; i < config_.depth; ++i)
    blocks_.push_back(load_block(checkpoint, block_name(i), conversion));
  if (!conversion.empty())
    fail(checkpoint,
         "the converted module '" + conversion.begin()->first + "' is no attention of this model");
  norm_ = load_norm(checkpoint, "norm");
  head_ = checkpoint.linear<T>("head", config_.classes, width);
  if (config_.special == 2) distilled_head_ = checkpoint.linear<T>("head_dist", config_.classes, width);

  std::vector<Harmless> harmless{{"mask_token", "of the training on masked pictures"}};
  for (const std::string& prefix : linattn::vit_prefixes(checkpoint.files(), linattn::WeightSet::ema))
    if (checkpoint.full_name("").empty() && !prefix.empty())
      harmless.push_back({prefix + "*", "the moving average of the weights, which themselves are taken"});
  ignored_ = leftovers(checkpoint, "a ViT, DeiT or T5 model", harmless);
}

template <class T>
Index Vit<T>::converted_blocks() const {
  return std::count_if(blocks_.begin(), blocks_.end(),
                       [](const Block& block) { return block.ttt.has_value(); });
}

template <class T>
Tensor<T> Vit<T>::embed(Runtime& rt, const TensorView<const T, 4>& pictures,
                        const Observer<T>& observe) const {
  const Index batch = pictures.extent(0), p = config_.patch;
  const Index rows = pictures.extent(2) / p, columns = pictures.extent(3) / p, cells = rows * columns;
  const Index special = config_.special, width = config_.width;
  const Tensor<T> patches = to_patches<T>(rt, pictures, p);
  Tensor<T> tokens({batch, special + cells, width});
  const TensorView<T, 3> x = tokens.template view<3>(), image = slice<1>(x, special, cells);
  linear<T>(rt, patches.template view<3>(), patches_, image);
  if (observe) observe("patch_embed", image);
  for (Index b = 0; b < batch; ++b) std::copy(special_.begin(), special_.end(), x.pointer(b));

  Tensor<T> positions({1, special + cells, width});
  T* const table = positions.data() + special * width;
  std::copy_n(positions_.begin(), special * width, positions.data());
  if (rows == config_.grid && columns == config_.grid)
    std::copy(positions_.begin() + special * width, positions_.end(), table);
  else
    resample_positions(positions_.data() + special * width, config_.grid, width, rows, columns, table);
  const TensorView<const T, 3> added = std::as_const(positions).template view<3>();
  if (observe) observe("positions", added);
  add<T>(rt, x, {added.data, x.extents, {0, added.stride(1), 1}});
  return tokens;
}

template <class T>
void Vit<T>::attend(Runtime& rt, const std::string& what, const Block& block, const linattn::TokenGrid& grid,
                    TensorView<T, 3> x, const Observer<T>& observe) const {
  if (observe) {
    const LinearWeights<T> qkv{block.qkv, block.qkv_bias};
    const Tensor<T> packed = linear<T>(rt, x, qkv);
    for (Index part = 0; part < 3; ++part)
      observe(what + "." + "qkv"[part],
              slice<2>(packed.template view<3>(), part * config_.width, config_.width));
  }
  linattn::AttentionWeights<T> weights =
      linattn::split_qkv<T>(as_matrix<T>(block.qkv), as_view(block.qkv_bias));
  weights.out = {as_matrix<T>(block.proj), as_view(block.proj_bias)};
  if (!block.ttt) {
    const linattn::SoftmaxLayerOptions options{.heads = config_.heads};
    return rt.run(
        what,
        [&](const auto& context) {
          return linattn::softmax_attention_layer_workspace<std::decay_t<decltype(context)>, T>(
              context, x, weights, x, options);
        },
        [&](const auto& context) {
          return linattn::softmax_attention_layer<std::decay_t<decltype(context)>, T>(context, x, weights, x,
                                                                                      options);
        });
  }
  const linattn::TttAttentionWeights<T> ttt = block.ttt->weights(weights);
  const linattn::TttLayerOptions options{.heads = config_.heads,
                                         .grid = grid,
                                         .inner_lr = block.ttt->conversion.inner_lr,
                                         .key_norm_eps = block.ttt->conversion.key_norm_eps};
  block.ttt->visit([&]<class Model, class Loss>(Model, Loss) {
    rt.run(
        what,
        [&](const auto& context) {
          return linattn::ttt_attention_layer_workspace<Model, Loss>(context, x, ttt, x, options);
        },
        [&](const auto& context) {
          return linattn::ttt_attention_layer<Model, Loss>(context, x, ttt, x, options);
        });
  });
}

// As many rows at a time as `hidden` holds, so that the wide activation stays small.
template <class T>
void Vit<T>::add_mlp(Runtime& rt, const Block& block, TensorView<T, 3> x, TensorView<T, 3> scratch,
                     Tensor<T>& hidden) const {
  const Index rows = x.extent(0) * x.extent(1), width = config_.width, most = hidden.extent(1);
  layer_norm<T>(rt, x,
                {.eps = norm_eps, .weight = as_view(block.norm2.weight), .bias = as_view(block.norm2.bias)},
                scratch);
  for (Index begin = 0; begin < rows; begin += most) {
    const Index count = std::min(most, rows - begin);
    const TensorView<T, 3> part(scratch.data + begin * width, {1, count, width});
    const TensorView<T, 3> wide(hidden.data(), {1, count, config_.mlp_width});
    linear<T>(rt, part, block.fc1, wide);
    activate<T>(rt, Activation::gelu_erf, wide);
    linear<T>(rt, wide, block.fc2, part);
  }
  add<T>(rt, x, scratch);
}

// What the head sees of one token, or of their mean.
template <class T>
Tensor<T> Vit<T>::classify(Runtime& rt, const TensorView<const T, 3>& normalised) const {
  const Index batch = normalised.extent(0), tokens = normalised.extent(1), width = config_.width;
  // x (batch, width) with that distance from picture to picture
  const auto apply = [&](const LinearWeights<T>& head, const T* features, Index stride) {
    return linear<T>(rt, {features, {1, batch, width}, {batch * stride, stride, 1}}, head);
  };
  Tensor<T> logits;
  if (config_.special == 0) {
    Tensor<T> mean = Tensor<T>::zeros({batch, width});
    for (Index b = 0; b < batch; ++b) {
      T* const sums = mean.data() + b * width;
      for (Index n = 0; n < tokens; ++n)
        map_row(
            sums, width, [](auto u, auto v) { return u + v; }, sums, normalised.pointer(b, n));
      for (Index c = 0; c < width; ++c) sums[c] /= static_cast<T>(tokens);
    }
    logits = apply(head_, mean.data(), width);
  } else {
    logits = apply(head_, normalised.data, normalised.stride(0));
  }
  if (config_.special == 2) {
    const Tensor<T> other = apply(distilled_head_, normalised.pointer(0, 1), normalised.stride(0));
    map_row(
        logits.data(), logits.elements(), [](auto u, auto v) { return (u + v) * decltype(u)(T(0.5)); },
        logits.data(), other.data());
  }
  return std::move(logits).reshaped({batch, config_.classes});
}

template <class T>
Tensor<T> Vit<T>::forward(Runtime& rt, In<T, 4> pictures, const Observer<T>& observe) const {
  const Index batch = pictures.extent(0), p = config_.patch;
  const Index rows = pictures.extent(2) / p, columns = pictures.extent(3) / p;
  if (pictures.extent(1) != config_.channels || pictures.extent(2) % p != 0 || pictures.extent(3) % p != 0 ||
      batch * rows * columns == 0)
    throw std::runtime_error("picture: expected " + std::to_string(config_.channels) +
                             " channels and multiples of " + std::to_string(p) + " pixels, got " +
                             to_string({pictures.extent(1), pictures.extent(2), pictures.extent(3)}));
  const auto show = [&](const std::string& name, const TensorView<const T, 3>& values) {
    if (observe) observe(name, values);
  };
  Tensor<T> tokens = embed(rt, pictures, observe);
  const TensorView<T, 3> x = tokens.template view<3>();
  expect_finite<T>(rt, "embedding", x);
  Tensor<T> memory(tokens.shape());  // what goes into a layer and, in place, what comes out of it
  const TensorView<T, 3> work = memory.template view<3>();
  constexpr Index mlp_rows = 1024;
  Tensor<T> hidden({1, std::min(mlp_rows, batch * x.extent(1)), config_.mlp_width});
  const auto normalise = [&](const Norm& norm) {
    layer_norm<T>(rt, x, {.eps = norm_eps, .weight = as_view(norm.weight), .bias = as_view(norm.bias)}, work);
  };

  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    const std::string name = "block" + std::to_string(i);
    normalise(blocks_[i].norm1);
    attend(rt, name, blocks_[i], {config_.special, rows, columns}, work, observe);
    show(name + ".attn", work);
    add<T>(rt, x, work);
    add_mlp(rt, blocks_[i], x, work, hidden);
    expect_finite<T>(rt, "block " + std::to_string(i), x);
    show(name, x);
  }
  normalise(norm_);
  expect_finite<T>(rt, "final norm", work);
  show("norm", work);
  Tensor<T> logits = classify(rt, work);
  expect_finite<T>("head", {logits.data(), static_cast<std::size_t>(logits.elements())});
  return logits;
}

template class Vit<float>;
template class Vit<double>;

}  // namespace deit

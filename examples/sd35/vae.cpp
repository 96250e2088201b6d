#include "vae.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <string>

#include <linattn/ops/linear_cpu.hpp>

#include "nn/rows.hpp"

namespace sd35 {
namespace {

// Count, mean and sum of squared deviations of a set; merged by Chan, Golub, LeVeque, 1983.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  void merge(const Moments& other) {
    const double total = count + other.count;
    if (total == 0) return;
    const double delta = other.mean - mean;
    mean += delta * other.count / total;
    squares += other.squares + delta * delta * count * other.count / total;
    count = total;
  }
};

// Of each group of channels over `rows` rows of dense activations. Sums of differences from the first row, so
// that an offset common to the rows costs no digits.
template <class T>
void group_moments(const T* x, Index rows, Index channels, Index groups, Moments* out) {
  std::vector<double> sums(static_cast<std::size_t>(2 * channels));
  double *const sum = sums.data(), *const squares = sum + channels;
  for (Index r = 1; r < rows; ++r)
    for (Index c = 0; c < channels; ++c) {
      const double d = static_cast<double>(x[r * channels + c]) - static_cast<double>(x[c]);
      sum[c] += d;
      squares[c] += d * d;
    }
  const double n = static_cast<double>(rows);
  const Index width = channels / groups;
  for (Index c = 0; c < channels; ++c)
    out[c / width].merge(
        {n, static_cast<double>(x[c]) + sum[c] / n, std::max(0.0, squares[c] - sum[c] * sum[c] / n)});
}

// What is done to the input of a convolution as it is read.
template <class T>
struct ConvInput {
  const Tensor<T>* norm_terms = nullptr;  // none: as it is; else group norm and SiLU
  bool upsample = false;                  // nearest x2
};

// out (+)= conv(input(x)), 3 x 3, zero padding of one.
template <class T>
void convolve(Runtime& rt, const typename VaeDecoder<T>::Image& x, const typename VaeDecoder<T>::Conv& conv,
              const ConvInput<T>& input, bool accumulate, typename VaeDecoder<T>::Image& out) {
  // 256 pixels: enough rows for the matrix product, columns of at most a few MB.
  constexpr Index tile_height = 8, tile_width = 32;
  const Index channels = conv.in, filters = conv.weights.out(), taps = 9 * channels;
  const int shift = input.upsample ? 1 : 0;
  const Index tiles_y = (out.height + tile_height - 1) / tile_height;
  const Index tiles_x = (out.width + tile_width - 1) / tile_width;
  const linattn::Cpu<> serial;

  visit(conv.weights.weight, [&](const auto* pointer) {
    using W = std::remove_pointer_t<decltype(pointer)>;
    const TensorView<W, 2> matrix{pointer, {filters, taps}};
    const TensorView<const T, 1> bias = as_view(conv.weights.bias);
    struct Scratch {
      T *patch, *columns, *result;
      linattn::Workspace rest;
    };
    constexpr Index pixels = tile_height * tile_width;
    // Tiles at the right and the lower edge are products of other shapes, which may need more than a whole one.
    std::size_t product = 0;
    for (const Index rows : {std::min(tile_height, out.height), out.height % tile_height})
      for (const Index columns : {std::min(tile_width, out.width), out.width % tile_width})
        if (const Index tile = rows * columns; tile > 0)
          product = std::max(
              product, linattn::linear_workspace(serial, TensorView<const T, 2>{nullptr, {tile, taps}},
                                                 matrix, bias, TensorView<T, 2>{nullptr, {tile, filters}}));
    const auto carve = [&](linattn::Carver& carver) {
      Scratch s;
      s.patch = carver.template take<T>((tile_height + 2) * (tile_width + 2) * channels);
      s.columns = carver.template take<T>(pixels * taps);
      s.result = carver.template take<T>(pixels * filters);
      std::byte* const rest = carver.template take<std::byte>(static_cast<Index>(product));
      s.rest = {rest, product};
      return s;
    };
    linattn::Carver count{linattn::Workspace{}};
    carve(count);
    const std::size_t bytes = count.used();
    const linattn::Workspace scratch = rt.scratch(bytes * static_cast<std::size_t>(rt.workers()));

    std::atomic<bool> failed = false;
    rt.parallel_workers(x.batch() * tiles_y * tiles_x, [&](Index task, Index worker) {
      linattn::Carver carver{{scratch.data + static_cast<std::size_t>(worker) * bytes, bytes}};
      const Scratch s = carve(carver);
      const Index b = task / (tiles_y * tiles_x);
      const Index y0 = task / tiles_x % tiles_y * tile_height, x0 = task % tiles_x * tile_width;
      const Index rows = std::min(tile_height, out.height - y0),
                  columns = std::min(tile_width, out.width - x0);

      // The pixels of x that the tile reads, ready to be multiplied, zero beyond the picture.
      const Index top = (y0 - 1) >> shift, left = (x0 - 1) >> shift;
      const Index patch_height = ((y0 + rows) >> shift) - top + 1;
      const Index patch_width = ((x0 + columns) >> shift) - left + 1;
      for (Index py = 0; py < patch_height; ++py)
        for (Index px = 0; px < patch_width; ++px) {
          T* const target = s.patch + (py * patch_width + px) * channels;
          const Index sy = top + py, sx = left + px;
          if (sy < 0 || sx < 0 || sy >= x.height || sx >= x.width) {
            std::fill_n(target, channels, T(0));
            continue;
          }
          const T* const source = x.values.data() + ((b * x.height + sy) * x.width + sx) * channels;
          if (input.norm_terms == nullptr) {
            std::copy_n(source, channels, target);
            continue;
          }
          const T* const terms = input.norm_terms->data() + b * 3 * channels;
          map_row(
              target, channels,
              [](auto u, auto mean, auto factor, auto offset) {
                const auto v = linattn::detail::fma(u - mean, factor, offset);
                return v * linattn::detail::sigmoid(v);
              },
              source, terms, terms + channels, terms + 2 * channels);
        }

      for (Index y = 0; y < rows; ++y)
        for (Index i = 0; i < columns; ++i) {
          const T* tap[9];
          for (Index ky = 0; ky < 3; ++ky)
            for (Index kx = 0; kx < 3; ++kx)
              tap[ky * 3 + kx] = s.patch + ((((y0 + y + ky - 1) >> shift) - top) * patch_width +
                                            ((x0 + i + kx - 1) >> shift) - left) *
                                               channels;
          T* column = s.columns + (y * columns + i) * taps;
          for (Index c = 0; c < channels; ++c)
            for (const T* const t : tap) *column++ = t[c];
        }

      const linattn::Cpu<> context{s.rest, {}};
      const linattn::Status status =
          linattn::linear(context, TensorView<const T, 2>{s.columns, {rows * columns, taps}}, matrix, bias,
                          TensorView<T, 2>{s.result, {rows * columns, filters}});
      if (!status.ok()) failed = true;

      for (Index y = 0; y < rows; ++y) {
        T* const target = out.values.data() + ((b * out.height + y0 + y) * out.width + x0) * filters;
        const T* const source = s.result + y * columns * filters;
        if (accumulate)
          map_row(
              target, columns * filters, [](auto u, auto v) { return u + v; }, target, source);
        else
          std::copy_n(source, columns * filters, target);
      }
    });
    if (failed) throw std::logic_error(conv.weights.weight.name + ": the convolution's product failed");
  });
}

template <class T>
typename VaeDecoder<T>::Image make_image(Index batch, Index height, Index width, Index channels) {
  return {Tensor<T>({batch, height * width, channels}), height, width};
}

template <class T>
typename VaeDecoder<T>::Conv load_conv(const Checkpoint& checkpoint, const std::string& name, Index out,
                                       Index in) {
  const Weight weight = checkpoint.get(name + ".weight", {out, in, 3, 3});
  return {weight.extent(1), {weight.matrix(), checkpoint.vector<T>(name + ".bias", weight.extent(0))}};
}

}  // namespace

VaeConfig VaeConfig::of(const Checkpoint& checkpoint) {
  VaeConfig config;
  if (checkpoint.has("post_quant_conv.weight")) config.scaling = 0.18215, config.shift = 0;
  config.groups = checkpoint.config_value("norm_num_groups", config.groups);
  config.scaling = checkpoint.config_value("scaling_factor", config.scaling);
  config.shift = checkpoint.config_value("shift_factor", config.shift);
  return config;
}

template <class T>
typename VaeDecoder<T>::Norm VaeDecoder<T>::load_norm(const Checkpoint& checkpoint, const std::string& name,
                                                      Index channels) const {
  if (config_.groups < 1 || channels % config_.groups != 0)
    throw std::runtime_error(checkpoint.path().string() + ": tensor '" + name +
                             ".weight': " + std::to_string(channels) + " channels do not divide into " +
                             std::to_string(config_.groups) + " groups");
  return {checkpoint.vector<T>(name + ".weight", channels), checkpoint.vector<T>(name + ".bias", channels)};
}

template <class T>
typename VaeDecoder<T>::ResBlock VaeDecoder<T>::load_block(const Checkpoint& checkpoint,
                                                           const std::string& name, Index channels) const {
  ResBlock block;
  block.norm1 = load_norm(checkpoint, name + "norm1", channels);
  block.conv1 = load_conv<T>(checkpoint, name + "conv1", Checkpoint::any, channels);
  const Index out = block.conv1.weights.out();
  block.norm2 = load_norm(checkpoint, name + "norm2", out);
  block.conv2 = load_conv<T>(checkpoint, name + "conv2", out, out);
  if (out != channels) block.shortcut = checkpoint.linear<T>(name + "nin_shortcut", out, channels);
  return block;
}

template <class T>
VaeDecoder<T>::VaeDecoder(const Checkpoint& checkpoint, const VaeConfig& config) : config_(config) {
  if (checkpoint.has("post_quant_conv.weight"))
    post_quant_ = checkpoint.linear<T>("post_quant_conv", Checkpoint::any, Checkpoint::any);
  conv_in_ = load_conv<T>(checkpoint, "decoder.conv_in", Checkpoint::any,
                          post_quant_ ? post_quant_->out() : Checkpoint::any);
  Index channels = conv_in_.weights.out();
  mid1_ = load_block(checkpoint, "decoder.mid.block_1.", channels);
  channels = mid1_.conv1.weights.out();
  const std::string attention = "decoder.mid.attn_1.";
  attention_norm_ = load_norm(checkpoint, attention + "norm", channels);
  q_ = checkpoint.linear<T>(attention + "q", channels, channels);
  k_ = checkpoint.linear<T>(attention + "k", channels, channels);
  v_ = checkpoint.linear<T>(attention + "v", channels, channels);
  proj_ = checkpoint.linear<T>(attention + "proj_out", channels, channels);
  mid2_ = load_block(checkpoint, "decoder.mid.block_2.", channels);
  channels = mid2_.conv1.weights.out();

  Index levels = 0;
  const auto level_name = [](Index level) { return "decoder.up." + std::to_string(level) + "."; };
  while (checkpoint.has(level_name(levels) + "block.0.norm1.weight")) ++levels;
  levels_.resize(static_cast<std::size_t>(levels));
  for (Index i = levels - 1; i >= 0; --i) {
    Level& level = levels_[static_cast<std::size_t>(i)];
    for (std::string name; name = level_name(i) + "block." + std::to_string(level.blocks.size()) + ".",
                           checkpoint.has(name + "norm1.weight");) {
      level.blocks.push_back(load_block(checkpoint, name, channels));
      channels = level.blocks.back().conv1.weights.out();
    }
    if (i > 0) {
      level.upsample = load_conv<T>(checkpoint, level_name(i) + "upsample.conv", Checkpoint::any, channels);
      channels = level.upsample->weights.out();
    }
  }
  norm_out_ = load_norm(checkpoint, "decoder.norm_out", channels);
  conv_out_ = load_conv<T>(checkpoint, "decoder.conv_out", Checkpoint::any, channels);
}

template <class T>
Index VaeDecoder<T>::latent_channels() const {
  return post_quant_ ? post_quant_->in() : conv_in_.in;
}

template <class T>
Index VaeDecoder<T>::factor() const {
  return levels_.empty() ? 1 : Index{1} << (levels_.size() - 1);
}

template <class T>
Tensor<T> VaeDecoder<T>::norm_terms(const Runtime& rt, const Image& x, const Norm& norm) const {
  constexpr Index part = 512;  // rows whose moments are summed at once
  const Index channels = x.channels(), rows = x.values.extent(1), parts = (rows + part - 1) / part;
  std::vector<Moments> moments(static_cast<std::size_t>(x.batch() * parts * config_.groups));
  rt.parallel(x.batch() * parts, [&](Index task) {
    const Index b = task / parts, begin = task % parts * part;
    group_moments(x.values.data() + (b * rows + begin) * channels, std::min(part, rows - begin), channels,
                  config_.groups, moments.data() + task * config_.groups);
  });
  Tensor<T> terms({x.batch(), 3, channels});
  for (Index b = 0; b < x.batch(); ++b)
    for (Index g = 0; g < config_.groups; ++g) {
      Moments all;
      for (Index p = 0; p < parts; ++p)
        all.merge(moments[static_cast<std::size_t>((b * parts + p) * config_.groups + g)]);
      const double inverse = 1 / std::sqrt(all.squares / all.count + 1e-6);
      const Index width = channels / config_.groups;
      for (Index c = g * width; c < (g + 1) * width; ++c) {
        const auto at = static_cast<std::size_t>(c);
        T* const term = terms.data() + b * 3 * channels + c;
        term[0] = static_cast<T>(all.mean);
        term[channels] = static_cast<T>(static_cast<double>(norm.weight[at]) * inverse);
        term[2 * channels] = norm.bias[at];
      }
    }
  return terms;
}

template <class T>
void VaeDecoder<T>::apply_block(Runtime& rt, const ResBlock& block, Image& x) const {
  Image hidden = make_image<T>(x.batch(), x.height, x.width, block.conv1.weights.out());
  const Tensor<T> terms1 = norm_terms(rt, x, block.norm1);
  convolve<T>(rt, x, block.conv1, {.norm_terms = &terms1}, false, hidden);
  if (block.shortcut) x.values = linear<T>(rt, x.view(), *block.shortcut);
  const Tensor<T> terms2 = norm_terms(rt, hidden, block.norm2);
  convolve<T>(rt, hidden, block.conv2, {.norm_terms = &terms2}, true, x);
}

template <class T>
void normalize(const Runtime& rt, const typename VaeDecoder<T>::Image& x, const Tensor<T>& terms,
               Tensor<T>& out) {
  const Index channels = x.channels(), rows = x.values.extent(1);
  rt.parallel_rows(x.batch() * rows, channels, [&](Index begin, Index end) {
    for (Index r = begin; r < end; ++r) {
      const T* const term = terms.data() + r / rows * 3 * channels;
      map_row(
          out.data() + r * channels, channels,
          [](auto u, auto mean, auto factor, auto offset) {
            return linattn::detail::fma(u - mean, factor, offset);
          },
          x.values.data() + r * channels, term, term + channels, term + 2 * channels);
    }
  });
}

template <class T>
void VaeDecoder<T>::apply_attention(Runtime& rt, Image& x) const {
  Tensor<T> normed(x.values.shape());
  normalize<T>(rt, x, norm_terms(rt, x, attention_norm_), normed);
  const TensorView<T, 3> n = normed.template view<3>();
  Tensor<T> q = linear<T>(rt, n, q_), k = linear<T>(rt, n, k_), v = linear<T>(rt, n, v_);
  const auto one_head = [](Tensor<T>& tensor) { return linattn::split_heads(tensor.template view<3>(), 1); };
  attention<T>(rt, "VAE attention", one_head(q), one_head(k), one_head(v), one_head(normed));
  linear<T>(rt, n, proj_, q.template view<3>());
  add<T>(rt, x.view(), q.template view<3>());
}

template <class T>
Tensor<T> VaeDecoder<T>::decode(Runtime& rt, const TensorView<const T, 4>& latent,
                                const Observer<T>& observe) const {
  const Index batch = latent.extent(0), height = latent.extent(2), width = latent.extent(3);
  if (latent.extent(1) != latent_channels() || batch < 1 || height < 1 || width < 1)
    throw std::runtime_error("VAE decoder: expected a latent of " + std::to_string(latent_channels()) +
                             " channels, got " + to_string({batch, latent.extent(1), height, width}));
  const auto show = [&](const std::string& name, const Image& image) {
    if (observe) observe(name, image.view());
  };

  Image x = make_image<T>(batch, height, width, latent_channels());
  for (Index b = 0; b < batch; ++b)
    for (Index y = 0; y < height; ++y)
      for (Index i = 0; i < width; ++i)
        for (Index c = 0; c < latent_channels(); ++c)
          x.view()(b, y * width + i, c) =
              latent(b, c, y, i) / static_cast<T>(config_.scaling) + static_cast<T>(config_.shift);
  show("z", x);
  if (post_quant_) {
    x.values = linear<T>(rt, x.view(), *post_quant_);
    show("post_quant_conv", x);
  }

  const auto replace_by_conv = [&](const Conv& conv, const ConvInput<T>& input) {
    const Index scale = input.upsample ? 2 : 1;
    Image next = make_image<T>(batch, scale * x.height, scale * x.width, conv.weights.out());
    convolve<T>(rt, x, conv, input, false, next);
    x = std::move(next);
  };
  replace_by_conv(conv_in_, {});
  show("conv_in", x);
  apply_block(rt, mid1_, x);
  show("mid.block_1", x);
  apply_attention(rt, x);
  show("mid.attn_1", x);
  apply_block(rt, mid2_, x);
  show("mid.block_2", x);
  for (std::size_t level = levels_.size(); level-- > 0;) {
    const std::string name = "up." + std::to_string(level) + ".";
    for (std::size_t block = 0; block < levels_[level].blocks.size(); ++block) {
      apply_block(rt, levels_[level].blocks[block], x);
      show(name + "block." + std::to_string(block), x);
    }
    if (levels_[level].upsample) {
      replace_by_conv(*levels_[level].upsample, {.upsample = true});
      show(name + "upsample", x);
    }
  }
  const Tensor<T> terms = norm_terms(rt, x, norm_out_);
  if (observe) {
    Image normed = make_image<T>(batch, x.height, x.width, x.channels());
    normalize<T>(rt, x, terms, normed.values);
    show("norm_out", normed);
  }
  replace_by_conv(conv_out_, {.norm_terms = &terms});
  return std::move(x.values).reshaped({batch, x.height, x.width, conv_out_.weights.out()});
}

template class VaeDecoder<float>;
template class VaeDecoder<double>;

}  // namespace sd35

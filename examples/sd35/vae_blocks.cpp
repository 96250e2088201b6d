#include "vae_blocks.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <span>
#include <stdexcept>

#include <linattn/ops/linear_cpu.hpp>

#include "nn/finite.hpp"
#include "nn/rows.hpp"

namespace sd35::vae {
namespace {

// 256 pixels: enough rows for the matrix product, columns of at most a few MB.
constexpr Index tile_height = 8, tile_width = 32;
static_assert(band % tile_height == 0);

// The pixel that tap k of a convolution reads for the pixel at `position`, along either axis.
Index source(Sampling sampling, Index position, Index k) {
  switch (sampling) {
    case Sampling::up:
      return (position + k - 1) >> 1;
    case Sampling::down:
      return 2 * position + k;
    default:
      return position + k - 1;
  }
}
Index extent_of(Sampling sampling, Index extent) {
  return sampling == Sampling::up ? 2 * extent : sampling == Sampling::down ? extent / 2 : extent;
}

// The product of a tile's rows.
template <class T>
std::size_t product_workspace(const LinearWeights<T>& weights, Index rows) {
  return visit(weights.weight, [&](const auto* pointer) {
    using W = std::remove_pointer_t<decltype(pointer)>;
    return linattn::linear_workspace(linattn::Cpu<>{}, TensorView<const T, 2>{nullptr, {rows, weights.in()}},
                                     TensorView<W, 2>{pointer, {weights.out(), weights.in()}},
                                     as_view(weights.bias), TensorView<T, 2>{nullptr, {rows, weights.out()}});
  });
}
template <class T>
bool product(const LinearWeights<T>& weights, const T* x, Index rows, T* out, linattn::Workspace workspace) {
  return visit(weights.weight, [&](const auto* pointer) {
    using W = std::remove_pointer_t<decltype(pointer)>;
    const linattn::Cpu<> context{workspace, {}};
    return linattn::linear(context, TensorView<const T, 2>{x, {rows, weights.in()}},
                           TensorView<W, 2>{pointer, {weights.out(), weights.in()}}, as_view(weights.bias),
                           TensorView<T, 2>{out, {rows, weights.out()}})
        .ok();
  });
}

// A convolution of a chain, whose output may be a window of bands.
template <class T>
struct Stage {
  Convolution<T> convolution;
  const Image<T>* in;
  Image<T>* out;
  GroupMoments<T>* moments = nullptr;  // of the output, gathered as it is computed
  Index done = 0;                      // rows
};

// Computes bands of the last stage until it has `rows` rows, and of those before it what it reads: one row more
// than its own.
template <class T>
void advance(Runtime& rt, std::span<Stage<T>> chain, Index rows) {
  Stage<T>& last = chain.back();
  while (last.done < rows) {
    const Index end = std::min(last.done + band, last.out->height);
    if (chain.size() > 1)
      advance(rt, chain.first(chain.size() - 1), std::min(end + 1, chain[chain.size() - 2].out->height));
    convolve(rt, *last.in, last.convolution, *last.out, last.done, end);
    if (last.moments != nullptr) last.moments->add(rt, *last.out, last.done, end);
    last.done = end;
  }
}

}  // namespace

template <class T>
Norm<T> load_norm(const Checkpoint& checkpoint, const std::string& name, Index channels, Index groups) {
  if (groups < 1 || channels % groups != 0)
    throw std::runtime_error(checkpoint.path().string() + ": tensor '" + name +
                             ".weight': " + std::to_string(channels) + " channels do not divide into " +
                             std::to_string(groups) + " groups");
  return {groups, checkpoint.vector<T>(name + ".weight", channels),
          checkpoint.vector<T>(name + ".bias", channels)};
}

// The file has columns (channel, ky, kx). With the channels last, a tap is a run of the picture's memory.
template <class T>
Conv<T> load_conv(const Checkpoint& checkpoint, const std::string& name, Index out, Index in) {
  const Weight stored = checkpoint.get(name + ".weight", {out, in, 3, 3});
  const auto filters = static_cast<std::size_t>(stored.extent(0)),
             channels = static_cast<std::size_t>(stored.extent(1));
  Conv<T> conv;
  conv.in = stored.extent(1);
  conv.weights.weight = copy(stored).matrix();
  const std::size_t size = linattn::size_of(stored.dtype);
  const auto* from = static_cast<const std::byte*>(stored.data);
  auto* const to = static_cast<std::byte*>(const_cast<void*>(conv.weights.weight.data));
  for (std::size_t o = 0; o < filters; ++o)
    for (std::size_t c = 0; c < channels; ++c)
      for (std::size_t tap = 0; tap < 9; ++tap, from += size)
        std::memcpy(to + ((o * 9 + tap) * channels + c) * size, from, size);
  conv.weights.bias = checkpoint.vector<T>(name + ".bias", stored.extent(0));
  return conv;
}

template <class T>
ResBlock<T> load_block(const Checkpoint& checkpoint, const std::string& name, Index channels, Index groups) {
  ResBlock<T> block;
  block.norm1 = load_norm<T>(checkpoint, name + "norm1", channels, groups);
  block.conv1 = load_conv<T>(checkpoint, name + "conv1", Checkpoint::any, channels);
  const Index out = block.out();
  block.norm2 = load_norm<T>(checkpoint, name + "norm2", out, groups);
  block.conv2 = load_conv<T>(checkpoint, name + "conv2", out, out);
  if (out != channels) block.shortcut = checkpoint.linear<T>(name + "nin_shortcut", out, channels);
  return block;
}

template <class T>
Middle<T> load_middle(const Checkpoint& checkpoint, const std::string& name, Index channels, Index groups) {
  Middle<T> middle;
  middle.block1 = load_block<T>(checkpoint, name + "block_1.", channels, groups);
  channels = middle.block1.out();
  const std::string attention = name + "attn_1.";
  middle.norm = load_norm<T>(checkpoint, attention + "norm", channels, groups);
  middle.q = checkpoint.linear<T>(attention + "q", channels, channels);
  middle.k = checkpoint.linear<T>(attention + "k", channels, channels);
  middle.v = checkpoint.linear<T>(attention + "v", channels, channels);
  middle.proj = checkpoint.linear<T>(attention + "proj_out", channels, channels);
  middle.block2 = load_block<T>(checkpoint, name + "block_2.", channels, groups);
  return middle;
}

// Chan, Golub, LeVeque, 1983.
template <class T>
void GroupMoments<T>::Moments::merge(const Moments& other) {
  const double total = count + other.count;
  if (total == 0) return;
  const double delta = other.mean - mean;
  mean += delta * other.count / total;
  squares += other.squares + delta * delta * count * other.count / total;
  count = total;
}

template <class T>
GroupMoments<T>::GroupMoments(Index batch, Index height, Index groups)
    : batch_(batch),
      height_(height),
      groups_(groups),
      rows_(static_cast<std::size_t>(batch * height * groups)) {}

template <class T>
void GroupMoments<T>::add(const Runtime& rt, const Image<T>& x, Index begin, Index end) {
  const Index channels = x.channels(), group_width = channels / groups_, count = end - begin;
  rt.parallel(batch_ * count, [&](Index task) {
    const Index b = task / count, y = begin + task % count;
    const T* const row = x.row(b, y);
    Moments* const out = rows_.data() + (b * height_ + y) * groups_;
    // Sums of differences from the first pixel, so that an offset common to the row costs no digits.
    std::vector<double> sums(static_cast<std::size_t>(2 * channels));
    double *const sum = sums.data(), *const squares = sum + channels;
    for (Index i = 1; i < x.width; ++i)
      for (Index c = 0; c < channels; ++c) {
        const double d = static_cast<double>(row[i * channels + c]) - static_cast<double>(row[c]);
        sum[c] += d;
        squares[c] += d * d;
      }
    const double n = static_cast<double>(x.width);
    for (Index c = 0; c < channels; ++c)
      out[c / group_width].merge(
          {n, static_cast<double>(row[c]) + sum[c] / n, std::max(0.0, squares[c] - sum[c] * sum[c] / n)});
  });
}

template <class T>
Tensor<T> GroupMoments<T>::terms(const Norm<T>& norm) const {
  const Index channels = static_cast<Index>(norm.weight.size()), group_width = channels / groups_;
  Tensor<T> terms({batch_, 3, channels});
  for (Index b = 0; b < batch_; ++b)
    for (Index g = 0; g < groups_; ++g) {
      Moments all;
      for (Index y = 0; y < height_; ++y)
        all.merge(rows_[static_cast<std::size_t>((b * height_ + y) * groups_ + g)]);
      const double inverse = 1 / std::sqrt(all.squares / all.count + 1e-6);
      for (Index c = g * group_width; c < (g + 1) * group_width; ++c) {
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
void normalize(const Runtime& rt, const Image<T>& x, const Tensor<T>& terms, Tensor<T>& out) {
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
void convolve(Runtime& rt, const Image<T>& x, const Convolution<T>& convolution, Image<T>& out, Index begin,
              Index end) {
  const Conv<T>& conv = *convolution.conv;
  const Image<T>* const residual = convolution.residual;
  const LinearWeights<T>* const shortcut = convolution.shortcut;
  const Index channels = conv.in, filters = conv.out(), taps = 9 * channels;
  const auto at = [&](Index position, Index k) { return source(convolution.sampling, position, k); };
  const Index tiles_y = (end - begin + tile_height - 1) / tile_height;
  const Index tiles_x = (out.width + tile_width - 1) / tile_width;

  struct Scratch {
    T *patch, *columns, *result, *passed;
    linattn::Workspace rest;
  };
  constexpr Index pixels = tile_height * tile_width;
  // Tiles at the right and the lower edge are products of other shapes, which may need more than a whole one.
  std::size_t rest = 0;
  for (const Index rows : {std::min(tile_height, out.height), out.height % tile_height})
    for (const Index columns : {std::min(tile_width, out.width), out.width % tile_width})
      if (const Index tile = rows * columns; tile > 0) {
        rest = std::max(rest, product_workspace(conv.weights, tile));
        if (shortcut != nullptr) rest = std::max(rest, product_workspace(*shortcut, tile));
      }
  const Index patch_height_limit = at(tile_height - 1, 2) - at(0, 0) + 1;
  const Index patch_width_limit = at(tile_width - 1, 2) - at(0, 0) + 1;
  const auto carve = [&](linattn::Carver& carver) {
    Scratch s;
    s.patch = carver.template take<T>(patch_height_limit * patch_width_limit * channels);
    s.columns = carver.template take<T>(pixels * std::max(taps, shortcut != nullptr ? shortcut->in() : 0));
    s.result = carver.template take<T>(pixels * filters);
    s.passed = carver.template take<T>(shortcut != nullptr ? pixels * filters : 0);
    std::byte* const bytes = carver.template take<std::byte>(static_cast<Index>(rest));
    s.rest = {bytes, rest};
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
    const Index y0 = begin + task / tiles_x % tiles_y * tile_height, x0 = task % tiles_x * tile_width;
    const Index rows = std::min(tile_height, end - y0), columns = std::min(tile_width, out.width - x0);

    // The pixels of x that the tile reads, ready to be multiplied, zero beyond the picture.
    const Index top = at(y0, 0), left = at(x0, 0);
    const Index patch_height = at(y0 + rows - 1, 2) - top + 1;
    const Index patch_width = at(x0 + columns - 1, 2) - left + 1;
    for (Index py = 0; py < patch_height; ++py)
      for (Index px = 0; px < patch_width; ++px) {
        T* const target = s.patch + (py * patch_width + px) * channels;
        const Index sy = top + py, sx = left + px;
        if (sy < 0 || sx < 0 || sy >= x.height || sx >= x.width) {
          std::fill_n(target, channels, T(0));
          continue;
        }
        const T* const pixel = x.row(b, sy) + sx * channels;
        if (convolution.norm_terms == nullptr) {
          std::copy_n(pixel, channels, target);
          continue;
        }
        const T* const terms = convolution.norm_terms->data() + b * 3 * channels;
        map_row(
            target, channels,
            [](auto u, auto mean, auto factor, auto offset) {
              const auto v = linattn::detail::fma(u - mean, factor, offset);
              return v * linattn::detail::sigmoid(v);
            },
            pixel, terms, terms + channels, terms + 2 * channels);
      }

    T* column = s.columns;
    for (Index y = 0; y < rows; ++y)
      for (Index i = 0; i < columns; ++i)
        for (Index ky = 0; ky < 3; ++ky)
          for (Index kx = 0; kx < 3; ++kx, column += channels)
            std::copy_n(s.patch + ((at(y0 + y, ky) - top) * patch_width + at(x0 + i, kx) - left) * channels,
                        channels, column);
    bool ok = product(conv.weights, s.columns, rows * columns, s.result, s.rest);

    if (shortcut != nullptr) {
      const Index width = columns * shortcut->in();
      for (Index y = 0; y < rows; ++y)
        std::copy_n(residual->row(b, y0 + y) + x0 * shortcut->in(), width, s.columns + y * width);
      ok = product(*shortcut, s.columns, rows * columns, s.passed, s.rest) && ok;
    }
    for (Index y = 0; y < rows; ++y) {
      T* const target = out.row(b, y0 + y) + x0 * filters;
      const T* const result = s.result + y * columns * filters;
      const auto sum = [](auto u, auto v) { return u + v; };
      if (residual == nullptr)
        std::copy_n(result, columns * filters, target);
      else if (shortcut != nullptr)
        map_row(target, columns * filters, sum, s.passed + y * columns * filters, result);
      else
        map_row(target, columns * filters, sum, residual->row(b, y0 + y) + x0 * filters, result);
    }
    if (!ok) failed = true;
  });
  if (failed) throw std::logic_error(conv.weights.weight.name + ": the convolution's product failed");
}

template <class T>
Image<T> convolve(Runtime& rt, const Image<T>& x, const Convolution<T>& convolution) {
  Image<T> out(x.batch(), extent_of(convolution.sampling, x.height), extent_of(convolution.sampling, x.width),
               convolution.conv->out());
  convolve(rt, x, convolution, out, 0, out.height);
  return out;
}

template <class T>
void apply(Runtime& rt, const ResBlock<T>& block, Image<T>& x) {
  const Tensor<T> terms1 = norm_terms(rt, x, block.norm1);
  const Image<T> hidden = convolve<T>(rt, x, {.conv = &block.conv1, .norm_terms = &terms1});
  const Tensor<T> terms2 = norm_terms(rt, hidden, block.norm2);
  Convolution<T> second{.conv = &block.conv2, .norm_terms = &terms2, .residual = &x};
  if (!block.shortcut) return convolve(rt, hidden, second, x, 0, x.height);
  second.shortcut = &*block.shortcut;
  x = convolve(rt, hidden, second);
}

template <class T>
void apply_banded(Runtime& rt, const Conv<T>* upsample, const ResBlock<T>& block, Image<T>& x) {
  const Sampling sampling = upsample != nullptr ? Sampling::up : Sampling::same;
  const Index batch = x.batch(), height = extent_of(sampling, x.height), width = extent_of(sampling, x.width);
  const auto window = [&](Index channels) { return Image<T>::window(batch, height, width, channels); };
  Image<T> enlarged = upsample != nullptr ? window(upsample->out()) : Image<T>();
  const Image<T>& input = upsample != nullptr ? enlarged : x;
  Image<T> hidden = window(block.out());
  const bool in_place = upsample == nullptr && !block.shortcut;
  Image<T> result = in_place ? Image<T>() : Image<T>(batch, height, width, block.out());
  Image<T>& out = in_place ? x : result;

  Tensor<T> terms1, terms2;
  // The stages up to and with the one that writes `last`.
  const auto pass = [&](const Image<T>& last, GroupMoments<T>* moments) {
    std::vector<Stage<T>> chain;
    if (upsample != nullptr) chain.push_back({{.conv = upsample, .sampling = sampling}, &x, &enlarged});
    if (&last != &enlarged) {
      chain.push_back({{.conv = &block.conv1, .norm_terms = &terms1}, &input, &hidden});
      if (&last != &hidden)
        chain.push_back({{.conv = &block.conv2,
                          .norm_terms = &terms2,
                          .residual = &input,
                          .shortcut = block.shortcut ? &*block.shortcut : nullptr},
                         &hidden,
                         &out});
    }
    chain.back().moments = moments;
    advance<T>(rt, chain, height);
  };
  const auto terms_of = [&](const Image<T>& stage, const Norm<T>& norm) {
    GroupMoments<T> moments(batch, height, norm.groups);
    pass(stage, &moments);
    return moments.terms(norm);
  };
  terms1 = upsample != nullptr ? terms_of(enlarged, block.norm1) : norm_terms(rt, x, block.norm1);
  terms2 = terms_of(hidden, block.norm2);
  // In place: the first convolution is a band ahead, and has read the rows that the second one writes.
  pass(out, nullptr);
  if (!in_place) x = std::move(result);
}

template <class T>
void apply(Runtime& rt, const Middle<T>& middle, Image<T>& x, const std::string& name,
           const Observer<T>& observe) {
  const auto show = [&](const char* part, const char* place) {
    expect_finite<T>(rt, place, std::as_const(x).view());
    if (observe) observe(name + part, std::as_const(x).view());
  };
  apply(rt, middle.block1, x);
  show("block_1", "middle block 1");
  {
    Tensor<T> normed(x.values.shape());
    normalize(rt, x, norm_terms(rt, x, middle.norm), normed);
    const TensorView<T, 3> n = normed.template view<3>();
    Tensor<T> q = linear<T>(rt, n, middle.q), k = linear<T>(rt, n, middle.k), v = linear<T>(rt, n, middle.v);
    const auto one_head = [](Tensor<T>& tensor) {
      return linattn::split_heads(tensor.template view<3>(), 1);
    };
    attention<T>(rt, "VAE attention", one_head(q), one_head(k), one_head(v), one_head(normed));
    linear<T>(rt, n, middle.proj, q.template view<3>());
    add<T>(rt, x.view(), q.template view<3>());
  }
  show("attn_1", "middle attention");
  apply(rt, middle.block2, x);
  show("block_2", "middle block 2");
}

#define SD35_INSTANTIATE(T)                                                                             \
  template Norm<T> load_norm<T>(const Checkpoint&, const std::string&, Index, Index);                   \
  template Conv<T> load_conv<T>(const Checkpoint&, const std::string&, Index, Index);                   \
  template ResBlock<T> load_block<T>(const Checkpoint&, const std::string&, Index, Index);              \
  template Middle<T> load_middle<T>(const Checkpoint&, const std::string&, Index, Index);               \
  template class GroupMoments<T>;                                                                       \
  template void normalize<T>(const Runtime&, const Image<T>&, const Tensor<T>&, Tensor<T>&);            \
  template void convolve<T>(Runtime&, const Image<T>&, const Convolution<T>&, Image<T>&, Index, Index); \
  template Image<T> convolve<T>(Runtime&, const Image<T>&, const Convolution<T>&);                      \
  template void apply<T>(Runtime&, const ResBlock<T>&, Image<T>&);                                      \
  template void apply_banded<T>(Runtime&, const Conv<T>*, const ResBlock<T>&, Image<T>&);               \
  template void apply<T>(Runtime&, const Middle<T>&, Image<T>&, const std::string&, const Observer<T>&);
SD35_INSTANTIATE(float)
SD35_INSTANTIATE(double)
#undef SD35_INSTANTIATE

}  // namespace sd35::vae

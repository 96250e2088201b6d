// SD3.5's text encoders and VAE as their formulas say, in double, one loop an axis: what the fast forms
// are compared with. Parameters come from a map by their checkpoint names.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace reference {

// A dense row-major array.
struct Array {
  std::vector<std::ptrdiff_t> shape;
  std::vector<double> values;

  explicit Array(std::vector<std::ptrdiff_t> extents = {}) : shape(std::move(extents)) {
    std::ptrdiff_t n = 1;
    for (const std::ptrdiff_t e : shape) n *= e;
    values.resize(static_cast<std::size_t>(n));
  }
  [[nodiscard]] std::ptrdiff_t size(std::size_t axis) const { return shape.at(axis); }
  template <class... I>
  [[nodiscard]] double& operator()(I... indices) {
    return values.at(offset({static_cast<std::ptrdiff_t>(indices)...}));
  }
  template <class... I>
  [[nodiscard]] double operator()(I... indices) const {
    return values.at(offset({static_cast<std::ptrdiff_t>(indices)...}));
  }

 private:
  [[nodiscard]] std::size_t offset(std::initializer_list<std::ptrdiff_t> indices) const {
    std::ptrdiff_t at = 0;
    std::size_t axis = 0;
    for (const std::ptrdiff_t i : indices) at = at * shape.at(axis++) + i;
    return static_cast<std::size_t>(at);
  }
};

using Parameters = std::map<std::string, Array>;

inline double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }
inline double silu(double u) { return u * sigmoid(u); }
inline double quick_gelu(double u) { return u * sigmoid(1.702 * u); }
inline double gelu_erf(double u) { return u / 2 * (1 + std::erf(u / std::sqrt(2.0))); }
inline double gelu_tanh(double u) {
  return u / 2 * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (u + 0.044715 * u * u * u)));
}

// (b, n, in) -> (b, n, out); a bias of no element is none.
inline Array linear(const Array& x, const Array& weight, const Array& bias) {
  Array out({x.size(0), x.size(1), weight.size(0)});
  const std::ptrdiff_t in = x.size(2);
  for (std::ptrdiff_t b = 0; b < x.size(0); ++b)
    for (std::ptrdiff_t n = 0; n < x.size(1); ++n)
      for (std::ptrdiff_t o = 0; o < weight.size(0); ++o) {
        double sum = bias.shape.empty() ? 0 : bias(o);
        for (std::ptrdiff_t i = 0; i < in; ++i)
          sum += x(b, n, i) * weight.values.at(static_cast<std::size_t>(o * in + i));
        out(b, n, o) = sum;
      }
  return out;
}
inline Array linear(const Parameters& p, const std::string& module, const Array& x, bool bias = true) {
  return linear(x, p.at(module + ".weight"), bias ? p.at(module + ".bias") : Array());
}

inline Array apply(Array x, const std::function<double(double)>& f) {
  for (double& value : x.values) value = f(value);
  return x;
}
inline Array sum(Array x, const Array& y) {
  for (std::size_t i = 0; i < x.values.size(); ++i) x.values[i] += y.values.at(i);
  return x;
}

inline Array layer_norm(const Array& x, const Array& weight, const Array& bias, double eps) {
  Array out(x.shape);
  const double n = static_cast<double>(x.size(2));
  for (std::ptrdiff_t b = 0; b < x.size(0); ++b)
    for (std::ptrdiff_t r = 0; r < x.size(1); ++r) {
      double mean = 0, variance = 0;
      for (std::ptrdiff_t c = 0; c < x.size(2); ++c) mean += x(b, r, c) / n;
      for (std::ptrdiff_t c = 0; c < x.size(2); ++c)
        variance += (x(b, r, c) - mean) * (x(b, r, c) - mean) / n;
      for (std::ptrdiff_t c = 0; c < x.size(2); ++c)
        out(b, r, c) = (x(b, r, c) - mean) / std::sqrt(variance + eps) * weight(c) + bias(c);
    }
  return out;
}

inline Array rms_norm(const Array& x, const Array& weight, double eps) {
  Array out(x.shape);
  for (std::ptrdiff_t b = 0; b < x.size(0); ++b)
    for (std::ptrdiff_t r = 0; r < x.size(1); ++r) {
      double square = 0;
      for (std::ptrdiff_t c = 0; c < x.size(2); ++c) square += x(b, r, c) * x(b, r, c);
      for (std::ptrdiff_t c = 0; c < x.size(2); ++c)
        out(b, r, c) = x(b, r, c) / std::sqrt(square / static_cast<double>(x.size(2)) + eps) * weight(c);
    }
  return out;
}

// softmax(scale q k^T + bias(head, query, key)) v with heads side by side in the channels.
inline Array attention(const Array& q, const Array& k, const Array& v, std::ptrdiff_t heads, double scale,
                       const std::function<double(std::ptrdiff_t, std::ptrdiff_t, std::ptrdiff_t)>& bias) {
  Array out({q.size(0), q.size(1), v.size(2)});
  const std::ptrdiff_t d = q.size(2) / heads, dv = v.size(2) / heads, keys = k.size(1);
  for (std::ptrdiff_t b = 0; b < q.size(0); ++b)
    for (std::ptrdiff_t h = 0; h < heads; ++h)
      for (std::ptrdiff_t i = 0; i < q.size(1); ++i) {
        std::vector<double> score(static_cast<std::size_t>(keys));
        double total = 0;
        for (std::ptrdiff_t j = 0; j < keys; ++j) {
          double dot = 0;
          for (std::ptrdiff_t c = 0; c < d; ++c) dot += q(b, i, h * d + c) * k(b, j, h * d + c);
          score[static_cast<std::size_t>(j)] = scale * dot + bias(h, i, j);
        }
        const double largest = *std::max_element(score.begin(), score.end());
        for (double& s : score) total += s = std::exp(s - largest);
        for (std::ptrdiff_t c = 0; c < dv; ++c) {
          double mix = 0;
          for (std::ptrdiff_t j = 0; j < keys; ++j)
            mix += score[static_cast<std::size_t>(j)] * v(b, j, h * dv + c);
          out(b, i, h * dv + c) = mix / total;
        }
      }
  return out;
}

inline Array embedding(const Array& table, const std::vector<std::int32_t>& ids, std::ptrdiff_t batch) {
  Array out({batch, static_cast<std::ptrdiff_t>(ids.size()) / batch, table.size(1)});
  for (std::size_t i = 0; i < ids.size(); ++i)
    for (std::ptrdiff_t c = 0; c < table.size(1); ++c)
      out.values[i * static_cast<std::size_t>(table.size(1)) + static_cast<std::size_t>(c)] =
          table(ids[i], c);
  return out;
}

struct ClipResult {
  Array hidden, last;  // input of the last layer; output of the last layer, normalised
};

inline ClipResult clip_text(const Parameters& p, const std::vector<std::int32_t>& ids, std::ptrdiff_t batch,
                            int layers, std::ptrdiff_t heads, const std::function<double(double)>& activation,
                            double eps) {
  const std::string text = "text_model.";
  Array x = embedding(p.at(text + "embeddings.token_embedding.weight"), ids, batch);
  const Array& positions = p.at(text + "embeddings.position_embedding.weight");
  for (std::ptrdiff_t b = 0; b < batch; ++b)
    for (std::ptrdiff_t n = 0; n < x.size(1); ++n)
      for (std::ptrdiff_t c = 0; c < x.size(2); ++c) x(b, n, c) += positions(n, c);
  const auto norm = [&](const std::string& name) {
    return layer_norm(x, p.at(name + ".weight"), p.at(name + ".bias"), eps);
  };
  const auto causal = [](std::ptrdiff_t, std::ptrdiff_t i, std::ptrdiff_t j) { return j > i ? -1e30 : 0.0; };
  ClipResult result;
  for (int i = 0; i < layers; ++i) {
    result.hidden = x;
    const std::string layer = text + "encoder.layers." + std::to_string(i) + ".", attn = layer + "self_attn.";
    const Array n = norm(layer + "layer_norm1");
    const double scale = 1 / std::sqrt(static_cast<double>(x.size(2) / heads));
    x = sum(x, linear(p, attn + "out_proj",
                      attention(linear(p, attn + "q_proj", n), linear(p, attn + "k_proj", n),
                                linear(p, attn + "v_proj", n), heads, scale, causal)));
    x = sum(x, linear(p, layer + "mlp.fc2",
                      apply(linear(p, layer + "mlp.fc1", norm(layer + "layer_norm2")), activation)));
  }
  result.last = norm(text + "final_layer_norm");
  return result;
}

// Bucket of key - query by the formula with logarithms, exact where double decides it.
inline std::ptrdiff_t t5_bucket(std::ptrdiff_t relative) {
  const double n = static_cast<double>(std::abs(relative));
  const double step = n < 8 ? n : std::min(15.0, 8 + std::floor(std::log(n / 8) / std::log(16.0) * 8 + 1e-9));
  return static_cast<std::ptrdiff_t>(step) + (relative > 0 ? 16 : 0);
}

inline Array t5_encoder(const Parameters& p, const std::vector<std::int32_t>& ids, std::ptrdiff_t batch,
                        int blocks) {
  const std::string attn0 = "encoder.block.0.layer.0.SelfAttention.";
  const Array& table = p.at(attn0 + "relative_attention_bias.weight");
  const auto bias = [&](std::ptrdiff_t h, std::ptrdiff_t i, std::ptrdiff_t j) {
    return table(t5_bucket(j - i), h);
  };
  Array x = embedding(p.at("shared.weight"), ids, batch);
  for (int i = 0; i < blocks; ++i) {
    const std::string block = "encoder.block." + std::to_string(i) + ".layer.";
    const std::string attn = block + "0.SelfAttention.", mlp = block + "1.DenseReluDense.";
    Array n = rms_norm(x, p.at(block + "0.layer_norm.weight"), 1e-6);
    x = sum(x, linear(p, attn + "o",
                      attention(linear(p, attn + "q", n, false), linear(p, attn + "k", n, false),
                                linear(p, attn + "v", n, false), table.size(1), 1.0, bias),
                      false));
    n = rms_norm(x, p.at(block + "1.layer_norm.weight"), 1e-6);
    Array hidden = apply(linear(p, mlp + "wi_0", n, false), gelu_tanh);
    const Array gate = linear(p, mlp + "wi_1", n, false);
    for (std::size_t k = 0; k < gate.values.size(); ++k) hidden.values[k] *= gate.values[k];
    x = sum(x, linear(p, mlp + "wo", hidden, false));
  }
  return rms_norm(x, p.at("encoder.final_layer_norm.weight"), 1e-6);
}

// ---- VAE; activations are (batch, channel, row, column) ----

// Zero padding that keeps the size; with stride 2, of one at the right and the lower edge alone.
inline Array conv(const Parameters& p, const std::string& module, const Array& x, std::ptrdiff_t stride = 1) {
  const Array &weight = p.at(module + ".weight"), &bias = p.at(module + ".bias");
  const std::ptrdiff_t kernel = weight.shape.size() == 4 ? weight.size(2) : 1,
                       pad = stride == 1 ? kernel / 2 : 0;
  Array out({x.size(0), weight.size(0), x.size(2) / stride, x.size(3) / stride});
  for (std::ptrdiff_t b = 0; b < x.size(0); ++b)
    for (std::ptrdiff_t o = 0; o < weight.size(0); ++o)
      for (std::ptrdiff_t y = 0; y < out.size(2); ++y)
        for (std::ptrdiff_t i = 0; i < out.size(3); ++i) {
          double total = bias(o);
          for (std::ptrdiff_t c = 0; c < x.size(1); ++c)
            for (std::ptrdiff_t ky = 0; ky < kernel; ++ky)
              for (std::ptrdiff_t kx = 0; kx < kernel; ++kx) {
                const std::ptrdiff_t sy = y * stride + ky - pad, sx = i * stride + kx - pad;
                if (sy < 0 || sx < 0 || sy >= x.size(2) || sx >= x.size(3)) continue;
                const std::ptrdiff_t w = ((o * x.size(1) + c) * kernel + ky) * kernel + kx;
                total += weight.values.at(static_cast<std::size_t>(w)) * x(b, c, sy, sx);
              }
          out(b, o, y, i) = total;
        }
  return out;
}

inline Array group_norm(const Parameters& p, const std::string& module, const Array& x,
                        std::ptrdiff_t groups) {
  const Array &weight = p.at(module + ".weight"), &bias = p.at(module + ".bias");
  Array out(x.shape);
  const std::ptrdiff_t width = x.size(1) / groups;
  const double n = static_cast<double>(width * x.size(2) * x.size(3));
  for (std::ptrdiff_t b = 0; b < x.size(0); ++b)
    for (std::ptrdiff_t g = 0; g < groups; ++g) {
      const auto each = [&](const auto& f) {
        for (std::ptrdiff_t c = g * width; c < (g + 1) * width; ++c)
          for (std::ptrdiff_t y = 0; y < x.size(2); ++y)
            for (std::ptrdiff_t i = 0; i < x.size(3); ++i) f(c, y, i);
      };
      double mean = 0, variance = 0;
      each([&](auto c, auto y, auto i) { mean += x(b, c, y, i) / n; });
      each([&](auto c, auto y, auto i) { variance += (x(b, c, y, i) - mean) * (x(b, c, y, i) - mean) / n; });
      each([&](auto c, auto y, auto i) {
        out(b, c, y, i) = (x(b, c, y, i) - mean) / std::sqrt(variance + 1e-6) * weight(c) + bias(c);
      });
    }
  return out;
}

inline Array res_block(const Parameters& p, const std::string& name, const Array& x, std::ptrdiff_t groups) {
  Array h = conv(p, name + "conv1", apply(group_norm(p, name + "norm1", x, groups), silu));
  h = conv(p, name + "conv2", apply(group_norm(p, name + "norm2", h, groups), silu));
  return sum(h, p.contains(name + "nin_shortcut.weight") ? conv(p, name + "nin_shortcut", x) : x);
}

// (b, c, h, w) <-> (b, h w, c)
inline Array to_tokens(const Array& x) {
  Array out({x.size(0), x.size(2) * x.size(3), x.size(1)});
  for (std::ptrdiff_t b = 0; b < x.size(0); ++b)
    for (std::ptrdiff_t c = 0; c < x.size(1); ++c)
      for (std::ptrdiff_t y = 0; y < x.size(2); ++y)
        for (std::ptrdiff_t i = 0; i < x.size(3); ++i) out(b, y * x.size(3) + i, c) = x(b, c, y, i);
  return out;
}

inline Array vae_middle(const Parameters& p, const std::string& name, Array x, std::ptrdiff_t groups) {
  x = res_block(p, name + "block_1.", x, groups);
  const std::string attn = name + "attn_1.";
  const Array n = group_norm(p, attn + "norm", x, groups);
  const Array mixed = attention(
      to_tokens(conv(p, attn + "q", n)), to_tokens(conv(p, attn + "k", n)), to_tokens(conv(p, attn + "v", n)),
      1, 1 / std::sqrt(static_cast<double>(x.size(1))), [](auto, auto, auto) { return 0.0; });
  Array grid(x.shape);
  for (std::ptrdiff_t b = 0; b < x.size(0); ++b)
    for (std::ptrdiff_t c = 0; c < x.size(1); ++c)
      for (std::ptrdiff_t y = 0; y < x.size(2); ++y)
        for (std::ptrdiff_t i = 0; i < x.size(3); ++i) grid(b, c, y, i) = mixed(b, y * x.size(3) + i, c);
  x = sum(x, conv(p, attn + "proj_out", grid));
  return res_block(p, name + "block_2.", x, groups);
}

inline Array vae_decoder(const Parameters& p, Array x, int levels, int blocks, std::ptrdiff_t groups) {
  for (double& value : x.values) value = value / 1.5305 + 0.0609;
  x = vae_middle(p, "decoder.mid.", conv(p, "decoder.conv_in", x), groups);
  for (int level = levels - 1; level >= 0; --level) {
    const std::string name = "decoder.up." + std::to_string(level) + ".";
    for (int block = 0; block < blocks; ++block)
      x = res_block(p, name + "block." + std::to_string(block) + ".", x, groups);
    if (level == 0) break;
    Array large({x.size(0), x.size(1), 2 * x.size(2), 2 * x.size(3)});
    for (std::ptrdiff_t b = 0; b < large.size(0); ++b)
      for (std::ptrdiff_t c = 0; c < large.size(1); ++c)
        for (std::ptrdiff_t y = 0; y < large.size(2); ++y)
          for (std::ptrdiff_t i = 0; i < large.size(3); ++i) large(b, c, y, i) = x(b, c, y / 2, i / 2);
    x = conv(p, name + "upsample.conv", large);
  }
  return conv(p, "decoder.conv_out", apply(group_norm(p, "decoder.norm_out", x, groups), silu));
}

// Mean and log variance.
inline Array vae_encoder(const Parameters& p, Array x, int levels, int blocks, std::ptrdiff_t groups) {
  x = conv(p, "encoder.conv_in", x);
  for (int level = 0; level < levels; ++level) {
    const std::string name = "encoder.down." + std::to_string(level) + ".";
    for (int block = 0; block < blocks; ++block)
      x = res_block(p, name + "block." + std::to_string(block) + ".", x, groups);
    if (level + 1 < levels) x = conv(p, name + "downsample.conv", x, 2);
  }
  x = vae_middle(p, "encoder.mid.", x, groups);
  x = conv(p, "encoder.conv_out", apply(group_norm(p, "encoder.norm_out", x, groups), silu));
  return p.contains("quant_conv.weight") ? conv(p, "quant_conv", x) : x;
}

}  // namespace reference

// Vision transformers as their formulas say, in double, one loop an axis: softmax or Test-Time-Training blocks.
// Parameters come from a map by their checkpoint names.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <map>
#include <string>
#include <vector>

#include "sd35_models.hpp"

namespace reference {

struct VitSettings {
  std::ptrdiff_t heads = 1, patch = 1;
  // of the blocks that have fast weights
  double inner_lr = 1, key_norm_eps = 1;
  bool squared_error = false;
};

// The kernel of bicubic interpolation with a = -3/4, written out.
inline double cubic_kernel(double distance) {
  const double x = std::abs(distance);
  if (x <= 1) return 1.25 * x * x * x - 2.25 * x * x + 1;
  return x < 2 ? -0.75 * x * x * x + 3.75 * x * x - 6 * x + 3 : 0;
}

// A table (grid * grid, width) at the centres of rows x columns cells, all cells of the table weighed: those
// beyond the edge are the edge.
inline Array resample(const Array& table, std::ptrdiff_t grid, std::ptrdiff_t rows, std::ptrdiff_t columns) {
  const std::ptrdiff_t width = table.size(1);
  Array out({rows * columns, width});
  for (std::ptrdiff_t y = 0; y < rows; ++y)
    for (std::ptrdiff_t x = 0; x < columns; ++x) {
      const double cy =
          (static_cast<double>(y) + 0.5) * static_cast<double>(grid) / static_cast<double>(rows);
      const double cx =
          (static_cast<double>(x) + 0.5) * static_cast<double>(grid) / static_cast<double>(columns);
      for (std::ptrdiff_t i = -2; i < grid + 2; ++i)
        for (std::ptrdiff_t j = -2; j < grid + 2; ++j) {
          const double weight = cubic_kernel(cy - 0.5 - static_cast<double>(i)) *
                                cubic_kernel(cx - 0.5 - static_cast<double>(j));
          const std::ptrdiff_t cell =
              std::clamp<std::ptrdiff_t>(i, 0, grid - 1) * grid + std::clamp<std::ptrdiff_t>(j, 0, grid - 1);
          for (std::ptrdiff_t c = 0; c < width; ++c) out(y * columns + x, c) += weight * table(cell, c);
        }
    }
  return out;
}

// x + conv3x3(x) + bias, a kernel a channel, over the tokens behind the first `special`, zeros outside.
inline Array local_conv(const Array& x, const Array& weight, const Array& bias, std::ptrdiff_t special,
                        std::ptrdiff_t rows, std::ptrdiff_t columns) {
  Array out = x;
  for (std::ptrdiff_t b = 0; b < x.size(0); ++b)
    for (std::ptrdiff_t y = 0; y < rows; ++y)
      for (std::ptrdiff_t z = 0; z < columns; ++z)
        for (std::ptrdiff_t c = 0; c < x.size(2); ++c) {
          double& sum = out(b, special + y * columns + z, c);
          sum += bias(c);
          for (std::ptrdiff_t i = -1; i <= 1; ++i)
            for (std::ptrdiff_t j = -1; j <= 1; ++j)
              if (y + i >= 0 && y + i < rows && z + j >= 0 && z + j < columns)
                sum += weight(c, 0, i + 1, j + 1) * x(b, special + (y + i) * columns + z + j, c);
        }
  return out;
}

// (x - mean) / sqrt(variance + eps) over the tokens, channel by channel.
inline Array token_norm(const Array& x, double eps) {
  Array out(x.shape);
  const double n = static_cast<double>(x.size(1));
  for (std::ptrdiff_t b = 0; b < x.size(0); ++b)
    for (std::ptrdiff_t c = 0; c < x.size(2); ++c) {
      double mean = 0, variance = 0;
      for (std::ptrdiff_t i = 0; i < x.size(1); ++i) mean += x(b, i, c) / n;
      for (std::ptrdiff_t i = 0; i < x.size(1); ++i)
        variance += (x(b, i, c) - mean) * (x(b, i, c) - mean) / n;
      for (std::ptrdiff_t i = 0; i < x.size(1); ++i)
        out(b, i, c) = (x(b, i, c) - mean) / std::sqrt(variance + eps);
    }
  return out;
}

// One head of test-time training: f(x) = a W_last with a = silu(x W1) (two matrices) or silu(x W1) * (x W2)
// (three), the matrices after one step of gradient descent on keys and values, token by token.
class InnerHead {
 public:
  using Matrix = std::vector<std::vector<double>>;
  using Row = std::vector<double>;

  InnerHead(const std::vector<const Array*>& weights, std::ptrdiff_t head) {
    for (const Array* w : weights) {
      const auto d = static_cast<std::size_t>(w->size(2));
      Matrix& m = matrices_.emplace_back(d, Row(d));
      for (std::size_t i = 0; i < d; ++i)
        for (std::size_t j = 0; j < d; ++j) m[i][j] = (*w)(0, head, i, j);
    }
  }

  [[nodiscard]] Row apply(const Row& x) const { return times(hidden(x), matrices_.back()); }

  void learn(const std::vector<Row>& keys, const std::vector<Row>& values, const VitSettings& settings) {
    const bool gated = matrices_.size() == 3;
    const double scale =
        1 / std::sqrt(static_cast<double>(keys[0].size())) / static_cast<double>(keys.size());
    std::vector<Matrix> updated = matrices_;
    const auto descend = [&](std::size_t m, const Row& x, const Row& error) {
      for (std::size_t i = 0; i < x.size(); ++i)
        for (std::size_t j = 0; j < error.size(); ++j)
          updated[m][i][j] -= settings.inner_lr * x[i] * error[j];
    };
    for (std::size_t n = 0; n < keys.size(); ++n) {
      const Row &x = keys[n], y = apply(x), z1 = times(x, matrices_[0]);
      Row e(x.size()), d1(x.size()), d2(x.size());
      for (std::size_t c = 0; c < e.size(); ++c)
        e[c] = (settings.squared_error ? y[c] - values[n][c] : -values[n][c]) * scale;
      const Row z2 = gated ? times(x, matrices_[1]) : Row(x.size(), 1.0);
      for (std::size_t i = 0; i < x.size(); ++i) {
        double delta = 0;
        for (std::size_t j = 0; j < e.size(); ++j) delta += matrices_.back()[i][j] * e[j];
        d1[i] = delta * z2[i] * sigmoid(z1[i]) * (1 + z1[i] * (1 - sigmoid(z1[i])));
        d2[i] = delta * silu(z1[i]);
      }
      descend(0, x, d1);
      if (gated) descend(1, x, d2);
      descend(matrices_.size() - 1, hidden(x), e);
    }
    matrices_ = std::move(updated);
  }

 private:
  [[nodiscard]] static Row times(const Row& x, const Matrix& w) {
    Row y(w[0].size());
    for (std::size_t i = 0; i < x.size(); ++i)
      for (std::size_t j = 0; j < y.size(); ++j) y[j] += x[i] * w[i][j];
    return y;
  }
  [[nodiscard]] Row hidden(const Row& x) const {
    Row a = times(x, matrices_[0]);
    for (double& z : a) z = silu(z);
    if (matrices_.size() == 3) {
      const Row gate = times(x, matrices_[1]);
      for (std::size_t i = 0; i < a.size(); ++i) a[i] *= gate[i];
    }
    return a;
  }

  std::vector<Matrix> matrices_;
};

// What the layer of `attn` computes between its projections.
inline Array ttt_attention(const Parameters& p, const std::string& attn, Array q, Array k, const Array& v,
                           const VitSettings& settings, std::ptrdiff_t special, std::ptrdiff_t rows,
                           std::ptrdiff_t columns) {
  k = token_norm(k, settings.key_norm_eps);
  if (p.contains(attn + ".q_conv2d.weight")) {
    q = local_conv(q, p.at(attn + ".q_conv2d.weight"), p.at(attn + ".q_conv2d.bias"), special, rows, columns);
    k = local_conv(k, p.at(attn + ".k_conv2d.weight"), p.at(attn + ".k_conv2d.bias"), special, rows, columns);
  }
  std::vector<const Array*> weights{&p.at(attn + ".w1"), &p.at(attn + ".w2")};
  if (p.contains(attn + ".w3")) weights.push_back(&p.at(attn + ".w3"));
  const std::ptrdiff_t d = q.size(2) / settings.heads;
  Array out(q.shape);
  for (std::ptrdiff_t b = 0; b < q.size(0); ++b)
    for (std::ptrdiff_t h = 0; h < settings.heads; ++h) {
      const auto tokens = [&](const Array& x) {
        std::vector<InnerHead::Row> result(static_cast<std::size_t>(x.size(1)));
        for (std::ptrdiff_t n = 0; n < x.size(1); ++n)
          for (std::ptrdiff_t c = 0; c < d; ++c)
            result[static_cast<std::size_t>(n)].push_back(x(b, n, h * d + c));
        return result;
      };
      InnerHead head(weights, h);
      head.learn(tokens(k), tokens(v), settings);
      const std::vector<InnerHead::Row> queries = tokens(q);
      for (std::ptrdiff_t n = 0; n < q.size(1); ++n) {
        const InnerHead::Row y = head.apply(queries[static_cast<std::size_t>(n)]);
        for (std::ptrdiff_t c = 0; c < d; ++c) out(b, n, h * d + c) = y[static_cast<std::size_t>(c)];
      }
    }
  return out;
}

struct VitResult {
  Array logits;                        // (batch, 1, classes)
  std::map<std::string, Array> steps;  // as the observer of the fast form calls them
};

// Pictures (batch, channel, row, column). Class and distillation token, fast weights and convolutions are used
// where the parameters have them.
inline VitResult vit(const Parameters& p, const Array& pictures, const VitSettings& settings) {
  const Array& kernel = p.at("patch_embed.proj.weight");
  const std::ptrdiff_t batch = pictures.size(0), patch = settings.patch, width = kernel.size(0);
  const std::ptrdiff_t rows = pictures.size(2) / patch, columns = pictures.size(3) / patch;
  std::vector<const Array*> special;
  for (const char* token : {"cls_token", "dist_token"})
    if (p.contains(token)) special.push_back(&p.at(token));
  const auto first = static_cast<std::ptrdiff_t>(special.size());
  VitResult result;

  Array patches({batch, rows * columns, width});
  for (std::ptrdiff_t b = 0; b < batch; ++b)
    for (std::ptrdiff_t n = 0; n < rows * columns; ++n)
      for (std::ptrdiff_t o = 0; o < width; ++o) {
        double sum = p.at("patch_embed.proj.bias")(o);
        for (std::ptrdiff_t c = 0; c < kernel.size(1); ++c)
          for (std::ptrdiff_t i = 0; i < patch; ++i)
            for (std::ptrdiff_t j = 0; j < patch; ++j)
              sum += kernel(o, c, i, j) * pictures(b, c, n / columns * patch + i, n % columns * patch + j);
        patches(b, n, o) = sum;
      }
  result.steps["patch_embed"] = patches;

  const Array& positions = p.at("pos_embed");
  const auto grid =
      static_cast<std::ptrdiff_t>(std::lround(std::sqrt(static_cast<double>(positions.size(1) - first))));
  Array table({grid * grid, width});
  for (std::ptrdiff_t n = 0; n < grid * grid; ++n)
    for (std::ptrdiff_t c = 0; c < width; ++c) table(n, c) = positions(0, first + n, c);
  table = resample(table, grid, rows, columns);

  Array x({batch, first + rows * columns, width}), added({1, first + rows * columns, width});
  for (std::ptrdiff_t n = 0; n < x.size(1); ++n)
    for (std::ptrdiff_t c = 0; c < width; ++c) {
      added(0, n, c) = n < first ? positions(0, n, c) : table(n - first, c);
      for (std::ptrdiff_t b = 0; b < batch; ++b)
        x(b, n, c) =
            (n < first ? (*special[static_cast<std::size_t>(n)])(0, 0, c) : patches(b, n - first, c)) +
            added(0, n, c);
    }
  result.steps["positions"] = added;

  const auto norm = [&](const std::string& name) {
    return layer_norm(x, p.at(name + ".weight"), p.at(name + ".bias"), 1e-6);
  };
  for (int i = 0; p.contains("blocks." + std::to_string(i) + ".norm1.weight"); ++i) {
    const std::string block = "blocks." + std::to_string(i) + ".", attn = block + "attn";
    const std::string step = "block" + std::to_string(i);
    const Array qkv = linear(p, attn + ".qkv", norm(block + "norm1"), p.contains(attn + ".qkv.bias"));
    std::vector<Array> parts;
    for (std::ptrdiff_t part = 0; part < 3; ++part) {
      Array& y = parts.emplace_back(std::vector<std::ptrdiff_t>{batch, x.size(1), width});
      for (std::ptrdiff_t b = 0; b < batch; ++b)
        for (std::ptrdiff_t n = 0; n < x.size(1); ++n)
          for (std::ptrdiff_t c = 0; c < width; ++c) y(b, n, c) = qkv(b, n, part * width + c);
      result.steps[step + "." + "qkv"[part]] = y;
    }
    const double scale = 1 / std::sqrt(static_cast<double>(width / settings.heads));
    const auto no_bias = [](std::ptrdiff_t, std::ptrdiff_t, std::ptrdiff_t) { return 0.0; };
    const Array core =
        p.contains(attn + ".w1")
            ? ttt_attention(p, attn, parts[0], parts[1], parts[2], settings, first, rows, columns)
            : attention(parts[0], parts[1], parts[2], settings.heads, scale, no_bias);
    const Array attended = linear(p, attn + ".proj", core);
    result.steps[step + ".attn"] = attended;
    x = sum(x, attended);
    x = sum(x, linear(p, block + "mlp.fc2",
                      apply(linear(p, block + "mlp.fc1", norm(block + "norm2")), gelu_erf)));
    result.steps[step] = x;
  }
  const Array last = norm("norm");
  result.steps["norm"] = last;

  // What a head reads: one token, or the mean of all.
  const auto features = [&](std::ptrdiff_t token) {
    Array y({batch, 1, width});
    for (std::ptrdiff_t b = 0; b < batch; ++b)
      for (std::ptrdiff_t c = 0; c < width; ++c)
        for (std::ptrdiff_t n = 0; n < x.size(1); ++n)
          if (first == 0)
            y(b, 0, c) += last(b, n, c) / static_cast<double>(x.size(1));
          else if (n == token)
            y(b, 0, c) = last(b, n, c);
    return y;
  };
  result.logits = linear(p, "head", features(0));
  if (first == 2) {
    result.logits = sum(result.logits, linear(p, "head_dist", features(1)));
    for (double& logit : result.logits.values) logit /= 2;
  }
  return result;
}

}  // namespace reference

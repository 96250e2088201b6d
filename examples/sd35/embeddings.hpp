// The two fixed embeddings of the transformer, from their formulas.
#pragma once

#include <cmath>
#include <span>
#include <vector>

#include "nn/runtime.hpp"

namespace sd35 {

using namespace nn;  // what the examples share

/// Sinusoid of the time: [cos(t f_0), ..., cos(t f_n-1), sin(t f_0), ..., sin(t f_n-1)], cosines first, with
/// f_i = 10000^(-i / n) and n half the length. t is 1000 sigma. Computed in double and rounded once; the
/// official code rounds t f_i to float32 first, which moves an element by up to 6e-5 at t = 1000.
template <class T>
void timestep_embedding(double t, std::span<T> out) {
  const std::size_t n = out.size() / 2;
  for (std::size_t i = 0; i < n; ++i) {
    const double angle = t * std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(n));
    out[i] = static_cast<T>(std::cos(angle));
    out[n + i] = static_cast<T>(std::sin(angle));
  }
}

/// The table of position embeddings that checkpoints carry, for checkpoints that are made from nothing:
/// [grid * grid, channels], rows of the grid one after another. The first half of the channels is of the
/// column, the second of the row: [sin(p w_j), cos(p w_j)] with p the position / scale and
/// w_j = 10000^(-j / (channels / 4)). `channels` is a multiple of 4. p is rounded to float32, as the official
/// code does, all else is double.
inline std::vector<double> position_table(Index channels, Index grid, double scale = 1) {
  const Index quarter = channels / 4;
  std::vector<double> table(static_cast<std::size_t>(grid * grid * channels));
  double* out = table.data();
  const auto position = [scale](Index i) { return static_cast<float>(i) / static_cast<float>(scale); };
  for (Index row = 0; row < grid; ++row)
    for (Index column = 0; column < grid; ++column, out += channels)
      for (Index j = 0; j < quarter; ++j) {
        const double w = std::pow(10000.0, -static_cast<double>(j) / static_cast<double>(quarter));
        const double x = static_cast<double>(position(column)) * w,
                     y = static_cast<double>(position(row)) * w;
        out[j] = std::sin(x);
        out[quarter + j] = std::cos(x);
        out[2 * quarter + j] = std::sin(y);
        out[3 * quarter + j] = std::cos(y);
      }
  return table;
}

}  // namespace sd35

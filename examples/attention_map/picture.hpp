// Attention maps as one picture.
#pragma once

#include <string>
#include <vector>

#include "maps.hpp"
#include "nn/image.hpp"

namespace attention_map {

// What the colours of one map stand for: white is 0, full red `largest`, full blue -`largest`.
struct Scale {
  Index head, query;  // the query by its token of the grid
  std::string map;    // "softmax" or "ttt"
  float least, most;  // of the values on the grid
  [[nodiscard]] float largest() const { return std::max(std::abs(least), std::abs(most)); }
};

struct Picture {
  Image image;
  std::vector<Scale> scales;
};

// A row for each head; in it, for each query, the softmax map and the TTT map over the grid, each on its own scale, the
// query framed. Longest side of a map about `size` pixels, whole pixels a token. A photo is shown in a row above.
[[nodiscard]] Picture draw(const Map& softmax, const Map& ttt, const linattn::TokenGrid& grid,
                           const std::vector<Index>& heads, const std::vector<Index>& queries, Index size,
                           const Image& photo = {});

}  // namespace attention_map

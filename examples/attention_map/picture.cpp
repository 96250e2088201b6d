#include "picture.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include "colours.hpp"

namespace attention_map {
namespace {

using Colour = std::array<std::uint8_t, 3>;
constexpr Colour background = {48, 48, 52}, frame = {16, 16, 16}, frame_inside = {255, 214, 10};

struct Canvas {
  Image image;

  Canvas(Index width, Index height) : image{width, height, {}} {
    image.rgb.resize(static_cast<std::size_t>(3 * width * height));
    fill(0, 0, width, height, background);
  }
  void fill(Index x, Index y, Index width, Index height, const Colour& colour) {
    const Index right = std::min(x + width, image.width), bottom = std::min(y + height, image.height);
    for (Index row = std::max<Index>(y, 0); row < bottom; ++row)
      for (Index column = std::max<Index>(x, 0); column < right; ++column)
        std::copy(colour.begin(), colour.end(), image.rgb.begin() + 3 * (row * image.width + column));
  }
  // The outline of a square, `thickness` wide.
  void outline(Index x, Index y, Index side, Index thickness, const Colour& colour) {
    fill(x, y, side, thickness, colour);
    fill(x, y + side - thickness, side, thickness, colour);
    fill(x, y, thickness, side, colour);
    fill(x + side - thickness, y, thickness, side, colour);
  }
};

// Where things are, in pixels.
struct Layout {
  linattn::TokenGrid grid;
  Index token;  // side of a token
  Index thin = 4, wide = 16;

  [[nodiscard]] Index width() const { return grid.width * token; }
  [[nodiscard]] Index height() const { return grid.height * token; }
  [[nodiscard]] Index x(Index query, Index map) const {
    return thin + query * (2 * width() + thin + wide) + map * (width() + thin);
  }
  [[nodiscard]] Index y(Index row) const { return thin + row * (height() + thin); }
};

void mark(Canvas& canvas, const Layout& at, Index x, Index y, Index query) {
  const Index line = std::max<Index>(1, at.token / 8);
  const Index left = x + query % at.grid.width * at.token, top = y + query / at.grid.width * at.token;
  canvas.outline(left - line, top - line, at.token + 2 * line, line, frame);
  canvas.outline(left, top, at.token, line, frame_inside);
}

}  // namespace

Picture draw(const Map& softmax, const Map& ttt, const linattn::TokenGrid& grid,
             const std::vector<Index>& heads, const std::vector<Index>& queries, Index size,
             const Image& photo) {
  const Layout at{grid, std::max<Index>(1, size / std::max(grid.height, grid.width))};
  const Index columns = static_cast<Index>(queries.size());
  const Index first = photo.rgb.empty() ? 0 : 1, rows = first + static_cast<Index>(heads.size());
  Canvas canvas(at.x(columns - 1, 1) + at.width() + at.thin, at.y(rows - 1) + at.height() + at.thin);
  Picture picture;

  for (Index column = 0; column < columns; ++column) {
    const Index query = queries[static_cast<std::size_t>(column)];
    if (first == 1) {
      for (Index y = 0; y < at.height(); ++y)
        for (Index x = 0; x < at.width(); ++x) {
          const Index from = (y * photo.height / at.height()) * photo.width + x * photo.width / at.width();
          Colour colour;
          std::copy_n(photo.rgb.begin() + 3 * from, 3, colour.begin());
          canvas.fill(at.x(column, 0) + x, at.y(0) + y, 1, 1, colour);
        }
      mark(canvas, at, at.x(column, 0), at.y(0), query);
    }
    for (Index row = 0; row < static_cast<Index>(heads.size()); ++row)
      for (const Index kind : {0, 1}) {
        const Index head = heads[static_cast<std::size_t>(row)];
        const float* const values =
            (kind == 0 ? softmax : ttt).data() + (head * columns + column) * grid.tokens();
        const auto [least, most] = std::minmax_element(values, values + grid.tokens());
        const Scale scale{head, query, kind == 0 ? "softmax" : "ttt", *least, *most};
        const Index left = at.x(column, kind), top = at.y(first + row);
        for (Index t = 0; t < grid.tokens(); ++t)
          canvas.fill(
              left + t % grid.width * at.token, top + t / grid.width * at.token, at.token, at.token,
              diverging(scale.largest() > 0 ? static_cast<double>(values[t] / scale.largest()) : 0.0));
        mark(canvas, at, left, top, query);
        picture.scales.push_back(scale);
      }
  }
  picture.image = std::move(canvas.image);
  return picture;
}

}  // namespace attention_map

#include "orientation.hpp"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>

namespace nn {
namespace {

int orientation_or_stored(std::uint32_t value) {
  return value >= 1 && value <= 8 ? static_cast<int>(value) : 1;
}

// Nothing where no entry is of the orientation.
std::optional<int> exif_orientation(std::string_view exif) {
  using namespace std::string_view_literals;
  const bool little = exif.starts_with("II*\0"sv);
  if (!little && !exif.starts_with("MM\0*"sv)) return std::nullopt;
  // The bytes before `at + size` are there.
  const auto number = [&](std::size_t at, std::size_t size) {
    std::uint32_t value = 0;
    for (std::size_t i = 0; i < size; ++i)
      value = value << 8 | static_cast<unsigned char>(exif[little ? at + size - 1 - i : at + i]);
    return value;
  };
  const auto holds = [&](std::size_t at, std::size_t size) {
    return at <= exif.size() && size <= exif.size() - at;
  };
  if (!holds(4, 4)) return std::nullopt;
  const std::size_t directory = number(4, 4);
  if (!holds(directory, 2)) return std::nullopt;
  constexpr std::uint32_t tag = 0x0112, type_short = 3, type_long = 4;
  const std::size_t entries = number(directory, 2), entry_size = 12;
  for (std::size_t i = 0; i < entries; ++i) {
    const std::size_t entry = directory + 2 + i * entry_size;
    if (!holds(entry, entry_size)) break;
    if (number(entry, 2) != tag) continue;
    const std::uint32_t type = number(entry + 2, 2);
    if ((type != type_short && type != type_long) || number(entry + 4, 4) != 1) return 1;
    return orientation_or_stored(number(entry + 8, type == type_short ? 2 : 4));
  }
  return std::nullopt;
}

// An attribute or an element, of one digit, which PIL finds without reading XML.
int xmp_orientation(std::string_view xmp) {
  constexpr std::string_view name = "tiff:Orientation";
  for (std::size_t at = 0; (at = xmp.find(name, at)) != std::string_view::npos;) {
    at += name.size();
    const std::string_view rest = xmp.substr(at);
    const std::size_t before = rest.starts_with("=\"") ? 2 : rest.starts_with('>') ? 1 : rest.size();
    if (before < rest.size() && rest[before] >= '0' && rest[before] <= '9')
      return orientation_or_stored(static_cast<std::uint32_t>(rest[before] - '0'));
  }
  return 1;
}

}  // namespace

int stored_orientation(std::string_view exif, std::string_view xmp) {
  const std::optional<int> orientation = exif_orientation(exif);
  return orientation ? *orientation : xmp_orientation(xmp);
}

Image upright(Image image, int orientation) {
  if (orientation <= 1 || orientation > 8) return image;
  const bool turned = orientation >= 5;  // rows are stored as columns
  const bool from_right = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
  const bool from_below = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  Image result{turned ? image.height : image.width, turned ? image.width : image.height,
               std::vector<std::uint8_t>(image.rgb.size())};
  auto out = result.rgb.begin();
  for (Index y = 0; y < result.height; ++y)
    for (Index x = 0; x < result.width; ++x) {
      const Index column = turned ? y : x, row = turned ? x : y;
      const Index pixel = (from_below ? image.height - 1 - row : row) * image.width +
                          (from_right ? image.width - 1 - column : column);
      out = std::copy_n(image.rgb.begin() + 3 * pixel, 3, out);
    }
  return result;
}

}  // namespace nn

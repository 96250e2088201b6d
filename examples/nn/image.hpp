// Pictures: 8-bit RGB, PNG and JPEG files.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "runtime.hpp"

namespace nn {

struct Image {
  Index width = 0, height = 0;
  std::vector<std::uint8_t> rgb;  // rows from the top, 3 bytes a pixel

  [[nodiscard]] bool operator==(const Image&) const = default;
};

/// How a colour becomes a byte: to the nearest, halves up (diffusers), or down (the official code).
enum class Rounding : std::uint8_t { nearest, down };

/// Pixels in [-1, 1], about, as (height, width, 3): 255 clamp((x + 1) / 2, 0, 1), rounded. NaN gives 0.
template <class T>
[[nodiscard]] Image to_image(std::span<const T> pixels, Index width, Index height,
                             Rounding rounding = Rounding::nearest);

/// Left to right with `gap` white columns between them. Throws where the heights differ.
[[nodiscard]] Image side_by_side(std::span<const Image> images, Index gap = 8);

/// Keyword and text, both UTF-8; keywords are of 1 to 79 ASCII characters.
using PngText = std::vector<std::pair<std::string, std::string>>;

/// The content of a PNG file. Text goes into tEXt chunks, or iTXt where it is not ASCII.
[[nodiscard]] std::string encode_png(const Image& image, const PngText& text = {});
/// The file itself, whole or not at all. Throws std::runtime_error that names the file and what the system says, a
/// full disk included.
void write_png(const std::filesystem::path& path, const Image& image, const PngText& text = {});

/// A PNG or a JPEG as 8-bit RGB, upright: the first bytes tell the format, not the name, and the Exif that a camera writes
/// tells the way up. Other formats are refused by name, and so are files that are damaged or cut short, of more than
/// 256 MB, or of more than 2^27 pixels, before room for them is made.
/// - PNG: grey, colour and palettes of 1 to 16 bits, interlaced or not; 16 bits are rounded to 8. Transparency lies on
///   black: colour times opacity, in bytes. Gamma, chromaticities and colour profiles are not applied.
/// - JPEG: 8 bits; grey, RGB, YCbCr, CMYK and YCCK (inverted, as Adobe writes them), sequential, progressive, arithmetic;
///   colour profiles are not applied.
///
/// Throws std::runtime_error that names the file.
[[nodiscard]] Image read_image(const std::filesystem::path& path);

}  // namespace nn

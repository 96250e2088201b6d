// Pictures in another size.
#pragma once

#include <array>
#include <cstdint>

#include "image.hpp"

namespace nn {

/// PIL's filters. bicubic: a = -0.5; lanczos: three lobes.
enum class Filter : std::uint8_t { nearest, box, bilinear, hamming, bicubic, lanczos };

/// Byte for byte what resize of Pillow 13 gives; older ones begin with the rows whatever the sizes. nearest takes the pixel
/// at each centre. The others are widened by the scale where the picture shrinks, so that nothing aliases; weights are
/// normalised in double, sums in fixed point with 22 bits behind the point, rounded to 8 bits after the rows and after
/// the columns. Throws where a size is not positive, or is of more than 2^27 pixels.
[[nodiscard]] Image resize(const Image& image, Index width, Index height, Filter filter = Filter::bicubic);

/// The part of that size whose corner is at (left, top). Throws where it is not all in the picture.
[[nodiscard]] Image crop(const Image& image, Index left, Index top, Index width, Index height);

/// The picture in the middle of a larger one of one colour, or itself along an axis where it is as long already. Of an odd
/// rest the right and the bottom get the greater part.
[[nodiscard]] Image pad(const Image& image, Index width, Index height, std::array<std::uint8_t, 3> colour);

}  // namespace nn

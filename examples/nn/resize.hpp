// Pictures in another size.
#pragma once

#include "image.hpp"

namespace nn {

/// Bicubic convolution (a = -0.5), widened by the scale where the picture shrinks, so that nothing aliases; weights
/// normalised in double, sums in fixed point with 22 bits behind the point, rounded to 8 bits after the rows and
/// after the columns: byte for byte what PIL's resize(BICUBIC) gives. Throws where a size is not positive.
[[nodiscard]] Image resize(const Image& image, Index width, Index height);

/// The part of that size whose corner is at (left, top). Throws where it is not all in the picture.
[[nodiscard]] Image crop(const Image& image, Index left, Index top, Index width, Index height);

}  // namespace nn

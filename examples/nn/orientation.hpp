// Which way up a camera held a picture.
#pragma once

#include <string_view>

#include "image.hpp"

namespace nn {

/// The orientation, 1 to 8, that an Exif block says (CIPA DC-008, tag 0x0112 of its first directory); 1, as it is stored,
/// where the block says none or is malformed, as PIL takes it. `exif` begins with the TIFF header.
[[nodiscard]] int exif_orientation(std::string_view exif);

/// A picture stored with that orientation, turned and mirrored so that it stands upright.
[[nodiscard]] Image upright(Image image, int orientation);

}  // namespace nn

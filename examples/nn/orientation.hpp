// Which way up a camera held a picture.
#pragma once

#include <string_view>

#include "image.hpp"

namespace nn {

/// The orientation, 1 to 8, that an Exif block says (CIPA DC-008, tag 0x0112 of its first directory), or else an XMP packet
/// (its tiff:Orientation); 1, as it is stored, where none says it or it is malformed, as PIL takes them. `exif` begins with
/// the TIFF header.
[[nodiscard]] int stored_orientation(std::string_view exif, std::string_view xmp = {});

/// A picture stored with that orientation, turned and mirrored so that it stands upright.
[[nodiscard]] Image upright(Image image, int orientation);

}  // namespace nn

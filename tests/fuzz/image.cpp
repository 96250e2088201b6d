// Pictures: any bytes are a picture or an error, and a picture comes back from the PNG that is written of it.
#include <nn/image.hpp>

#include "fuzz.hpp"

namespace {

// Whether the header of a PNG or JPEG promises so many pixels that making room for them takes most of the time.
bool is_large(const std::uint8_t* data, std::size_t size) {
  constexpr std::uint64_t most = 1 << 20;
  const auto number = [&](std::size_t at, int bytes) {
    std::uint64_t value = 0;
    for (; bytes > 0; --bytes, ++at) value = value << 8 | (at < size ? data[at] : 0u);
    return value;
  };
  if (size > 0 && data[0] == 0x89) return number(16, 4) * number(20, 4) > most;
  for (std::size_t at = 0; at + 9 < size; ++at)
    if (data[at] == 0xff && data[at + 1] >= 0xc0 && data[at + 1] <= 0xcf &&
        number(at + 5, 2) * number(at + 7, 2) > most)
      return true;
  return false;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (is_large(data, size)) return 0;
  const auto path = fuzz::write("picture", data, size);
  nn::Image image;
  if (const std::string why = fuzz::refusal(path, [&] { image = nn::read_image(path); }); !why.empty()) {
    fuzz::expect(image.rgb.empty(), "what failed leaves nothing");
    return 0;
  }
  fuzz::expect(image.width > 0 && image.height > 0 &&
                   image.rgb.size() == static_cast<std::size_t>(3 * image.width * image.height),
               "a picture has three bytes a pixel");
  const auto again = fuzz::fresh("again.png");
  nn::write_png(again, image, {{"Comment", "written again"}});
  fuzz::expect(nn::read_image(again) == image, "a picture comes back as it was written");
  return 0;
}

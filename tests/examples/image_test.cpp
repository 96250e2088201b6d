// Pictures in and out: PNG and JPEG against what PIL reads, resizing against PIL's, and files that are no pictures.
#include <doctest/doctest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "nn/image.hpp"
#include "nn/resize.hpp"
#include "sd35_files.hpp"
#include "support.hpp"

namespace {

namespace fs = std::filesystem;
using nn::Image;
using nn::Index;
using sd35_files::Folder;

const fs::path data = fs::path(LINATTN_TEST_DATA) / "deit-tiny";

std::string read_file(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// The largest difference of a byte.
int distance(const Image& a, const Image& b) {
  REQUIRE(a.width == b.width);
  REQUIRE(a.height == b.height);
  REQUIRE(a.rgb.size() == b.rgb.size());
  int worst = 0;
  for (std::size_t i = 0; i < a.rgb.size(); ++i) worst = std::max(worst, std::abs(a.rgb[i] - b.rgb[i]));
  return worst;
}

Image random_image(Index width, Index height, std::uint64_t seed) {
  support::Random random(seed);
  Image image{width, height, std::vector<std::uint8_t>(static_cast<std::size_t>(width * height * 3))};
  for (std::uint8_t& byte : image.rgb) byte = static_cast<std::uint8_t>(random.below(256));
  return image;
}

TEST_CASE("a JPEG is what PIL reads: colour, grey, CMYK, progressive") {
  for (const char* name : {"picture", "grey", "cmyk", "progressive"}) {
    CAPTURE(name);
    const fs::path jpeg = data / (std::string(name) + ".jpg");
    const Image image = nn::read_image(jpeg);
    // libjpeg's inverse transform is exact integer arithmetic; of two inks, PIL rounds the product.
    CHECK(distance(image, nn::read_image(data / ("decoded_" + std::string(name) + ".png"))) <=
          (std::string(name) == "cmyk" ? 1 : 0));
    CHECK(nn::read_image(jpeg) == image);
  }
  CHECK(distance(nn::read_image(data / "picture.jpg"), nn::read_image(data / "picture.png")) > 0);
}

TEST_CASE("the first bytes tell the format, not the name") {
  const Folder folder;
  fs::copy_file(data / "picture.png", folder / "a.jpg");
  fs::copy_file(data / "picture.jpg", folder / "b.png");
  CHECK(nn::read_image(folder / "a.jpg") == nn::read_image(data / "picture.png"));
  CHECK(nn::read_image(folder / "b.png") == nn::read_image(data / "picture.jpg"));
}

TEST_CASE("the text of a PNG is UTF-8 without NUL") {
  const Folder folder;
  const Image image{1, 1, {1, 2, 3}};
  nn::write_png(folder / "good.png", image, {{"parameters", "F\u00fcchse"}});
  for (const std::string& text : {std::string("caf\xe9"), std::string("a\0b", 3)}) {
    CHECK_THROWS_WITH_AS(nn::write_png(folder / "bad.png", image, {{"parameters", text}}),
                         doctest::Contains("text 'parameters': byte "), std::runtime_error);
    CHECK_FALSE(std::filesystem::exists(folder / "bad.png"));
  }
}

TEST_CASE("a PNG is read as it was written, 16 bits and grey too") {
  const Folder folder;
  const Image image = random_image(13, 7, 1);
  nn::write_png(folder / "image.png", image);
  CHECK(nn::read_image(folder / "image.png") == image);
  const Image grey = nn::read_image(data / "grey16.png"), alpha = nn::read_image(data / "alpha.png");
  // A ramp of 16 bits; the upper byte counts. Half transparent white is on black.
  for (std::size_t x = 0; x < 8; ++x) CHECK(std::abs(grey.rgb[3 * x] - static_cast<int>(36 * x)) <= 1);
  CHECK(alpha.rgb[0] == 0);
  CHECK(alpha.rgb[3] == 255);
}

TEST_CASE("what is no picture is refused in one sentence") {
  const Folder folder;
  const auto refuses = [&](const std::string& bytes, const char* words) {
    CAPTURE(words);
    const fs::path path = folder / "broken";
    sd35_files::write_text(path, bytes);
    CHECK_THROWS_WITH_AS((void)nn::read_image(path), doctest::Contains(words), std::runtime_error);
    CHECK_THROWS_WITH_AS((void)nn::read_image(path), doctest::Contains(path.c_str()), std::runtime_error);
  };
  const std::string png = read_file(data / "picture.png"), jpeg = read_file(data / "picture.jpg");
  refuses("", "neither");
  refuses("GIF89a and more", "neither");
  refuses(png.substr(0, 8), "");
  refuses(png.substr(0, png.size() / 2), "");
  for (const std::size_t size : {4u, 100u, 700u, 1500u}) refuses(jpeg.substr(0, size), "cannot decode");
  refuses(jpeg.substr(0, jpeg.size() - 2), "cannot decode");  // the end marker alone
  const std::size_t frame = jpeg.find("\xff\xc0");
  REQUIRE(frame != std::string::npos);
  const auto with = [&](std::size_t offset, std::string_view bytes) {
    std::string changed = jpeg;
    changed.replace(frame + offset, bytes.size(), bytes);
    return changed;
  };
  refuses(with(4, "\x0c"), "precision");
  refuses(with(5, "\xea\x60\xea\x60"), "60000 x 60000");
  refuses(with(5, std::string_view("\0\0", 2)), "cannot decode");
  CHECK_THROWS_WITH_AS((void)nn::read_image(folder / "nothing.png"), doctest::Contains("no such file"),
                       std::runtime_error);
  CHECK_THROWS_WITH_AS((void)nn::read_image(folder.path()), doctest::Contains("regular file"),
                       std::runtime_error);
}

TEST_CASE("damaged JPEGs end in an exception or in a picture, never otherwise") {
  const Folder folder;
  for (const char* name : {"picture.jpg", "progressive.jpg", "cmyk.jpg"}) {
    const std::string jpeg = read_file(data / name);
    support::Random random(3);
    int refused = 0;
    for (int i = 0; i < 200; ++i) {
      std::string changed = jpeg;
      for (int j = 0; j < 3; ++j)
        changed[static_cast<std::size_t>(random.below(static_cast<Index>(changed.size())))] =
            static_cast<char>(random.below(256));
      sd35_files::write_text(folder / "broken", changed);
      try {
        const Image image = nn::read_image(folder / "broken");
        CHECK(image.rgb.size() == static_cast<std::size_t>(image.width * image.height * 3));
      } catch (const std::runtime_error&) {
        ++refused;
      }
    }
    CHECK(refused > 10);
  }
}

TEST_CASE("resizing gives PIL's bytes") {
  const Image image = nn::read_image(data / "picture.png");
  for (const auto& size : {std::pair<Index, Index>{37, 29}, {90, 71}, {8, 48}, {64, 20}}) {
    const Index width = size.first, height = size.second;
    CAPTURE(width);
    const std::string name = "resized_" + std::to_string(width) + "x" + std::to_string(height) + ".png";
    CHECK(nn::resize(image, width, height) == nn::read_image(data / name));
  }
  CHECK(nn::resize(image, image.width, image.height) == image);
}

TEST_CASE("resizing keeps a colour, and the mean of a picture that halves") {
  Image flat{5, 9, std::vector<std::uint8_t>(5 * 9 * 3, 201)};
  for (const auto& [width, height] : {std::pair<Index, Index>{1, 1}, {2, 31}, {17, 3}})
    CHECK(nn::resize(flat, width, height) ==
          Image{width, height, std::vector<std::uint8_t>(static_cast<std::size_t>(width * height * 3), 201)});
  CHECK_THROWS_AS((void)nn::resize(flat, 0, 4), std::runtime_error);
  CHECK_THROWS_AS((void)nn::resize(Image{}, 3, 4), std::runtime_error);
}

TEST_CASE("cropping takes the part, and nothing outside") {
  const Image image = random_image(6, 5, 2);
  const Image part = nn::crop(image, 2, 1, 3, 4);
  for (Index y = 0; y < 4; ++y)
    for (Index x = 0; x < 3; ++x)
      for (Index c = 0; c < 3; ++c)
        CHECK(part.rgb[static_cast<std::size_t>((y * 3 + x) * 3 + c)] ==
              image.rgb[static_cast<std::size_t>(((y + 1) * 6 + x + 2) * 3 + c)]);
  CHECK(nn::crop(image, 0, 0, 6, 5) == image);
  for (const auto& [left, top, width, height] : {std::array<Index, 4>{-1, 0, 2, 2},
                                                 {0, -1, 2, 2},
                                                 {5, 0, 2, 2},
                                                 {0, 4, 2, 2},
                                                 {0, 0, 0, 2},
                                                 {0, 0, 7, 2}})
    CHECK_THROWS_AS((void)nn::crop(image, left, top, width, height), std::runtime_error);
}

}  // namespace

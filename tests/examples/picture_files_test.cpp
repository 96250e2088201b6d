// Pictures as people have them: every form of PNG and JPEG, the orientation that a camera notes, and what is neither.
#include <doctest/doctest.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "nn/image.hpp"
#include "nn/orientation.hpp"
#include "sd35_files.hpp"
#include "support.hpp"

namespace {

namespace fs = std::filesystem;
using namespace std::string_literals;
using nn::Image;
using nn::Index;
using sd35_files::Folder;

const fs::path data = fs::path(LINATTN_TEST_DATA) / "deit-tiny";

std::string read_file(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

Image read(const std::string& bytes) {
  const Folder folder;
  sd35_files::write_text(folder / "picture", bytes);
  return nn::read_image(folder / "picture");
}

// What is said of a file after its name; empty where it is read.
std::string refusal(const std::string& bytes) {
  const Folder folder;
  sd35_files::write_text(folder / "picture", bytes);
  try {
    (void)nn::read_image(folder / "picture");
  } catch (const std::runtime_error& error) {
    const std::string name = (folder / "picture").string() + ": ", what = error.what();
    CHECK(what.starts_with(name));
    CHECK(what.find('\n') == std::string::npos);
    return what.substr(name.size());
  }
  return {};
}

std::string big_endian(std::uint32_t value) {
  return {static_cast<char>(value >> 24), static_cast<char>(value >> 16), static_cast<char>(value >> 8),
          static_cast<char>(value)};
}

std::string chunk(const std::string& type, const std::string& content) {
  const std::string body = type + content;
  std::uint32_t crc = 0xffffffff;
  for (const char c : body) {
    crc ^= static_cast<unsigned char>(c);
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (0xedb88320u & (0u - (crc & 1u)));
  }
  return big_endian(static_cast<std::uint32_t>(content.size())) + body + big_endian(~crc);
}

// A zlib stream of one stored block.
std::string stored(const std::string& content) {
  std::uint32_t a = 1, b = 0;
  for (const char c : content) {
    a = (a + static_cast<unsigned char>(c)) % 65521;
    b = (b + a) % 65521;
  }
  const auto size = static_cast<std::uint16_t>(content.size());
  const auto little = [](unsigned value) {
    return std::string{static_cast<char>(value & 255), static_cast<char>(value >> 8 & 255)};
  };
  return "\x78\x01\x01"s + little(size) + little(~size & 0xffffu) + content + big_endian(b << 16 | a);
}

enum Colour : char { grey = 0, rgb = 2, palette = 3, grey_alpha = 4, rgba = 6 };

struct Png {
  std::uint32_t width = 1, height = 1;
  char depth = 8;
  Colour colour = rgb;
  std::string rows{};  // each begins with its filter
  std::string before{}, after{};
  char interlaced = 0;

  [[nodiscard]] std::string bytes() const {
    const std::string header =
        big_endian(width) + big_endian(height) + depth + static_cast<char>(colour) + "\0\0"s + interlaced;
    return "\x89PNG\r\n\x1a\n" + chunk("IHDR", header) + before + chunk("IDAT", stored(rows)) + after +
           chunk("IEND", "");
  }
};

using Bytes = std::vector<std::uint8_t>;
Bytes pixels(const Png& png) {
  const Image image = read(png.bytes());
  CHECK(image.width == png.width);
  CHECK(image.height == png.height);
  return image.rgb;
}

// Greys as the colours they are.
Bytes grey_pixels(const Bytes& levels) {
  Bytes all;
  for (const std::uint8_t level : levels) all.insert(all.end(), 3, level);
  return all;
}

// A TIFF header and a directory with one entry.
std::string exif(bool little, int orientation, std::uint32_t type = 3, std::uint32_t count = 1) {
  const auto number = [little](std::uint32_t value, int size) {
    std::string out;
    for (int i = 0; i < size; ++i) out += static_cast<char>(value >> 8 * (little ? i : size - 1 - i) & 255);
    return out;
  };
  const auto value = static_cast<std::uint32_t>(orientation);
  return (little ? "II" : "MM") + number(42, 2) + number(8, 4) + number(1, 2) + number(0x0112, 2) +
         number(type, 2) + number(count, 4) + (type == 3 ? number(value, 2) + "\0\0"s : number(value, 4)) +
         "\0\0\0\0"s;
}

std::string with_app1(const std::string& jpeg, const std::string& content) {
  const auto size = content.size() + 2;
  return jpeg.substr(0, 2) + "\xff\xe1" + static_cast<char>(size >> 8) + static_cast<char>(size & 255) +
         content + jpeg.substr(2);
}

TEST_CASE("a PNG of every depth and colour is read") {
  CHECK(pixels({.width = 9, .depth = 1, .colour = grey, .rows = "\0\xa5\x80"s}) ==
        grey_pixels({255, 0, 255, 0, 0, 255, 0, 255, 255}));
  CHECK(pixels({.width = 4, .depth = 2, .colour = grey, .rows = "\0\x1b"s}) ==
        grey_pixels({0, 85, 170, 255}));
  CHECK(pixels({.width = 3, .depth = 4, .colour = grey, .rows = "\0\x0f\x70"s}) ==
        grey_pixels({0, 255, 119}));
  CHECK(pixels({.width = 2, .colour = grey, .rows = "\0\x01\xfe"s}) == grey_pixels({1, 254}));
  CHECK(pixels({.width = 2, .depth = 16, .colour = grey, .rows = "\0\x80\x80\xff\xff"s}) ==
        grey_pixels({128, 255}));
  CHECK(pixels({.depth = 16, .colour = rgb, .rows = "\0\x01\x01\x80\x80\xfe\xfe"s}) == Bytes{1, 128, 254});
  const std::string colours = chunk("PLTE", "\x0a\x14\x1e\x28\x32\x3c\x46\x50\x5a");
  CHECK(pixels({.width = 3, .depth = 2, .colour = palette, .rows = "\0\x18"s, .before = colours}) ==
        Bytes{10, 20, 30, 40, 50, 60, 70, 80, 90});
  CHECK(pixels({.width = 3, .colour = palette, .rows = "\0\2\0\1"s, .before = colours}) ==
        Bytes{70, 80, 90, 10, 20, 30, 40, 50, 60});
  // The passes of Adam7 that a picture of 2 x 2 has: its corner, right of it, below.
  CHECK(
      pixels({.width = 2, .height = 2, .colour = grey, .rows = "\0\x0a\0\x14\0\x1e\x28"s, .interlaced = 1}) ==
      grey_pixels({10, 20, 30, 40}));
}

TEST_CASE("transparency lies on black: colour times opacity, in bytes") {
  CHECK(pixels({.width = 2, .colour = rgba, .rows = "\0\xff\x80\x01\x80\x64\xc8\xff\xff"s}) ==
        Bytes{128, 64, 1, 100, 200, 255});
  CHECK(pixels({.width = 2, .colour = grey_alpha, .rows = "\0\xff\0\x80\x40"s}) == grey_pixels({0, 32}));
  CHECK(
      pixels({.colour = rgba, .rows = "\0\x64\xc8\xff\x33"s, .before = chunk("gAMA", big_endian(100000))}) ==
      Bytes{20, 40, 51});
  CHECK(pixels({.width = 2,
                .colour = palette,
                .rows = "\0\0\1"s,
                .before = chunk("PLTE", "\x64\xc8\xff\x28\x32\x3c") + chunk("tRNS", "\x80")}) ==
        Bytes{50, 100, 128, 40, 50, 60});
  CHECK(pixels({.width = 2, .colour = grey, .rows = "\0\x64\xc8"s, .before = chunk("tRNS", "\0\x64"s)}) ==
        grey_pixels({0, 200}));
}

TEST_CASE("gamma, chromaticities and profiles of a PNG are not applied") {
  const Bytes expected{10, 100, 200};
  const std::string rows = "\0\x0a\x64\xc8"s;
  CHECK(pixels({.rows = rows}) == expected);
  CHECK(pixels({.rows = rows, .before = chunk("gAMA", big_endian(100000))}) == expected);
  CHECK(pixels({.rows = rows, .before = chunk("gAMA", big_endian(0))}) == expected);
  CHECK(pixels({.rows = rows, .before = chunk("iCCP", "name\0\0no profile"s)}) == expected);
  CHECK(pixels({.rows = rows, .before = chunk("tEXt", "no separator") + chunk("zTXt", "a\0\0b"s)}) ==
        expected);
  CHECK(pixels({.depth = 16,
                .rows = "\0\x0a\x0a\x64\x64\xc8\xc8"s,
                .before = chunk("gAMA", big_endian(100000))}) == expected);
}

TEST_CASE("a picture stands upright, however the camera was held") {
  // Letters as they are stored, row 0 and column 0 being where CIPA DC-008 says; upright it is abc, def.
  const std::vector<std::string> layouts = {"abcdef", "cbafed", "fedcba", "defabc",
                                            "adbecf", "cfbead", "fcebda", "daebfc"};
  Png png{.width = 3, .height = 2, .colour = grey};
  for (int orientation = 1; orientation <= 8; ++orientation)
    for (const bool little : {true, false})
      for (const bool behind : {true, false}) {
        CAPTURE(orientation);
        const std::string& letters = layouts[static_cast<std::size_t>(orientation - 1)];
        png.width = orientation < 5 ? 3 : 2;
        png.height = 6 / png.width;
        png.rows.clear();
        for (std::size_t row = 0; row < png.height; ++row)
          png.rows += "\0"s + letters.substr(row * png.width, png.width);
        (behind ? png.after : png.before) = chunk("eXIf", exif(little, orientation));
        (behind ? png.before : png.after).clear();
        const Image image = read(png.bytes());
        CHECK(image == Image{3, 2, grey_pixels({'a', 'b', 'c', 'd', 'e', 'f'})});
      }

  const std::string jpeg = read_file(data / "picture.jpg");
  const Image stored_image = nn::read_image(data / "picture.jpg");
  for (int orientation = 1; orientation <= 8; ++orientation)
    for (const bool little : {true, false}) {
      const Image image = read(with_app1(jpeg, "Exif\0\0"s + exif(little, orientation)));
      CAPTURE(orientation);
      CHECK(image == nn::upright(stored_image, orientation));
      CHECK((image == stored_image) == (orientation == 1));
      CHECK(image.width == (orientation < 5 ? stored_image.width : stored_image.height));
    }
  // The first block of Exif counts, and what is no Exif does not.
  const std::string turned = with_app1(jpeg, "Exif\0\0"s + exif(true, 6));
  CHECK(read(with_app1(turned, "http://ns.adobe.com/xap/1.0/\0<x/>"s)) == nn::upright(stored_image, 6));
  CHECK(read(with_app1(turned, "Exif\0\0"s + exif(false, 3))) == nn::upright(stored_image, 3));
}

TEST_CASE("where Exif says no orientation XMP does, as in PIL") {
  const std::string packet = "<x tiff:Orientation=\"6\"/>", name = "http://ns.adobe.com/xap/1.0/\0"s;
  CHECK(nn::stored_orientation("", packet) == 6);
  CHECK(nn::stored_orientation("", "<tiff:Orientation>8</tiff:Orientation>") == 8);
  CHECK(nn::stored_orientation("", "tiff:Orientation tiff:Orientation= tiff:Orientation=\"x" + packet) == 6);
  for (const char* none :
       {"", "tiff:Orientation", "tiff:Orientation=\"", "tiff:Orientation>", "tiff:Orientation=\"0\"",
        "tiff:Orientation=\"9\"", "tiff:Orientation='6'", "exif:Orientation=\"6\""})
    CHECK(nn::stored_orientation("", none) == 1);
  CHECK(nn::stored_orientation(exif(true, 1), packet) == 1);
  CHECK(nn::stored_orientation(exif(true, 6, 2), packet) == 1);
  CHECK(nn::stored_orientation("II*\0\x08\0\0\0\0\0"s, packet) == 6);  // no entries

  const std::string jpeg = read_file(data / "picture.jpg");
  const Image stored_image = nn::read_image(data / "picture.jpg");
  const std::string turned = with_app1(jpeg, name + packet);
  CHECK(read(turned) == nn::upright(stored_image, 6));
  CHECK(read(with_app1(turned, name + "tiff:Orientation>3")) ==
        nn::upright(stored_image, 6));  // the last packet counts
  CHECK(read(with_app1(turned, "Exif\0\0"s + exif(false, 3))) == nn::upright(stored_image, 3));

  const Png plain{.width = 2, .colour = grey, .rows = "\0ab"s};
  const auto with_text = [&](const std::string& type, const std::string& content) {
    Png png = plain;
    png.after = chunk(type.c_str(), content);
    return read(png.bytes());
  };
  const std::string keyword = "XML:com.adobe.xmp\0\0\0"s;
  CHECK(with_text("iTXt", keyword + "\0\0"s + packet) == nn::upright(read(plain.bytes()), 6));
  CHECK(with_text("iTXt", keyword) == read(plain.bytes()));
  CHECK(with_text("iTXt", "Comment\0\0\0\0\0"s + packet) == read(plain.bytes()));
}

TEST_CASE("an Exif block that is malformed says nothing") {
  CHECK(nn::stored_orientation(exif(true, 6)) == 6);
  CHECK(nn::stored_orientation(exif(false, 6, 4)) == 6);  // PIL takes a LONG
  CHECK(nn::stored_orientation(exif(true, 6, 2)) == 1);
  CHECK(nn::stored_orientation(exif(true, 6, 3, 2)) == 1);
  for (const int orientation : {0, 9, 255, 65535})
    CHECK(nn::stored_orientation(exif(true, orientation)) == 1);
  CHECK(nn::stored_orientation("") == 1);
  CHECK(nn::stored_orientation("XX*\0\x08\0\0\0"s) == 1);
  CHECK(nn::stored_orientation("II*\0\xff\xff\xff\xff"s) == 1);
  const std::string whole = exif(true, 6);
  for (std::size_t size = 0; size < whole.size(); ++size) {
    const std::vector<char> cut(whole.begin(), whole.begin() + static_cast<Index>(size));  // no byte behind
    CHECK(nn::stored_orientation({cut.data(), size}) == (size < 22 ? 1 : 6));
  }
  support::Random random(5);
  for (int i = 0; i < 2000; ++i) {
    std::string changed = exif(i % 2 == 0, 1 + i % 8);
    for (int j = 0; j < 3; ++j)
      changed[static_cast<std::size_t>(random.below(static_cast<Index>(changed.size())))] =
          static_cast<char>(random.below(256));
    const int orientation = nn::stored_orientation(changed);
    CHECK(orientation >= 1);
    CHECK(orientation <= 8);
  }
}

TEST_CASE("a file that is neither a PNG nor a JPEG is named as what it is") {
  const auto says = [](const std::string& bytes, const std::string& name) {
    CHECK(refusal(bytes) == "is " + name + ", neither a PNG nor a JPEG: convert it to one");
  };
  says("GIF89a\1\0\1\0\0\0\0;"s, "a GIF");
  says("RIFF\x24\0\0\0WEBPVP8 "s, "a WebP");
  says("BM\x3a\0\0\0\0\0\0\0"s, "a BMP");
  says("II*\0\x08\0\0\0"s, "a TIFF");
  says("MM\0*\0\0\0\x08"s, "a TIFF");
  says("\0\0\0\x18"s + "ftypheic\0\0\0\0mif1heic"s, "a HEIC");
  says("\0\0\0\x1c"s + "ftypavif\0\0\0\0avifmif1"s, "an AVIF");
  says("\0\0\0\x0c"s + "JXL \r\n\x87\n", "a JPEG XL");
  says("%PDF-1.7\n", "a PDF");
  CHECK(refusal("") == "is empty, neither a PNG nor a JPEG");
  CHECK(refusal("hello") == "is neither a PNG nor a JPEG");
  CHECK(refusal("RIFF") == "is a RIFF file (WebP)");
}

TEST_CASE("a PNG that is cut short, damaged or too large is refused") {
  const std::string png = read_file(data / "picture.png");
  for (const std::size_t size : {8u, 20u, 33u, 60u, 3000u}) {
    CAPTURE(size);
    CHECK(refusal(png.substr(0, size)) == "is a PNG that is cut short or damaged: it has no end (IEND)");
  }
  CHECK(refusal(png.substr(0, png.size() - 1)).ends_with("(IEND)"));
  CHECK(refusal(png.substr(0, png.size() - 12)).ends_with("(IEND)"));
  CHECK(read(png + "what follows") == read(png));
  const Png small{.width = 2, .height = 2, .colour = grey, .rows = "\0\1\2"s};
  CHECK(refusal(small.bytes()).starts_with("cannot decode: "));  // a row is missing
  CHECK(refusal(Png{.width = 0, .rows = "\0"s}.bytes()).starts_with("cannot decode: "));
  CHECK(refusal(Png{.height = 0, .rows = "\0"s}.bytes()).starts_with("cannot decode: "));
  CHECK(refusal(Png{.width = 60000, .height = 60000, .rows = "\0"s}.bytes()) ==
        "is 60000 x 60000 pixels; at most 134217728 are read");
  std::string damaged = png;
  damaged[1000] = static_cast<char>(damaged[1000] ^ 1);
  CHECK(refusal(damaged).starts_with("cannot decode: "));
}

}  // namespace

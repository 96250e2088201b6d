#include "image.hpp"

#include <png.h>

#include <algorithm>
#include <csetjmp>
#include <cstdio>
// jpeglib.h needs the types of cstdio.
#include <jerror.h>
#include <jpeglib.h>

#include <memory>
#include <stdexcept>
#include <string_view>

#include <linattn/weights/atomic_file.hpp>

#include "orientation.hpp"
#include "signals.hpp"
#include "small_file.hpp"
#include "text.hpp"

namespace nn {
namespace {

namespace fs = std::filesystem;

// Where libpng writes to. Exceptions do not cross it: libpng leaves by longjmp.
struct Sink {
  std::string bytes;
  char error[128] = {};
};

void on_error(png_structp png, png_const_charp what) {
  std::snprintf(static_cast<Sink*>(png_get_error_ptr(png))->error, sizeof(Sink::error), "%s", what);
  png_longjmp(png, 1);
}
void on_warning(png_structp, png_const_charp) {}
void on_write(png_structp png, png_bytep data, png_size_t size) {
  bool failed = false;
  try {
    static_cast<Sink*>(png_get_io_ptr(png))->bytes.append(reinterpret_cast<const char*>(data), size);
  } catch (...) {
    failed = true;
  }
  if (failed) png_error(png, "out of memory");
}

// No object with a destructor lives in this frame, because an error jumps out of it.
bool encode(Sink& sink, const Image& image, png_text* text, int texts) {
  png_structp png = png_create_write_struct(PNG_LIBPNG_VER_STRING, &sink, on_error, on_warning);
  if (png == nullptr) return false;
  png_infop info = png_create_info_struct(png);
  if (info == nullptr || setjmp(png_jmpbuf(png)) != 0) {
    png_destroy_write_struct(&png, &info);
    return false;
  }
  png_set_write_fn(png, &sink, on_write, nullptr);
  png_set_IHDR(png, info, static_cast<png_uint_32>(image.width), static_cast<png_uint_32>(image.height), 8,
               PNG_COLOR_TYPE_RGB, PNG_INTERLACE_NONE, PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
  png_set_sRGB(png, info, PNG_sRGB_INTENT_PERCEPTUAL);
  png_set_text(png, info, text, texts);
  png_write_info(png, info);
  for (Index row = 0; row < image.height; ++row) png_write_row(png, image.rgb.data() + row * image.width * 3);
  png_write_end(png, info);
  png_destroy_write_struct(&png, &info);
  return true;
}

bool is_ascii(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 128; });
}

std::string read_picture(const fs::path& path) {
  return read_small_file(path, std::size_t{256} << 20, "a picture");
}

// Memory for a picture, once its header has told its size.
Image make_image(const fs::path& path, Index width, Index height, Index channels = 3) {
  constexpr Index most = Index{1} << 27;
  if (width < 1 || height < 1 || width > most / height)
    fail(path, "is " + std::to_string(width) + " x " + std::to_string(height) + " pixels; at most " +
                   std::to_string(most) + " are read");
  return {width, height, std::vector<std::uint8_t>(static_cast<std::size_t>(width * height * channels))};
}

// The product of two parts of 255, as such a part.
std::uint8_t times(std::uint8_t a, std::uint8_t b) { return static_cast<std::uint8_t>((a * b + 127) / 255); }

// What an iTXt chunk with XMP begins with: the keyword, then no compression, by method 0, as ISO 16684-3 has it. A language
// and a translated keyword, both empty there, lie before the packet.
constexpr std::string_view xmp_keyword("XML:com.adobe.xmp\0\0\0", 20);

// Leaves of a PNG the chunks that its pixels are made of: no gamma or colour profile is applied, as in PIL, and no text is
// unpacked. Returns the orientation that its eXIf says, or else its XMP.
int keep_pixels(const fs::path& path, std::string& png) {
  constexpr std::size_t signature = 8, around = 12;  // length, type and checksum of a chunk
  std::size_t kept = signature;
  std::string exif, xmp;
  for (std::size_t at = signature; png.size() - at >= around;) {
    std::size_t size = 0;
    for (std::size_t i = 0; i < 4; ++i) size = size << 8 | static_cast<unsigned char>(png[at + i]);
    if (size > png.size() - at - around) break;
    const std::string_view type = std::string_view(png).substr(at + 4, 4);
    const std::string_view content = std::string_view(png).substr(at + 8, size);
    const bool is_end = type == "IEND", is_critical = (type[0] & 0x20) == 0;
    if (type == "eXIf") exif = content;
    if (type == "iTXt" && content.starts_with(xmp_keyword)) xmp = content.substr(xmp_keyword.size());
    size += around;
    if (is_critical || type == "tRNS") {
      std::copy_n(png.begin() + static_cast<Index>(at), size, png.begin() + static_cast<Index>(kept));
      kept += size;
    }
    at += size;
    if (!is_end) continue;
    png.resize(kept);
    return stored_orientation(exif, xmp);
  }
  fail(path, "is a PNG that is cut short or damaged: it has no end (IEND)");
}

Image decode_png(const fs::path& path, std::string bytes) {
  const int orientation = keep_pixels(path, bytes);
  png_image png{};
  png.version = PNG_IMAGE_VERSION;
  const std::unique_ptr<png_image, void (*)(png_image*)> guard(&png, png_image_free);
  const auto check = [&](int done) {
    if (done == 0) fail(path, std::string("cannot decode: ") + png.message);
  };
  check(png_image_begin_read_from_memory(&png, bytes.data(), bytes.size()));
  const bool transparent = (png.format & PNG_FORMAT_FLAG_ALPHA) != 0;
  png.format = transparent ? PNG_FORMAT_RGBA : PNG_FORMAT_RGB;
  png.flags |= PNG_IMAGE_FLAG_16BIT_sRGB;  // 16 bits are as little linear as 8
  Image image =
      make_image(path, static_cast<Index>(png.width), static_cast<Index>(png.height), transparent ? 4 : 3);
  check(png_image_finish_read(&png, nullptr, image.rgb.data(), 0, nullptr));
  if (transparent) {
    const std::size_t pixels = image.rgb.size() / 4;
    for (std::size_t i = 0; i < pixels; ++i)
      for (std::size_t c = 0; c < 3; ++c)
        image.rgb[3 * i + c] = times(image.rgb[4 * i + c], image.rgb[4 * i + 3]);
    image.rgb.resize(pixels * 3);
  }
  return upright(std::move(image), orientation);
}

// A JPEG while it is decoded. libjpeg leaves by longjmp as well.
struct Jpeg {
  jpeg_decompress_struct info{};
  jpeg_error_mgr errors{};
  jpeg_progress_mgr progress{};
  std::jmp_buf jump;
  char error[JMSG_LENGTH_MAX] = {};

  Jpeg() = default;
  Jpeg(const Jpeg&) = delete;
  Jpeg& operator=(const Jpeg&) = delete;
  ~Jpeg() { jpeg_destroy_decompress(&info); }
};

[[noreturn]] void on_jpeg_error(j_common_ptr info) {
  Jpeg& jpeg = *static_cast<Jpeg*>(info->client_data);
  info->err->format_message(info, jpeg.error);
  std::longjmp(jpeg.jump, 1);
}
// libjpeg fills in grey for data that is damaged or not there, and warns.
void on_jpeg_message(j_common_ptr info, int level) {
  if (level < 0 && info->err->msg_code != JWRN_EXTRANEOUS_DATA && info->err->msg_code != JWRN_JFIF_MAJOR)
    on_jpeg_error(info);
}
// Each scan of a progressive file goes over all of the picture: a small file could ask for years.
void on_jpeg_progress(j_common_ptr info) {
  if (reinterpret_cast<j_decompress_ptr>(info)->input_scan_number <= 500) return;
  Jpeg& jpeg = *static_cast<Jpeg*>(info->client_data);
  std::snprintf(jpeg.error, sizeof jpeg.error, "more than 500 scans");
  std::longjmp(jpeg.jump, 1);
}

// As in encode(), no object with a destructor lives in the frames that errors jump to.
bool read_header(Jpeg& jpeg, const std::string& bytes) {
  jpeg.info.err = jpeg_std_error(&jpeg.errors);
  jpeg.errors.error_exit = on_jpeg_error;
  jpeg.errors.emit_message = on_jpeg_message;
  jpeg.info.client_data = &jpeg;
  if (setjmp(jpeg.jump) != 0) return false;
  jpeg_create_decompress(&jpeg.info);
  jpeg.progress.progress_monitor = on_jpeg_progress;
  jpeg.info.progress = &jpeg.progress;
  jpeg_save_markers(&jpeg.info, JPEG_APP0 + 1, 0xffff);
  jpeg_mem_src(&jpeg.info, reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size());
  jpeg_read_header(&jpeg.info, TRUE);
  const bool inks = jpeg.info.jpeg_color_space == JCS_CMYK || jpeg.info.jpeg_color_space == JCS_YCCK;
  jpeg.info.out_color_space = inks ? JCS_CMYK : JCS_RGB;
  return true;
}

// `row` holds a row of four inks where the file has them.
bool read_rows(Jpeg& jpeg, std::uint8_t* rgb, std::uint8_t* row) {
  if (setjmp(jpeg.jump) != 0) return false;
  jpeg_start_decompress(&jpeg.info);
  const std::size_t width = jpeg.info.output_width;
  while (jpeg.info.output_scanline < jpeg.info.output_height) {
    std::uint8_t* const out = rgb + jpeg.info.output_scanline * width * 3;
    JSAMPROW target = row != nullptr ? row : out;
    jpeg_read_scanlines(&jpeg.info, &target, 1);
    if (row == nullptr) continue;
    for (std::size_t x = 0; x < width; ++x)
      for (std::size_t c = 0; c < 3; ++c)  // inverted inks: what is left of white
        out[3 * x + c] = times(row[4 * x + c], row[4 * x + 3]);
  }
  jpeg_finish_decompress(&jpeg.info);
  return true;
}

// What the first block of Exif says, or else the last one of XMP.
int orientation_of(const Jpeg& jpeg) {
  using namespace std::string_view_literals;
  constexpr std::string_view exif_name = "Exif\0\0"sv, xmp_name = "http://ns.adobe.com/xap/1.0/\0"sv;
  std::string_view exif, xmp;
  for (const jpeg_marker_struct* marker = jpeg.info.marker_list; marker != nullptr; marker = marker->next) {
    const std::string_view data(reinterpret_cast<const char*>(marker->data), marker->data_length);
    if (exif.empty() && data.starts_with(exif_name)) exif = data.substr(exif_name.size());
    if (data.starts_with(xmp_name)) xmp = data.substr(xmp_name.size());
  }
  return stored_orientation(exif, xmp);
}

Image decode_jpeg(const fs::path& path, const std::string& bytes) {
  Jpeg jpeg;
  if (!read_header(jpeg, bytes)) fail(path, std::string("cannot decode: ") + jpeg.error);
  Image image =
      make_image(path, static_cast<Index>(jpeg.info.image_width), static_cast<Index>(jpeg.info.image_height));
  const int orientation = orientation_of(jpeg);  // libjpeg drops the markers when it is done
  std::vector<std::uint8_t> row;
  if (jpeg.info.out_color_space == JCS_CMYK) row.resize(static_cast<std::size_t>(image.width) * 4);
  if (!read_rows(jpeg, image.rgb.data(), row.empty() ? nullptr : row.data()))
    fail(path, std::string("cannot decode: ") + jpeg.error);
  return upright(std::move(image), orientation);
}

// What other files that people take for pictures begin with; empty for an unknown one.
std::string_view other_format(std::string_view bytes) {
  using namespace std::string_view_literals;
  struct Format {
    std::size_t at;
    std::string_view begins, name;
  };
  constexpr Format formats[] = {
      {0, "GIF8"sv, "a GIF"},
      {8, "WEBP"sv, "a WebP"},
      {0, "BM"sv, "a BMP"},
      {0, "II*\0"sv, "a TIFF"},
      {0, "MM\0*"sv, "a TIFF"},
      {0, "II+\0"sv, "a TIFF"},
      {0, "MM\0+"sv, "a TIFF"},
      {4, "ftypavif"sv, "an AVIF"},
      {4, "ftypavis"sv, "an AVIF"},
      {4, "ftyphe"sv, "a HEIC"},
      {4, "ftypmif1"sv, "a HEIC or AVIF"},
      {4, "ftypmsf1"sv, "a HEIC or AVIF"},
      {0, "\xff\x0a"sv, "a JPEG XL"},
      {4, "JXL \r\n\x87\n"sv, "a JPEG XL"},
      {4, "jP  \r\n\x87\n"sv, "a JPEG 2000"},
      {0, "\xff\x4f\xff\x51"sv, "a JPEG 2000"},
      {0, "8BPS"sv, "a Photoshop file"},
      {0, "%PDF-"sv, "a PDF"},
      {0, "<svg"sv, "an SVG"},
      {0, "<?xml"sv, "an XML file, perhaps an SVG"},
      {0, "\0\0\1\0"sv, "an icon file"},
      {0, "qoif"sv, "a QOI"},
      {0, "P5\n"sv, "a PGM"},
      {0, "P6\n"sv, "a PPM"},
  };
  for (const Format& format : formats)
    if (bytes.substr(std::min(format.at, bytes.size())).starts_with(format.begins)) return format.name;
  return {};
}

// Any of the two: the first bytes tell.
Image decode(const fs::path& path, std::string bytes) {
  if (bytes.starts_with("\x89PNG\r\n\x1a\n")) return decode_png(path, std::move(bytes));
  if (bytes.starts_with("\xff\xd8\xff")) return decode_jpeg(path, bytes);
  if (bytes.empty()) fail(path, "is empty, neither a PNG nor a JPEG");
  const std::string_view other = other_format(bytes);
  if (other.empty()) fail_by_content(path, bytes, "is neither a PNG nor a JPEG");
  fail(path, "is " + std::string(other) + ", neither a PNG nor a JPEG: convert it to one");
}

}  // namespace

template <class T>
Image to_image(std::span<const T> pixels, Index width, Index height, Rounding rounding) {
  const T up = rounding == Rounding::nearest ? T(0.5) : T(0);
  if (static_cast<Index>(pixels.size()) != width * height * 3)
    throw std::logic_error(std::to_string(pixels.size()) + " values for a picture of " +
                           std::to_string(width) + " x " + std::to_string(height));
  Image image{width, height, std::vector<std::uint8_t>(pixels.size())};
  for (std::size_t i = 0; i < pixels.size(); ++i) {
    const T level = (pixels[i] + 1) / 2 * 255 + up;
    image.rgb[i] = level >= 255 ? std::uint8_t{255}
                   : level >= 0 ? static_cast<std::uint8_t>(level)
                                : std::uint8_t{0};
  }
  return image;
}
template Image to_image<float>(std::span<const float>, Index, Index, Rounding);
template Image to_image<double>(std::span<const double>, Index, Index, Rounding);

Image side_by_side(std::span<const Image> images, Index gap) {
  Image result;
  for (const Image& image : images) {
    if (image.height != images[0].height)
      throw std::runtime_error("pictures of " + std::to_string(images[0].height) + " and " +
                               std::to_string(image.height) + " rows do not fit side by side");
    result.width += image.width + (&image == images.data() ? 0 : gap);
    result.height = image.height;
  }
  result.rgb.assign(static_cast<std::size_t>(result.width * result.height * 3), 255);
  Index column = 0;
  for (const Image& image : images) {
    for (Index row = 0; row < image.height; ++row)
      std::copy_n(image.rgb.begin() + row * image.width * 3, image.width * 3,
                  result.rgb.begin() + (row * result.width + column) * 3);
    column += image.width + gap;
  }
  return result;
}

std::string encode_png(const Image& image, const PngText& text) {
  std::vector<png_text> chunks;
  for (const auto& [keyword, value] : text) {
    if (const std::string why = text_error(value); !why.empty())
      throw std::runtime_error("the picture's text '" + keyword + "': " + why);
    png_text chunk{};
    chunk.compression = is_ascii(value) ? PNG_TEXT_COMPRESSION_NONE : PNG_ITXT_COMPRESSION_NONE;
    // libpng takes pointers to mutable text and does not write through them.
    chunk.key = const_cast<char*>(keyword.c_str());
    chunk.text = const_cast<char*>(value.c_str());
    (chunk.compression == PNG_TEXT_COMPRESSION_NONE ? chunk.text_length : chunk.itxt_length) = value.size();
    chunks.push_back(chunk);
  }
  Sink sink;
  if (!encode(sink, image, chunks.data(), static_cast<int>(chunks.size())))
    throw std::runtime_error("the picture cannot be encoded: " +
                             std::string(sink.error[0] != '\0' ? sink.error : "out of memory"));
  return std::move(sink.bytes);
}

void write_png(const fs::path& path, const Image& image, const PngText& text) {
  const Unfinished unfinished;
  if (const linattn::FileStatus status = linattn::write_file(path, encode_png(image, text)); !status.ok())
    throw std::runtime_error(message(status));
}

Image read_image(const fs::path& path) { return decode(path, read_picture(path)); }

}  // namespace nn

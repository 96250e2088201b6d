#include "image.hpp"

#include <png.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csetjmp>
#include <cstdio>
// jpeglib.h needs the types of cstdio.
#include <jerror.h>
#include <jpeglib.h>

#include <memory>
#include <stdexcept>
#include <string_view>
#include <system_error>

#include <linattn/weights/atomic_file.hpp>

#include "signals.hpp"
#include "small_file.hpp"

namespace nn {
namespace {

namespace fs = std::filesystem;

std::string reason(int error) { return std::system_category().message(error); }

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

// A pipe or a device has no name to rename to.
bool is_special(const fs::path& path) {
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  return fs::exists(status) && !fs::is_regular_file(status) && !fs::is_directory(status);
}

void write_directly(const fs::path& path, std::string_view bytes) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "wb"), std::fclose);
  if (file == nullptr) fail(path, "cannot open: " + reason(errno));
  if (std::fwrite(bytes.data(), 1, bytes.size(), file.get()) != bytes.size() || std::fflush(file.get()) != 0)
    fail(path, "cannot write: " + reason(errno));
}

std::string read_picture(const fs::path& path) {
  return read_small_file(path, std::uintmax_t{256} << 20, "a picture");
}

// Memory for a picture, once its header has told its size.
Image make_image(const fs::path& path, Index width, Index height) {
  constexpr Index most = Index{1} << 27;
  if (width < 1 || height < 1 || width > most / height)
    fail(path, "is " + std::to_string(width) + " x " + std::to_string(height) + " pixels; at most " +
                   std::to_string(most) + " are read");
  return {width, height, std::vector<std::uint8_t>(static_cast<std::size_t>(width * height * 3))};
}

Image decode_png(const fs::path& path, const std::string& bytes) {
  png_image png{};
  png.version = PNG_IMAGE_VERSION;
  const std::unique_ptr<png_image, void (*)(png_image*)> guard(&png, png_image_free);
  if (png_image_begin_read_from_memory(&png, bytes.data(), bytes.size()) == 0) fail(path, png.message);
  png.format = PNG_FORMAT_RGB;
  png.flags |= PNG_IMAGE_FLAG_16BIT_sRGB;  // 16 bits are as little linear as 8, unless the file says so
  Image image = make_image(path, static_cast<Index>(png.width), static_cast<Index>(png.height));
  const png_color black{};
  if (png_image_finish_read(&png, &black, image.rgb.data(), 0, nullptr) == 0) fail(path, png.message);
  return image;
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
        out[3 * x + c] = static_cast<std::uint8_t>((row[4 * x + c] * row[4 * x + 3] + 127) / 255);
  }
  jpeg_finish_decompress(&jpeg.info);
  return true;
}

Image decode_jpeg(const fs::path& path, const std::string& bytes) {
  Jpeg jpeg;
  if (!read_header(jpeg, bytes)) fail(path, std::string("cannot decode: ") + jpeg.error);
  Image image =
      make_image(path, static_cast<Index>(jpeg.info.image_width), static_cast<Index>(jpeg.info.image_height));
  std::vector<std::uint8_t> row;
  if (jpeg.info.out_color_space == JCS_CMYK) row.resize(static_cast<std::size_t>(image.width) * 4);
  if (!read_rows(jpeg, image.rgb.data(), row.empty() ? nullptr : row.data()))
    fail(path, std::string("cannot decode: ") + jpeg.error);
  return image;
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

void write_png(const fs::path& path, const Image& image, const PngText& text) {
  std::vector<png_text> chunks;
  for (const auto& [keyword, value] : text) {
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
    fail(path, std::string("cannot encode: ") + (sink.error[0] != '\0' ? sink.error : "out of memory"));

  if (is_special(path)) return write_directly(path, sink.bytes);
  const Unfinished unfinished;
  if (const linattn::FileStatus status = linattn::write_file(path, sink.bytes); !status.ok())
    throw std::runtime_error(message(status));
}

Image read_png(const fs::path& path) { return decode_png(path, read_picture(path)); }
Image read_jpeg(const fs::path& path) { return decode_jpeg(path, read_picture(path)); }

Image read_image(const fs::path& path) {
  const std::string bytes = read_picture(path);
  if (bytes.starts_with("\x89PNG\r\n\x1a\n")) return decode_png(path, bytes);
  if (bytes.starts_with("\xff\xd8\xff")) return decode_jpeg(path, bytes);
  fail(path, "is neither a PNG nor a JPEG");
}

}  // namespace nn

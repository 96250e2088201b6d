// What a file is that was taken for another: told by its first bytes, with what to do about it.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include <linattn/version.hpp>

LINATTN_BEGIN

// The first bytes as text in lower case, without a byte-order mark and blanks in front.
[[nodiscard]] inline std::string beginning_of(std::string_view content, std::size_t length = 64) {
  if (content.starts_with("\xEF\xBB\xBF")) content.remove_prefix(3);
  content.remove_prefix(std::min(content.size(), content.find_first_not_of(" \t\r\n")));
  std::string text(content.substr(0, length));
  for (char& c : text)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  return text;
}

namespace detail {

[[nodiscard]] inline std::string_view as_text(std::span<const std::byte> content) {
  return {reinterpret_cast<const char*>(content.data()), content.size()};
}

}  // namespace detail

// Whether a file is JSON rather than safetensors, which has NUL among its first eight bytes.
[[nodiscard]] inline bool looks_like_json(std::string_view content) {
  return content.substr(0, 8).find('\0') == std::string_view::npos &&
         beginning_of(content, 1).find_first_of("{[") == 0;
}

[[nodiscard]] inline bool looks_like_json(std::span<const std::byte> content) {
  return looks_like_json(detail::as_text(content));
}

// Whether a file is a model of ours: JSON, as an index is, or the header of a safetensors file behind its length.
[[nodiscard]] inline bool looks_like_model(std::span<const std::byte> content) {
  const std::string_view text = detail::as_text(content);
  return looks_like_json(text) ||
         (text.size() > 8 && text[8] == '{' && text.substr(4, 4) == std::string_view("\0\0\0\0", 4));
}

[[nodiscard]] inline bool looks_like_picture(std::span<const std::byte> content) {
  const std::string_view text = detail::as_text(content);
  return text.starts_with("\x89PNG") || text.starts_with("\xff\xd8\xff");
}

// A clause as "is a Git LFS pointer, not the file itself: 'git lfs pull' fetches it", or nothing where the beginning
// tells nothing.
[[nodiscard]] inline std::string foreign_kind(std::string_view content) {
  using namespace std::string_view_literals;
  static constexpr std::string_view convert =
      ": load it in PyTorch and write it with safetensors.torch.save_file";
  static constexpr std::string_view unpack = ": unpack it first";
  static constexpr std::string_view other = ": another program's model, name the safetensors files instead";
  struct Magic {
    std::string_view bytes, what, advice;
  };
  static constexpr std::array magics{
      Magic{"PK\x03\x04"sv, "a ZIP archive, as torch.save writes (.pt, .bin, .ckpt)", convert},
      Magic{"\x80\x02"sv, "a Python pickle, as old versions of torch.save write", convert},
      Magic{"\x80\x03"sv, "a Python pickle", convert},
      Magic{"\x80\x04"sv, "a Python pickle", convert},
      Magic{"\x80\x05"sv, "a Python pickle", convert},
      Magic{"\x1f\x8b"sv, "compressed by gzip", unpack},
      Magic{"\xfd\x37zXZ"sv, "compressed by xz", unpack},
      Magic{"\x28\xb5\x2f\xfd"sv, "compressed by zstd", unpack},
      Magic{"BZh"sv, "compressed by bzip2", unpack},
      Magic{"7z\xbc\xaf\x27\x1c"sv, "a 7z archive", unpack},
      Magic{"Rar!\x1a\x07"sv, "a RAR archive", unpack},
      Magic{"GGUF"sv, "a GGUF file (llama.cpp, stable-diffusion.cpp)", other},
      Magic{"ggml"sv, "a GGML file", other},
      Magic{"lmgg"sv, "a GGML file", other},
      Magic{"tjgg"sv, "a GGML file", other},
      Magic{"\x89HDF"sv, "an HDF5 file (Keras)", other},
      Magic{"\x93NUMPY"sv, "a NumPy array", convert},
      Magic{"\x89PNG"sv, "a PNG picture", ""},
      Magic{"\xff\xd8\xff"sv, "a JPEG picture", ""},
      Magic{"RIFF"sv, "a RIFF file (WebP)", ""},
      Magic{"GIF8"sv, "a GIF picture", ""},
      Magic{"%PDF"sv, "a PDF document", ""},
  };
  if (content.empty()) return "is empty: it was not written or fetched to the end, fetch it again";
  for (const Magic& magic : magics)
    if (content.starts_with(magic.bytes)) return "is " + std::string(magic.what) + std::string(magic.advice);
  if (content.size() > 262 && content.substr(257, 5) == "ustar")
    return "is a tar archive" + std::string(unpack);

  const std::string text = beginning_of(content);
  const auto begins = [&](std::string_view what) { return text.starts_with(what); };
  if (begins("version https://git-lfs") || begins("version https://hawser"))
    return "is a Git LFS pointer, not the file itself: 'git lfs pull' in its folder fetches it";
  if (begins("<!doctype html") || begins("<html") || begins("<head") || begins("<!--"))
    return "is an HTML page, not the file itself: the download was answered by a page, as that of a login, "
           "fetch it again";
  if (begins("<?xml")) return "is an XML document, as a server's error message: fetch the file again";
  if (content.size() >= 64 &&
      std::all_of(content.begin(),
                  content.begin() + static_cast<std::ptrdiff_t>(std::min<std::size_t>(content.size(), 4096)),
                  [](char c) { return c == '\0'; }))
    return "holds zeros alone at its begin: it was not written or fetched to the end, fetch it again";
  return {};
}
[[nodiscard]] inline std::string foreign_kind(std::span<const std::byte> content) {
  return foreign_kind(detail::as_text(content));
}

LINATTN_END

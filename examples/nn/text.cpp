#include "text.hpp"

#include <utf8proc.h>

#include <cstdio>
#include <stdexcept>
#include <utility>

namespace nn {
namespace {

// The bytes of the first character of a text that is not empty, or 0 where they are not UTF-8.
std::size_t first_character(std::string_view text, utf8proc_int32_t& character) {
  const auto read = utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                                     static_cast<utf8proc_ssize_t>(text.size()), &character);
  return read > 0 ? static_cast<std::size_t>(read) : 0;
}

bool invisible(utf8proc_int32_t character) {
  switch (utf8proc_category(character)) {
    case UTF8PROC_CATEGORY_CC:  // control
    case UTF8PROC_CATEGORY_CF:  // format, as those that turn the direction of writing
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
      return true;
    default:
      return false;
  }
}

std::string escaped(utf8proc_int32_t character) {
  if (character == '\n') return "\\n";
  if (character == '\r') return "\\r";
  if (character == '\t') return "\\t";
  char text[16];
  std::snprintf(text, sizeof text, character < 0x100 ? "\\x%02x" : "\\u{%x}",
                static_cast<unsigned>(character));
  return text;
}

}  // namespace

std::string text_error(std::string_view text) {
  utf8proc_int32_t character = 0;
  for (std::size_t at = 0, size; at < text.size(); at += size) {
    size = first_character(text.substr(at), character);
    if (size == 0) return "byte " + std::to_string(at) + " is not UTF-8";
    if (character == 0) return "byte " + std::to_string(at) + " is NUL";
  }
  return {};
}

std::string without_byte_order_mark(std::string text) {
  constexpr std::string_view mark = "\xef\xbb\xbf";
  if (text.starts_with(mark)) text.erase(0, mark.size());
  return text;
}

std::string checked_text(std::string content, const std::string& file) {
  using namespace std::string_view_literals;
  // That of little-endian UTF-32 begins with that of UTF-16.
  for (const auto& [mark, name] :
       {std::pair("\xff\xfe\0\0"sv, "UTF-32"), std::pair("\0\0\xfe\xff"sv, "UTF-32"),
        std::pair("\xff\xfe"sv, "UTF-16"), std::pair("\xfe\xff"sv, "UTF-16")})
    if (content.starts_with(mark)) throw std::runtime_error(file + ": is " + name + ", UTF-8 is expected");
  content = without_byte_order_mark(std::move(content));
  if (const std::string why = text_error(content); !why.empty())
    throw std::runtime_error(file + ": " + why + ", text in UTF-8 is expected");
  return content;
}

std::string printable(std::string_view text) {
  std::string result;
  utf8proc_int32_t character = 0;
  while (!text.empty()) {
    const std::size_t size = first_character(text, character);
    if (size == 0)
      result += escaped(static_cast<unsigned char>(text.front()));
    else if (invisible(character))
      result += escaped(character);
    else
      result += text.substr(0, size);
    text.remove_prefix(size == 0 ? 1 : size);
  }
  return result;
}

}  // namespace nn

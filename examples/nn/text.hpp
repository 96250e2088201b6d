// Text from outside (arguments, files, names of files) is UTF-8, and what quotes it is printable.
#pragma once

#include <string>
#include <string_view>

namespace nn {

/// What is wrong with text that has to be UTF-8 without NUL, such as "byte 3 is not UTF-8"; empty where nothing is.
[[nodiscard]] std::string text_error(std::string_view text);

[[nodiscard]] std::string without_byte_order_mark(std::string text);

/// The content of a text file, without its byte-order mark. Throws std::runtime_error "FILE: is UTF-16, ...".
[[nodiscard]] std::string checked_text(std::string content, const std::string& file);

/// For a sentence on one line: control and other invisible characters, and bytes that are not UTF-8, as \n or \x1b.
[[nodiscard]] std::string printable(std::string_view text);

}  // namespace nn

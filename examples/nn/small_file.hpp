// A whole file of bounded size as a string: vocabularies and other small files that a user hands us.
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <system_error>

namespace nn {

// Throws "PATH: sentence".
[[noreturn]] inline void fail(const std::filesystem::path& file, const std::string& what) {
  throw std::runtime_error(file.string() + ": " + what);
}

// The content of a regular file of at most `limit` bytes; `kind` says in the message what the file is taken for.
[[nodiscard]] inline std::string read_small_file(const std::filesystem::path& file, std::uintmax_t limit,
                                                 const std::string& kind) {
  std::error_code error;
  const std::filesystem::file_status status = std::filesystem::status(file, error);
  if (!std::filesystem::exists(status)) fail(file, "no such file");
  if (!std::filesystem::is_regular_file(status)) fail(file, "is not a regular file");
  const std::uintmax_t size = std::filesystem::file_size(file, error);
  if (error) fail(file, "cannot be read: " + error.message());
  if (size > limit)
    fail(file, "has " + std::to_string(size) + " bytes; " + kind + " has at most " + std::to_string(limit));
  std::ifstream stream(file, std::ios::binary);
  std::string content(static_cast<std::size_t>(size), '\0');
  if (!stream.read(content.data(), static_cast<std::streamsize>(size))) fail(file, "cannot be read");
  return content;
}

}  // namespace nn

// Small files that a user hands us (vocabularies, prompts, pictures), whose failures are exceptions.
#pragma once

#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>

#include <linattn/weights/file_kind.hpp>
#include <linattn/weights/small_file.hpp>

namespace nn {

// Throws "PATH: sentence".
[[noreturn]] inline void fail(const std::filesystem::path& file, const std::string& what) {
  throw std::runtime_error(file.string() + ": " + what);
}

// Throws what the file is instead of what was expected, if its content tells, or else `what`.
[[noreturn]] inline void fail_by_content(const std::filesystem::path& file, std::string_view content,
                                         const std::string& what) {
  const std::string foreign = linattn::foreign_kind(content);
  fail(file, foreign.empty() ? what : foreign);
}

// linattn::read_small_file() that throws.
[[nodiscard]] inline std::string read_small_file(const std::filesystem::path& file, std::size_t limit,
                                                 const std::string& kind,
                                                 linattn::SmallFile takes = linattn::SmallFile::regular) {
  std::string content;
  const linattn::FileStatus status = linattn::read_small_file(file, limit, kind, content, takes);
  std::error_code ignored;
  if (status.status.native == ENOENT && !std::filesystem::is_symlink(file, ignored))
    fail(file, "no such file");
  if (!status.ok()) throw std::runtime_error(message(status));
  return content;
}

}  // namespace nn

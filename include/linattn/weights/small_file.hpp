// Whole files of bounded size: configurations, indices, vocabularies, prompts. What is larger is refused unread.
#pragma once

#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>

#include <linattn/version.hpp>
#include <linattn/weights/file_kind.hpp>
#include <linattn/weights/file_status.hpp>
#include <linattn/weights/json.hpp>
#include <linattn/weights/regular_file.hpp>

LINATTN_BEGIN

// What is taken beside regular files. The pipe of a shell's <(command) or of `command |` has a writer, but a named one
// may never have, and is always refused.
enum class SmallFile : std::uint8_t { regular, or_unnamed_pipe };

namespace detail {

[[nodiscard]] inline FileStatus too_large(const std::filesystem::path& path, std::string size,
                                          std::size_t limit, std::string_view kind) {
  return file_error(path, "has " + std::move(size) + " bytes, but " + std::string(kind) + " has at most " +
                              std::to_string(limit));
}

// All bytes up to the end of the file; one more than `most` where there are more.
[[nodiscard]] inline FileStatus read_to_end(const std::filesystem::path& path, int descriptor,
                                            std::size_t most, std::string& out) {
  constexpr std::size_t piece = 1 << 16;
  std::size_t have = 0;
  for (;;) {
    out.resize(have + std::min(piece, most + 1 - have));
    const ::ssize_t got = ::read(descriptor, out.data() + have, out.size() - have);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return system_error(path, "read", errno);
    have += static_cast<std::size_t>(got);
    if (got == 0 || have > most) break;
  }
  out.resize(have);
  return {};
}

// Linux gives the pipes that have no name a file system of their own.
[[nodiscard]] inline bool is_unnamed_pipe(const std::filesystem::path& path) {
  constexpr auto pipefs = 0x50495045;  // PIPEFS_MAGIC of linux/magic.h
  struct ::statfs system {};
  struct ::stat info {};
  return ::stat(path.c_str(), &info) == 0 && S_ISFIFO(info.st_mode) && ::statfs(path.c_str(), &system) == 0 &&
         system.f_type == pipefs;
}

}  // namespace detail

// The content of a file of at most `limit` bytes; `kind` says in messages what it is taken for ("a list of prompts").
[[nodiscard]] inline FileStatus read_small_file(const std::filesystem::path& path, std::size_t limit,
                                                std::string_view kind, std::string& out,
                                                SmallFile takes = SmallFile::regular) {
  std::string content;
  if (takes == SmallFile::or_unnamed_pipe && detail::is_unnamed_pipe(path)) {
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) return detail::system_error(path, "open", errno);
    FileStatus status = detail::read_to_end(path, descriptor, limit, content);
    ::close(descriptor);
    if (!status.ok()) return status;
    if (content.size() > limit) return detail::too_large(path, "more", limit, kind);
  } else {
    detail::RegularFile file;
    if (FileStatus status = detail::RegularFile::open(path, file); !status.ok()) return status;
    if (file.size() > limit) return detail::too_large(path, std::to_string(file.size()), limit, kind);
    content.reserve(file.size() + 1);
    if (FileStatus status = detail::read_to_end(path, file.descriptor(), file.size(), content); !status.ok())
      return status;
    if (content.size() != file.size())
      return detail::file_error(
          path, std::string(content.size() < file.size() ? "became shorter" : "became longer") +
                    " than its " + std::to_string(file.size()) + " bytes while it was read");
  }
  out = std::move(content);
  return {};
}

inline constexpr std::size_t largest_config = 16u << 20;

// A JSON object from a file of at most `limit` bytes. Json is nlohmann::json or nlohmann::ordered_json.
template <class Json>
[[nodiscard]] FileStatus read_json_file(const std::filesystem::path& path, std::string_view kind, Json& out,
                                        std::size_t limit = largest_config) {
  std::string text;
  if (FileStatus status = read_small_file(path, limit, kind, text); !status.ok()) return status;
  if (const std::string why = parse_json(text, out); !why.empty()) {
    const std::string foreign = foreign_kind(text);
    return detail::file_error(path, foreign.empty() ? why : foreign);
  }
  if (!out.is_object()) return detail::file_error(path, "is not an object");
  return {};
}

LINATTN_END

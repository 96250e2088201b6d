// Files and folders that a path must not touch: what a program reads against what it is about to write. POSIX.
#pragma once

#include <sys/stat.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <system_error>
#include <utility>

#include <linattn/version.hpp>

LINATTN_BEGIN

namespace detail {

// One file under all of its names: links, hard links, mounts, the spellings of a file system that ignores case.
using FileId = std::pair<std::uintmax_t, std::uintmax_t>;

[[nodiscard]] inline std::optional<FileId> file_id(const std::filesystem::path& path) {
  struct ::stat info {};
  if (::stat(path.c_str(), &info) != 0 || !(S_ISREG(info.st_mode) || S_ISDIR(info.st_mode))) return {};
  return FileId(info.st_dev, info.st_ino);
}

// Absolute, without links, `.` and `..`, also where nothing is there yet: a link to nothing becomes the file that
// would be created through it.
[[nodiscard]] inline std::filesystem::path without_links(std::filesystem::path path) {
  namespace fs = std::filesystem;
  std::error_code error;
  for (int links = 0; links < 40; ++links) {
    if (!fs::is_symlink(fs::symlink_status(path, error))) break;
    const fs::path to = fs::read_symlink(path, error);
    if (error) break;
    path = path.parent_path() / to;
  }
  fs::path whole = fs::weakly_canonical(fs::absolute(path, error), error);
  if (error) whole = fs::absolute(path, error).lexically_normal();
  return whole.has_filename() ? whole : whole.parent_path();
}

}  // namespace detail

// The inputs of a program, or its outputs so far. Another output must be none of them, lie in none, and hold none.
class FileSet {
 public:
  // What the set holds, in messages.
  explicit FileSet(std::string noun = "input") : noun_(std::move(noun)) {}

  // A file, or a folder with all that lies in it. A link in a folder counts where it points to, too, as deep as the
  // components of a model lie. What is not there counts by its name.
  void add(const std::filesystem::path& path) { add(path, 3); }

  // Why `output` must not be written, or nothing: a clause that names what it touches.
  [[nodiscard]] std::string conflict(const std::filesystem::path& output) const {
    const std::filesystem::path whole = detail::without_links(output);
    const std::optional<detail::FileId> id = detail::file_id(output);
    if (const std::filesystem::path* same = all_.find(whole, id))
      return "is the " + noun_ + " itself" + (*same == output ? "" : ": " + same->string());
    if (const std::filesystem::path* held = holders_.find(whole, id))
      return "holds the " + noun_ + " " + held->string();
    for (std::filesystem::path folder = whole; folder.has_relative_path();) {
      folder = folder.parent_path();
      if (const std::filesystem::path* around = folders_.find(folder, detail::file_id(folder)))
        return "lies in the " + noun_ + " folder " + around->string();
    }
    return {};
  }

 private:
  // Names as they were given, by path and by file.
  class Names {
   public:
    void add(const std::filesystem::path& path, std::optional<detail::FileId> id,
             const std::filesystem::path& given) {
      paths_.emplace(path.string(), given);
      if (id) ids_.emplace(*id, given);
    }
    [[nodiscard]] const std::filesystem::path* find(const std::filesystem::path& path,
                                                    std::optional<detail::FileId> id) const {
      if (const auto found = paths_.find(path.string()); found != paths_.end()) return &found->second;
      if (!id) return nullptr;
      const auto found = ids_.find(*id);
      return found != ids_.end() ? &found->second : nullptr;
    }

   private:
    std::map<std::string, std::filesystem::path> paths_;
    std::map<detail::FileId, std::filesystem::path> ids_;
  };

  void add(const std::filesystem::path& path, int depth) {
    namespace fs = std::filesystem;
    std::error_code error;
    const fs::file_status status = fs::status(path, error);
    if (path.empty() || fs::is_other(status)) return;  // a device keeps nothing that could be lost
    const fs::path whole = detail::without_links(path);
    all_.add(whole, detail::file_id(path), path);
    for (fs::path folder = whole; folder.has_relative_path();) {
      folder = folder.parent_path();
      if (holders_.find(folder, {}) != nullptr) break;  // and so are those above
      holders_.add(folder, detail::file_id(folder), path);
    }
    if (!fs::is_directory(status)) return;
    folders_.add(whole, detail::file_id(path), path);
    if (depth == 0) return;
    fs::directory_iterator entry(path, error);
    for (; !error && entry != fs::directory_iterator(); entry.increment(error)) add(entry->path(), depth - 1);
  }

  std::string noun_;
  Names all_, folders_, holders_;
};

LINATTN_END

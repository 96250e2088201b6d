// What lies where an output is to be written, once links are followed. POSIX.
#pragma once

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <filesystem>
#include <string>
#include <system_error>
#include <vector>

#include <linattn/version.hpp>
#include <linattn/weights/file_status.hpp>

LINATTN_BEGIN

enum class TargetKind { missing, file, folder, stream };

// A path as a writer sees it. A link is no target: the file that it points to is, and the link stays.
struct OutputTarget {
  std::filesystem::path given;  // for messages
  std::filesystem::path path;   // what is created or replaced
  TargetKind kind = TargetKind::missing;
  int descriptor = -1;    // of this process, where the path leads to one, as /dev/stdout does
  struct ::stat info {};  // unless it is missing

  [[nodiscard]] std::filesystem::path folder() const {
    return path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
  }
};

namespace detail {

// The number of a descriptor of this process: /proc/self/fd/1. Its link must not be followed, because a pipe has no
// other name, and what was redirected to a file goes on where that file ends.
[[nodiscard]] inline int own_descriptor(const std::filesystem::path& path) {
  namespace fs = std::filesystem;
  std::error_code error;
  const fs::path folder = fs::canonical(path.parent_path(), error);
  if (error || (folder != fs::canonical("/proc/self/fd", error) &&
                folder != fs::canonical("/proc/thread-self/fd", error)))
    return -1;
  const std::string name = path.filename().string();
  int number = -1;
  const auto [end, bad] = std::from_chars(name.data(), name.data() + name.size(), number);
  return bad == std::errc() && end == name.data() + name.size() ? number : -1;
}

[[nodiscard]] inline FileStatus examine_target(OutputTarget& target) {
  const auto refuse = [&](const char* why) { return file_error(target.given, why, {}, Code::option); };
  const mode_t mode = target.info.st_mode;
  if (target.descriptor >= 0) {
    if (S_ISDIR(mode) || (::fcntl(target.descriptor, F_GETFL) & O_ACCMODE) == O_RDONLY)
      return system_error(target.given, "write", EBADF);
    target.kind = TargetKind::stream;
    return {};
  }
  if (S_ISBLK(mode)) return refuse("is a block device, which is not written to");
  if (S_ISSOCK(mode)) return refuse("is a socket, which is not written to");
  target.kind = S_ISREG(mode) ? TargetKind::file : S_ISDIR(mode) ? TargetKind::folder : TargetKind::stream;
  return {};
}

}  // namespace detail

[[nodiscard]] inline FileStatus find_target(const std::filesystem::path& given, OutputTarget& out) {
  namespace fs = std::filesystem;
  constexpr int most_links = 40;
  OutputTarget target{.given = given, .path = given};
  if (given.empty()) return detail::file_error(given, "the name of an output is empty", {}, Code::option);
  for (int links = 0;; ++links) {
    if (::lstat(target.path.c_str(), &target.info) != 0) {
      if (errno != ENOENT) return detail::system_error(given, "create", errno);
      out = std::move(target);
      return {};
    }
    if (!S_ISLNK(target.info.st_mode)) break;
    if (links == most_links) return detail::system_error(given, "create", ELOOP);
    target.descriptor = detail::own_descriptor(target.path);
    std::error_code error;
    if (target.descriptor >= 0) {
      if (::fstat(target.descriptor, &target.info) != 0) return detail::system_error(given, "write", errno);
      break;
    }
    const fs::path to = fs::read_symlink(target.path, error);
    if (error) return detail::system_error(given, "create", error.value());
    target.path = target.path.parent_path() / to;
  }
  if (FileStatus status = detail::examine_target(target); !status.ok()) return status;
  if (target.kind == TargetKind::folder) {  // which may be called "."
    std::error_code error;
    target.path = fs::canonical(target.path, error);
    if (error) return detail::system_error(given, "examine", error.value());
  }
  out = std::move(target);
  return {};
}

namespace detail {

// Whether a file or folder that is there may be replaced by a rename: a file as if it was written to, so that one that
// is read-only stays (root may write to any).
[[nodiscard]] inline FileStatus expect_replaceable(const OutputTarget& target) {
  if (target.kind == TargetKind::file) {
    const int file = ::open(target.given.c_str(), O_WRONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (file < 0) return system_error(target.given, "write", errno);
    ::close(file);
  } else if (::faccessat(AT_FDCWD, target.path.c_str(), W_OK | X_OK, AT_EACCESS) != 0) {
    return system_error(target.given, "write", errno);
  }
#if defined(STATX_ATTR_MOUNT_ROOT)
  struct ::statx mount {};
  if (::statx(AT_FDCWD, target.path.c_str(), AT_SYMLINK_NOFOLLOW, 0, &mount) == 0 &&
      (mount.stx_attributes & STATX_ATTR_MOUNT_ROOT) != 0)
    return file_error(target.given, "is a mount point, which cannot be replaced", {}, Code::option);
#endif
  struct ::stat folder {};
  const uid_t user = ::geteuid();
  if (::stat(target.folder().c_str(), &folder) == 0 && (folder.st_mode & S_ISVTX) != 0 && user != 0 &&
      user != folder.st_uid && user != target.info.st_uid)
    return system_error(target.given, "replace", EPERM);
  return {};
}

// Temporaries have short names of their own, so that a target may have the longest. A lock on them tells whether who
// made them lives.
inline constexpr std::string_view temporary_prefix = ".linattn-";

// Calls make(path) with names until one is free. A number of a process may come again, in containers at once.
template <class Make>
[[nodiscard]] int make_temporary(const std::filesystem::path& folder, const char* ending,
                                 std::filesystem::path& out, Make&& make) {
  for (int attempt = 0;; ++attempt) {
    out = folder / (std::string(temporary_prefix) + std::to_string(::getpid()) + "-" +
                    std::to_string(attempt) + ending);
    if (make(out)) return 0;
    const int error = errno;
    if (error == EEXIST && attempt < 9999) continue;
    out.clear();
    return error;
  }
}

// Makes a new name survive a power cut. The content is complete either way, so a folder that cannot be flushed is no
// failure.
inline void sync_folder(const std::filesystem::path& folder) {
  const int file = ::open(folder.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return;
  (void)::fsync(file);
  ::close(file);
}

}  // namespace detail

// Temporaries in a folder that no process holds any more: what is left of runs that were killed. One that ends in .old
// is what a folder was before.
[[nodiscard]] inline std::vector<std::filesystem::path> left_temporaries(
    const std::filesystem::path& folder) {
  namespace fs = std::filesystem;
  std::vector<fs::path> left;
  std::error_code error;
  fs::directory_iterator entry(folder, error);
  for (; !error && entry != fs::directory_iterator(); entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    if (!name.starts_with(detail::temporary_prefix) || !(name.ends_with(".tmp") || name.ends_with(".old")))
      continue;
    const int file = ::open(entry->path().c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW);
    const bool held = file >= 0 && ::flock(file, LOCK_SH | LOCK_NB) != 0 && errno == EWOULDBLOCK;
    if (file >= 0) ::close(file);
    if (!held) left.push_back(entry->path());
  }
  return left;
}

LINATTN_END

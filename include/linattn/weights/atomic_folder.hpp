// A folder that appears whole or not at all. POSIX.
#pragma once

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <system_error>
#include <utility>

#include <linattn/version.hpp>
#include <linattn/weights/file_status.hpp>
#include <linattn/weights/output_target.hpp>

LINATTN_BEGIN

// Made under a temporary name beside the target. A folder that is there is exchanged for it in one step and then
// removed. Where the file system cannot exchange (RENAME_EXCHANGE is Linux's), two renames do it: who is killed between
// them leaves no target, but the old one beside it, under a name that ends in .old.
class AtomicFolder {
 public:
  AtomicFolder() = default;
  AtomicFolder(const AtomicFolder&) = delete;
  AtomicFolder& operator=(const AtomicFolder&) = delete;
  ~AtomicFolder() {
    std::error_code ignored;
    if (!temporary_.empty()) std::filesystem::remove_all(temporary_, ignored);
    if (lock_ >= 0) ::close(lock_);
  }

  [[nodiscard]] FileStatus create(const OutputTarget& target) {
    target_ = target;
    if (replaces())
      if (FileStatus status = detail::expect_replaceable(target_); !status.ok()) return status;
    const int error = detail::make_temporary(target_.folder(), ".tmp", temporary_, [](const auto& path) {
      return ::mkdir(path.c_str(), 0777) == 0;
    });
    if (error != 0) return detail::system_error(target_.given, "create", error);
    lock_ = ::open(temporary_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (lock_ >= 0) (void)::flock(lock_, LOCK_EX | LOCK_NB);
    return {};
  }
  [[nodiscard]] const std::filesystem::path& path() const { return temporary_; }

  [[nodiscard]] FileStatus commit() {
    if (replaces()) (void)::chmod(temporary_.c_str(), target_.info.st_mode & 0777);
    detail::sync_folder(temporary_);
    const int error = replaces() ? exchange() : move(temporary_, target_.path);
    if (error != 0) return detail::system_error(target_.given, replaces() ? "replace" : "create", error);
    detail::sync_folder(target_.folder());
    const std::filesystem::path old = std::exchange(temporary_, {});
    if (!replaces()) return {};
    std::error_code removed;
    std::filesystem::remove_all(old, removed);
    return removed ? detail::system_error(old, "remove", removed.value()) : FileStatus{};
  }

 private:
  [[nodiscard]] bool replaces() const { return target_.kind == TargetKind::folder; }

  // Never onto something that has come there meanwhile, not even an empty folder. Gives errno.
  [[nodiscard]] static int move(const std::filesystem::path& from, const std::filesystem::path& to) {
#if defined(RENAME_NOREPLACE)
    if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_NOREPLACE) == 0) return 0;
    if (errno != EINVAL && errno != ENOSYS) return errno;
#endif
    struct ::stat info {};
    if (::lstat(to.c_str(), &info) == 0) return EEXIST;
    return ::rename(from.c_str(), to.c_str()) == 0 ? 0 : errno;
  }

  // Afterwards temporary_ is what the target was.
  [[nodiscard]] int exchange() {
#if defined(RENAME_EXCHANGE)
    if (::renameat2(AT_FDCWD, temporary_.c_str(), AT_FDCWD, target_.path.c_str(), RENAME_EXCHANGE) == 0)
      return 0;
    if (errno != EINVAL && errno != ENOSYS) return errno;
#endif
    std::filesystem::path old;
    int error = detail::make_temporary(target_.folder(), ".old", old, [&](const auto& path) {
      errno = move(target_.path, path);
      return errno == 0;
    });
    if (error != 0) return error;
    error = move(temporary_, target_.path);
    if (error != 0)
      (void)move(old, target_.path);
    else
      temporary_ = old;
    return error;
  }

  OutputTarget target_;
  std::filesystem::path temporary_;
  int lock_ = -1;
};

LINATTN_END

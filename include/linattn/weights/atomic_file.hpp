// A file that appears whole or not at all. POSIX.
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include <linattn/version.hpp>
#include <linattn/weights/file_status.hpp>
#include <linattn/weights/mapped_file.hpp>
#include <linattn/weights/output_target.hpp>

LINATTN_BEGIN

// Written under a temporary name in the folder of the target, flushed to the disk, then renamed: whoever
// opens the target sees the old content or all of the new. Without commit(), or after any failure, the
// temporary is removed and the target is as it was. A link stays, its file is replaced; a file that is replaced hands on
// its mode, and its owner where that is permitted. A device, a pipe or a descriptor (/dev/stdout) is written to
// as it is.
class AtomicFile {
 public:
  AtomicFile() = default;
  AtomicFile(AtomicFile&& other) noexcept { *this = std::move(other); }
  AtomicFile& operator=(AtomicFile&& other) noexcept {
    std::swap(file_, other.file_);
    std::swap(target_, other.target_);
    std::swap(temporary_, other.temporary_);
    return *this;
  }
  ~AtomicFile() { discard(); }

  [[nodiscard]] static FileStatus create(const std::filesystem::path& path, AtomicFile& out) {
    AtomicFile made;
    OutputTarget& target = made.target_;
    target.given = path;
    if (FileStatus status = find_target(path, target); !status.ok()) return status;
    if (target.kind == TargetKind::folder || !target.path.has_filename())
      return detail::file_error(path, "is a folder, a file name is needed", {}, Code::option);
    FileStatus status;
    if (target.kind == TargetKind::stream)
      status = made.open_stream();
    else
      status = made.open_temporary();
    if (status.ok()) out = std::move(made);
    return status;
  }

  // Whether what is written goes straight to its place, so that nothing is unfinished meanwhile.
  [[nodiscard]] bool streams() const { return target_.kind == TargetKind::stream; }

  [[nodiscard]] FileStatus write(std::span<const std::byte> bytes) {
    if (file_ < 0) return detail::file_error(target_.given, "not open for writing", {}, Code::option);
    while (!bytes.empty()) {
      const ssize_t count = ::write(file_, bytes.data(), std::min(bytes.size(), largest_write));
      if (count < 0 && errno == EINTR) continue;
      if (count < 0 && errno == EAGAIN) {  // another program made the pipe non-blocking
        ::pollfd wait{file_, POLLOUT, 0};
        ::poll(&wait, 1, -1);
        continue;
      }
      if (count < 0) return fail("write", errno);
      bytes = bytes.subspan(static_cast<std::size_t>(count));
    }
    return {};
  }
  [[nodiscard]] FileStatus write(std::string_view text) { return write(std::as_bytes(std::span(text))); }

  // Bytes of a mapped file. The kernel moves them by itself where it can (Linux, most file systems), else they
  // are read through the mapping and released at once: either way the memory of this process does not grow.
  [[nodiscard]] FileStatus write(const MappedFile& from, std::span<const std::byte> bytes) {
#if defined(__linux__)
    off_t offset = bytes.data() - from.bytes().data();
    while (file_ >= 0 && !bytes.empty()) {
      const ssize_t count = ::copy_file_range(from.descriptor(), &offset, file_, nullptr, bytes.size(), 0);
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0) break;  // whatever the reason, write() below succeeds or names it
      bytes = bytes.subspan(static_cast<std::size_t>(count));
    }
#endif
    FileStatus status = write(bytes);
    from.release(bytes);
    return status;
  }

  [[nodiscard]] FileStatus commit() {
    if (file_ < 0) return detail::file_error(target_.given, "not open for writing", {}, Code::option);
    // What is no file of a disk has nothing to flush.
    if (::fsync(file_) != 0 && !(streams() && (errno == EINVAL || errno == ENOTSUP || errno == EROFS)))
      return fail("flush", errno);
    if (streams()) return ::close(std::exchange(file_, -1)) != 0 ? fail("close", errno) : FileStatus{};
    // The descriptor holds the lock that tells that the temporary is alive; a second one tells the errors of close().
    const int copy = ::dup(file_);
    if (copy >= 0 && ::close(copy) != 0) return fail("close", errno);
    if (::rename(temporary_.c_str(), target_.path.c_str()) != 0) return fail("rename to", errno);
    temporary_.clear();
    ::close(std::exchange(file_, -1));
    detail::sync_folder(target_.folder());
    return {};
  }

  void discard() {
    if (!temporary_.empty()) ::unlink(temporary_.c_str());
    temporary_.clear();
    if (file_ >= 0) ::close(std::exchange(file_, -1));
  }

 private:
  static constexpr std::size_t largest_write = std::size_t{1} << 30;  // Linux takes 2 GiB - 4 KiB a call
  static constexpr int seconds_for_reader = 5;

  [[nodiscard]] FileStatus fail(std::string_view action, int error) {
    discard();
    return detail::system_error(target_.given, action, error);
  }

  [[nodiscard]] FileStatus open_temporary() {
    const bool replaces = target_.kind == TargetKind::file;
    if (replaces)
      if (FileStatus status = detail::expect_replaceable(target_); !status.ok()) return status;
    const int error = detail::make_temporary(target_.folder(), ".tmp", temporary_, [&](const auto& path) {
      file_ = ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, replaces ? 0600 : 0666);
      return file_ >= 0;
    });
    if (error != 0) return detail::system_error(target_.given, "create", error);
    (void)::flock(file_, LOCK_EX | LOCK_NB);
    if (!replaces) return {};
    // In this order, as a change of the owner may take bits of the mode.
    if (::fchown(file_, target_.info.st_uid, target_.info.st_gid) != 0) {
      [[maybe_unused]] const int group_alone = ::fchown(file_, static_cast<uid_t>(-1), target_.info.st_gid);
    }
    (void)::fchmod(file_, target_.info.st_mode & 0777);
    return {};
  }

  // A pipe that nobody reads is waited for, but not for ever.
  [[nodiscard]] FileStatus open_stream() {
    if (target_.descriptor >= 0) {
      file_ = ::fcntl(target_.descriptor, F_DUPFD_CLOEXEC, 3);
      return file_ < 0 ? detail::system_error(target_.given, "write", errno) : FileStatus{};
    }
    constexpr int tries_a_second = 50;
    for (int tries = 0; file_ < 0; ++tries) {
      file_ = ::open(target_.path.c_str(), O_WRONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
      if (file_ >= 0) break;
      if (errno != ENXIO || !S_ISFIFO(target_.info.st_mode))
        return detail::system_error(target_.given, "write", errno);
      if (tries == seconds_for_reader * tries_a_second)
        return detail::file_error(
            target_.given,
            "is a pipe that nobody has read for " + std::to_string(seconds_for_reader) + " seconds", {},
            Code::option);
      ::poll(nullptr, 0, 1000 / tries_a_second);
    }
    (void)::fcntl(file_, F_SETFL, ::fcntl(file_, F_GETFL) & ~O_NONBLOCK);
    // Some devices say at once that they take nothing, as /dev/full does. A pipe takes no notice of no bytes.
    if (S_ISCHR(target_.info.st_mode) && ::write(file_, "", 0) < 0) return fail("write", errno);
    return {};
  }

  int file_ = -1;
  OutputTarget target_;
  std::filesystem::path temporary_;
};

// The whole of a small file.
[[nodiscard]] inline FileStatus write_file(const std::filesystem::path& target, std::string_view content) {
  AtomicFile file;
  if (FileStatus status = AtomicFile::create(target, file); !status.ok()) return status;
  if (FileStatus status = file.write(content); !status.ok()) return status;
  return file.commit();
}

LINATTN_END

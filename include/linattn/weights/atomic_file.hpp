// A file that appears whole or not at all. POSIX.
#pragma once

#include <fcntl.h>
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

LINATTN_BEGIN

// Written under a temporary name in the folder of the target, flushed to the disk, then renamed: whoever
// opens the target sees the old content or all of the new. Without commit(), or after any failure, the
// temporary is removed and the target is as it was.
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

  [[nodiscard]] static FileStatus create(const std::filesystem::path& target, AtomicFile& out) {
    AtomicFile made;
    made.target_ = target;
    for (int attempt = 0; made.file_ < 0; ++attempt) {
      made.temporary_ = target;
      made.temporary_ += "." + std::to_string(::getpid()) + "-" + std::to_string(attempt) + ".tmp";
      made.file_ = ::open(made.temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
      if (made.file_ < 0 && (errno != EEXIST || attempt == 99)) {
        const int error = errno;
        made.temporary_.clear();
        return detail::system_error(target, "create", error);
      }
    }
    out = std::move(made);
    return {};
  }

  [[nodiscard]] FileStatus write(std::span<const std::byte> bytes) {
    if (file_ < 0) return detail::file_error(target_, "not open for writing", {}, Code::option);
    while (!bytes.empty()) {
      const ssize_t count = ::write(file_, bytes.data(), std::min(bytes.size(), largest_write));
      if (count < 0 && errno == EINTR) continue;
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
    if (file_ < 0) return detail::file_error(target_, "not open for writing", {}, Code::option);
    if (::fsync(file_) != 0) return fail("flush", errno);
    if (::close(std::exchange(file_, -1)) != 0) return fail("close", errno);
    if (::rename(temporary_.c_str(), target_.c_str()) != 0) return fail("rename to", errno);
    temporary_.clear();
    sync_folder(target_.parent_path());
    return {};
  }

  void discard() {
    if (file_ >= 0) ::close(std::exchange(file_, -1));
    if (!temporary_.empty()) ::unlink(temporary_.c_str());
    temporary_.clear();
  }

 private:
  static constexpr std::size_t largest_write = std::size_t{1} << 30;  // Linux takes 2 GiB - 4 KiB a call

  [[nodiscard]] FileStatus fail(std::string_view action, int error) {
    discard();
    return detail::system_error(target_, action, error);
  }

  // Makes the new name survive a power cut. The content is complete either way, so a folder that cannot be
  // flushed is no failure.
  static void sync_folder(std::filesystem::path folder) {
    if (folder.empty()) folder = ".";
    const int file = ::open(folder.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) return;
    (void)::fsync(file);
    ::close(file);
  }

  int file_ = -1;
  std::filesystem::path target_, temporary_;
};

// The whole of a small file.
[[nodiscard]] inline FileStatus write_file(const std::filesystem::path& target, std::string_view content) {
  AtomicFile file;
  if (FileStatus status = AtomicFile::create(target, file); !status.ok()) return status;
  if (FileStatus status = file.write(content); !status.ok()) return status;
  return file.commit();
}

LINATTN_END

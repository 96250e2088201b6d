// Opening a file that a user names: a regular one alone, and without waiting for one that is none.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include <linattn/version.hpp>
#include <linattn/weights/file_status.hpp>

LINATTN_BEGIN

namespace detail {

[[nodiscard]] inline std::string_view kind_of_file(::mode_t mode) {
  if (S_ISDIR(mode)) return "a folder";
  if (S_ISFIFO(mode)) return "a pipe";
  if (S_ISSOCK(mode)) return "a socket";
  if (S_ISCHR(mode) || S_ISBLK(mode)) return "a device";
  return "no file";
}

// An open regular file, closed at the end.
class RegularFile {
 public:
  RegularFile() = default;
  RegularFile(RegularFile&& other) noexcept
      : descriptor_(std::exchange(other.descriptor_, -1)), size_(other.size_) {}
  RegularFile& operator=(RegularFile&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~RegularFile() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }

  // What is no regular file is not opened: a pipe would wait, a device may act. It is looked at again when it is open,
  // for another file may have taken its name meanwhile.
  [[nodiscard]] static FileStatus open(const std::filesystem::path& path, RegularFile& out) {
    struct ::stat info {};
    if (::stat(path.c_str(), &info) != 0) return cannot_open(path, errno);
    if (!S_ISREG(info.st_mode)) return refuse(path, info.st_mode);
    RegularFile made;
    made.descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (made.descriptor_ < 0) return cannot_open(path, errno);
    if (::fstat(made.descriptor_, &info) != 0) return system_error(path, "examine", errno);
    if (!S_ISREG(info.st_mode)) return refuse(path, info.st_mode);
    made.size_ = static_cast<std::size_t>(info.st_size);
    out = std::move(made);
    return {};
  }

  [[nodiscard]] int descriptor() const { return descriptor_; }  // -1 if there is none
  [[nodiscard]] std::size_t size() const { return size_; }      // when it was opened
  [[nodiscard]] bool has_its_size() const {
    struct ::stat info {};
    return ::fstat(descriptor_, &info) == 0 && static_cast<std::size_t>(info.st_size) == size_;
  }

 private:
  static FileStatus refuse(const std::filesystem::path& path, ::mode_t mode) {
    return file_error(path, "is " + std::string(kind_of_file(mode)) + ", not a regular file");
  }
  static FileStatus cannot_open(const std::filesystem::path& path, int error) {
    FileStatus status = system_error(path, "open", error);
    std::error_code ignored;
    if (error == ENOENT && std::filesystem::is_symlink(path, ignored))
      status.detail = "is a link to '" + printable(std::filesystem::read_symlink(path, ignored).string()) +
                      "', where there is no file";
    return status;
  }

  int descriptor_ = -1;
  std::size_t size_ = 0;
};

}  // namespace detail

LINATTN_END

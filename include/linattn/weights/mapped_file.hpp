// A file seen as memory, read only. POSIX.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <utility>

#include <linattn/version.hpp>
#include <linattn/weights/file_status.hpp>

LINATTN_BEGIN

// Owns the mapping of a whole file. Pages are read when they are touched and may be dropped by the system at
// any time. The file must not be cut short while it is mapped: touching a page that is gone is a SIGBUS.
class MappedFile {
 public:
  MappedFile() = default;
  MappedFile(MappedFile&& other) noexcept
      : path_(std::move(other.path_)), bytes_(std::exchange(other.bytes_, {})) {}
  MappedFile& operator=(MappedFile&& other) noexcept {
    std::swap(path_, other.path_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~MappedFile() {
    if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
  }

  // Maps a regular file. Only a regular one: a pipe has no size.
  [[nodiscard]] static FileStatus open(const std::filesystem::path& path, MappedFile& out) {
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file < 0) return detail::system_error(path, "open", errno);
    struct ::stat info {};
    void* memory = nullptr;
    FileStatus status;
    MappedFile mapped;
    mapped.path_ = path;
    if (::fstat(file, &info) != 0) {
      status = detail::system_error(path, "examine", errno);
    } else if (!S_ISREG(info.st_mode)) {
      status = detail::file_error(path, "not a regular file");
    } else if (info.st_size > 0) {
      const auto size = static_cast<std::size_t>(info.st_size);
      memory = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0);
      if (memory == MAP_FAILED)
        status = detail::system_error(path, "map", errno);
      else
        mapped.bytes_ = {static_cast<const std::byte*>(memory), size};
    }
    ::close(file);
    if (status.ok()) out = std::move(mapped);
    return status;
  }

  [[nodiscard]] std::span<const std::byte> bytes() const { return bytes_; }
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }

  // Tells the system that the file will be read from front to back.
  void expect_sequential() const {
    if (!bytes_.empty()) ::madvise(const_cast<std::byte*>(bytes_.data()), bytes_.size(), MADV_SEQUENTIAL);
  }

  // Takes the whole pages inside `part` out of this process; touching them reads them again.
  void release(std::span<const std::byte> part) const {
    const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
    const auto begin = (reinterpret_cast<std::uintptr_t>(part.data()) + page - 1) / page * page;
    const auto end = reinterpret_cast<std::uintptr_t>(part.data() + part.size()) / page * page;
    if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
  }

 private:
  std::filesystem::path path_;
  std::span<const std::byte> bytes_;
};

LINATTN_END

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
      : path_(std::move(other.path_)),
        descriptor_(std::exchange(other.descriptor_, -1)),
        bytes_(std::exchange(other.bytes_, {})) {}
  MappedFile& operator=(MappedFile&& other) noexcept {
    std::swap(path_, other.path_);
    std::swap(descriptor_, other.descriptor_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~MappedFile() {
    if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
    if (descriptor_ >= 0) ::close(descriptor_);
  }

  // Maps a regular file. Only a regular one: a pipe has no size.
  [[nodiscard]] static FileStatus open(const std::filesystem::path& path, MappedFile& out) {
    MappedFile mapped;
    mapped.path_ = path;
    mapped.descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (mapped.descriptor_ < 0) return detail::system_error(path, "open", errno);
    struct ::stat info {};
    if (::fstat(mapped.descriptor_, &info) != 0) return detail::system_error(path, "examine", errno);
    if (!S_ISREG(info.st_mode)) return detail::file_error(path, "not a regular file");
    if (info.st_size > 0) {
      const auto size = static_cast<std::size_t>(info.st_size);
      void* const memory = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, mapped.descriptor_, 0);
      if (memory == MAP_FAILED) return detail::system_error(path, "map", errno);
      mapped.bytes_ = {static_cast<const std::byte*>(memory), size};
    }
    out = std::move(mapped);
    return {};
  }

  [[nodiscard]] std::span<const std::byte> bytes() const { return bytes_; }
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }

  // The open file, for system calls that take one; -1 if there is none.
  [[nodiscard]] int descriptor() const { return descriptor_; }

  // Takes the whole pages inside `part` out of this process; touching them reads them again.
  void release(std::span<const std::byte> part) const {
    const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
    const auto begin = (reinterpret_cast<std::uintptr_t>(part.data()) + page - 1) / page * page;
    const auto end = reinterpret_cast<std::uintptr_t>(part.data() + part.size()) / page * page;
    if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
  }

 private:
  std::filesystem::path path_;
  int descriptor_ = -1;
  std::span<const std::byte> bytes_;
};

LINATTN_END

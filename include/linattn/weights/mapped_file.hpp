// A file seen as memory, read only. POSIX.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <utility>

#include <linattn/version.hpp>
#include <linattn/weights/file_status.hpp>
#include <linattn/weights/regular_file.hpp>

LINATTN_BEGIN

// Owns the mapping of a whole file. Pages are read when they are touched and may be dropped by the system at
// any time. The file must not be cut short while it is mapped: touching a page that is gone is a SIGBUS.
class MappedFile {
 public:
  MappedFile() = default;
  MappedFile(MappedFile&& other) noexcept
      : path_(std::move(other.path_)),
        file_(std::move(other.file_)),
        bytes_(std::exchange(other.bytes_, {})) {}
  MappedFile& operator=(MappedFile&& other) noexcept {
    std::swap(path_, other.path_);
    std::swap(file_, other.file_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~MappedFile() {
    if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
  }

  // Maps a regular file. Only a regular one: a pipe has no size.
  [[nodiscard]] static FileStatus open(const std::filesystem::path& path, MappedFile& out) {
    MappedFile mapped;
    mapped.path_ = path;
    if (FileStatus status = detail::RegularFile::open(path, mapped.file_); !status.ok()) return status;
    if (const std::size_t size = mapped.file_.size(); size > 0) {
      void* const memory = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, mapped.descriptor(), 0);
      if (memory == MAP_FAILED) return detail::system_error(path, "map", errno);
      mapped.bytes_ = {static_cast<const std::byte*>(memory), size};
    }
    if (!mapped.file_.has_its_size()) return detail::file_error(path, "changed its size while it was opened");
    out = std::move(mapped);
    return {};
  }

  [[nodiscard]] std::span<const std::byte> bytes() const { return bytes_; }
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }

  // The open file, for system calls that take one; -1 if there is none.
  [[nodiscard]] int descriptor() const { return file_.descriptor(); }

  // Takes the whole pages inside `part` out of this process; touching them reads them again.
  void release(std::span<const std::byte> part) const {
    const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
    const auto begin = (reinterpret_cast<std::uintptr_t>(part.data()) + page - 1) / page * page;
    const auto end = reinterpret_cast<std::uintptr_t>(part.data() + part.size()) / page * page;
    if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
  }

 private:
  std::filesystem::path path_;
  detail::RegularFile file_;
  std::span<const std::byte> bytes_;
};

LINATTN_END

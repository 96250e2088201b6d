// The one place that files and folders are written through.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include <linattn/weights/atomic_file.hpp>
#include <linattn/weights/atomic_folder.hpp>

#include "temporary_folder.hpp"

namespace {
bool exchange_is_unknown = false;
}

// A file system that has no more than rename(2), where a case asks for it: takes the place of the C library's.
extern "C" int renameat2(int from_folder, const char* from, int to_folder, const char* to,
                         unsigned flags) noexcept {
  if (exchange_is_unknown && flags != 0) {
    errno = EINVAL;
    return -1;
  }
  return static_cast<int>(::syscall(SYS_renameat2, from_folder, from, to_folder, to, flags));
}

namespace {

namespace fs = std::filesystem;
using namespace linattn;
using support::read_text;
using support::TemporaryFolder;
using support::write_text;

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

void require_ok(const FileStatus& status) {
  CAPTURE(message(status));
  REQUIRE(status.ok());
}

mode_t mode_of(const fs::path& path) {
  struct ::stat info {};
  REQUIRE(::stat(path.c_str(), &info) == 0);
  return info.st_mode & 0777;
}

OutputTarget target_of(const fs::path& path) {
  OutputTarget target;
  require_ok(find_target(path, target));
  return target;
}

// Replaces or makes a folder that holds one file.
FileStatus write_folder(const fs::path& path, const std::string& text) {
  AtomicFolder folder;
  if (FileStatus status = folder.create(target_of(path)); !status.ok()) return status;
  write_text(folder.path() / "file", text);
  return folder.commit();
}

}  // namespace

TEST_CASE("atomic file: a link stays, what it points to is replaced with its mode") {
  const TemporaryFolder folder;
  write_text(folder / "file", "old");
  REQUIRE(::chmod((folder / "file").c_str(), 0614) == 0);
  fs::create_symlink("file", folder / "link");
  fs::create_symlink("link", folder / "again");
  require_ok(write_file(folder / "again", "new"));
  CHECK(fs::read_symlink(folder / "again") == "link");
  CHECK(fs::read_symlink(folder / "link") == "file");
  CHECK(read_text(folder / "file") == "new");
  CHECK(mode_of(folder / "file") == 0614);

  fs::create_symlink("created", folder / "dangling");
  const mode_t before = ::umask(027);
  require_ok(write_file(folder / "dangling", "new"));
  ::umask(before);
  CHECK(fs::is_symlink(folder / "dangling"));
  CHECK(mode_of(folder / "created") == 0640);
  fs::create_symlink("loop", folder / "loop");
  CHECK(write_file(folder / "loop", "").status.native == ELOOP);
  CHECK(folder.names() == std::vector<std::string>{"again", "created", "dangling", "file", "link", "loop"});
}

TEST_CASE("atomic file: names") {
  const TemporaryFolder folder;
  const std::string longest(255, 'n');
  require_ok(write_file(folder / longest, "x"));
  CHECK(write_file(folder / (longest + "n"), "x").status.native == ENAMETOOLONG);
  CHECK(has(message(write_file("", "x")), "name of an output is empty"));
  CHECK(has(message(write_file(folder.path(), "x")), "is a folder"));
  CHECK(has(message(write_file(folder / "none/", "x")), "is a folder"));
  CHECK(write_file(folder / "none/file", "x").status.native == ENOENT);
  CHECK(write_file(folder / (longest + "/file"), "x").status.native == ENOTDIR);
  CHECK(folder.names() == std::vector<std::string>{longest});
}

TEST_CASE("atomic file: what is no regular file is written to as it is") {
  const TemporaryFolder folder;
  const fs::path pipe = folder / "pipe", file = folder / "file";
  REQUIRE(::mkfifo(pipe.c_str(), 0600) == 0);
  std::string received;
  std::thread reader([&] { received = read_text(pipe); });
  CHECK(write_file(pipe, "through the pipe").ok());
  reader.join();
  CHECK(received == "through the pipe");
  CHECK(fs::is_fifo(pipe));

  // What a descriptor is redirected to goes on where it ends.
  write_text(file, "begin ");
  const int descriptor = ::open(file.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC), closed = ::dup(descriptor);
  fs::create_symlink("/proc/self/fd/" + std::to_string(descriptor), folder / "link");
  for (const fs::path& path : {folder / "link", fs::path("/dev/fd/" + std::to_string(descriptor))}) {
    CHECK(target_of(path).kind == TargetKind::stream);
    require_ok(write_file(path, "more "));
  }
  CHECK(read_text(file) == "begin more more ");
  ::close(descriptor);
  ::close(closed);
  CHECK_FALSE(write_file(folder / "link", "x").ok());
  const int reading = ::open(file.c_str(), O_RDONLY | O_CLOEXEC);
  CHECK(write_file("/proc/self/fd/" + std::to_string(reading), "x").status.native == EBADF);
  ::close(reading);
  CHECK(read_text(file) == "begin more more ");
  CHECK(folder.names() == std::vector<std::string>{"file", "link", "pipe"});
}

TEST_CASE("temporaries: one that is left blocks nobody, and is told from one that is held") {
  const TemporaryFolder folder;
  const std::string stem = ".linattn-" + std::to_string(::getpid());
  write_text(folder / (stem + "-0.tmp"), "left");
  fs::create_directory(folder / (stem + "-1.tmp"));
  fs::create_directory(folder / (stem + "-0.old"));
  write_text(folder / ".linattn-notes", "mine");
  AtomicFile file;
  require_ok(AtomicFile::create(folder / "file", file));
  AtomicFolder made;
  require_ok(made.create(target_of(folder / "folder")));
  std::vector<std::string> left;
  for (const fs::path& path : left_temporaries(folder.path())) left.push_back(path.filename().string());
  std::sort(left.begin(), left.end());
  CHECK(left == std::vector<std::string>{stem + "-0.old", stem + "-0.tmp", stem + "-1.tmp"});
  require_ok(file.commit());
  require_ok(made.commit());
  CHECK(left_temporaries(folder.path()).size() == 3);
  CHECK(left_temporaries(folder / "none").empty());
}

TEST_CASE("atomic folder: replaces in one step, and by two renames where the system cannot") {
  for (const bool plain : {false, true}) {
    exchange_is_unknown = plain;
    const TemporaryFolder folder;
    require_ok(write_folder(folder / "out", "first"));
    REQUIRE(::chmod((folder / "out").c_str(), 0700) == 0);
    write_text(folder / "out/old", "goes");
    fs::create_directory_symlink("out", folder / "link");
    const std::string stale = ".linattn-" + std::to_string(::getpid()) + "-0.old";
    write_text(folder / stale, "left");
    require_ok(write_folder(folder / "link", "second"));
    CHECK(read_text(folder / "out/file") == "second");
    CHECK_FALSE(fs::exists(folder / "out/old"));
    CHECK(mode_of(folder / "out") == 0700);
    CHECK(fs::is_symlink(folder / "link"));
    CHECK(folder.names() == std::vector<std::string>{stale, "link", "out"});

    // Without commit(), and where something has come to the target's place meanwhile.
    {
      AtomicFolder given_up;
      require_ok(given_up.create(target_of(folder / "out")));
      write_text(given_up.path() / "file", "third");
    }
    AtomicFolder late;
    require_ok(late.create(target_of(folder / "late")));
    fs::create_directory(folder / "late");
    CHECK(late.commit().status.native == EEXIST);
    CHECK(read_text(folder / "out/file") == "second");
    CHECK(fs::is_empty(folder / "late"));
  }
  exchange_is_unknown = false;
}

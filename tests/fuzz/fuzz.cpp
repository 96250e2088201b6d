#include "fuzz.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

// What is written need not outlive the process, and waiting for the disk would take most of the time.
extern "C" int fsync(int) { return 0; }
extern "C" int fdatasync(int) { return 0; }

namespace fuzz {

namespace fs = std::filesystem;

void fail(std::string_view what) {
  std::fprintf(stderr, "does not hold: %.*s\n", static_cast<int>(what.size()), what.data());
  std::abort();
}

void expect_sentence(std::string_view message) {
  expect(!message.empty(), "an error has a message");
  expect(std::none_of(message.begin(), message.end(),
                      [](char c) { return static_cast<unsigned char>(c) < 32 || c == 127; }),
         "a message has one line and no control characters: " + std::string(message));
}

std::vector<std::string> parts(const std::uint8_t* data, std::size_t size) {
  constexpr std::string_view separator = "\n--\n";
  std::string_view rest(reinterpret_cast<const char*>(data), size);
  std::vector<std::string> all;
  for (std::size_t end; (end = rest.find(separator)) != std::string_view::npos;
       rest.remove_prefix(end + separator.size()))
    all.emplace_back(rest.substr(0, end));
  all.emplace_back(rest);
  return all;
}

const fs::path& folder() {
  struct Folder {
    fs::path path;
    Folder() {
      std::string name = (fs::temp_directory_path() / "linattn-fuzz-XXXXXX").string();
      if (::mkdtemp(name.data()) == nullptr) fail("a temporary folder can be made");
      path = name;
    }
    ~Folder() {
      std::error_code ignored;
      fs::remove_all(path, ignored);
    }
  };
  static const Folder made;
  return made.path;
}

fs::path write(std::string_view name, std::string_view content) {
  const fs::path path = folder() / name;
  // Not O_TRUNC: a file cut to nothing and closed is written to the disk at once by ext4.
  const int file = ::open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
  const auto size = static_cast<::ssize_t>(content.size());
  if (file < 0 || ::write(file, content.data(), content.size()) != size || ::ftruncate(file, size) != 0)
    fail("a temporary file can be written");
  ::close(file);
  return path;
}

// A file that is renamed over another is written to the disk at once, as well.
fs::path fresh(std::string_view name) {
  fs::path path = folder() / name;
  fs::remove(path);
  return path;
}

}  // namespace fuzz

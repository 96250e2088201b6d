// What the fuzz targets share: a folder for files, and what must hold of every input.
#pragma once

#include <cstdint>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace fuzz {

// Says what does not hold, and aborts, so that libFuzzer keeps the input.
[[noreturn]] void fail(std::string_view what);
inline void expect(bool holds, std::string_view what) {
  if (!holds) fail(what);
}

// One sentence on one line: what an error says of a file that is not as it should be.
void expect_sentence(std::string_view message);

// Runs f and returns what it throws as std::runtime_error, or nothing. Any other exception ends the program.
template <class F>
[[nodiscard]] std::string refusal(const F& f) {
  try {
    f();
  } catch (const std::runtime_error& error) {
    expect_sentence(error.what());
    return error.what();
  }
  return {};
}

// The same for what reads one file, which the error names first.
template <class F>
[[nodiscard]] std::string refusal(const std::filesystem::path& file, const F& f) {
  const std::string why = refusal(f);
  expect(why.empty() || why.starts_with(file.string() + ": "), "an error names the file");
  return why;
}

// Whether a status of the library is fine; where it is not, its message is a sentence.
template <class Status>
[[nodiscard]] bool accepted(const Status& status) {
  if (!status.ok()) expect_sentence(message(status));
  return status.ok();
}

// The parts of an input of several texts, between lines of "--": seeds can be read and edited, and libFuzzer moves whole
// parts.
[[nodiscard]] std::vector<std::string> parts(const std::uint8_t* data, std::size_t size);

// The folder of this process, removed at its end.
[[nodiscard]] const std::filesystem::path& folder();
// Writes a file of that folder, and returns its path.
std::filesystem::path write(std::string_view name, std::string_view content);
inline std::filesystem::path write(std::string_view name, const std::uint8_t* data, std::size_t size) {
  return write(name, {reinterpret_cast<const char*>(data), size});
}

// The path of a file of that folder, which is not there.
[[nodiscard]] std::filesystem::path fresh(std::string_view name);

}  // namespace fuzz

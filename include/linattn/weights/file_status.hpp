// Errors of files: a Status plus what only a file has, a path, the name of a tensor, a reason in words.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include <linattn/core/status.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN

// The outcome of reading or writing a file. `file` and `tensor` may be empty; `detail` is a clause without
// a full stop. status.code is Code::format for a file that is not what it should be, Code::native (with
// errno in status.native) where the system refused, Code::shape, Code::option otherwise.
struct [[nodiscard]] FileStatus {
  Status status;
  std::string file;
  std::string tensor;
  std::string detail;

  [[nodiscard]] bool ok() const { return status.ok(); }
};

// One sentence: "model.safetensors: tensor 'a.weight': 24 bytes, but F32 [2, 4] takes 32".
[[nodiscard]] inline std::string message(const FileStatus& status) {
  if (status.ok()) return "ok";
  std::string text;
  if (!status.file.empty()) text += status.file + ": ";
  if (!status.tensor.empty()) text += "tensor '" + status.tensor + "': ";
  return text + (status.detail.empty() ? std::string(message(status.status).c_str()) : status.detail);
}

namespace detail {

// Untrusted text as it may be shown: control characters replaced, at most 200 bytes.
[[nodiscard]] inline std::string printable(std::string_view text) {
  std::string out(text.substr(0, 200));
  for (char& c : out)
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  if (out.size() < text.size()) out += "...";
  return out;
}

[[nodiscard]] inline FileStatus file_error(const std::filesystem::path& file, std::string detail,
                                           std::string_view tensor = {}, Code code = Code::format) {
  return {{code, "file", 0, 0, 0}, file.string(), printable(tensor), std::move(detail)};
}

// A failed call of the system: "cannot open: No such file or directory".
[[nodiscard]] inline FileStatus system_error(const std::filesystem::path& file, std::string_view action,
                                             int error) {
  std::string detail = "cannot " + std::string(action) + ": " + std::system_category().message(error);
  return {{Code::native, "file", 0, 0, error}, file.string(), {}, std::move(detail)};
}

}  // namespace detail

LINATTN_END

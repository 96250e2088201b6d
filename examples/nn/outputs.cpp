#include "outputs.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>

#include "signals.hpp"
#include "small_file.hpp"
#include "standard_output.hpp"

namespace nn {
namespace {

namespace fs = std::filesystem;
using linattn::AtomicFile;

void expect(const linattn::FileStatus& status) {
  if (!status.ok()) throw std::runtime_error(message(status));
}

bool is_standard_output(const struct ::stat& file) {
  struct ::stat standard {};
  return ::fstat(STDOUT_FILENO, &standard) == 0 && file.st_dev == standard.st_dev &&
         file.st_ino == standard.st_ino;
}

}  // namespace

void add_model(linattn::FileSet& inputs, const fs::path& path) {
  inputs.add(path);
  std::error_code error;
  if (!fs::is_regular_file(path, error)) return;
  const fs::path folder = path.has_parent_path() ? path.parent_path() : fs::path(".");
  if (path.extension() == ".json")
    inputs.add(folder);
  else if (fs::exists(folder / "config.json", error))
    inputs.add(folder / "config.json");
}

bool is_stream(const fs::path& path) {
  linattn::OutputTarget target;
  expect(find_target(path, target));
  return target.kind == linattn::TargetKind::stream;
}

void Outputs::claim(const fs::path& path) {
  linattn::OutputTarget target;
  expect(find_target(path.has_filename() ? path : path.parent_path(), target));
  for (const linattn::FileSet* others : {&inputs_, &claimed_})
    if (const std::string why = others->conflict(path); !why.empty()) fail(path, why);
  claimed_.add(path);
  if (target.kind == linattn::TargetKind::stream) {
    standard_output_taken_ = standard_output_taken_ || is_standard_output(target.info);
    return;
  }
  if (!folders_.insert(target.folder()).second) return;
  for (const fs::path& left : linattn::left_temporaries(target.folder()))
    std::fprintf(
        stderr, "note: %s %s\n", left.c_str(),
        left.extension() == ".old"
            ? "is a folder that a run was about to replace when it was killed: rename it back or remove it"
            : "is left of a run that was killed, and may be removed");
}

void Outputs::try_file(const fs::path& path) {
  std::optional<Unfinished> unfinished;
  if (!is_stream(path)) unfinished.emplace();
  AtomicFile file;
  expect(AtomicFile::create(path, file));
  if (file.streams())
    streams_[path] = std::move(file);
  else
    expect(file.write(std::string(4096, '\0')));
}

void Outputs::write(const fs::path& path, std::string_view content) {
  if (const auto stream = streams_.find(path); stream != streams_.end()) {
    expect(stream->second.write(content));
    return expect(stream->second.commit());
  }
  const Unfinished unfinished;
  expect(linattn::write_file(path, content));
}

void Outputs::print_text(std::string_view text) const {
  if (standard_output_taken_)
    std::fprintf(stderr, "%.*s", static_cast<int>(text.size()), text.data());
  else
    nn::print_text(text);
}

}  // namespace nn

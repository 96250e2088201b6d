// The files that a command writes: held against those that it reads, and tried before the work.
#pragma once

#include <filesystem>
#include <map>
#include <set>
#include <string_view>
#include <utility>

#include <linattn/weights/atomic_file.hpp>
#include <linattn/weights/file_set.hpp>

namespace nn {

/// A model as an input: a folder, a file and the config.json beside it, or an index and the folder of its shards.
void add_model(linattn::FileSet& inputs, const std::filesystem::path& path);

/// Whether what is written there goes straight to its place: to a device, a pipe, or a descriptor of this process.
[[nodiscard]] bool is_stream(const std::filesystem::path& path);

/// All outputs of a command. Whatever fails throws std::runtime_error that names the file.
class Outputs {
 public:
  explicit Outputs(linattn::FileSet inputs) : inputs_(std::move(inputs)) {}

  /// Refuses a path that is, holds or lies in an input or another output. Says on stderr what killed runs have left beside
  /// it.
  void claim(const std::filesystem::path& path);
  /// Tries a file as it will be written, so that a long computation does not start in vain: its name, its folder, a
  /// block of the disk. A pipe or a device is opened for good, and a pipe's reader is waited for.
  void try_file(const std::filesystem::path& path);
  void add_file(const std::filesystem::path& path) {
    claim(path);
    try_file(path);
  }

  /// The whole of a file that was tried.
  void write(const std::filesystem::path& path, std::string_view content);

  /// Prints what belongs to no output: to stderr, where an output goes to standard output.
  void print_text(std::string_view text) const;

 private:
  linattn::FileSet inputs_, claimed_{"other output"};
  std::map<std::filesystem::path, linattn::AtomicFile> streams_;
  std::set<std::filesystem::path> folders_;  // that were looked at for what is left
  bool standard_output_taken_ = false;
};

}  // namespace nn

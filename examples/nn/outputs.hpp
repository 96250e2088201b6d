// The files that a command writes, held against those that it reads.
#pragma once

#include <filesystem>
#include <utility>

#include <linattn/weights/file_set.hpp>

namespace nn {

/// A model as an input: a folder, a file and the config.json beside it, or an index and the folder of its shards.
void add_model(linattn::FileSet& inputs, const std::filesystem::path& path);

/// All outputs of a command. Each is tried before the work, so that a long computation does not start in vain.
class Outputs {
 public:
  explicit Outputs(linattn::FileSet inputs) : inputs_(std::move(inputs)) {}

  /// Throws std::runtime_error that names the file where it is, holds or lies in an input or another output.
  void claim(const std::filesystem::path& path);
  /// Throws where a file could not be written.
  void try_file(const std::filesystem::path& path);
  void add_file(const std::filesystem::path& path) {
    claim(path);
    try_file(path);
  }

 private:
  linattn::FileSet inputs_, claimed_{"other output"};
};

}  // namespace nn

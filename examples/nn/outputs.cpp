#include "outputs.hpp"

#include <unistd.h>

#include <cerrno>
#include <string>
#include <system_error>

#include "small_file.hpp"

namespace nn {

namespace fs = std::filesystem;

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

void Outputs::claim(const fs::path& path) {
  for (const linattn::FileSet* others : {&inputs_, &claimed_})
    if (const std::string why = others->conflict(path); !why.empty()) fail(path, why);
  claimed_.add(path);
}

void Outputs::try_file(const fs::path& path) {
  const auto reason = [] { return std::system_category().message(errno); };
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (fs::is_directory(status)) fail(path, "is a folder, a file name is needed");
  if (fs::is_other(status)) {
    if (::access(path.c_str(), W_OK) != 0) fail(path, "cannot write: " + reason());
    return;
  }
  const fs::path folder = path.has_parent_path() ? path.parent_path() : fs::path(".");
  if (::access(folder.c_str(), W_OK | X_OK) != 0) fail(path, "cannot write into its folder: " + reason());
}

}  // namespace nn

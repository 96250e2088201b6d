// Where a conversion is written: what the target must not touch, what of it may be replaced, whether there is room.
#pragma once

#include <fcntl.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <filesystem>
#include <set>
#include <string>
#include <system_error>

#include <linattn/version.hpp>
#include <linattn/weights/atomic_file.hpp>
#include <linattn/weights/atomic_folder.hpp>
#include <linattn/weights/file_set.hpp>
#include <linattn/weights/file_status.hpp>
#include <linattn/weights/inherit_plan.hpp>
#include <linattn/weights/inherit_report.hpp>
#include <linattn/weights/mapped_file.hpp>
#include <linattn/weights/output_target.hpp>
#include <linattn/weights/safetensors.hpp>

LINATTN_BEGIN

namespace detail {

// What a conversion writes below its folder; the names of folders end in a slash.
[[nodiscard]] inline std::set<std::filesystem::path> written_names(const Checkpoint& checkpoint,
                                                                   const Plan& plan) {
  const Safetensors& source = checkpoint.weights;
  const std::filesystem::path transformer =
      checkpoint.transformer == checkpoint.root ? "" : checkpoint.transformer.filename();
  std::set<std::filesystem::path> names(plan.files.begin(), plan.files.end());
  for (const std::filesystem::path& folder : plan.folders) names.insert(folder / "");
  names.insert(transformer / "config.json");
  for (const MappedFile& shard : source.shards()) names.insert(transformer / shard.path().filename());
  if (source.sharded()) names.insert(transformer / source.path().filename());
  return names;
}

// A folder may be replaced where all that would go with it is what the new one has as well, and may be removed.
[[nodiscard]] inline FileStatus check_replaced(const OutputTarget& target,
                                               const std::set<std::filesystem::path>& names) {
  namespace fs = std::filesystem;
  std::error_code error;
  fs::recursive_directory_iterator entry(target.path, error);
  for (; !error && entry != fs::recursive_directory_iterator(); entry.increment(error)) {
    const fs::path name = entry->path().lexically_relative(target.path);
    const fs::file_status status = entry->symlink_status(error);
    if (error) break;
    const bool folder = fs::is_directory(status);
    if (!names.contains(folder ? name / "" : name) || !(folder || fs::is_regular_file(status)))
      return file_error(
          target.given,
          "holds " + printable(name.string()) + ", which this conversion does not write, and stays as it is",
          {}, Code::option);
    if (::faccessat(AT_FDCWD, entry->path().c_str(), folder ? W_OK | X_OK : W_OK, AT_EACCESS) != 0)
      return system_error(target.given / name, "write", errno);
  }
  return error ? system_error(target.given, "list", error.value()) : FileStatus{};
}

// The target must be of the same kind as the source, must not touch what is read, and must not exist unless it may
// be overwritten.
[[nodiscard]] inline FileStatus check_target(const Checkpoint& checkpoint, const Plan& plan,
                                             const Safetensors* init_file, const std::filesystem::path& given,
                                             bool overwrite, OutputTarget& target) {
  namespace fs = std::filesystem;
  std::error_code error;
  // "folder/" is a folder's name, a file has none such.
  const bool slash = !given.has_filename() && given.has_relative_path();
  if (FileStatus status = find_target(slash && checkpoint.folder() ? given.parent_path() : given, target);
      !status.ok())
    return status;
  const auto refuse = [&](const std::string& why) { return file_error(target.given, why, {}, Code::option); };
  FileSet inputs;
  inputs.add(checkpoint.root);
  for (const fs::path& path : plan.files) inputs.add(checkpoint.root / path);
  for (const Safetensors* weights : {&checkpoint.weights, init_file})
    if (weights != nullptr)
      for (const MappedFile& shard : weights->shards()) inputs.add(shard.path());
  if (init_file != nullptr) inputs.add(init_file->path());
  if (const std::string why = inputs.conflict(target.given); !why.empty()) return refuse(why);
  if (target.kind == TargetKind::stream)
    return checkpoint.folder() ? refuse("is no folder, but the input is one") : FileStatus{};
  if (target.kind == TargetKind::missing) return {};
  if (!overwrite) return refuse("exists already");
  const bool folder = target.kind == TargetKind::folder;
  if (folder != checkpoint.folder())
    return refuse(folder ? "is a folder, but the input is a file" : "is a file, but the input is a folder");
  if (!folder) return {};
  if (!fs::exists(target.path / "transformer" / "config.json", error) &&
      !fs::exists(target.path / "config.json", error))
    return refuse("is a folder that holds no model, and stays as it is");
  const fs::path here = fs::current_path(error);
  if (std::mismatch(target.path.begin(), target.path.end(), here.begin(), here.end()).first ==
      target.path.end())
    return refuse("holds the working folder, and stays as it is");
  return check_replaced(target, written_names(checkpoint, plan));
}

// All that is written; known beforehand.
[[nodiscard]] inline FileStatus total_bytes(const Checkpoint& checkpoint, const Plan& plan,
                                            std::uint64_t& out) {
  out = totals(plan).target_bytes;
  std::error_code error;
  for (const std::filesystem::path& path : plan.files) {
    const auto size = std::filesystem::file_size(checkpoint.root / path, error);
    if (error) return system_error(checkpoint.root / path, "examine", error.value());
    out += size;
  }
  return {};
}

[[nodiscard]] inline FileStatus expect_space(const OutputTarget& target, std::uint64_t bytes) {
  struct ::statvfs disk {};
  if (::statvfs(target.folder().c_str(), &disk) != 0 || disk.f_blocks == 0) return {};  // nobody knows
  const std::uint64_t blocks = ::geteuid() == 0 ? disk.f_bfree : disk.f_bavail;
  if (bytes / disk.f_frsize < blocks) return {};
  return file_error(target.given,
                    "takes " + std::to_string(bytes) + " bytes, but its disk has " +
                        std::to_string(blocks * disk.f_frsize) + " left",
                    {}, Code::option);
}

// All that can be known before the work: what apply() begins with.
struct Destination {
  OutputTarget target;
  std::uint64_t bytes = 0;
};
[[nodiscard]] inline FileStatus find_destination(const Checkpoint& checkpoint, const Plan& plan,
                                                 const InheritOptions& options,
                                                 const std::filesystem::path& given, bool overwrite,
                                                 Destination& out) {
  if (!plan.mismatches.empty())
    return file_error(checkpoint.root, "the plan has mismatches", plan.mismatches[0].tensor, Code::shape);
  FileStatus status = check_target(checkpoint, plan, options.init_file, given, overwrite, out.target);
  if (status.ok()) status = total_bytes(checkpoint, plan, out.bytes);
  if (status.ok() && out.target.kind != TargetKind::stream) status = expect_space(out.target, out.bytes);
  return status;
}

}  // namespace detail

// Whether apply() may write there, tried as it will write: for whoever has other work to do first. Leaves nothing.
[[nodiscard]] inline FileStatus check_output(const Checkpoint& checkpoint, const Plan& plan,
                                             const InheritOptions& options,
                                             const std::filesystem::path& target, bool overwrite = false) {
  detail::Destination to;
  FileStatus status = detail::find_destination(checkpoint, plan, options, target, overwrite, to);
  if (!status.ok() || to.target.kind == TargetKind::stream) return status;
  if (checkpoint.folder()) return AtomicFolder().create(to.target);
  AtomicFile file;
  return AtomicFile::create(to.target.given, file);
}

LINATTN_END

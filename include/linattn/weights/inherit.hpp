// Weight inheritance: a softmax checkpoint becomes one whose attentions are Test-Time-Training modules.
// Rules of the family (sd35.hpp, vit.hpp, dit.hpp) -> plan (inherit_plan.hpp) -> report (inherit_report.hpp) -> where to
// (inherit_target.hpp) -> apply (here).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <linattn/version.hpp>
#include <linattn/weights/atomic_file.hpp>
#include <linattn/weights/atomic_folder.hpp>
#include <linattn/weights/file_status.hpp>
#include <linattn/weights/inherit_plan.hpp>
#include <linattn/weights/inherit_report.hpp>
#include <linattn/weights/inherit_target.hpp>
#include <linattn/weights/json.hpp>
#include <linattn/weights/mapped_file.hpp>
#include <linattn/weights/random.hpp>
#include <linattn/weights/safetensors.hpp>
#include <linattn/weights/small_file.hpp>

LINATTN_BEGIN

// Told the bytes written so far and all that will be; false stops the conversion and leaves nothing behind.
using Progress = std::function<bool(std::uint64_t done, std::uint64_t total)>;

namespace detail {

// Moves mapped bytes into files piece by piece, to tell the progress between them.
class Mover {
 public:
  Mover(std::uint64_t total, const Progress& progress) : total_(total), progress_(progress) {}

  template <class Sink>
  [[nodiscard]] FileStatus move(const MappedFile& from, std::span<const std::byte> bytes, Sink& to) {
    while (!bytes.empty()) {
      const std::span<const std::byte> part = bytes.first(std::min(bytes.size(), piece));
      if (FileStatus status = to.write(from, part); !status.ok()) return status;
      bytes = bytes.subspan(part.size());
      if (FileStatus status = advance(part.size()); !status.ok()) return status;
    }
    return {};
  }
  [[nodiscard]] FileStatus advance(std::size_t bytes) {
    done_ += bytes;
    if (progress_ && !progress_(done_, total_))
      return file_error({}, "stopped, nothing is written", {}, Code::option);
    return {};
  }

 private:
  // No multiple of a page: ext4 of Linux 6.18 took twice the time for pieces that begin on one.
  static constexpr std::size_t piece = 10'000'000;
  std::uint64_t done_ = 0, total_;
  const Progress& progress_;
};

// Whether no element is Inf or NaN; integers are none.
[[nodiscard]] inline bool all_finite(Dtype dtype, std::span<const std::byte> bytes) {
  bool finite = true;
  visit_dtype(dtype, [&](auto type) {
    for (; finite && !bytes.empty(); bytes = bytes.subspan(sizeof type)) {
      std::memcpy(&type, bytes.data(), sizeof type);
      finite = std::isfinite(convert<double>(type));
    }
  });
  return finite;
}

// The values of a new tensor, in its dtype.
[[nodiscard]] inline FileStatus create_values(const PlanItem& item, const Safetensors* init_file,
                                              std::vector<std::byte>& out) {
  const auto count = static_cast<std::size_t>(item.target.elements());
  out.assign(item.target.byte_size(), std::byte{});
  if (item.initialiser == Initialiser::zero) return {};
  if (item.initialiser == Initialiser::file) {
    const TensorInfo& given = *init_file->find(item.source);
    FileStatus status;
    if (given.dtype == item.target.dtype)
      std::copy(given.bytes.begin(), given.bytes.end(), out.begin());
    else
      visit_dtype(item.target.dtype, [&](auto type) {
        std::vector<decltype(type)> values(count);
        status = read(given, std::span(values));
        std::memcpy(out.data(), values.data(), out.size());
      });
    if (status.ok() && !all_finite(item.target.dtype, out))
      return file_error(init_file->path(),
                        "holds a value that is not finite as " + std::string(name(item.target.dtype)),
                        given.name, Code::option);
    return status;
  }
  std::vector<float> values(count, 1.0f);
  TorchGenerator generator(item.seed);
  if (item.initialiser == Initialiser::normal) {
    generator.normal(values);
    for (float& value : values) value *= 0.02f;
  } else if (item.initialiser == Initialiser::uniform) {
    constexpr float bound = 1.0f / 3.0f;  // 1 / sqrt(fan in) of a depthwise 3x3
    for (float& value : values) value = generator.uniform() * (2 * bound) - bound;
  }
  visit_dtype(item.target.dtype, [&](auto type) {
    for (std::size_t i = 0; i < count; ++i) {
      const auto value = convert<decltype(type)>(values[i]);
      std::memcpy(out.data() + i * sizeof value, &value, sizeof value);
    }
  });
  return {};
}

// One file of the target, from the items of one shard.
[[nodiscard]] inline FileStatus write_shard(const Checkpoint& checkpoint, const Plan& plan, std::size_t shard,
                                            const Safetensors* init_file, const std::filesystem::path& target,
                                            Mover& mover) {
  const Safetensors& source = checkpoint.weights;
  std::vector<TensorSpec> specs;
  for (const PlanItem& item : plan.items)
    if (item.shard == shard && item.from != Source::drop) specs.push_back(item.target);
  // The metadata of a shard is that of the whole: of several shards only "format" is common to all.
  Metadata metadata;
  if (!checkpoint.folder()) metadata = conversion_metadata(plan.conversion, plan.stated_heads());
  metadata.merge(Metadata(source.metadata()));

  SafetensorsWriter writer;
  if (FileStatus status = SafetensorsWriter::create(target, specs, metadata, writer); !status.ok())
    return status;
  std::vector<std::byte> values;
  for (const PlanItem& item : plan.items) {
    if (item.shard != shard || item.from == Source::drop) continue;
    FileStatus status;
    if (item.from == Source::copy) {
      // What is left out lies in front.
      const std::span<const std::byte> bytes = source.find(item.source)->bytes;
      status = mover.move(source.shards()[shard], bytes.last(item.target.byte_size()), writer);
    } else {
      status = create_values(item, init_file, values);
      if (status.ok()) status = writer.write(values);
      if (status.ok()) status = mover.advance(values.size());
    }
    if (!status.ok()) return status;
  }
  return writer.finish();
}

[[nodiscard]] inline std::string pretty(const nlohmann::ordered_json& json) { return json.dump(2) + "\n"; }

// The whole model folder, into a folder that is there.
[[nodiscard]] inline FileStatus write_folder(const Checkpoint& checkpoint, const Plan& plan,
                                             const Safetensors* init_file,
                                             const std::filesystem::path& target, Mover& mover) {
  namespace fs = std::filesystem;
  std::error_code error;
  for (const fs::path& folder : plan.folders)
    if (!fs::create_directory(target / folder, error))
      return system_error(target / folder, "create", error.value());

  const Safetensors& source = checkpoint.weights;
  const fs::path transformer =
      checkpoint.transformer == checkpoint.root ? target : target / checkpoint.transformer.filename();
  for (std::size_t shard = 0; shard < source.shards().size(); ++shard) {
    const fs::path file = transformer / source.shards()[shard].path().filename();
    if (FileStatus status = write_shard(checkpoint, plan, shard, init_file, file, mover); !status.ok())
      return status;
  }
  nlohmann::ordered_json config;
  if (FileStatus status = read_json_file(checkpoint.config(), "a configuration", config); !status.ok())
    return status;
  config["linattn"] = conversion_json<nlohmann::ordered_json>(plan.conversion, plan.stated_heads());
  if (FileStatus status = write_file(transformer / "config.json", pretty(config)); !status.ok())
    return status;

  if (source.sharded()) {
    nlohmann::ordered_json index;
    if (FileStatus status = read_json_file(source.path(), "an index of shards", index, largest_header);
        !status.ok())
      return status;
    std::map<std::string, std::string> sorted;
    for (const PlanItem& item : plan.items)
      if (item.from != Source::drop)
        sorted[item.target.name] = source.shards()[item.shard].path().filename().string();
    index["metadata"]["total_size"] = totals(plan).target_bytes;
    index["weight_map"] = sorted;
    if (FileStatus status = write_file(transformer / source.path().filename(), pretty(index)); !status.ok())
      return status;
  }
  for (const fs::path& path : plan.files) {
    MappedFile from;
    AtomicFile to;
    if (FileStatus status = MappedFile::open(checkpoint.root / path, from); !status.ok()) return status;
    if (FileStatus status = AtomicFile::create(target / path, to); !status.ok()) return status;
    if (FileStatus status = mover.move(from, from.bytes(), to); !status.ok()) return status;
    if (FileStatus status = to.commit(); !status.ok()) return status;
  }
  return {};
}

}  // namespace detail

// Writes the converted model: a file for a file, a complete folder for a folder, with the same shards. It
// appears under its name when all of it is on the disk; after any failure nothing is left. Inherited tensors
// are copied byte for byte. Memory does not grow with the model. `overwrite` permits to replace a target of
// the same kind, never the input.
[[nodiscard]] inline FileStatus apply(const Checkpoint& checkpoint, const Plan& plan,
                                      const InheritOptions& options, const std::filesystem::path& target,
                                      bool overwrite = false, const Progress& progress = {}) {
  detail::Destination to;
  if (FileStatus status = detail::find_destination(checkpoint, plan, options, target, overwrite, to);
      !status.ok())
    return status;
  detail::Mover mover(to.bytes, progress);
  if (!checkpoint.folder())
    return detail::write_shard(checkpoint, plan, 0, options.init_file, to.target.given, mover);
  AtomicFolder folder;
  if (FileStatus status = folder.create(to.target); !status.ok()) return status;
  if (FileStatus status = detail::write_folder(checkpoint, plan, options.init_file, folder.path(), mover);
      !status.ok())
    return status;
  return folder.commit();
}

LINATTN_END

#include "checkpoint.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <set>
#include <stdexcept>
#include <utility>

#include <linattn/weights/recognise.hpp>
#include <linattn/weights/small_file.hpp>

#include "runtime.hpp"

namespace nn {
namespace {

namespace fs = std::filesystem;
using linattn::Safetensors;
using linattn::TensorInfo;

bool same_shape(const std::vector<Index>& wanted, const std::vector<Index>& shape) {
  return std::equal(wanted.begin(), wanted.end(), shape.begin(), shape.end(),
                    [](Index w, Index s) { return w == Checkpoint::any || w == s; });
}

std::string describe_shape(const std::vector<Index>& shape) {
  std::string text = to_string(shape);
  for (std::size_t at; (at = text.find("-1")) != std::string::npos;) text.replace(at, 2, "any");
  return text;
}

}  // namespace

nlohmann::json read_config(const fs::path& folder) {
  const fs::path path = folder / "config.json";
  std::error_code ignored;
  nlohmann::json config;
  if (!fs::exists(fs::symlink_status(path, ignored))) return config;
  if (const linattn::FileStatus status = linattn::read_json_file(path, "a configuration", config);
      !status.ok())
    throw std::runtime_error(message(status));
  return config;
}

std::shared_ptr<const Safetensors> open_weights(const fs::path& path) {
  auto files = std::make_shared<Safetensors>();
  linattn::FileStatus status = Safetensors::open(path, *files);
  if (status.ok()) status = linattn::check_wrappers(*files);
  if (!status.ok()) throw std::runtime_error(message(status));
  static std::set<std::string> said;
  if (!files->note().empty() && said.insert(files->note()).second)
    std::fprintf(stderr, "note: %s\n", files->note().c_str());
  return files;
}

bool is_model(const fs::path& path) {
  std::error_code ignored;
  if (fs::is_directory(path, ignored)) return true;
  linattn::MappedFile file;
  const bool readable = linattn::MappedFile::open(path, file).ok();
  if (readable && linattn::looks_like_model(file.bytes())) return true;
  return (!readable || !linattn::looks_like_picture(file.bytes())) &&
         (path.extension() == ".safetensors" || path.extension() == ".json" ||
          linattn::ModelFiles::is_foreign(path));
}

Weight copy(const Weight& weight, bool swap_halves) {
  const std::size_t bytes = static_cast<std::size_t>(weight.elements()) * linattn::size_of(weight.dtype);
  auto memory = std::make_shared<Buffer>(bytes);
  const auto* source = static_cast<const std::byte*>(weight.data);
  std::rotate_copy(source, source + (swap_halves ? bytes / 2 : 0), source + bytes, memory->data());
  Weight result = weight;
  result.data = memory->data();
  result.owner = std::move(memory);
  result.mapped = false;
  return result;
}

void release(const Weight& weight) {
  if (!weight.mapped) return;
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto first = reinterpret_cast<std::uintptr_t>(weight.data);
  const std::size_t bytes = static_cast<std::size_t>(weight.elements()) * linattn::size_of(weight.dtype);
  const std::uintptr_t begin = (first + page - 1) / page * page, end = (first + bytes) / page * page;
  if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

Checkpoint Checkpoint::open(const fs::path& path, const std::string& prefix) {
  Checkpoint checkpoint;
  checkpoint.files_ = open_weights(path);
  checkpoint.prefix_ = prefix;
  std::error_code ignored;
  checkpoint.config_ = read_config(fs::is_directory(path, ignored) ? path : path.parent_path());
  return checkpoint;
}

void Checkpoint::fail(std::string_view tensor, const std::string& why) const {
  throw std::runtime_error(path().string() + ": tensor '" + full_name(tensor) + "': " + why);
}

Weight Checkpoint::load(std::string_view tensor, const std::vector<Index>& expected) const {
  const TensorInfo* found = info(tensor);
  if (found == nullptr) fail(tensor, "missing, expected " + describe_shape(expected));
  const bool f8 = found->dtype == Dtype::f8_e4m3;
  if ((f8 && !takes_f8_) || found->dtype == Dtype::f8_e5m2)
    fail(tensor, "8-bit weights (" + std::string(name(found->dtype)) +
                     ") are not supported here; use the 16-bit file");
  if (!f8 && found->dtype != Dtype::f32 && found->dtype != Dtype::f16 && found->dtype != Dtype::bf16 &&
      found->dtype != Dtype::f64)
    fail(tensor, "expected F32, F16, BF16 or F64, got " + linattn::describe(*found));

  note_load(found->name);
  Weight weight{found->name, found->dtype, found->shape, found->bytes.data(), files_, scale_of(*found), true};
  if (reinterpret_cast<std::uintptr_t>(weight.data) % linattn::size_of(weight.dtype) != 0)
    weight = copy(weight);
  return adapt(tensor, std::move(weight));
}

void Checkpoint::note_load(const std::string& stored) const {
  loaded_->insert(stored);
  if (on_load) on_load(stored);
}

// A scale is never passed over: where one is that is not known to be applied, the tensor is refused.
float Checkpoint::scale_of(const TensorInfo& weight) const {
  constexpr std::string_view ending = ".weight";
  if (!std::string_view(weight.name).ends_with(ending)) return 1;
  const std::string stem = weight.name.substr(0, weight.name.size() - ending.size());
  const auto refuse = [&](const std::string& scale, const std::string& why) {
    throw std::runtime_error(path().string() + ": tensor '" + scale + "': " + why);
  };
  if (const std::string other = stem + ".weight_scale"; files_->find(other) != nullptr)
    refuse(other, "this kind of scaled weights is not supported; use the 16-bit file");
  const TensorInfo* const found = files_->find(stem + ".scale_weight");
  if (found == nullptr) return 1;
  if (weight.dtype != Dtype::f8_e4m3 || !takes_f8_)
    refuse(found->name, "the scale of a weight of type " + std::string(name(weight.dtype)) +
                            " is not supported; use the 16-bit file");
  if (found->dtype != Dtype::f32 || found->elements() != 1)
    refuse(found->name, "expected one F32, got " + linattn::describe(*found));
  float scale = 0;
  std::memcpy(&scale, found->bytes.data(), sizeof scale);
  if (!std::isfinite(scale)) refuse(found->name, "the scale is not a finite number");
  note_load(found->name);
  return scale;
}

Weight Checkpoint::get(std::string_view tensor, const std::vector<Index>& shape) const {
  Weight weight = load(tensor, shape);
  if (!same_shape(shape, weight.shape))
    fail(tensor, "expected " + describe_shape(shape) + ", got " + to_string(weight.shape));
  return weight;
}

Weight Checkpoint::matrix(std::string_view tensor, Index out, Index in) const {
  Weight weight = load(tensor, {out, in});
  while (weight.shape.size() > 2 && weight.shape.back() == 1) weight.shape.pop_back();
  if (!same_shape({out, in}, weight.shape))
    fail(tensor, "expected " + describe_shape({out, in}) + ", got " + to_string(weight.shape));
  return weight;
}

std::vector<std::string> Checkpoint::stored_names() const {
  std::vector<std::string> names;
  for (const TensorInfo& tensor : files_->tensors())
    if (tensor.name.starts_with(prefix_)) names.push_back(tensor.name.substr(prefix_.size()));
  return names;
}

const nlohmann::json* Checkpoint::config_entry(const char* key) const {
  const auto found = config_.find(key);
  return found == config_.end() || found->is_null() ? nullptr : &*found;
}

std::optional<std::string> Checkpoint::config_text(const char* key) const {
  const nlohmann::json* const value = config_entry(key);
  if (value == nullptr) return std::nullopt;
  if (!value->is_string()) fail_config(key, "expected a string");
  return value->get<std::string>();
}

Index Checkpoint::confirmed(const char* key, Index size) const {
  const nlohmann::json* const value = config_entry(key);
  if (value != nullptr && !json_number(*value, Range<Index>{size, size}))
    fail_config(key, "the tensors have " + std::to_string(size));
  return size;
}

std::optional<Index> Checkpoint::config_heads() const {
  const Range<Index> heads{1, 4096};
  const std::optional<Index> found = config_number("num_heads", heads);
  return found ? found : config_number("num_attention_heads", heads);
}

void Checkpoint::fail_config(const char* key, const std::string& expected) const {
  throw std::runtime_error((path().parent_path() / "config.json").string() + ": '" + key + "' is " +
                           linattn::detail::printable(config_[key].dump()) + ", " + expected);
}

}  // namespace nn

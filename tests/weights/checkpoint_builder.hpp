// Checkpoints of random bytes for the tests of weights, and how they are looked at.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <linattn/weights/json.hpp>
#include <linattn/weights/random.hpp>
#include <linattn/weights/safetensors.hpp>

#include "temporary_folder.hpp"

namespace support {

using linattn::Dtype;
using linattn::FileStatus;
using linattn::Index;
using linattn::Metadata;
using linattn::Safetensors;
using linattn::TensorInfo;
using linattn::TensorSpec;

[[nodiscard]] inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// Tensors with random bytes: a conversion must not care what they mean.
class CheckpointBuilder {
 public:
  explicit CheckpointBuilder(std::vector<TensorSpec> specs) : specs_(std::move(specs)) {}

  std::vector<TensorSpec>& specs() { return specs_; }
  [[nodiscard]] const std::vector<TensorSpec>& specs() const { return specs_; }
  TensorSpec& at(const std::string& name) {
    const auto found =
        std::find_if(specs_.begin(), specs_.end(), [&](const auto& s) { return s.name == name; });
    REQUIRE_MESSAGE(found != specs_.end(), name);
    return *found;
  }
  void remove(const std::string& name) { specs_.erase(specs_.begin() + (&at(name) - specs_.data())); }
  void add(std::string name, Dtype dtype, std::vector<Index> shape) {
    specs_.push_back({std::move(name), dtype, std::move(shape)});
  }
  void append(const std::vector<TensorSpec>& more) { specs_.insert(specs_.end(), more.begin(), more.end()); }
  void set_dtype(Dtype dtype) {
    for (TensorSpec& spec : specs_) spec.dtype = dtype;
  }

  void write(const std::filesystem::path& path, const Metadata& metadata = {}) const {
    std::vector<TensorInfo> tensors;
    std::vector<std::vector<std::byte>> data;
    for (const TensorSpec& spec : specs_) {
      data.emplace_back(spec.byte_size());
      std::mt19937 random(linattn::named_seed(1, spec.name));
      for (std::byte& byte : data.back()) byte = static_cast<std::byte>(random() & 0x3f);
      tensors.push_back({spec, data.back(), 0});
    }
    const FileStatus status = write_safetensors(path, tensors, metadata);
    REQUIRE_MESSAGE(status.ok(), message(status));
  }
  // Zeros, which the file system need not store: for models of true size.
  void write_zeros(const std::filesystem::path& path) const {
    nlohmann::json header;
    std::size_t end = 0;
    for (const TensorSpec& spec : specs_) {
      const std::size_t begin = end;
      end += spec.byte_size();
      header[spec.name] = {
          {"dtype", name(spec.dtype)}, {"shape", spec.shape}, {"data_offsets", {begin, end}}};
    }
    const std::string text = header.dump();
    const std::uint64_t size = text.size();
    std::string file(sizeof size, '\0');
    std::memcpy(file.data(), &size, sizeof size);
    write_text(path, file + text);
    std::filesystem::resize_file(path, file.size() + text.size() + end);
  }

 private:
  std::vector<TensorSpec> specs_;
};

[[nodiscard]] inline Safetensors opened(const std::filesystem::path& path) {
  Safetensors file;
  const FileStatus status = Safetensors::open(path, file);
  REQUIRE_MESSAGE(status.ok(), message(status));
  return file;
}

inline void require_ok(const FileStatus& status) { REQUIRE_MESSAGE(status.ok(), message(status)); }

[[nodiscard]] inline bool same_bytes(const TensorInfo& a, const TensorInfo& b) {
  return std::equal(a.bytes.begin(), a.bytes.end(), b.bytes.begin(), b.bytes.end());
}

[[nodiscard]] inline std::vector<double> values(const Safetensors& file, const std::string& name) {
  const TensorInfo* info = file.find(name);
  REQUIRE_MESSAGE(info != nullptr, name);
  std::vector<double> out(static_cast<std::size_t>(info->elements()));
  REQUIRE(read(*info, std::span(out)).ok());
  return out;
}

}  // namespace support

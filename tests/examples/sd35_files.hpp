// Small random model files for the tests of the SD3.5 example.
#pragma once

#include <doctest/doctest.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <linattn/weights/safetensors.hpp>

#include "reference/sd35_models.hpp"
#include "support.hpp"

namespace sd35_files {

namespace fs = std::filesystem;
using linattn::Dtype;
using linattn::Index;
using reference::Array;
using reference::Parameters;

// A folder of its own, gone at the end of the test.
class Folder {
 public:
  Folder() {
    static int count = 0;
    path_ = fs::temp_directory_path() /
            ("linattn-sd35-test-" + std::to_string(::getpid()) + "-" + std::to_string(count++));
    fs::create_directories(path_);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  ~Folder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  [[nodiscard]] fs::path operator/(const std::string& name) const { return path_ / name; }
  [[nodiscard]] const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

inline void write_text(const fs::path& path, const std::string& text) {
  fs::create_directories(path.parent_path());
  std::ofstream(path, std::ios::binary) << text;
}

// Draws parameters: matrices N(0, gain^2 / inputs), vectors `mean` + gain N(0, 1), rounded to `dtype`.
class Maker {
 public:
  explicit Maker(Dtype dtype, std::uint64_t seed = 7) : dtype_(dtype), random_(seed) {}

  void add(const std::string& name, const std::vector<Index>& shape, double gain = 1, double mean = 0) {
    Array array(shape);
    const double rows =
        shape.size() > 1 ? static_cast<double>(shape[0]) : static_cast<double>(array.values.size());
    const double deviation = gain / std::sqrt(static_cast<double>(array.values.size()) / rows);
    for (double& value : array.values) value = round(mean + deviation * random_.normal());
    parameters[name] = std::move(array);
  }
  void linear(const std::string& name, Index out, Index in, bool bias = true) {
    add(name + ".weight", {out, in});
    if (bias) add(name + ".bias", {out}, 0.1);
  }
  void norm(const std::string& name, Index channels, bool bias = true) {
    add(name + ".weight", {channels}, 0.2, 1);
    if (bias) add(name + ".bias", {channels}, 0.2);
  }
  void conv(const std::string& name, Index out, Index in, Index kernel) {
    add(name + ".weight", {out, in, kernel, kernel});
    add(name + ".bias", {out}, 0.1);
  }

  Parameters parameters;

 private:
  [[nodiscard]] double round(double value) const {
    switch (dtype_) {
      case Dtype::f16:
        return linattn::convert<double>(linattn::convert<linattn::half>(value));
      case Dtype::bf16:
        return linattn::convert<double>(linattn::convert<linattn::bfloat16>(value));
      case Dtype::f8_e4m3:
        return linattn::convert<double>(linattn::convert<linattn::float8_e4m3>(value));
      case Dtype::f32:
        return static_cast<double>(static_cast<float>(value));
      default:
        return value;
    }
  }

  Dtype dtype_;
  support::Random random_;
};

// `skew` bytes in front make every tensor of the file misaligned. Parameters in `others` are stored as F32.
inline void write(const fs::path& path, const Parameters& parameters, Dtype dtype,
                  const std::string& prefix = "", std::size_t skew = 0,
                  const linattn::Metadata& metadata = {}, const Parameters& others = {}) {
  std::vector<std::vector<std::byte>> memory;
  std::vector<linattn::TensorInfo> tensors;
  const auto append = [&](linattn::TensorInfo info) {
    memory.emplace_back(info.byte_size());
    info.bytes = memory.back();
    tensors.push_back(std::move(info));
  };
  if (skew > 0) append({{"unrelated.bytes", Dtype::u8, {static_cast<Index>(skew)}}, {}, 0});
  const auto store = [&](const std::string& name, const Array& array, Dtype type) {
    append({{prefix + name, type, array.shape}, {}, 0});
    const auto fill = [&](auto zero) {
      using T = decltype(zero);
      for (std::size_t i = 0; i < array.values.size(); ++i) {
        const T value = linattn::convert<T>(array.values[i]);
        std::memcpy(memory.back().data() + i * sizeof value, &value, sizeof value);
      }
    };
    if (type == Dtype::f8_e4m3)
      fill(linattn::float8_e4m3{});
    else
      linattn::visit_dtype(type, fill);
  };
  for (const auto& [name, array] : others) store(name, array, Dtype::f32);
  for (const auto& [name, array] : parameters) store(name, array, dtype);
  fs::create_directories(path.parent_path());
  const linattn::FileStatus status = linattn::write_safetensors(path, tensors, metadata);
  REQUIRE_MESSAGE(status.ok(), message(status));
}

struct ClipSize {
  int layers = 3;
  Index heads = 3, head_dim = 8, mlp = 40, vocabulary = 50, positions = 77, projection = 20;
  [[nodiscard]] Index width() const { return heads * head_dim; }
};
inline Parameters make_clip(Dtype dtype, const ClipSize& size, std::uint64_t seed = 7) {
  Maker m(dtype, seed);
  const Index width = size.width();
  const double root = std::sqrt(static_cast<double>(width));
  m.add("text_model.embeddings.token_embedding.weight", {size.vocabulary, width}, root);
  m.add("text_model.embeddings.position_embedding.weight", {size.positions, width}, 0.3 * root);
  for (int i = 0; i < size.layers; ++i) {
    const std::string layer = "text_model.encoder.layers." + std::to_string(i) + ".";
    m.norm(layer + "layer_norm1", width);
    m.norm(layer + "layer_norm2", width);
    for (const char* name : {"q_proj", "k_proj", "v_proj", "out_proj"})
      m.linear(layer + "self_attn." + name, width, width);
    m.linear(layer + "mlp.fc1", size.mlp, width);
    m.linear(layer + "mlp.fc2", width, size.mlp);
  }
  m.norm("text_model.final_layer_norm", width);
  m.linear("text_projection", size.projection, width, false);
  return std::move(m.parameters);
}

struct T5Size {
  int blocks = 2;
  Index heads = 3, head_dim = 10, width = 24, mlp = 36, vocabulary = 60;
};
inline Parameters make_t5(Dtype dtype, const T5Size& size, std::uint64_t seed = 8) {
  Maker m(dtype, seed);
  const Index inner = size.heads * size.head_dim;
  m.add("shared.weight", {size.vocabulary, size.width}, std::sqrt(static_cast<double>(size.width)));
  m.add("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", {32, size.heads}, 2);
  for (int i = 0; i < size.blocks; ++i) {
    const std::string block = "encoder.block." + std::to_string(i) + ".layer.";
    m.norm(block + "0.layer_norm", size.width, false);
    m.norm(block + "1.layer_norm", size.width, false);
    for (const char* name : {"q", "k", "v"})
      m.linear(block + "0.SelfAttention." + name, inner, size.width, false);
    m.linear(block + "0.SelfAttention.o", size.width, inner, false);
    m.linear(block + "1.DenseReluDense.wi_0", size.mlp, size.width, false);
    m.linear(block + "1.DenseReluDense.wi_1", size.mlp, size.width, false);
    m.linear(block + "1.DenseReluDense.wo", size.width, size.mlp, false);
  }
  m.norm("encoder.final_layer_norm", size.width, false);
  return std::move(m.parameters);
}

// The parts of a VAE, each half of which makes itself with them.
class VaeMaker : public Maker {
 public:
  using Maker::Maker;

  void block(const std::string& name, Index in, Index out) {
    norm(name + "norm1", in);
    conv(name + "conv1", out, in, 3);
    norm(name + "norm2", out);
    conv(name + "conv2", out, out, 3);
    if (in != out) conv(name + "nin_shortcut", out, in, 1);
  }
  void middle(const std::string& name, Index c) {
    block(name + "block_1.", c, c);
    norm(name + "attn_1.norm", c);
    for (const char* part : {"q", "k", "v", "proj_out"}) conv(name + "attn_1." + part, c, c, 1);
    block(name + "block_2.", c, c);
  }
};

// The decoder. Channels of the levels, finest first, as in the names.
inline Parameters make_vae(Dtype dtype, const std::vector<Index>& channels, int blocks, Index latent_channels,
                           std::uint64_t seed = 9) {
  VaeMaker m(dtype, seed);
  Index c = channels.back();
  m.conv("decoder.conv_in", c, latent_channels, 3);
  m.middle("decoder.mid.", c);
  for (std::size_t level = channels.size(); level-- > 0;) {
    const std::string name = "decoder.up." + std::to_string(level) + ".";
    for (int i = 0; i < blocks; ++i) {
      m.block(name + "block." + std::to_string(i) + ".", c, channels[level]);
      c = channels[level];
    }
    if (level > 0) m.conv(name + "upsample.conv", c, c, 3);
  }
  m.norm("decoder.norm_out", c);
  m.conv("decoder.conv_out", 3, c, 3);
  return std::move(m.parameters);
}

inline Parameters make_vae_encoder(Dtype dtype, const std::vector<Index>& channels, int blocks,
                                   Index latent_channels, std::uint64_t seed = 10) {
  VaeMaker m(dtype, seed);
  Index c = channels.front();
  m.conv("encoder.conv_in", c, 3, 3);
  for (std::size_t level = 0; level < channels.size(); ++level) {
    const std::string name = "encoder.down." + std::to_string(level) + ".";
    for (int i = 0; i < blocks; ++i) {
      m.block(name + "block." + std::to_string(i) + ".", c, channels[level]);
      c = channels[level];
    }
    if (level + 1 < channels.size()) m.conv(name + "downsample.conv", c, c, 3);
  }
  m.middle("encoder.mid.", c);
  m.norm("encoder.norm_out", c);
  m.conv("encoder.conv_out", 2 * latent_channels, c, 3);
  return std::move(m.parameters);
}

}  // namespace sd35_files

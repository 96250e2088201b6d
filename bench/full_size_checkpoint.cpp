// Writes checkpoints with the names, shapes and dtypes of Stable Diffusion 3.5 Medium's and seeded random content of
// a sensible size, to measure with: full_size_checkpoint FILE writes sd3.5_medium.safetensors alone (5.1 GB),
// full_size_checkpoint --all FOLDER [--divide-depth N] the text encoders (11.4 GB) beside it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <linattn/weights/safetensors.hpp>
#include <linattn/weights/sd35.hpp>

namespace {

using linattn::Dtype;
using linattn::Index;
using linattn::TensorSpec;

// The autoencoder of SD3.5 under its official names: 106 tensors of the encoder, 138 of the decoder.
class Autoencoder {
 public:
  Autoencoder() {
    const std::vector<Index> channels{128, 256, 512, 512};
    const Index last = 3;
    convolution("encoder.conv_in", 128, 3, 3);
    for (Index level = 0, in = 128; level <= last; ++level) {
      const Index out = channels[static_cast<std::size_t>(level)];
      const std::string down = "encoder.down." + std::to_string(level) + ".";
      for (Index j = 0; j < 2; ++j, in = out) residual(down + "block." + std::to_string(j), in, out);
      if (level < last) convolution(down + "downsample.conv", out, out, 3);
    }
    middle("encoder.mid");
    norm("encoder.norm_out", 512);
    convolution("encoder.conv_out", 32, 512, 3);

    convolution("decoder.conv_in", 512, 16, 3);
    middle("decoder.mid");
    for (Index level = last, in = 512; level >= 0; --level) {
      const Index out = channels[static_cast<std::size_t>(level)];
      const std::string up = "decoder.up." + std::to_string(level) + ".";
      for (Index j = 0; j < 3; ++j, in = out) residual(up + "block." + std::to_string(j), in, out);
      if (level > 0) convolution(up + "upsample.conv", out, out, 3);
    }
    norm("decoder.norm_out", 128);
    convolution("decoder.conv_out", 3, 128, 3);
  }
  [[nodiscard]] const std::vector<TensorSpec>& tensors() const { return specs_; }

 private:
  void add(const std::string& tensor, std::vector<Index> shape) {
    specs_.push_back({"first_stage_model." + tensor, Dtype::f16, std::move(shape)});
  }
  void norm(const std::string& stem, Index channels) {
    add(stem + ".weight", {channels});
    add(stem + ".bias", {channels});
  }
  void convolution(const std::string& stem, Index out, Index in, Index size) {
    add(stem + ".weight", {out, in, size, size});
    add(stem + ".bias", {out});
  }
  void residual(const std::string& stem, Index in, Index out) {
    norm(stem + ".norm1", in);
    convolution(stem + ".conv1", out, in, 3);
    norm(stem + ".norm2", out);
    convolution(stem + ".conv2", out, out, 3);
    if (in != out) convolution(stem + ".nin_shortcut", out, in, 1);
  }
  void middle(const std::string& stem) {
    residual(stem + ".block_1", 512, 512);
    norm(stem + ".attn_1.norm", 512);
    for (const char* part : {".attn_1.q", ".attn_1.k", ".attn_1.v", ".attn_1.proj_out"})
      convolution(stem + part, 512, 512, 1);
    residual(stem + ".block_2", 512, 512);
  }

  std::vector<TensorSpec> specs_;
};

using Specs = std::vector<TensorSpec>;

void add_linear(Specs& specs, const std::string& stem, Index out, Index in, bool bias = true) {
  specs.push_back({stem + ".weight", Dtype::f16, {out, in}});
  if (bias) specs.push_back({stem + ".bias", Dtype::f16, {out}});
}

// CLIP-L: 12 layers of 768 channels; CLIP-G: 32 of 1280, and its projection.
Specs clip(Index layers, Index width, bool projection) {
  Specs specs;
  const std::string text = "text_model.";
  const auto norm = [&](const std::string& stem) {
    for (const char* part : {".weight", ".bias"}) specs.push_back({stem + part, Dtype::f16, {width}});
  };
  specs.push_back({text + "embeddings.token_embedding.weight", Dtype::f16, {49408, width}});
  specs.push_back({text + "embeddings.position_embedding.weight", Dtype::f16, {77, width}});
  for (Index i = 0; i < layers; ++i) {
    const std::string layer = text + "encoder.layers." + std::to_string(i) + ".";
    norm(layer + "layer_norm1");
    norm(layer + "layer_norm2");
    for (const char* part : {"q_proj", "k_proj", "v_proj", "out_proj"})
      add_linear(specs, layer + "self_attn." + part, width, width);
    add_linear(specs, layer + "mlp.fc1", 4 * width, width);
    add_linear(specs, layer + "mlp.fc2", width, 4 * width);
  }
  norm(text + "final_layer_norm");
  if (projection) add_linear(specs, "text_projection", width, width, false);
  return specs;
}

// T5-XXL's encoder: 24 blocks.
Specs t5(Index blocks) {
  constexpr Index width = 4096, hidden = 10240, heads = 64;
  Specs specs{{"shared.weight", Dtype::f16, {32128, width}}};
  for (Index i = 0; i < blocks; ++i) {
    const std::string block = "encoder.block." + std::to_string(i) + ".layer.";
    for (const char* part : {"q", "k", "v", "o"})
      add_linear(specs, block + "0.SelfAttention." + part, width, width, false);
    if (i == 0)
      specs.push_back({block + "0.SelfAttention.relative_attention_bias.weight", Dtype::f16, {32, heads}});
    specs.push_back({block + "0.layer_norm.weight", Dtype::f16, {width}});
    add_linear(specs, block + "1.DenseReluDense.wi_0", hidden, width, false);
    add_linear(specs, block + "1.DenseReluDense.wi_1", hidden, width, false);
    add_linear(specs, block + "1.DenseReluDense.wo", width, hidden, false);
    specs.push_back({block + "1.layer_norm.weight", Dtype::f16, {width}});
  }
  specs.push_back({"encoder.final_layer_norm.weight", Dtype::f16, {width}});
  return specs;
}

Specs medium(Index divide_depth) {
  linattn::Sd35Model model = linattn::sd35_medium();
  model.depth /= divide_depth;
  const Index dual = static_cast<Index>(model.dual_blocks.size()) / divide_depth;
  std::erase_if(model.dual_blocks, [&](Index block) { return block >= dual; });
  Specs specs = sd35_tensors(model);
  for (TensorSpec& spec : specs) spec.dtype = Dtype::f16;
  const Specs vae = Autoencoder().tensors();
  specs.insert(specs.end(), vae.begin(), vae.end());
  return specs;
}

// Values are uniform in mean +- radius. Matrices keep the size of what goes through them, up to half of it, so
// that nothing overflows or dies away in any depth; norms are near 1, biases near 0.
struct Distribution {
  float mean = 0, radius = 0;
};
Distribution distribution(const TensorSpec& spec) {
  if (spec.shape.size() == 1) {
    const bool norm =
        spec.name.find("norm") != std::string::npos || spec.name.find(".ln_") != std::string::npos;
    return norm && spec.name.ends_with(".weight") ? Distribution{1, 0.1f} : Distribution{0, 0.02f};
  }
  for (const char* table : {"embedding.weight", "shared.weight", "pos_embed", "relative_attention_bias"})
    if (spec.name.ends_with(table) || spec.name.find(std::string(table) + ".weight") != std::string::npos)
      return {0, 1};
  const double inputs = static_cast<double>(spec.elements()) / static_cast<double>(spec.shape[0]);
  return {0, static_cast<float>(std::sqrt(0.75 / inputs))};
}

// Four values of a counter's mixed bits (splitmix64): any part of a tensor can be drawn on its own.
void fill(std::span<linattn::half> out, std::uint64_t counter, const Distribution& d) {
  float values[4];
  for (std::size_t i = 0; i < out.size(); i += 4, ++counter) {
    std::uint64_t z = counter * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    for (std::size_t k = 0; k < 4; ++k) {
      const auto bits = static_cast<std::int16_t>(static_cast<std::uint16_t>(z >> (16 * k)));
      values[k] = d.mean + d.radius * static_cast<float>(bits) * 0x1p-15f;
    }
    for (std::size_t k = 0; k < std::min<std::size_t>(4, out.size() - i); ++k)
      out[i + k] = linattn::half(values[k]);
  }
}

linattn::FileStatus write(const std::filesystem::path& path, const Specs& specs) {
  linattn::SafetensorsWriter writer;
  if (auto status = linattn::SafetensorsWriter::create(path, specs, {}, writer); !status.ok()) return status;
  constexpr std::size_t slice = 1 << 16, slices = 256;  // a thread's, and a write's
  std::vector<linattn::half> piece(slice * slices);
  std::uint64_t counter = 1;
  std::size_t total = 0;
  for (const TensorSpec& spec : specs) {
    const Distribution d = distribution(spec);
    total += spec.byte_size();
    auto left = static_cast<std::size_t>(spec.elements());
    for (std::size_t size = 0; left > 0; left -= size) {
      size = std::min(left, piece.size());
      const auto count = static_cast<std::ptrdiff_t>((size + slice - 1) / slice);
#if defined(_OPENMP)
#pragma omp parallel for
#endif
      for (std::ptrdiff_t i = 0; i < count; ++i) {
        const std::size_t begin = static_cast<std::size_t>(i) * slice;
        fill(std::span(piece).subspan(begin, std::min(slice, size - begin)), counter + begin, d);
      }
      counter += size;
      if (auto status = writer.write(std::as_bytes(std::span(piece)).first(size * sizeof piece[0]));
          !status.ok())
        return status;
    }
  }
  std::fprintf(stderr, "%s: %zu tensors, %.3f GB\n", path.c_str(), specs.size(),
               static_cast<double>(total) * 1e-9);
  return writer.finish();
}

linattn::FileStatus write_all(const std::filesystem::path& folder, Index divide_depth) {
  std::error_code ignored;
  std::filesystem::create_directories(folder, ignored);
  for (const auto& [name, specs] :
       {std::pair<const char*, Specs>{"sd3.5_medium.safetensors", medium(divide_depth)},
        {"clip_l.safetensors", clip(12 / divide_depth, 768, false)},
        {"clip_g.safetensors", clip(32 / divide_depth, 1280, true)},
        {"t5xxl_fp16.safetensors", t5(24 / divide_depth)}})
    if (auto status = write(folder / name, specs); !status.ok()) return status;
  return {};
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  const bool all = arguments.size() >= 2 && arguments[0] == "--all";
  Index divide = 1;
  if (all && arguments.size() == 4 && arguments[2] == "--divide-depth") divide = std::atoi(argv[4]);
  const bool understood = all ? arguments.size() == 2 || arguments.size() == 4 : arguments.size() == 1;
  if (!understood || divide < 1 || divide > 6) {
    std::fprintf(stderr,
                 "usage: full_size_checkpoint FILE\n"
                 "       full_size_checkpoint --all FOLDER [--divide-depth 1..6]\n");
    return 2;
  }
  const linattn::FileStatus status =
      all ? write_all(arguments[1], divide) : write(arguments[0], medium(divide));
  if (!status.ok()) std::fprintf(stderr, "%s\n", message(status).c_str());
  return status.ok() ? 0 : 2;
}

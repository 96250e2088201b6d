// Writes a checkpoint with the names, shapes and dtypes of sd3.5_medium.safetensors (5.1 GB) and random content,
// to measure linattn-inherit with. Usage: full_size_checkpoint FILE
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>
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

linattn::FileStatus write(const char* path) {
  std::vector<TensorSpec> specs = sd35_tensors(linattn::sd35_medium());
  for (TensorSpec& spec : specs) spec.dtype = Dtype::f16;
  const std::vector<TensorSpec> vae = Autoencoder().tensors();
  std::printf("%zu + %zu tensors\n", specs.size(), vae.size());
  specs.insert(specs.end(), vae.begin(), vae.end());

  linattn::SafetensorsWriter writer;
  if (auto status = linattn::SafetensorsWriter::create(path, specs, {}, writer); !status.ok()) return status;
  std::vector<std::uint64_t> piece(1 << 20);
  std::uint64_t state = 1, total = 0;
  for (const TensorSpec& spec : specs) {
    total += spec.byte_size();
    for (std::size_t left = spec.byte_size(), size = 0; left > 0; left -= size) {
      for (std::uint64_t& word : piece) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        word = state & 0xbfffbfffbfffbfffu;  // halves below 2 in size
      }
      size = std::min(left, piece.size() * sizeof piece[0]);
      if (auto status = writer.write(std::as_bytes(std::span(piece)).first(size)); !status.ok())
        return status;
    }
  }
  std::printf("%.3f GB\n", static_cast<double>(total) * 1e-9);
  return writer.finish();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: full_size_checkpoint FILE\n");
    return 2;
  }
  const linattn::FileStatus status = write(argv[1]);
  if (!status.ok()) std::fprintf(stderr, "%s\n", message(status).c_str());
  return status.ok() ? 0 : 2;
}

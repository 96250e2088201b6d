// One part: -DPART=name, with the -m flags of its machine. All that it defines itself has internal linkage and no
// template of std:: is called, so that what the linker may take from another part is the library's alone.
#include <linattn/cpu.hpp>

#include <sys/mman.h>

#include "part.hpp"

namespace {

using namespace linattn;

constexpr Index tokens = 35, heads = 2, head_dim = 20, width = heads * head_dim;

// Numbers in [-1, 1), scaled; a new sequence for each seed.
void fill(float* x, Index count, std::uint32_t seed, float scale) {
  for (Index i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    x[i] = scale * (static_cast<float>(seed >> 8) * 0x1p-23f - 1.0f);
  }
}

// Memory that ends where a page begins that nobody may touch. It holds NaN.
Workspace guarded(std::size_t size) {
  constexpr std::size_t page = 4096;
  const std::size_t whole = (size + page - 1) / page * page;
  void* const base = mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return {};
  auto* const bytes = static_cast<std::byte*>(base);
  if (mprotect(bytes + whole, page, PROT_NONE) != 0) return {};
  for (std::size_t i = 0; i < whole; ++i) bytes[i] = std::byte{0xff};
  return {bytes + (whole - size), size};
}

std::uint64_t hash(const float* x, Index count) {  // FNV-1a
  std::uint64_t h = 0xcbf29ce484222325u;
  for (Index i = 0; i < count; ++i) h = (h ^ __builtin_bit_cast(std::uint32_t, x[i])) * 0x100000001b3u;
  return h;
}

float input[3 * tokens * width], square[width * width], output[tokens * 3 * width];

}  // namespace

int PART(Row* rows);  // NOLINT: -D names it
int PART(Row* rows) {
  int count = 0;
  const auto run = [&](const char* op, std::size_t size, Index outputs, const auto& call) {
    for (float& y : output) y = 0;
    const Status status = call(Cpu{guarded(size)});
    rows[count++] = {op, status.ok() ? nullptr : status.what, size, hash(output, outputs)};
  };
  const auto view4 = [](const float* x) {
    return TensorView<const float, 4>(x, {1, tokens, heads, head_dim});
  };
  fill(input, 3 * tokens * width, 1, 1.0f);
  fill(square, width * width, 2, 0.3f);
  const auto q = view4(input), k = view4(input + tokens * width), v = view4(input + 2 * tokens * width);
  const TensorView<float, 4> out(output, {1, tokens, heads, head_dim});

  const TensorView<const float, 3> matrices(square, {heads, head_dim, head_dim});
  const TttWeights<float> weights{matrices, matrices, matrices};
  run("ttt", ttt_workspace<SwiGlu>(Cpu{}, q, k, v, weights, out), tokens * width,
      [&](const auto& cpu) { return ttt<SwiGlu>(cpu, q, k, v, weights, out); });

  run("softmax_attention", softmax_attention_workspace(Cpu{}, q, k, v, out), tokens * width,
      [&](const auto& cpu) { return softmax_attention(cpu, q, k, v, out); });

  const TensorView<const float, 2> x(input, {tokens, width}), weight(square, {width, width});
  const TensorView<const float, 1> bias(square, {width}), gain(square, {head_dim});
  const TensorView<float, 2> y(output, {tokens, width});
  run("linear", linear_workspace(Cpu{}, x, weight, bias, y), tokens * width,
      [&](const auto& cpu) { return linear(cpu, x, weight, bias, y); });

  run("rms_norm", 0, tokens * width, [&](const auto& cpu) { return rms_norm(cpu, q, gain, out); });

  const TensorView<const float, 4> taps(square, {width, 1, 3, 3});
  run("depthwise_conv", 0, tokens * width, [&](const auto& cpu) {
    return depthwise_conv(cpu, q, taps, bias, out, {{0, 5, 7}});
  });

  run("instance_norm", instance_norm_workspace(Cpu{}, q, out), tokens * width,
      [&](const auto& cpu) { return instance_norm(cpu, q, out); });

  const AttentionWeights<float> projections{{weight, bias}, {weight, bias}, {weight, bias},
                                            {weight, bias}, gain,           gain};
  const TensorView<const float, 3> image(input, {1, tokens, width});
  const TensorView<float, 3> attended(output, {1, tokens, width});
  run("softmax_attention_layer",
      softmax_attention_layer_workspace(Cpu{}, image, projections, attended, {heads}), tokens * width,
      [&](const auto& cpu) { return softmax_attention_layer(cpu, image, projections, attended, {heads}); });
  return count;
}

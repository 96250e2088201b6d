#include <linattn/cpu.hpp>

#include <cstdio>
#include <vector>

int main() {
  constexpr linattn::Index batch = 1, tokens = 1024, heads = 4, head_dim = 64;
  std::vector<float> qkv(batch * tokens * 3 * heads * head_dim, 0.1f), y(batch * tokens * heads * head_dim);
  std::vector<float> w(heads * head_dim * head_dim, 0.02f);
  const auto [q, k, v] = linattn::unpack_qkv(
      linattn::TensorView<float, 3>(qkv.data(), {batch, tokens, 3 * heads * head_dim}), heads);
  const linattn::TensorView<float, 4> out(y.data(), {batch, tokens, heads, head_dim});
  const linattn::TensorView<const float, 3> w1(w.data(), {heads, head_dim, head_dim});
  const linattn::TttWeights<float> weights{w1, w1, w1};

  std::vector<std::byte> scratch(
      linattn::ttt_workspace<linattn::SwiGlu>(linattn::Cpu{}, q, k, v, weights, out));
  const linattn::Cpu cpu{{scratch.data(), scratch.size()}};
  const linattn::Status status = linattn::ttt<linattn::SwiGlu>(cpu, q, k, v, weights, out);
  std::printf("%s: out[0] = %g\n", linattn::message(status).c_str(), static_cast<double>(y[0]));
  return status.ok() ? 0 : 1;
}

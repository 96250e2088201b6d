// neighborhood_attention against softmax attention of each token over its window: any grids, windows, strides and types, with
// NaN and infinities outside the windows, and arguments that it must refuse.
#include <linattn/ops/neighborhood_attention_cpu.hpp>

#include "../reference/neighborhood_attention.hpp"
#include "attention.hpp"
#include "op.hpp"

namespace {

using namespace fuzz;

template <class T>
void try_neighborhood(FuzzedDataProvider& in) {
  const auto extent = [&](Index few, Index many) {
    return in.ConsumeIntegralInRange<Index>(1, in.ConsumeIntegralInRange(0, 5) == 1 ? many : few);
  };
  const Index batch = extent(2, 2), height = extent(6, 16), width = extent(6, 16), heads = extent(2, 3);
  const Index head_dim = extent(9, 40), value_dim = extent(9, 40), tokens = height * width;
  const auto odd = [&](Index most) { return 2 * in.ConsumeIntegralInRange<Index>(0, (most - 1) / 2) + 1; };
  linattn::NeighborhoodAttentionOptions options{.grid = {0, height, width},
                                                .kernel = {odd(height), odd(width)}};
  if (in.ConsumeBool()) options.scale = in.PickValueInArray({0.3, 1.0, -0.5, 0.0});
  const bool special = in.ConsumeIntegralInRange(0, 3) == 1;
  Operand<T, 4> q(in, {batch, tokens, heads, head_dim}, Use::input),
      k(in, {batch, tokens, heads, head_dim}, Use::input);
  Operand<T, 4> v(in, {batch, tokens, heads, value_dim}, Use::input);
  Operand<T, 4> out(in, {batch, tokens, heads, value_dim}, Use::output);
  q.fill(in, 1.0, special), k.fill(in, 1.0, special), v.fill(in, 1.0, special);
  auto q_ = q.view(), k_ = k.view(), v_ = v.view(), out_ = out.view();
  const bool spoil = in.ConsumeIntegralInRange(0, 3) == 1;
  if (spoil) {
    const int which = in.ConsumeIntegralInRange(0, 6);
    const Index size = in.PickValueInArray<Index>({0, -1, 2, Index{1} << 62, 2 * height + 1});
    if (which == 0) q_ = spoiled(in, q_);
    if (which == 1) k_ = spoiled(in, k_);
    if (which == 2) v_ = spoiled(in, v_);
    if (which == 3) out_ = spoiled(in, out_);
    if (which == 4) options.grid.height = size;
    if (which == 5) options.kernel.height = size;
    if (which == 6) options.grid.offset = size;
  }
  const auto call = [&](linattn::Workspace workspace) {
    return linattn::neighborhood_attention<linattn::Serial, T>({workspace}, q_, k_, v_, out_, options);
  };
  if (const Status status = call({}); !status.ok() && status.code != Code::workspace)
    return expect(spoil, linattn::message(status).c_str());
  const Status status = run(
      in, linattn::neighborhood_attention_workspace<linattn::Serial, T>({}, q_, k_, v_, out_, options), call);
  expect(status.ok(), linattn::message(status).c_str());

  const Attention attention(
      options.scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim))), [&](const auto& at, Index j) {
        const Index i = at[1];
        return reference::sees(i / width, j / width, options.kernel.height, height) &&
                       reference::sees(i % width, j % width, options.kernel.width, width)
                   ? 0.0
                   : -HUGE_VAL;
      });
  attention.expect_close(q_, k_, v_, out_);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  FuzzedDataProvider in(data, size);
  switch (in.ConsumeIntegralInRange(0, 3)) {
    case 0:
      return try_neighborhood<float>(in), 0;
    case 1:
      return try_neighborhood<double>(in), 0;
    case 2:
      return try_neighborhood<linattn::half>(in), 0;
    default:
      return try_neighborhood<linattn::bfloat16>(in), 0;
  }
}

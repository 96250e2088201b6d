// softmax_attention against its double reference: any shapes, strides and types, masks, biases and log-sum-exps, with NaN and
// infinities among the inputs, and arguments that it must refuse.
#include <linattn/ops/softmax_attention_cpu.hpp>

#include "attention.hpp"
#include "op.hpp"

namespace {

using namespace fuzz;

template <class T>
void try_softmax(FuzzedDataProvider& in) {
  using C = Compute<T>;
  const auto extent = [&](Index few, Index many) {
    return in.ConsumeIntegralInRange<Index>(1, in.ConsumeIntegralInRange(0, 7) == 1 ? many : few);
  };
  const Index batch = extent(2, 3), queries = extent(9, 140), keys = extent(9, 200), heads = extent(2, 3);
  const Index head_dim = extent(9, 72), value_dim = extent(9, 72);
  const bool special = in.ConsumeIntegralInRange(0, 3) == 1, biased = in.ConsumeBool(),
             lse_wanted = in.ConsumeBool();
  Operand<T, 4> q(in, {batch, queries, heads, head_dim}, Use::input),
      k(in, {batch, keys, heads, head_dim}, Use::input);
  Operand<T, 4> v(in, {batch, keys, heads, value_dim}, Use::input),
      out(in, {batch, queries, heads, value_dim}, Use::output);
  Operand<C, 4> bias(in, {batch, heads, queries, keys}, Use::input);
  Operand<C, 3> lse(in, {batch, queries, heads}, Use::output);
  const double size = in.PickValueInArray({1.0, 1.0, 0.0, 1e-3, 6.0});
  q.fill(in, size, special), k.fill(in, size, special), v.fill(in, 1.0, special), bias.fill(in, 2.0);
  const bool hide = in.ConsumeBool();
  if (hide)
    for_each_index(bias.view().extents, [&](const auto& i) {
      if ((i[2] * 7 + i[3] * 3 + i[1]) % 5 < 2) element(bias.view(), i) = -std::numeric_limits<C>::infinity();
    });

  linattn::SoftmaxAttentionOptions<C> options;
  options.causal = in.ConsumeBool();
  if (in.ConsumeBool()) options.scale = in.PickValueInArray({0.3, 1.0, -0.5, 0.0});
  if (biased) options.bias = bias.view();
  if (lse_wanted) options.lse = lse.view();
  auto q_ = q.view(), k_ = k.view(), v_ = v.view(), out_ = out.view();
  const bool spoil = in.ConsumeIntegralInRange(0, 3) == 1;
  if (spoil) {
    const int which = in.ConsumeIntegralInRange(0, 6);
    if (which == 0) q_ = spoiled(in, q_);
    if (which == 1) k_ = spoiled(in, k_);
    if (which == 2) v_ = spoiled(in, v_);
    if (which == 3) out_ = spoiled(in, out_);
    if (which == 4 && biased) options.bias = spoiled(in, options.bias);
    if (which == 5 && lse_wanted) {
      options.lse = spoiled(in, options.lse);
      options.lse.strides = lse.view().strides;  // any stride is right, but not any is within the memory
    }
    if (which == 6) options.scale = in.PickValueInArray({std::nan(""), HUGE_VAL, 1e308, 1e-320});
  }
  const auto call = [&](linattn::Workspace workspace) {
    return linattn::softmax_attention<linattn::Serial, T>({workspace}, q_, k_, v_, out_, options);
  };
  if (const Status status = call({}); !status.ok() && status.code != Code::workspace) {
    expect(spoil, linattn::message(status).c_str());
    return;
  }
  const Status status =
      run(in, linattn::softmax_attention_workspace<linattn::Serial, T>({}, q_, k_, v_, out_, options), call);
  expect(status.ok(), linattn::message(status).c_str());
  const double scale = options.scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim)));
  if (std::abs(scale) > 1e3) return;

  // A bias without elements, as spoiled() may leave it, is none.
  const bool has_bias = !options.bias.empty();
  const auto dbias = AsDouble{}(bias.view());
  const Attention attention(scale, [&](const auto& at, Index j) {
    if (options.causal && j > at[1] + keys - queries) return -HUGE_VAL;
    return has_bias ? dbias.view()(at[0], at[2], at[1], j) : 0.0;
  });
  attention.expect_close(q_, k_, v_, out_, options.lse);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  FuzzedDataProvider in(data, size);
  switch (in.ConsumeIntegralInRange(0, 3)) {
    case 0:
      try_softmax<float>(in);
      break;
    case 1:
      try_softmax<double>(in);
      break;
    case 2:
      try_softmax<linattn::half>(in);
      break;
    default:
      try_softmax<linattn::bfloat16>(in);
  }
  return 0;
}

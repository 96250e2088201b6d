// linear against its double reference: any shapes, strides and storage types, and arguments that it must refuse.
#include <linattn/ops/linear_cpu.hpp>

#include "../reference/linear.hpp"
#include "op.hpp"

namespace {

using namespace fuzz;
using linattn::bfloat16;
using linattn::half;

template <class X, class W, class T>
void try_linear(FuzzedDataProvider& in) {
  const auto extent = [&](Index few, Index many) {
    return in.ConsumeIntegralInRange<Index>(1, in.ConsumeIntegralInRange(0, 7) == 1 ? many : few);
  };
  const Index batch = extent(2, 3), rows = extent(9, 70), ins = extent(20, 300), outs = extent(20, 140);
  const bool special = in.ConsumeIntegralInRange(0, 3) == 1, biased = in.ConsumeBool();
  Operand<X, 3> x(in, {batch, rows, ins}, Use::input);
  Operand<W, 2> weight(in, {outs, ins}, Use::input);
  Operand<float, 1> bias(in, {biased ? outs : 0}, Use::input);
  Operand<T, 3> out(in, {batch, rows, outs}, Use::output);
  x.fill(in, 1.0, special), weight.fill(in, 1.0, special), bias.fill(in, 1.0, special);

  auto x_ = x.view();
  auto weight_ = weight.view();
  auto bias_ = bias.view();
  auto out_ = out.view();
  const bool spoil = in.ConsumeIntegralInRange(0, 3) == 1;
  if (spoil) {
    const int which = in.ConsumeIntegralInRange(0, 3);
    if (which == 0) x_ = spoiled(in, x_);
    if (which == 1) weight_ = spoiled(in, weight_);
    if (which == 2) bias_ = spoiled(in, bias_);
    if (which == 3) out_ = spoiled(in, out_);
  }
  const auto call = [&](linattn::Workspace workspace) {
    return linattn::linear(linattn::Cpu{workspace}, x_, weight_, bias_, out_);
  };
  if (!call({}).ok() && call({}).code != Code::workspace) {
    expect(spoil, linattn::message(call({})).c_str());
    return;
  }
  const Status status = run(in, linattn::linear_workspace(linattn::Cpu{}, x_, weight_, bias_, out_), call);
  expect(status.ok(), linattn::message(status).c_str());

  const AsDouble numbers{.odd_to_nan = true}, sizes{.odd_to_nan = true, .absolute = true};
  support::Buffer<double, 3> expected(out_.extents), terms(out_.extents);
  reference::linear(numbers(x_), numbers(weight_), numbers(bias_), expected);
  reference::linear(sizes(x_), sizes(weight_), sizes(bias_), terms);
  const double bound = static_cast<double>(ins + 1) * 2 * support::unit_roundoff<Compute<T>>;
  expect_close(out_, expected.view(),
               [&](const auto& index) { return bound * element(terms.view(), index); });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  FuzzedDataProvider in(data, size);
  switch (in.ConsumeIntegralInRange(0, 5)) {
    case 0:
      try_linear<float, float, float>(in);
      break;
    case 1:
      try_linear<double, double, double>(in);
      break;
    case 2:
      try_linear<half, half, half>(in);
      break;
    case 3:
      try_linear<bfloat16, bfloat16, bfloat16>(in);
      break;
    case 4:
      try_linear<float, bfloat16, float>(in);
      break;
    default:
      try_linear<float, float, half>(in);
  }
  return 0;
}

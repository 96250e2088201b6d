// ttt_conv against its formulas in double: any grids, strides and types, and arguments that it must refuse.
#include <linattn/ops/ttt_conv_cpu.hpp>

#include "../reference/depthwise_conv.hpp"
#include "../reference/ttt_conv.hpp"
#include "op.hpp"

namespace {

using namespace fuzz;
using Doubles = support::Buffer<double, 4>;

template <class T>
void try_ttt_conv(FuzzedDataProvider& in) {
  const auto extent = [&](Index few, Index many) {
    return in.ConsumeIntegralInRange<Index>(1, in.ConsumeIntegralInRange(0, 7) == 1 ? many : few);
  };
  const Index batch = extent(2, 3), height = extent(5, 36), width = extent(5, 20), heads = extent(2, 2);
  const Index channels = extent(9, 40), tokens = height * width;
  const std::array shape{batch, tokens, heads, channels};
  const bool special = in.ConsumeIntegralInRange(0, 3) == 1;
  Operand<T, 4> q(in, shape, Use::input), k(in, shape, Use::input), v(in, shape, Use::input);
  Operand<T, 4> weight(in, {heads * channels, 1, 3, 3}, Use::input), out(in, shape, Use::output);
  q.fill(in, 1.0, special), k.fill(in, 1.0, special), v.fill(in, 1.0, special), weight.fill(in, 0.5, special);
  linattn::TttConvOptions options{.grid = {0, height, width}};
  options.scale = in.PickValueInArray({1.0 / 3.0, 1.0, -2.0, 0.0});
  options.inner_lr = in.PickValueInArray({1.0, 0.1, -1.0, 0.0});
  auto q_ = q.view(), k_ = k.view(), v_ = v.view(), weight_ = weight.view(), out_ = out.view();
  const bool spoil = in.ConsumeIntegralInRange(0, 3) == 1;
  if (spoil) {
    const int which = in.ConsumeIntegralInRange(0, 6);
    if (which == 0) q_ = spoiled(in, q_);
    if (which == 1) k_ = spoiled(in, k_);
    if (which == 2) v_ = spoiled(in, v_);
    if (which == 3) out_ = spoiled(in, out_);
    if (which == 4) weight_ = spoiled(in, weight_);
    if (which == 5) options.grid.width = in.PickValueInArray<Index>({0, -1, Index{1} << 62, width + 1});
    if (which == 6) options.scale = std::nan("");
  }
  const auto call = [&](linattn::Workspace workspace) {
    return linattn::ttt_conv<linattn::Serial, T>({workspace}, q_, k_, v_, weight_, out_, options);
  };
  if (const Status status = call({}); !status.ok() && status.code != Code::workspace)
    return expect(spoil, linattn::message(status).c_str());
  const Status status =
      run(in, linattn::ttt_conv_workspace<linattn::Serial, T>({}, q_, k_, v_, weight_, out_, options), call);
  expect(status.ok(), linattn::message(status).c_str());

  const AsDouble numbers{.odd_to_nan = true}, sizes{.odd_to_nan = true, .absolute = true};
  Doubles expected(out_.extents), terms(out_.extents);
  reference::ttt_conv(numbers(q_), numbers(k_), numbers(v_), numbers(weight_), expected, options.grid,
                      options.scale, options.inner_lr);
  // Without the clip, of a scale whose sign makes every term add; an upper bound of what the sums go through.
  Doubles unclipped(weight_.extents);
  const auto k_sizes = sizes(k_), v_sizes = sizes(v_), w_sizes = sizes(weight_), q_sizes = sizes(q_);
  for (Index b = 0; b < batch; ++b) {
    for_each_index(weight_.extents, [&](const auto& i) {
      const Index h = i[0] / channels, c = i[0] % channels;
      double sum = 0;
      for (Index n = 0; n < tokens; ++n) {
        const Index row = n / width + i[2] - 1, column = n % width + i[3] - 1;
        if (row >= 0 && row < height && column >= 0 && column < width)
          sum += v_sizes.view()(b, n, h, c) * k_sizes.view()(b, row * width + column, h, c);
      }
      element(unclipped.view(), i) = element(w_sizes.view(), i) + std::abs(options.inner_lr * options.scale) *
                                                                      sum / static_cast<double>(tokens);
    });
    const auto part = [b](const TensorView<double, 4>& x) { return linattn::slice<0>(x, b, 1); };
    reference::depthwise_conv(part(q_sizes.view()), unclipped.view(), {}, part(terms.view()), options.grid,
                              false);
  }
  const double share = (static_cast<double>(height + width) + 64) * 2 * support::unit_roundoff<Compute<T>>;
  expect_close(out_, expected.view(), [&](const auto& i) { return share * element(terms.view(), i); });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  FuzzedDataProvider in(data, size);
  switch (in.ConsumeIntegralInRange(0, 3)) {
    case 0:
      return try_ttt_conv<float>(in), 0;
    case 1:
      return try_ttt_conv<double>(in), 0;
    case 2:
      return try_ttt_conv<linattn::half>(in), 0;
    default:
      return try_ttt_conv<linattn::bfloat16>(in), 0;
  }
}

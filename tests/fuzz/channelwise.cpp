// The ops that work on each channel, or each head, alone, against their double references: depthwise_conv, instance_norm,
// rms_norm, affine and mix, on any shapes, strides and types.
#include <linattn/ops/depthwise_conv_cpu.hpp>
#include <linattn/ops/elementwise_cpu.hpp>
#include <linattn/ops/instance_norm_cpu.hpp>
#include <linattn/ops/rms_norm_cpu.hpp>

#include "../reference/depthwise_conv.hpp"
#include "../reference/instance_norm.hpp"
#include "../reference/rms_norm.hpp"
#include "op.hpp"

namespace {

using namespace fuzz;
using Doubles = support::Buffer<double, 4>;
constexpr AsDouble numbers{.odd_to_nan = true}, sizes{.odd_to_nan = true, .absolute = true};

template <class T>
struct Tokens {
  static constexpr double eps = 2 * support::unit_roundoff<Compute<T>>;
  FuzzedDataProvider& in;
  linattn::TokenGrid grid;
  Index heads, channels;
  bool special, spoil;
  Operand<T, 4> x, out;
  TensorView<T, 4> x_, out_;

  explicit Tokens(FuzzedDataProvider& input)
      : in(input),
        grid{.offset = extent(3, 8) - 1, .height = extent(4, 30), .width = extent(4, 30)},
        heads(extent(3, 3)),
        channels(extent(9, 70)),
        special(in.ConsumeIntegralInRange(0, 3) == 1),
        spoil(in.ConsumeIntegralInRange(0, 3) == 1),
        x(in, {extent(2, 3), grid.offset + grid.tokens() + extent(3, 3) - 1, heads, channels}, Use::input),
        out(in, x.view().extents, Use::output),
        x_(x.view()),
        out_(out.view()) {
    x.fill(in, in.PickValueInArray({1.0, 1e-6, 100.0}), special);
    // Not both: they might come to agree on more than there is.
    if (spoil && in.ConsumeBool())
      x_ = spoiled(in, x_);
    else if (spoil && in.ConsumeBool())
      out_ = spoiled(in, out_);
  }

  Index extent(Index few, Index many) {
    return in.ConsumeIntegralInRange<Index>(1, in.ConsumeIntegralInRange(0, 7) == 1 ? many : few);
  }
  template <class View>
  void maybe_spoil(View& view) {
    if (spoil && in.ConsumeBool()) view = spoiled(in, view);
  }
  // Whether there is a result to compare.
  [[nodiscard]] bool done(const Status& status) const {
    expect(status.ok() || spoil, linattn::message(status).c_str());
    return status.ok();
  }
  template <class Bound>
  void close(const Doubles& expected, const Bound& bound) const {
    expect_close(out_, expected.view(), bound);
  }

  void depthwise_conv() {
    Operand<T, 4> weight(in, {heads * channels, 1, 3, 3}, Use::input);
    Operand<T, 1> bias(in, {in.ConsumeBool() ? heads * channels : 0}, Use::input);
    // By the formula, a tap that is NaN meets the zeros outside the grid, too.
    weight.fill(in), bias.fill(in, 1.0, special);
    auto weight_ = weight.view();
    auto bias_ = bias.view();
    maybe_spoil(weight_), maybe_spoil(bias_);
    linattn::DepthwiseConvOptions options{.grid = grid, .residual = in.ConsumeBool()};
    if (spoil && in.ConsumeBool())
      options.grid.height = in.PickValueInArray<Index>({0, -1, Index{1} << 62, grid.height + 5});
    if (!done(linattn::depthwise_conv(linattn::Cpu{}, x_, weight_, bias_, out_, options))) return;
    Doubles expected(out_.extents), terms(out_.extents);
    reference::depthwise_conv(numbers(x_), numbers(weight_), numbers(bias_), expected, options.grid,
                              options.residual);
    reference::depthwise_conv(sizes(x_), sizes(weight_), sizes(bias_), terms, options.grid, true);
    close(expected, [&](const auto& i) { return 12 * eps * element(terms.view(), i); });
  }

  void instance_norm() {
    linattn::InstanceNormOptions options{.eps = in.PickValueInArray({1.0, 0.5, 1e-3}),
                                         .divide_by_std = in.ConsumeBool()};
    if (spoil && in.ConsumeBool()) options.eps = in.PickValueInArray({-1.0, std::nan("")});
    const auto call = [&](linattn::Workspace workspace) {
      return linattn::instance_norm<linattn::Serial, T>({workspace}, x_, out_, options);
    };
    // The size of a workspace is told for arguments that the op takes.
    Status status = call({});
    if (status.ok() || status.code == Code::workspace)
      status = run(in, linattn::instance_norm_workspace<linattn::Serial, T>({}, x_, out_, options), call);
    if (!done(status)) return;
    const Doubles values = numbers(x_);
    Doubles expected(out_.extents);
    reference::instance_norm(values, expected, options.eps, options.divide_by_std);
    // Relative to the largest of a channel, whose mean and variance carry an error of a few eps.
    close(expected, [&](const auto& i) {
      double most = 0;
      for (Index n = 0; n < values.view().extent(1); ++n)
        most = std::max(most, std::abs(values.view()(i[0], n, i[2], i[3])));
      const double size = options.divide_by_std ? most / std::sqrt(options.eps) : most;
      return 64 * eps * (size + std::abs(element(expected.view(), i)));
    });
  }

  void rms_norm() {
    Operand<T, 1> weight(in, {channels}, Use::input);
    weight.fill(in, 1.0, special);
    auto weight_ = weight.view();
    maybe_spoil(weight_);
    linattn::RmsNormOptions options{.eps = in.PickValueInArray({1e-6, 1.0, 1e-3})};
    if (spoil && in.ConsumeBool()) options.eps = in.PickValueInArray({-1.0, std::nan("")});
    if (!done(linattn::rms_norm(linattn::Cpu{}, x_, weight_, out_, options))) return;
    Doubles expected(out_.extents);
    reference::rms_norm(numbers(x_), numbers(weight_), expected, options.eps);
    const double share = (4 + static_cast<double>(channels) / 16) * 2 * eps;
    close(expected, [&](const auto& i) { return share * std::abs(element(expected.view(), i)); });
  }

  void affine() {
    Operand<float, 1> scale(in, {heads * channels}, Use::input), offset(in, {heads * channels}, Use::input);
    scale.fill(in, 1.0, special), offset.fill(in, 1.0, special);
    auto scale_ = scale.view(), offset_ = offset.view();
    // Of any stride, 0 among them.
    if (in.ConsumeBool()) scale_.strides[0] = 0;
    if (spoil && in.ConsumeBool()) scale_.data = nullptr;
    if (spoil && in.ConsumeBool()) offset_.extents[0] += in.PickValueInArray<Index>({-1, 1});
    if (!done(linattn::affine(linattn::Cpu{}, x_, scale_, offset_, out_))) return;
    const Doubles a = numbers(x_);
    const auto factors = numbers(scale_), terms = numbers(offset_);
    Doubles expected(out_.extents);
    for_each_index(out_.extents, [&](const auto& i) {
      const Index channel = i[2] * channels + i[3];
      element(expected.view(), i) = factors.view()(channel) * element(a.view(), i) + terms.view()(channel);
    });
    close(expected, [&](const auto& i) {
      const Index channel = i[2] * channels + i[3];
      return eps *
             (std::abs(factors.view()(channel) * element(a.view(), i)) + std::abs(terms.view()(channel)));
    });
  }

  void mix() {
    Operand<T, 4> other(in, x.view().extents, Use::input);
    other.fill(in, 1.0, special);
    auto other_ = other.view();
    maybe_spoil(other_);
    const double weight =
        spoil && in.ConsumeBool() ? std::nan("") : in.PickValueInArray({0.5, 0.0, 1.0, -2.0});
    if (!done(linattn::mix<linattn::Serial, T>({}, x_, other_, weight, out_))) return;
    const Doubles a = numbers(x_), b = numbers(other_);
    Doubles expected(out_.extents);
    for_each_index(out_.extents, [&](const auto& i) {
      element(expected.view(), i) = (1 - weight) * element(a.view(), i) + weight * element(b.view(), i);
    });
    close(expected, [&](const auto& i) {
      return 3 * eps *
             (std::abs((1 - weight) * element(a.view(), i)) + std::abs(weight * element(b.view(), i)));
    });
  }
};

template <class T>
void try_channelwise(FuzzedDataProvider& in) {
  Tokens<T> tokens(in);
  switch (in.ConsumeIntegralInRange(0, 4)) {
    case 0:
      return tokens.depthwise_conv();
    case 1:
      return tokens.instance_norm();
    case 2:
      return tokens.rms_norm();
    case 3:
      return tokens.affine();
    default:
      return tokens.mix();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  FuzzedDataProvider in(data, size);
  switch (in.ConsumeIntegralInRange(0, 3)) {
    case 0:
      try_channelwise<float>(in);
      break;
    case 1:
      try_channelwise<double>(in);
      break;
    case 2:
      try_channelwise<linattn::half>(in);
      break;
    default:
      try_channelwise<linattn::bfloat16>(in);
  }
  return 0;
}

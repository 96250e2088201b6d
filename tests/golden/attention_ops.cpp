// Golden cases of the ops around test-time training: softmax_attention, the key norms and the depthwise
// convolution.
#include <array>
#include <string>

#include "../reference/instance_norm.hpp"
#include "ttt.hpp"

namespace {

using namespace golden;

// ---- softmax ----

template <class T>
Buffer<T, 4> softmax(const std::array<TensorView<const double, 4>, 3>& qkv, double scale, Layout layout,
                     const TensorView<Compute<T>, 3>& lse = {}) {
  const auto q = in_layout<T>(qkv[0], layout), k = in_layout<T>(qkv[1], layout),
             v = in_layout<T>(qkv[2], layout);
  Buffer<T, 4> out = support::make<T>(
      layout, {q.view().extent(0), q.view().extent(1), q.view().extent(2), v.view().extent(3)});
  const SoftmaxAttentionOptions<Compute<T>> options{.scale = scale, .causal = false, .bias = {}, .lse = lse};
  const std::size_t bytes =
      softmax_attention_workspace(Cpu{}, q.view(), k.view(), v.view(), out.view(), options);
  require(softmax_attention(arena(bytes), q.view(), k.view(), v.view(), out.view(), options));
  return out;
}

void run_softmax(Case& c) {
  const Tensor q = c.read("q"), k = c.read("k"), v = c.read("v");
  const std::array<TensorView<const double, 4>, 3> qkv = {
      swap_tokens_heads(q.view<4>()), swap_tokens_heads(k.view<4>()), swap_tokens_heads(v.view<4>())};
  const double scale = c.number("scale");
  for_each_layout([&]<class T>(Layout layout) {
    Buffer<T, 3> lse({qkv[0].extent(0), qkv[0].extent(1), qkv[0].extent(2)});  // (b, n, h)
    const Buffer<T, 4> out = softmax<T>(qkv, scale, layout, lse);
    c.check("output", run_name<T>(layout), swap_tokens_heads(out.view()), recorded<T>);
    c.check("mid.lse", run_name<T>(layout), permute<0, 2, 1>(lse.view()), recorded<T>);
  });
  const auto in_16_bit = [&]<class T>(T) {
    const auto qr = rounded<T>(qkv[0]), kr = rounded<T>(qkv[1]), vr = rounded<T>(qkv[2]);
    const auto qd = support::to_double(qr), kd = support::to_double(kr), vd = support::to_double(vr);
    const Buffer<double, 4> exact = softmax<double>({qd.view(), kd.view(), vd.view()}, scale, Layout::dense);
    c.compare("output", std::string(support::type_name<T>), softmax<T>(qkv, scale, Layout::dense).view(),
              to_golden<4>(exact.view()), stored<T>);
  };
  in_16_bit(half{});
  in_16_bit(bfloat16{});
}

// ---- the key norms ----

template <class T>
Buffer<T, 4> normalised(const TensorView<const double, 4>& x, const InstanceNormOptions& options,
                        Layout layout) {
  const auto in = in_layout<T>(x, layout);
  Buffer<T, 4> out = support::make<T>(layout, x.extents);
  const std::size_t bytes = instance_norm_workspace(Cpu{}, in.view(), out.view(), options);
  require(instance_norm(arena(bytes), in.view(), out.view(), options));
  return out;
}

void run_norm(Case& c) {
  const Tensor input = c.read("input");
  const TensorView<const double, 4> x = one_head(input.view<3>());
  const bool divide = c.op() == "key_instance_norm";
  const InstanceNormOptions options{.eps = divide ? c.number("eps") : 0.0, .divide_by_std = divide};
  for_each_layout([&]<class T>(Layout layout) {
    c.check("output", run_name<T>(layout), normalised<T>(x, options, layout).view(), recorded<T>);
  });
  Buffer<double, 3> mean({x.extent(0), x.extent(2), x.extent(3)}),
      var({x.extent(0), x.extent(2), x.extent(3)});
  reference::token_statistics(x, mean, var);
  c.check("mid.mean", "reference", mean.view(), recorded<double>);
  c.check("mid.var", "reference", var.view(), recorded<double>);
  const auto in_16_bit = [&]<class T>(T) {
    const auto xd = support::to_double(rounded<T>(x));
    const Buffer<double, 4> exact = normalised<double>(xd.view(), options, Layout::dense);
    c.compare("output", std::string(support::type_name<T>), normalised<T>(x, options, Layout::dense).view(),
              to_golden<4>(exact.view()), stored<T>);
  };
  in_16_bit(half{});
  in_16_bit(bfloat16{});
}

// ---- the convolution ----

template <class T>
Buffer<T, 4> convolved(const TensorView<const double, 4>& x, const TensorView<const double, 4>& weight,
                       const TensorView<const double, 1>& bias, const TokenGrid& grid, Layout layout) {
  const auto in = in_layout<T>(x, layout);
  const auto w = rounded<T>(weight);
  const auto b = rounded<T>(bias);
  Buffer<T, 4> out = support::make<T>(layout, x.extents);
  require(depthwise_conv(Cpu{}, in.view(), w.view(), b.view(), out.view(), {.grid = grid}));
  return out;
}

void run_conv(Case& c) {
  const Tensor input = c.read("input"), weight = c.read("param.weight"), bias = c.read("param.bias");
  const TensorView<const double, 4> x = one_head(input.view<3>());
  const TokenGrid grid = grid_of(c);
  for_each_layout([&]<class T>(Layout layout) {
    c.check("output", run_name<T>(layout),
            convolved<T>(x, weight.view<4>(), bias.view<1>(), grid, layout).view(), recorded<T>);
  });
  const auto in_16_bit = [&]<class T>(T) {
    const auto xd = support::to_double(rounded<T>(x));
    const auto wd = support::to_double(rounded<T>(weight.view<4>()));
    const auto bd = support::to_double(rounded<T>(bias.view<1>()));
    const auto exact = convolved<double>(xd.view(), wd.view(), bd.view(), grid, Layout::dense);
    c.compare("output", std::string(support::type_name<T>),
              convolved<T>(x, weight.view<4>(), bias.view<1>(), grid, Layout::dense).view(),
              to_golden<4>(exact.view()), stored<T>);
  };
  in_16_bit(half{});
  in_16_bit(bfloat16{});
}

const Registration registrations[] = {
    {{"softmax_attention"}, run_softmax},
    {{"key_instance_norm", "key_mean_subtract"}, run_norm},
    {{"dwconv_residual"}, run_conv},
};

}  // namespace

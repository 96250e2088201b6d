// Golden cases of the ops around test-time training: softmax_attention, the key norms and the depthwise
// convolution, wherever they run.
#pragma once

#include <array>

#include "../reference/instance_norm.hpp"
#include "ttt.hpp"

namespace golden {

using Qkv = std::array<TensorView<const double, 4>, 3>;

// ---- softmax ----

// The row sums go to `lse` if it is given: (b, n, h).
template <class At, class T>
Buffer<T, 4> softmax(const Qkv& qkv, double scale, Layout layout, Buffer<Compute<T>, 3>* lse = nullptr) {
  const auto q = in_layout<T>(qkv[0], layout), k = in_layout<T>(qkv[1], layout),
             v = in_layout<T>(qkv[2], layout);
  Buffer<T, 4> result = support::make<T>(
      layout, {q.view().extent(0), q.view().extent(1), q.view().extent(2), v.view().extent(3)});
  At at;
  const TensorView<T, 4> queries = at.view(q), keys = at.view(k), values = at.view(v), out = at.view(result);
  SoftmaxAttentionOptions<Compute<T>> options;
  options.scale = scale;
  if (lse != nullptr) options.lse = at.view(*lse);
  at.run(
      [&](const auto& ctx) { return softmax_attention_workspace(ctx, queries, keys, values, out, options); },
      [&](const auto& ctx) { return softmax_attention(ctx, queries, keys, values, out, options); });
  return result;
}

template <class At>
void run_softmax(Case& c) {
  const Tensor q = c.read("q"), k = c.read("k"), v = c.read("v");
  const Qkv qkv = {swap_tokens_heads(q.view<4>()), swap_tokens_heads(k.view<4>()),
                   swap_tokens_heads(v.view<4>())};
  const double scale = c.number("scale");
  for_each_layout<At>([&]<class T>(Layout layout) {
    constexpr Tolerance tolerance = std::is_same_v<T, float> ? At::softmax_in_float : recorded<T>;
    Buffer<T, 3> lse({qkv[0].extent(0), qkv[0].extent(1), qkv[0].extent(2)});
    const Buffer<T, 4> out = softmax<At, T>(qkv, scale, layout, &lse);
    c.check("output", run_name<T>(layout), swap_tokens_heads(out.view()), tolerance);
    c.check("mid.lse", run_name<T>(layout), permute<0, 2, 1>(lse.view()), tolerance);
  });
  for_each_stored<At>([&]<class T>(Layout layout) {
    const auto qd = support::to_double(rounded<T>(qkv[0])), kd = support::to_double(rounded<T>(qkv[1])),
               vd = support::to_double(rounded<T>(qkv[2]));
    const Buffer<double, 4> exact =
        softmax<Host, double>({qd.view(), kd.view(), vd.view()}, scale, Layout::dense);
    constexpr int roundings = 2;  // the probabilities and the output
    c.compare("output", At::template stored_name<T>(layout), softmax<At, T>(qkv, scale, layout).view(),
              to_golden<4>(exact.view()), At::template stored_after<T>(roundings));
  });
}

// ---- the key norms ----

template <class At, class T>
Buffer<T, 4> normalised(const TensorView<const double, 4>& x, const InstanceNormOptions& options,
                        Layout layout) {
  const auto input = in_layout<T>(x, layout);
  Buffer<T, 4> result = support::make<T>(layout, x.extents);
  At at;
  const TensorView<T, 4> in = at.view(input), out = at.view(result);
  at.run([&](const auto& ctx) { return instance_norm_workspace(ctx, in, out, options); },
         [&](const auto& ctx) { return instance_norm(ctx, in, out, options); });
  return result;
}

template <class At>
void run_norm(Case& c) {
  const Tensor input = c.read("input");
  const TensorView<const double, 4> x = one_head(input.view<3>());
  const bool divide = c.op() == "key_instance_norm";
  const InstanceNormOptions options{.eps = divide ? c.number("eps") : 0.0, .divide_by_std = divide};
  for_each_layout<At>([&]<class T>(Layout layout) {
    c.check("output", run_name<T>(layout), normalised<At, T>(x, options, layout).view(), recorded<T>);
  });
  Buffer<double, 3> mean({x.extent(0), x.extent(2), x.extent(3)}),
      var({x.extent(0), x.extent(2), x.extent(3)});
  reference::token_statistics(x, mean, var);
  c.check("mid.mean", "reference", mean.view(), recorded<double>);
  c.check("mid.var", "reference", var.view(), recorded<double>);
  for_each_stored<At>([&]<class T>(Layout layout) {
    const auto xd = support::to_double(rounded<T>(x));
    const Buffer<double, 4> exact = normalised<Host, double>(xd.view(), options, Layout::dense);
    c.compare("output", At::template stored_name<T>(layout), normalised<At, T>(x, options, layout).view(),
              to_golden<4>(exact.view()), At::template stored_after<T>(1));
  });
}

// ---- the convolution ----

template <class At, class T>
Buffer<T, 4> convolved(const TensorView<const double, 4>& x, const TensorView<const double, 4>& weight,
                       const TensorView<const double, 1>& bias, const TokenGrid& grid, Layout layout) {
  const auto input = in_layout<T>(x, layout);
  const auto taps = rounded<T>(weight);
  const auto offsets = rounded<T>(bias);
  Buffer<T, 4> result = support::make<T>(layout, x.extents);
  At at;
  const TensorView<T, 4> in = at.view(input), w = at.view(taps), out = at.view(result);
  const TensorView<T, 1> b = at.view(offsets);
  at.run([](const auto&) { return std::size_t{0}; },
         [&](const auto& ctx) { return depthwise_conv(ctx, in, w, b, out, {.grid = grid}); });
  return result;
}

template <class At>
void run_conv(Case& c) {
  const Tensor input = c.read("input"), weight = c.read("param.weight"), bias = c.read("param.bias");
  const TensorView<const double, 4> x = one_head(input.view<3>());
  const TokenGrid grid = grid_of(c);
  for_each_layout<At>([&]<class T>(Layout layout) {
    c.check("output", run_name<T>(layout),
            convolved<At, T>(x, weight.view<4>(), bias.view<1>(), grid, layout).view(), recorded<T>);
  });
  for_each_stored<At>([&]<class T>(Layout layout) {
    const auto xd = support::to_double(rounded<T>(x));
    const auto wd = support::to_double(rounded<T>(weight.view<4>()));
    const auto bd = support::to_double(rounded<T>(bias.view<1>()));
    const auto exact = convolved<Host, double>(xd.view(), wd.view(), bd.view(), grid, Layout::dense);
    c.compare("output", At::template stored_name<T>(layout),
              convolved<At, T>(x, weight.view<4>(), bias.view<1>(), grid, layout).view(),
              to_golden<4>(exact.view()), At::template stored_after<T>(1));
  });
}

// In double these are the host's, compiled where it is: attention_ops.cpp.
extern template Buffer<double, 4> softmax<Host, double>(const Qkv&, double, Layout, Buffer<double, 3>*);
extern template Buffer<double, 4> normalised<Host, double>(const TensorView<const double, 4>&,
                                                           const InstanceNormOptions&, Layout);
extern template Buffer<double, 4> convolved<Host, double>(const TensorView<const double, 4>&,
                                                          const TensorView<const double, 4>&,
                                                          const TensorView<const double, 1>&,
                                                          const TokenGrid&, Layout);

}  // namespace golden

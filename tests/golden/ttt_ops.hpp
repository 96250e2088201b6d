// Golden cases of the test-time-training ops, ttt_* and the branch of ViT3 that is one of them, wherever they run.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "ttt.hpp"

namespace golden {

// The op, and its first half.
template <class Model, class Loss, class Step>
struct Ttt {
  using Qkv = std::array<TensorView<const double, 4>, 3>;

  template <class At, class T>
  static Buffer<T, 4> trained(const Qkv& qkv, const Matrices<T>& weights, const TttOptions<T>& options,
                              Layout layout) {
    const auto q = in_layout<T>(qkv[0], layout), k = in_layout<T>(qkv[1], layout),
               v = in_layout<T>(qkv[2], layout);
    Buffer<T, 4> result = support::make<T>(layout, q.view().extents);
    At at;
    const TensorView<T, 4> queries = at.view(q), keys = at.view(k), values = at.view(v),
                           out = at.view(result);
    const TttWeights<T> w = weights.views(at);
    at.run(
        [&](const auto& ctx) {
          return ttt_workspace<Model, Loss, Step>(ctx, queries, keys, values, w, out, options);
        },
        [&](const auto& ctx) { return ttt<Model, Loss, Step>(ctx, queries, keys, values, w, out, options); });
    return result;
  }
  // In double, on the host: compiled in ttt_ops.cpp.
  static Buffer<double, 4> exact(const Qkv& qkv, const Matrices<double>& weights,
                                 const TttOptions<double>& options);

  template <class At, class T>
  static Updated<T> updated(const Qkv& qkv, const Matrices<T>& weights, const TttOptions<T>& options,
                            Layout layout) {
    const auto k = in_layout<T>(qkv[1], layout), v = in_layout<T>(qkv[2], layout);
    Updated<T> result(qkv[1].extent(0), qkv[1].extent(2), qkv[1].extent(3), weights.memory.size());
    At at;
    const TensorView<T, 4> keys = at.view(k), values = at.view(v);
    const TttWeights<T> w = weights.views(at);
    const FastWeights<T> fast = result.views(at);
    at.run(
        [&](const auto& ctx) {
          return ttt_update_workspace<Model, Loss, Step>(ctx, keys, values, w, fast, options);
        },
        [&](const auto& ctx) { return ttt_update<Model, Loss, Step>(ctx, keys, values, w, fast, options); });
    return result;
  }
};

// `numbers`: which of the recorded matrices the model's are.
template <class At, class Model, class Loss, class Step>
void run_variant(Case& c, std::string_view numbers) {
  using Op = Ttt<Model, Loss, Step>;
  const Tensor q = c.read("q"), k = c.read("k"), v = c.read("v");
  const typename Op::Qkv qkv = {swap_tokens_heads(q.view<4>()), swap_tokens_heads(k.view<4>()),
                                swap_tokens_heads(v.view<4>())};
  const std::vector<Tensor> initial = read_matrices(c, "", linattn::detail::matrices<Model>, numbers);
  const double scale = c.number("scale"), inner_lr = c.number("inner_lr");
  for_each_layout<At>([&]<class T>(Layout layout) {
    const Matrices<T> w(initial);
    const TttOptions<T> options{.inner_lr = inner_lr, .scale = scale};
    const std::string run = run_name<T>(layout);
    c.check("output", run, swap_tokens_heads(Op::template trained<At, T>(qkv, w, options, layout).view()),
            recorded<T>);
    check_update<T>(c, run, initial, Op::template updated<At, T>(qkv, w, options, layout), inner_lr, numbers);
    if constexpr (!std::is_same_v<Step, Plain>)
      check_gradients<T>(c, run, initial,
                         Ttt<Model, Loss, Plain>::template updated<At, T>(qkv, w, options, layout), inner_lr,
                         numbers, "_raw");
  });
  for_each_stored<At>([&]<class T>(Layout layout) {
    const Matrices<T> w(initial);
    const auto qd = support::to_double(rounded<T>(qkv[0])), kd = support::to_double(rounded<T>(qkv[1])),
               vd = support::to_double(rounded<T>(qkv[2]));
    const auto exact = Op::exact({qd.view(), kd.view(), vd.view()}, Matrices<double>(w),
                                 {.inner_lr = inner_lr, .scale = scale});
    const auto ours = Op::template trained<At, T>(qkv, w, {.inner_lr = inner_lr, .scale = scale}, layout);
    constexpr int roundings = 8;  // ops/ttt.hpp
    c.compare("output", At::template stored_name<T>(layout), ours.view(), to_golden<4>(exact.view()),
              At::template stored_after<T>(roundings));
  });
}

template <class At, class Model, class Loss>
void run_ttt(Case& c) {
  run_variant<At, Model, Loss, Plain>(c, "123");
}

// ViT3's branch (x w1) * silu(x w2): the gate is the second matrix.
template <class At>
void run_vittt(Case& c) {
  run_variant<At, Glu, InnerProduct, ColumnClip>(c, "21");
}

}  // namespace golden

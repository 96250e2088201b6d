// Golden cases of the test-time-training ops: ttt_* and the branch of ViT3 that is one of them.
#include "ttt.hpp"

namespace {

using namespace golden;

// The op, and its first half.
template <class Model, class Loss, class Step, class T>
Buffer<T, 4> trained(const std::array<TensorView<const double, 4>, 3>& qkv, const Matrices<T>& w,
                     const TttOptions<T>& options, Layout layout) {
  const auto q = in_layout<T>(qkv[0], layout), k = in_layout<T>(qkv[1], layout),
             v = in_layout<T>(qkv[2], layout);
  Buffer<T, 4> out = support::make<T>(layout, q.view().extents);
  const std::size_t bytes =
      ttt_workspace<Model, Loss, Step>(Cpu{}, q.view(), k.view(), v.view(), w.views(), out.view(), options);
  require(ttt<Model, Loss, Step>(arena(bytes), q.view(), k.view(), v.view(), w.views(), out.view(), options));
  return out;
}
template <class Model, class Loss, class Step, class T>
Updated<T> updated(const std::array<TensorView<const double, 4>, 3>& qkv, const Matrices<T>& w,
                   const TttOptions<T>& options, Layout layout) {
  const auto k = in_layout<T>(qkv[1], layout), v = in_layout<T>(qkv[2], layout);
  Updated<T> result(qkv[1].extent(0), qkv[1].extent(2), qkv[1].extent(3), w.memory.size());
  const std::size_t bytes =
      ttt_update_workspace<Model, Loss, Step>(Cpu{}, k.view(), v.view(), w.views(), result.views(), options);
  require(
      ttt_update<Model, Loss, Step>(arena(bytes), k.view(), v.view(), w.views(), result.views(), options));
  return result;
}

// `numbers`: which of the recorded matrices the model's are.
template <class Model, class Loss, class Step>
void run_variant(Case& c, std::string_view numbers) {
  const Tensor q = c.read("q"), k = c.read("k"), v = c.read("v");
  const std::array<TensorView<const double, 4>, 3> qkv = {
      swap_tokens_heads(q.view<4>()), swap_tokens_heads(k.view<4>()), swap_tokens_heads(v.view<4>())};
  const std::vector<Tensor> initial = read_matrices(c, "", detail::matrices<Model>, numbers);
  const double scale = c.number("scale"), inner_lr = c.number("inner_lr");
  for_each_layout([&]<class T>(Layout layout) {
    const Matrices<T> w(initial);
    const TttOptions<T> options{.inner_lr = inner_lr, .scale = scale};
    const std::string run = run_name<T>(layout);
    c.check("output", run, swap_tokens_heads(trained<Model, Loss, Step>(qkv, w, options, layout).view()),
            recorded<T>);
    check_update<T>(c, run, initial, updated<Model, Loss, Step>(qkv, w, options, layout), inner_lr, numbers);
    if constexpr (!std::is_same_v<Step, Plain>)
      check_gradients<T>(c, run, initial, updated<Model, Loss, Plain>(qkv, w, options, layout), inner_lr,
                         numbers, "_raw");
  });
  const auto in_16_bit = [&]<class T>(T) {
    const Matrices<T> w(initial);
    const Matrices<double> wd(w);
    const auto qd = support::to_double(rounded<T>(qkv[0])), kd = support::to_double(rounded<T>(qkv[1]));
    const auto vd = support::to_double(rounded<T>(qkv[2]));
    const auto exact = trained<Model, Loss, Step, double>(
        {qd.view(), kd.view(), vd.view()}, wd, {.inner_lr = inner_lr, .scale = scale}, Layout::dense);
    const auto ours =
        trained<Model, Loss, Step, T>(qkv, w, {.inner_lr = inner_lr, .scale = scale}, Layout::dense);
    c.compare("output", std::string(support::type_name<T>), ours.view(), to_golden<4>(exact.view()),
              stored<T>);
  };
  in_16_bit(half{});
  in_16_bit(bfloat16{});
}

template <class Model, class Loss>
void run_ttt(Case& c) {
  run_variant<Model, Loss, Plain>(c, "123");
}

// ViT3's branch (x w1) * silu(x w2): the gate is the second matrix.
void run_vittt(Case& c) { run_variant<Glu, InnerProduct, ColumnClip>(c, "21"); }

const Registration registrations[] = {
    {{"ttt_swiglu_ip"}, run_ttt<SwiGlu, InnerProduct>}, {{"ttt_mlp2_ip"}, run_ttt<Mlp, InnerProduct>},
    {{"ttt_mlp2_l2"}, run_ttt<Mlp, SquaredError>},      {{"ttt_mlp3_ip"}, run_ttt<Mlp3, InnerProduct>},
    {{"ttt_glu1_ip"}, run_ttt<Glu, InnerProduct>},      {{"ttt_linear_ip"}, run_ttt<Linear, InnerProduct>},
    {{"ttt_linear_l2"}, run_ttt<Linear, SquaredError>}, {{"vittt_swiglu_clip"}, run_vittt},
};

}  // namespace

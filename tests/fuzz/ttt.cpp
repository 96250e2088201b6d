// ttt against its formulas in double: inner models, losses and steps, any shapes, strides and types, with and without the
// prologue, and arguments that it must refuse; and its two halves, which together give the bits of the whole.
#include "ttt_problem.hpp"

namespace {

using namespace fuzz;

template <class Model, class Loss, class Step, class T>
void expect_halves(FuzzedDataProvider& in, const Problem<Model, Loss, Step, T>& p) {
  std::vector<Operand<Compute<T>, 4>> memory;
  FastWeights<Compute<T>> fast;
  const std::array<TensorView<Compute<T>, 4>*, 3> views{&fast.w1, &fast.w2, &fast.w3};
  for (std::size_t m = 0; m < static_cast<std::size_t>(p.matrices); ++m) {
    memory.emplace_back(in, std::array{p.batch, p.heads, p.head_dim, p.head_dim}, Use::output);
    *views[m] = memory.back().view();
  }
  Status status = fuzz::run(
      in, ttt_update_workspace<Model, Loss, Step>(Cpu{}, p.k.view(), p.v, p.weights, fast, p.options),
      [&](Workspace workspace) {
        return ttt_update<Model, Loss, Step>(Cpu{workspace}, p.k.view(), p.v, p.weights, fast, p.options);
      });
  expect(status.ok(), message(status).c_str());
  Operand<T, 4> again(in, p.out.view().extents, Use::output);
  status = fuzz::run(in, ttt_apply_workspace<Model>(Cpu{}, p.q, fast, again.view(), p.options),
                     [&](Workspace workspace) {
                       return ttt_apply<Model>(Cpu{workspace}, p.q, fast, again.view(), p.options);
                     });
  expect(status.ok(), message(status).c_str());
  if (!p.special)
    expect(support::same_bits(again.view(), p.out.view()), "the halves give the bits of the whole");
}

template <class Model, class Loss, class Step, class T>
void try_ttt(FuzzedDataProvider& in) {
  Problem<Model, Loss, Step, T> p(in);
  auto& weights = p.weights;
  auto& options = p.options;
  auto q_ = p.q.view(), k_ = p.k.view(), v_ = p.v.view(), out_ = p.out.view();
  const bool spoil = in.ConsumeIntegralInRange(0, 3) == 1;
  if (spoil) {
    const int which = in.ConsumeIntegralInRange(0, 8);
    if (which == 0) q_ = spoiled(in, q_);
    if (which == 1) k_ = spoiled(in, k_);
    if (which == 2) v_ = spoiled(in, v_);
    if (which == 3) out_ = spoiled(in, out_);
    if (which == 4) weights.w1 = spoiled(in, weights.w1);
    if (which == 5) weights.w3 = spoiled(in, weights.w3);
    if (which == 6) options.prologue.k_conv = spoiled(in, options.prologue.k_conv);
    if (which == 7)
      options.prologue.grid.width = in.PickValueInArray<Index>({0, -3, Index{1} << 60, p.grid.width + 1});
    if (which == 8) (in.ConsumeBool() ? options.inner_lr : options.prologue.key_norm_eps) = std::nan("");
  }
  const auto call = [&](Workspace workspace) {
    return linattn::ttt<Model, Loss, Step>(Cpu{workspace}, q_, k_, v_, weights, out_, options);
  };
  if (const Status status = call({}); !status.ok() && status.code != Code::workspace)
    return expect(spoil, message(status).c_str());
  const Status status =
      fuzz::run(in, ttt_workspace<Model, Loss, Step>(Cpu{}, q_, k_, v_, weights, out_, options), call);
  expect(status.ok(), message(status).c_str());
  if (spoil) return;
  p.check(out_);
  expect_halves(in, p);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  FuzzedDataProvider in(data, size);
  switch (in.ConsumeIntegralInRange(0, 5)) {
    case 0:
      return try_ttt<Linear, SquaredError, Plain, float>(in), 0;
    case 1:
      return try_ttt<SwiGlu, InnerProduct, Plain, float>(in), 0;
    case 2:
      return try_ttt<Mlp, SquaredError, Plain, double>(in), 0;
    case 3:
      return try_ttt<Glu, InnerProduct, ColumnClip, float>(in), 0;
    case 4:
      return try_ttt<Mlp3, InnerProduct, Plain, half>(in), 0;
    default:
      return try_ttt<SwiGlu, SquaredError, ColumnClip, bfloat16>(in), 0;
  }
}

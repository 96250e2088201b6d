// Instance normalisation over the tokens, on the host. Contract: instance_norm.hpp.
#pragma once

#include <algorithm>
#include <cstddef>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/detail/lanes.hpp>
#include <linattn/detail/token_stats.hpp>
#include <linattn/ops/instance_norm.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

template <class C, class T>
LINATTN_NOINLINE void normalize_rows(const T* x, Index x_step, T* out, Index out_step, Index rows,
                                     Index channels, const C* shift, const C* delta, const C* scale) {
  for (Index r = 0; r < rows; ++r)
    for_each_pack<C>(0, channels, [&](Index c, auto lanes) {
      lanes.store(out + r * out_step + c, normalize(lanes.load(x + r * x_step + c), lanes.load(shift + c),
                                                    lanes.load(delta + c), lanes.load(scale + c)));
    });
}

}  // namespace detail::inline LINATTN_TARGET

inline namespace LINATTN_TARGET {

// Bytes of scratch: 3 to 99 numbers a channel and sample.
template <ParallelPolicy P, Storage T>
[[nodiscard]] std::size_t instance_norm_workspace(const Cpu<P>&, In<T, 4> x, const TensorView<T, 4>&,
                                                  const InstanceNormOptions& = {}) {
  Carver carver(Workspace{});
  (void)detail::take_token_stats<Compute<T>>(carver, x.extent(0), x.extent(1), x.extent(2) * x.extent(3));
  return carver.used();
}

// y = (x - mean) / sqrt(var + eps) over the tokens. See instance_norm.hpp.
template <ParallelPolicy P, Storage T>
[[nodiscard]] Status instance_norm(const Cpu<P>& ctx, In<T, 4> x, const TensorView<T, 4>& out,
                                   const InstanceNormOptions& options = {}) {
  using C = Compute<T>;
  const Status status = detail::check_instance_norm<T>(x, out, options);
  if (!status.ok()) return status;
  const Index batch = x.extent(0), tokens = x.extent(1), channels = x.extent(2) * x.extent(3);
  Carver carver(ctx.workspace);
  const detail::TokenStats<C> stats = detail::take_token_stats<C>(carver, batch, tokens, channels);
  const Status space = carver.check("instance_norm, workspace");
  if (!space.ok()) return space;

  detail::token_stats<C, T>(ctx.parallel, x, options.eps, options.divide_by_std, stats);

  const bool merged = detail::heads_are_dense(x) && detail::heads_are_dense(out);
  const TensorView<const T, 4> from = merged ? detail::merge_heads(x) : x;
  const TensorView<T, 4> to = merged ? detail::merge_heads(out) : out;
  const Index heads = from.extent(2), head_dim = from.extent(3);
  constexpr Index chunk = 64;
  const Index chunks = (tokens + chunk - 1) / chunk;
  ctx.parallel.run(batch * chunks * heads, [&](Index task, Index) {
    const Index h = task % heads, first = task / heads % chunks * chunk, b = task / heads / chunks;
    const Index channel = b * channels + h * head_dim;
    detail::normalize_rows(from.pointer(b, first, h), from.step(1), to.pointer(b, first, h), to.step(1),
                           std::min(chunk, tokens - first), head_dim, stats.shift + channel,
                           stats.delta + channel, stats.scale + channel);
  });
  return {};
}

}  // namespace LINATTN_TARGET
LINATTN_END

// Root-mean-square normalisation over the channels of each head, on the host. Contract: rms_norm.hpp.
#pragma once

#include <algorithm>
#include <cmath>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/detail/lanes.hpp>
#include <linattn/ops/rms_norm.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

template <class C, class T, class W>
LINATTN_INLINE void rms_norm_row(const T* x, const W* weight, T* out, Index channels, C eps) {
  Pack<C> squares = Pack<C>::zero();
  for_each_pack<C>(0, channels, [&](Index c, auto lanes) {
    const Pack<C> v = lanes.load(x + c);
    squares = fma(v, v, squares);
  });
  const Pack<C> scale(C(1) / std::sqrt(reduce_add(squares) / static_cast<C>(channels) + eps));
  for_each_pack<C>(0, channels, [&](Index c, auto lanes) {
    lanes.store(out + c, lanes.load(x + c) * scale * lanes.load(weight + c));
  });
}

}  // namespace detail::inline LINATTN_TARGET

inline namespace LINATTN_TARGET {

// y = weight * x / sqrt(mean x^2 + eps) over the channels. See rms_norm.hpp.
template <ParallelPolicy P, Storage T, class W>
[[nodiscard]] Status rms_norm(const Cpu<P>& ctx, In<T, 4> x, const TensorView<W, 1>& weight,
                              const TensorView<T, 4>& out, const RmsNormOptions& options = {}) {
  using C = Compute<T>;
  const Status status = detail::check_rms_norm<T>(x, weight, out, options);
  if (!status.ok()) return status;
  const Index tokens = x.extent(1), heads = x.extent(2);
  constexpr Index chunk = 16;
  const Index chunks = tokens / chunk + (tokens % chunk != 0 ? 1 : 0);
  ctx.parallel.run(x.extent(0) * chunks, [&](Index task, Index) {
    const Index b = task / chunks, first = task % chunks * chunk;
    for (Index n = first; n < std::min(first + chunk, tokens); ++n)
      for (Index h = 0; h < heads; ++h)
        detail::rms_norm_row(x.pointer(b, n, h), weight.data, out.pointer(b, n, h), x.extent(3),
                             static_cast<C>(options.eps));
  });
  return {};
}

}  // namespace LINATTN_TARGET
LINATTN_END

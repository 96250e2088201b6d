// How much the keys have in common, on the host. Contract: key_shift_ratio.hpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <type_traits>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/detail/lanes.hpp>
#include <linattn/diagnostics/key_shift_ratio.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
inline namespace LINATTN_TARGET {

// Bytes of scratch: one key in double a worker.
template <ParallelPolicy P, class T>
[[nodiscard]] std::size_t key_shift_ratio_workspace(const Cpu<P>& ctx, const TensorView<T, 4>& k,
                                                    const TensorView<Compute<T>, 2>&) {
  Carver carver(Workspace{});
  (void)carver.take<double>(static_cast<Index>(ctx.parallel.workers()) * k.extent(3));
  return carver.used();
}

// out = |mean k| / mean |k| over the tokens. T is that of k. See key_shift_ratio.hpp.
template <ParallelPolicy P, class T>
[[nodiscard]] Status key_shift_ratio(const Cpu<P>& ctx, const TensorView<T, 4>& k,
                                     const TensorView<Compute<T>, 2>& out) {
  const Status status = detail::check_key_shift_ratio<std::remove_const_t<T>>(k, out);
  if (!status.ok()) return status;
  const Index heads = k.extent(2), channels = k.extent(3);
  Carver carver(ctx.workspace);
  double* const sums = carver.take<double>(static_cast<Index>(ctx.parallel.workers()) * channels);
  const Status space = carver.check("key_shift_ratio, workspace");
  if (!space.ok()) return space;

  ctx.parallel.run(k.extent(0) * heads, [&](Index task, Index worker) {
    const Index b = task / heads, h = task % heads;
    double* const sum = sums + worker * channels;
    std::fill_n(sum, channels, 0.0);
    double lengths = 0;
    for (Index n = 0; n < k.extent(1); ++n) {
      const T* const key = k.pointer(b, n, h);
      detail::Pack<double> squares = detail::Pack<double>::zero();
      detail::for_each_pack<double>(0, channels, [&](Index c, auto lanes) {
        const detail::Pack<double> x = lanes.load(key + c);
        squares = fma(x, x, squares);
        lanes.store(sum + c, lanes.load(sum + c) + x);
      });
      lengths += std::sqrt(reduce_add(squares));
    }
    double squares = 0;
    for (Index c = 0; c < channels; ++c) squares += sum[c] * sum[c];
    out(b, h) = static_cast<Compute<T>>(lengths == 0 ? 0.0 : std::sqrt(squares) / lengths);
  });
  return {};
}

}  // namespace LINATTN_TARGET
LINATTN_END

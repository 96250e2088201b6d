// Element-wise ops on tokens, on the host. Contract: elementwise.hpp.
#pragma once

#include <algorithm>
#include <type_traits>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/detail/lanes.hpp>
#include <linattn/detail/simd.hpp>
#include <linattn/ops/elementwise.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

// Channels [first, first + count) of a vector of any stride, side by side.
template <class C, class W>
inline void gather_channels(const TensorView<W, 1>& from, Index first, Index count, C* to) {
  for (Index c = 0; c < count; ++c) to[c] = convert<C>(from(first + c));
}

}  // namespace detail::inline LINATTN_TARGET

inline namespace LINATTN_TARGET {

// out = scale x + offset, a scale and an offset a channel. See elementwise.hpp.
template <ParallelPolicy P, Storage T, class W>
[[nodiscard]] Status affine(const Cpu<P>& ctx, In<T, 4> x, const TensorView<W, 1>& scale,
                            const std::type_identity_t<TensorView<W, 1>>& offset,
                            const TensorView<T, 4>& out) {
  using C = Compute<T>;
  if (const Status status = detail::check_affine<T>(x, scale, offset, out); !status.ok()) return status;
  // A task takes some tokens of a block of channels, whose scales and offsets it lays side by side.
  constexpr Index chunk = 64, block = 128;
  const Index tokens = x.extent(1), heads = x.extent(2), channels = x.extent(3);
  const Index chunks = (tokens + chunk - 1) / chunk, blocks = (channels + block - 1) / block;
  ctx.parallel.run(x.extent(0) * chunks * heads * blocks, [&](Index task, Index) {
    const Index first = task % blocks * block, h = task / blocks % heads,
                count = std::min(block, channels - first);
    const Index begin = task / blocks / heads % chunks * chunk, b = task / blocks / heads / chunks;
    C scales[block] = {}, offsets[block] = {};
    detail::gather_channels(scale, h * channels + first, count, scales);
    detail::gather_channels(offset, h * channels + first, count, offsets);
    for (Index n = begin; n < std::min(begin + chunk, tokens); ++n) {
      const T* const from = x.pointer(b, n, h, first);
      T* const to = out.pointer(b, n, h, first);
      detail::for_each_pack<C>(0, count, [&](Index c, auto lanes) {
        using Pack = detail::Pack<C>;
        lanes.store(to + c, fma(lanes.load(from + c), Pack::load(scales + c), Pack::load(offsets + c)));
      });
    }
  });
  return {};
}

// out = (1 - weight) a + weight b. See elementwise.hpp.
template <ParallelPolicy P, Storage T>
[[nodiscard]] Status mix(const Cpu<P>& ctx, In<T, 4> a, In<T, 4> b, double weight,
                         const TensorView<T, 4>& out) {
  using C = Compute<T>;
  if (const Status status = detail::check_mix<T>(a, b, weight, out); !status.ok()) return status;
  constexpr Index chunk = 16;
  const Index tokens = a.extent(1), chunks = (tokens + chunk - 1) / chunk;
  const detail::Pack<C> of_a(static_cast<C>(1 - weight)), of_b(static_cast<C>(weight));
  ctx.parallel.run(a.extent(0) * chunks, [&](Index task, Index) {
    const Index sample = task / chunks, begin = task % chunks * chunk;
    for (Index n = begin; n < std::min(begin + chunk, tokens); ++n)
      for (Index h = 0; h < a.extent(2); ++h) {
        const T *const x = a.pointer(sample, n, h), *const y = b.pointer(sample, n, h);
        T* const to = out.pointer(sample, n, h);
        detail::for_each_pack<C>(0, a.extent(3), [&](Index c, auto lanes) {
          lanes.store(to + c, fma(lanes.load(x + c), of_a, lanes.load(y + c) * of_b));
        });
      }
  });
  return {};
}

}  // namespace LINATTN_TARGET
LINATTN_END

// Softmax attention on a CUDA device. Contract: softmax_attention.hpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <type_traits>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/detail/channel_tiles.cuh>
#include <linattn/detail/cuda.cuh>
#include <linattn/detail/flash_mma.cuh>
#include <linattn/detail/softmax_plain.cuh>
#include <linattn/detail/softmax_problem.cuh>
#include <linattn/ops/softmax_attention.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

// Whether the tensor cores can do it: 16 bits, channels by 8, rows at multiples of 16 bytes.
template <class T>
[[nodiscard]] bool flash_fits(const TensorView<const T, 4>& q, const TensorView<const T, 4>& k,
                              const TensorView<const T, 4>& v, const TensorView<T, 4>& out) {
  const Index d = q.extent(3), dv = v.extent(3);
  return sizeof(T) == 2 && std::max(d, dv) <= 128 && d % 8 == 0 && dv % 8 == 0 && has_aligned_rows(q) &&
         has_aligned_rows(k) && has_aligned_rows(v) && has_aligned_rows(out);
}

template <class T>
[[nodiscard]] SoftmaxProblem<T> softmax_problem(const TensorView<const T, 4>& q,
                                                const TensorView<const T, 4>& k,
                                                const TensorView<const T, 4>& v, const TensorView<T, 4>& out,
                                                const SoftmaxAttentionOptions<float>& options) {
  const auto queries = static_cast<int>(q.extent(1)), keys = static_cast<int>(k.extent(1));
  SoftmaxProblem<T> p{
      .q = rows(q),
      .k = rows(k),
      .v = rows(v),
      .out = rows(out),
      .bias = {},
      .lse = {},
      .queries = queries,
      .keys = keys,
      .heads = static_cast<int>(q.extent(2)),
      .head_dim = static_cast<int>(q.extent(3)),
      .value_dim = static_cast<int>(v.extent(3)),
      .diagonal = options.causal ? keys - queries : keys - 1,
      .scale = static_cast<float>(options.scale.value_or(1.0 / std::sqrt(static_cast<double>(q.extent(3))))),
      .quads = takes_quads(out)};
  if (!options.bias.empty())
    p.bias = {options.bias.data, options.bias.stride(0), options.bias.stride(2), options.bias.stride(1)};
  if (!options.lse.empty())
    p.lse = {options.lse.data, options.lse.stride(0), options.lse.stride(1), options.lse.stride(2)};
  return p;
}

template <int Width, class T>
[[nodiscard]] Status run_flash(const Cuda& ctx, Index groups, const SoftmaxProblem<T>& p) {
  using Tile = FlashTile<Width>;
  constexpr int guarded = flash_guarded_width;
  const Grid grid{.x = groups * ceil_div(p.queries, Tile::queries)};
  const Status status = launch(ctx, "flash_mma", flash_mma_kernel<T, Width>, grid, Tile::threads,
                               sizeof(FlashShared<Width>), p);
  if (!status.ok() || !p.hides(0, p.queries - 1)) return status;
  static_assert(Tile::queries == FlashTile<guarded>::queries);
  return launch(ctx, "flash_guarded", flash_guarded_kernel<T>, grid, FlashTile<guarded>::threads,
                sizeof(FlashShared<guarded>), p);
}
template <int Width, class T>
[[nodiscard]] Status run_softmax_plain(const Cuda& ctx, Index groups, const SoftmaxProblem<T>& p) {
  constexpr int guarded = softmax_plain_guarded_width;
  Grid grid{.x = groups * ceil_div(p.queries, softmax_plain_tokens), .y = ceil_div(p.value_dim, Width)};
  const Status status = launch(ctx, "softmax_plain", softmax_plain_kernel<T, Width>, grid,
                               softmax_plain_threads, sizeof(SoftmaxPlainShared<Width>), p);
  if (!status.ok() || !p.hides(0, p.queries - 1)) return status;
  grid.y = ceil_div(p.value_dim, guarded);
  return launch(ctx, "softmax_plain_guarded", softmax_plain_guarded_kernel<T>, grid, softmax_plain_threads,
                sizeof(SoftmaxPlainShared<guarded>), p);
}

}  // namespace detail::inline LINATTN_TARGET

inline namespace LINATTN_TARGET {

// None is needed.
template <Storage T>
[[nodiscard]] std::size_t softmax_attention_workspace(const Cuda&, const In<T, 4>&, const In<T, 4>&,
                                                      const In<T, 4>&, const TensorView<T, 4>&,
                                                      const SoftmaxAttentionOptions<Compute<T>>& = {}) {
  LINATTN_REQUIRE_DEVICE_STORAGE(T);
  return 0;
}

// out = softmax(scale q k^T + bias) v. See softmax_attention.hpp.
template <Storage T>
[[nodiscard]] Status softmax_attention(const Cuda& ctx, const In<T, 4>& q, const In<T, 4>& k,
                                       const In<T, 4>& v, const TensorView<T, 4>& out,
                                       const SoftmaxAttentionOptions<Compute<T>>& options = {}) {
  LINATTN_REQUIRE_DEVICE_STORAGE(T);
  if (const Status status = detail::check_softmax_attention<T>(q, k, v, out, options); !status.ok())
    return status;
  constexpr Index most_tokens = Index{1} << 29;  // the sum of a query and a key is an int of the kernels
  const Index tokens = std::max(q.extent(1), k.extent(1));
  if (tokens > most_tokens)
    return detail::fail(Code::option, "softmax_attention, tokens (on a device)", most_tokens, tokens);
  const auto p = detail::softmax_problem<T>(q, k, v, out, options);
  const Index groups = q.extent(0) * q.extent(2);
  if constexpr (sizeof(T) == 2) {
    if (detail::flash_fits<T>(q, k, v, out)) {
      const int width = std::max(p.head_dim, p.value_dim);
      if (width <= 32) return detail::run_flash<32>(ctx, groups, p);
      if (width <= 64) return detail::run_flash<64>(ctx, groups, p);
      return detail::run_flash<128>(ctx, groups, p);
    }
  }
  return p.value_dim <= 128 ? detail::run_softmax_plain<128>(ctx, groups, p)
                            : detail::run_softmax_plain<512>(ctx, groups, p);
}

}  // namespace LINATTN_TARGET
LINATTN_END

// Root-mean-square normalisation over the channels of each head, on a CUDA device. Contract: rms_norm.hpp.
//
// A row has 1 to 32 lanes of a warp, the fewest that hold it four channels each; longer rows go round. A lane adds up
// its own squares, then the lanes add theirs pairwise: |error| is about (4 + c / 64) eps |y|, and one rounding to T.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <type_traits>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/detail/channel_tiles.cuh>
#include <linattn/detail/cuda.cuh>
#include <linattn/detail/ptx.cuh>
#include <linattn/ops/rms_norm.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

inline constexpr int rms_norm_threads = 128;
inline constexpr int rms_norm_turns = 4;  // rows of a group of lanes, whose loads hide behind each other

template <class T, class W>
struct RmsNormParams {
  Rows<const T> x;
  Rows<T> out;
  const W* weight;
  int rows, heads, head_dim;  // rows: tokens * heads of a sample
  int blocks;                 // of a sample
  int lanes;                  // of a row
  float eps;

  // Row r of sample b.
  [[nodiscard]] __device__ __forceinline__ const T* input(Index b, int r) const {
    return x.at(b, r / heads, r % heads);
  }
  [[nodiscard]] __device__ __forceinline__ T* output(Index b, int r) const {
    return out.at(b, r / heads, r % heads);
  }
};

template <int Width>
[[nodiscard]] __device__ __forceinline__ float add_squares(const float (&x)[Width], float sum) {
#pragma unroll
  for (int c = 0; c < Width; ++c) sum = fmaf(x[c], x[c], sum);
  return sum;
}
template <int Width, class W>
__device__ __forceinline__ void load_weight(const W* from, float (&to)[Width]) {
#pragma unroll
  for (int c = 0; c < Width; ++c) to[c] = to_float(from[c]);
}
template <int Width, class T>
__device__ __forceinline__ void store_scaled(T* to, const float (&x)[Width], float scale,
                                             const float (&weight)[Width]) {
  float y[Width];
#pragma unroll
  for (int c = 0; c < Width; ++c) y[c] = x[c] * scale * weight[c];
  store_channels<Width>(to, y);
}

template <class T, class W, int Width>
static __global__ void __launch_bounds__(rms_norm_threads, 8) rms_norm_kernel(RmsNormParams<T, W> p) {
  const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const Index b = block / p.blocks;
  const int groups = rms_norm_threads / p.lanes;
  const int begin = block % p.blocks * (groups * rms_norm_turns) + thread / p.lanes;
  const int first = thread % p.lanes * Width, step = p.lanes * Width;

  // The lane's first channels stay in registers, which for most heads are all.
  float x[rms_norm_turns][Width] = {}, weight[Width] = {};
  if (first < p.head_dim) load_weight(p.weight + first, weight);
#pragma unroll
  for (int i = 0; i < rms_norm_turns; ++i) {
    const int row = begin + i * groups;
    if (row < p.rows && first < p.head_dim) load_channels<Width>(p.input(b, row) + first, x[i]);
  }
#pragma unroll
  for (int i = 0; i < rms_norm_turns; ++i) {
    const int row = begin + i * groups;
    float sum = add_squares(x[i], 0.0f);
    for (int channel = first + step; row < p.rows && channel < p.head_dim; channel += step) {
      float more[Width];
      load_channels<Width>(p.input(b, row) + channel, more);
      sum = add_squares(more, sum);
    }
    for (int apart = p.lanes / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
    if (row >= p.rows || first >= p.head_dim) continue;
    const float scale = 1.0f / sqrtf(sum / static_cast<float>(p.head_dim) + p.eps);
    store_scaled(p.output(b, row) + first, x[i], scale, weight);
    for (int channel = first + step; channel < p.head_dim; channel += step) {
      float more[Width], more_weight[Width];
      load_channels<Width>(p.input(b, row) + channel, more);
      load_weight(p.weight + channel, more_weight);
      store_scaled(p.output(b, row) + channel, more, scale, more_weight);
    }
  }
}

}  // namespace detail::inline LINATTN_TARGET

inline namespace LINATTN_TARGET {

// y = weight * x / sqrt(mean x^2 + eps) over the channels. See rms_norm.hpp.
template <Storage T, class W>
[[nodiscard]] Status rms_norm(const Cuda& ctx, In<T, 4> x, const TensorView<W, 1>& weight,
                              const TensorView<T, 4>& out, const RmsNormOptions& options = {}) {
  LINATTN_REQUIRE_DEVICE_STORAGE(T);
  LINATTN_REQUIRE_DEVICE_STORAGE(W);
  using Weight = std::remove_const_t<W>;
  const Status status = detail::check_rms_norm<T>(x, weight, out, options);
  if (!status.ok()) return status;
  const Index rows = x.extent(1) * x.extent(2);
  constexpr Index most_rows = Index{1} << 30;  // of which a kernel's ints may hold twice as many
  if (rows > most_rows) return detail::fail(Code::option, "rms_norm, tokens * heads", most_rows, rows);
  return detail::with_width(x, out, [&](auto width) {
    const auto head_dim = static_cast<int>(x.extent(3));
    const auto vectors = static_cast<unsigned>(detail::ceil_div(head_dim, width));
    const int lanes = static_cast<int>(std::min(std::bit_ceil(vectors), 32u));
    const Index blocks = detail::ceil_div(rows, detail::rms_norm_threads / lanes * detail::rms_norm_turns);
    const detail::RmsNormParams<T, Weight> p{.x = detail::rows(x),
                                             .out = detail::rows(out),
                                             .weight = weight.data,
                                             .rows = static_cast<int>(rows),
                                             .heads = static_cast<int>(x.extent(2)),
                                             .head_dim = head_dim,
                                             .blocks = static_cast<int>(blocks),
                                             .lanes = lanes,
                                             .eps = static_cast<float>(options.eps)};
    return detail::launch(ctx, "rms_norm", detail::rms_norm_kernel<T, Weight, width>,
                          detail::Grid{.x = x.extent(0) * blocks}, detail::rms_norm_threads, 0, p);
  });
}

}  // namespace LINATTN_TARGET
LINATTN_END

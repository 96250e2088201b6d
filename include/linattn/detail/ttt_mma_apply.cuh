// The answers of TTT's fast weights on tensor cores, for heads of at most 64 channels: out = f(q; W').
//
// A warp owns 16 tokens of a tile: its queries are A, the matrices are B, read from shared memory. 16 features at
// a time are projected, pass the model's function, and are, rounded to T, the A of the chained product, as the
// probabilities are in flash attention.
#pragma once

#include <cuda_runtime.h>

#include <linattn/core/dtype.hpp>
#include <linattn/detail/cuda.cuh>
#include <linattn/detail/mma_tiles.cuh>
#include <linattn/detail/ptx.cuh>
#include <linattn/detail/ttt_mma_load.cuh>
#include <linattn/ops/ttt_inner.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

template <class T, class W>
struct TttApplyParameters {
  TttTokens<T, W> queries;
  Rows<const float> weights[3] = {};  // (batch, row, head)
  Rows<T> out;
  Index groups;  // batch * heads
  int split_tokens;
};

// The block's shared memory; the ring of the loader lies behind it.
template <class Model, int Width>
struct TttApplyShared {
  MmaTile<Width, Width> weights[matrices<Model>];
  MmaTile<ttt_mma_tile, Width> queries;  // and then the outputs
  TttChannels<Width> channels;
};

// 16 features from the `feature`-th on, of this warp's tokens.
template <class Model, class T, int Width>
[[nodiscard]] __device__ __forceinline__ MmaSums activate(const TttApplyShared<Model, Width>& shared,
                                                          const MmaOperand (&q)[Width / 16], int feature) {
  constexpr int projections = Model::projections;
  MmaSums z[projections];
#pragma unroll
  for (int i = 0; i < Width / 16; ++i)
#pragma unroll
    for (int p = 0; p < projections; ++p) {
      MmaOperand w;
      load_b_transposed(w, shared.weights[p], 16 * i, feature / 8);
      multiply_add<T>(z[p], q[i], w);
    }
  if constexpr (Model::has_activation) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        z[0].d[n][i] =
            Model::activate(Approximate{z[0].d[n][i]}, Approximate{z[projections - 1].d[n][i]}).value;
  }
  return z[0];
}

// A block: the tokens of one split, one head.
template <class Model, class T, class W, int Width>
static __global__ void __launch_bounds__(128, Model::chained == 0 ? 2 : 3)
    ttt_mma_apply_kernel(TttApplyParameters<T, W> p) {
  constexpr int threads = 128, row_chunks = Width / 8, steps = Width / 16;
  auto& shared = dynamic_shared<TttApplyShared<Model, Width>>();
  const Index split = blockIdx.x / p.groups, group = blockIdx.x % p.groups;
  const Index b = group / p.queries.heads, h = group % p.queries.heads;
  const int d = p.queries.head_dim, row = 16 * mma_warp();
  const int first = static_cast<int>(split) * p.split_tokens,
            end = min(first + p.split_tokens, p.queries.tokens);

  TttLoader<T, W, Width, threads> queries(p.queries, b, h, first, end, shared.channels,
                                          reinterpret_cast<uint4*>(&shared + 1));
  cp_async_commit();
#pragma unroll
  for (int i = 0; i < matrices<Model>; ++i)
    stage_matrix<T, threads>(shared.weights[i], p.weights[i].at(b, 0, h), p.weights[i].token, d);

  T* const out = p.out.at(b, 0, h);
  for (int token = first; token < end; token += ttt_mma_tile) {
    cp_async_wait<0>();
    __syncthreads();
    queries.prepare(shared.queries, token);
    __syncthreads();
    if (token + ttt_mma_tile < end) {
      queries.advance();
      cp_async_commit();
    }

    MmaOperand q[steps];
#pragma unroll
    for (int i = 0; i < steps; ++i) load_a(q[i], shared.queries, row, 2 * i);
    float y[2 * steps][4] = {};
#pragma unroll(Model::chained == 0 ? steps : 1)
    for (int i = 0; i < steps; ++i) {
      const MmaSums a = activate<Model, T, Width>(shared, q, 16 * i);
      if constexpr (Model::chained == 0) {
#pragma unroll
        for (int j = 0; j < 4; ++j) y[2 * i][j] = a.d[0][j], y[2 * i + 1][j] = a.d[1][j];
      } else {
        const MmaOperand features = to_operand<T>(a);
#pragma unroll
        for (int j = 0; j < steps; ++j) {
          MmaOperand w;
          load_b_transposed(w, shared.weights[matrices<Model> - 1], 16 * i, 2 * j);
          multiply_add<T>(y[2 * j], y[2 * j + 1], features, w);
        }
      }
    }

    // The outputs take the place of the warp's queries, and leave in whole rows.
    __syncwarp();
#pragma unroll
    for (int j = 0; j < steps; ++j)
      store_operand(shared.queries, row, 8 * j, to_operand<T>(y[2 * j], y[2 * j + 1]));
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16 * row_chunks / warp_size; ++i) {
      const int at = i * warp_size + mma_lane(), t = row + at / row_chunks, chunk = at % row_chunks;
      if (token + t < end && 8 * chunk < d)
        store(out + (token + t) * p.out.token + 8 * chunk, load<uint4>(shared.queries.chunk(t, chunk)));
    }
  }
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

// The gradients of TTT's fast weights on tensor cores, for heads of at most 64 channels.
//
// All products are transposed: a warp owns 16 of the features that the projections make (or, where nothing is
// chained to them, of the outputs), for all tokens of its block. Its rows of the weights stay in registers as A,
// its rows of the gradients as sums, and what is summed up over features becomes, rounded to T, the A of the
// products over tokens, without a move: accumulators and operands have the same places. Keys and values are B,
// read from shared memory both as they lie and transposed.
//
//   z_p^T = W_p^T k^T                   D^T = W_chained e^T
//   G_p^T += (D * da/dz_p)^T k          G_chained += a^T e
//
// A loss that needs the prediction is given it 16 or 32 tokens at a time: the warps exchange a^T through shared memory,
// and with it their 16 outputs each predict, and exchange e^T. InnerProduct's e is -v: the values themselves are
// multiplied, and the gradients change their sign as they are written.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

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
struct TttUpdateParameters {
  TttTokens<T, W> keys;
  Rows<const T> values;
  Rows<const W> weights[3] = {};  // (-, row, head)
  float* partials;                // [split, batch * heads, matrix, d, d]
  Index groups;                   // batch * heads
  int split_tokens;
};

// What a loss that needs the prediction needs where a matrix is chained: that matrix, and where the warps exchange
// features and outputs, by tokens.
template <int Width, bool Exchanges>
struct TttExchange {};
template <int Width>
struct TttExchange<Width, true> {
  MmaTile<Width, Width> chained;
  MmaTile<Width, ttt_mma_tile> activations, errors;
};

// The block's shared memory; the ring of the loader lies behind it.
template <class Model, class Loss, int Width>
struct TttUpdateShared : TttExchange<Width, Model::chained != 0 && Loss::needs_prediction> {
  MmaTile<ttt_mma_tile, Width> keys, values[2];  // keys: the weights before that
  TttChannels<Width> channels;
};

// A warp's weights and gradients.
template <class Model, class Loss, class T, int Width>
struct TttMmaLearner {
  static constexpr int projections = Model::projections, steps = Width / 16;
  static constexpr bool chained = Model::chained != 0, predicts = Loss::needs_prediction;
  // Whether anything depends on z.
  static constexpr bool projects = Model::has_activation || predicts;
  static constexpr int exchanged = 32 / projections;  // tokens between two barriers: what registers can hold
  using Tile = MmaTile<ttt_mma_tile, Width>;
  using Shared = TttUpdateShared<Model, Loss, Width>;

  MmaOperand projecting[projections][steps];                   // W_p^T, rows: features
  MmaOperand returning[steps];                                 // W_chained, rows: features; if not shared
  float projection_gradients[projections][2 * steps][4] = {};  // G_p^T
  float chained_gradient[2 * steps][4] = {};

  // Matrix `index` is in the tile.
  __device__ __forceinline__ void load_weights(const MmaTile<Width, Width>& tile, int index) {
    const int mine = 2 * mma_warp();
#pragma unroll
    for (int i = 0; i < steps; ++i) {
#pragma unroll
      for (int p = 0; p < projections; ++p)
        if (p == index) load_a_transposed(projecting[p][i], tile, 16 * i, mine);
      if (index == projections && !predicts) load_a(returning[i], tile, 8 * mine, 2 * i);
    }
  }

  // z of 16 tokens.
  __device__ __forceinline__ void project(const Tile& keys, int row, MmaSums (&z)[projections]) const {
#pragma unroll
    for (int i = 0; i < steps; ++i) {
      MmaOperand k;
      load_b(k, keys, row, 2 * i);
#pragma unroll
      for (int p = 0; p < projections; ++p) multiply_add<T>(z[p], projecting[p][i], k);
    }
  }

  // The model's function of z, and its derivatives instead of z.
  [[nodiscard]] __device__ static __forceinline__ MmaSums differentiate(MmaSums (&z)[projections]) {
    MmaSums value;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (Model::has_activation) {
          const Activation<Approximate> f =
              Model::differentiate(Approximate{z[0].d[n][i]}, Approximate{z[projections - 1].d[n][i]});
          value.d[n][i] = f.value.value;
          z[0].d[n][i] = f.d1.value;
          if constexpr (projections == 2) z[1].d[n][i] = f.d2.value;
        } else {
          value.d[n][i] = z[0].d[n][i];
          z[0].d[n][i] = 1.0f;
        }
      }
    return value;
  }

  // The errors of 16 tokens from `row` on, `count` of them in the tile: this warp's outputs.
  [[nodiscard]] __device__ static __forceinline__ MmaSums errors(const Tile& values, int row, int count,
                                                                 const MmaSums& prediction) {
    MmaOperand target;
    load_a_transposed(target, values, row, 2 * mma_warp());
    MmaSums e = to_sums<T>(target);
    if constexpr (predicts) {
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = row + 8 * n + mma_lane() % 4 * 2 + i % 2;
          const Approximate error = Loss::error(Approximate{e.d[n][i]}, Approximate{prediction.d[n][i]});
          e.d[n][i] = token < count ? error.value : 0.0f;
        }
    }
    return e;
  }

  // G_p^T += (errors * derivatives)^T k
  __device__ __forceinline__ void add_projection_gradients(const Tile& keys, int row, const MmaSums& errors,
                                                           MmaSums (&derivatives)[projections]) {
    MmaOperand a[projections];
#pragma unroll
    for (int p = 0; p < projections; ++p) {
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) derivatives[p].d[n][i] *= errors.d[n][i];
      a[p] = to_operand<T>(derivatives[p]);
    }
#pragma unroll
    for (int i = 0; i < steps; ++i) {
      MmaOperand k;
      load_b_transposed(k, keys, row, 2 * i);
#pragma unroll
      for (int p = 0; p < projections; ++p)
        multiply_add<T>(projection_gradients[p][2 * i], projection_gradients[p][2 * i + 1], a[p], k);
    }
  }

  // A tile of keys and values, `count` tokens in it.
  __device__ __forceinline__ void learn(Shared& shared, const Tile& values, int count) {
    if constexpr (!chained) {
#pragma unroll 1
      for (int row = 0; row < ttt_mma_tile; row += 16) learn_outputs(shared.keys, values, row, count);
    } else if constexpr (!predicts) {
#pragma unroll 1
      for (int row = 0; row < ttt_mma_tile; row += 16) learn_values(shared.keys, values, row);
    } else {
#pragma unroll 1
      for (int row = 0; row < ttt_mma_tile; row += exchanged) learn_predictions(shared, values, row, count);
    }
  }

 private:
  // 16 tokens, nothing chained: the features are the outputs.
  __device__ __forceinline__ void learn_outputs(const Tile& keys, const Tile& values, int row, int count) {
    MmaSums z[projections], prediction;
    if constexpr (projects) project(keys, row, z);
    prediction = differentiate(z);
    add_projection_gradients(keys, row, errors(values, row, count, prediction), z);
  }

  // 16 tokens, a chained matrix, and errors that are the values.
  __device__ __forceinline__ void learn_values(const Tile& keys, const Tile& values, int row) {
    MmaSums z[projections], e;
    project(keys, row, z);
    const MmaOperand activation = to_operand<T>(differentiate(z));
#pragma unroll
    for (int i = 0; i < steps; ++i) {
      MmaOperand v;
      load_b(v, values, row, 2 * i);
      multiply_add<T>(e, returning[i], v);
    }
    add_projection_gradients(keys, row, e, z);
#pragma unroll
    for (int i = 0; i < steps; ++i) {
      MmaOperand v;
      load_b_transposed(v, values, row, 2 * i);
      multiply_add<T>(chained_gradient[2 * i], chained_gradient[2 * i + 1], activation, v);
    }
  }

  // `exchanged` tokens, a chained matrix, and errors of its predictions.
  __device__ __forceinline__ void learn_predictions(Shared& shared, const Tile& values, int first,
                                                    int count) {
    constexpr int blocks = exchanged / 16;
    const int mine = 16 * mma_warp();
    MmaSums z[blocks][projections];
#pragma unroll
    for (int s = 0; s < blocks; ++s) {
      const int row = first + 16 * s;
      project(shared.keys, row, z[s]);
      store_operand(shared.activations, mine, row / 2, to_operand<T>(differentiate(z[s])));
    }
    __syncthreads();
    MmaSums prediction[blocks];
#pragma unroll
    for (int i = 0; i < steps; ++i) {
      MmaOperand w;
      load_a_transposed(w, shared.chained, 16 * i, mine / 8);
#pragma unroll
      for (int s = 0; s < blocks; ++s) {
        MmaOperand a;
        load_b_transposed(a, shared.activations, 16 * i, (first + 16 * s) / 8);
        multiply_add<T>(prediction[s], w, a);
      }
    }
#pragma unroll
    for (int s = 0; s < blocks; ++s) {
      const int row = first + 16 * s;
      store_operand(shared.errors, mine, row / 2, to_operand<T>(errors(values, row, count, prediction[s])));
    }
    __syncthreads();
    MmaSums returned[blocks];
#pragma unroll
    for (int i = 0; i < steps; ++i) {
      MmaOperand w;
      load_a(w, shared.chained, mine, 2 * i);
#pragma unroll
      for (int s = 0; s < blocks; ++s) {
        MmaOperand e;
        load_b_transposed(e, shared.errors, 16 * i, (first + 16 * s) / 8);
        multiply_add<T>(returned[s], w, e);
      }
    }
#pragma unroll
    for (int s = 0; s < blocks; ++s) {
      const int row = first + 16 * s;
      add_projection_gradients(shared.keys, row, returned[s], z[s]);
      MmaOperand activation;
      load_a(activation, shared.activations, mine, row / 8);
#pragma unroll
      for (int i = 0; i < steps; ++i) {
        MmaOperand e;
        load_b(e, shared.errors, 16 * i, row / 8);
        multiply_add<T>(chained_gradient[2 * i], chained_gradient[2 * i + 1], activation, e);
      }
    }
  }

 public:
  // All gradients, without the factor, to [matrix, d, d].
  __device__ __forceinline__ void write(float* to, int d) const {
    constexpr float sign = predicts ? 1.0f : -1.0f;
    const int column = mma_lane() % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int feature = 16 * mma_warp() + 8 * half + mma_lane() / 4;
#pragma unroll
      for (int n = 0; n < 2 * steps; ++n) {
        if (feature >= d || 8 * n >= d) continue;
#pragma unroll
        for (int p = 0; p < projections; ++p) {
          float* const g = to + (p * d + 8 * n + column) * d + feature;
          g[0] = sign * projection_gradients[p][n][2 * half];
          g[d] = sign * projection_gradients[p][n][2 * half + 1];
        }
        if constexpr (chained)
          store(to + (projections * d + feature) * d + 8 * n + column,
                float2{sign * chained_gradient[n][2 * half], sign * chained_gradient[n][2 * half + 1]});
      }
    }
  }
};

// A block: the tokens of one split, one head.
template <class Model, class Loss, class T, class W, int Width>
static __global__ void __launch_bounds__(2 * Width, 2) ttt_mma_update_kernel(TttUpdateParameters<T, W> p) {
  constexpr int threads = 2 * Width, row_chunks = Width / 8;
  auto& shared = dynamic_shared<TttUpdateShared<Model, Loss, Width>>();
  const Index split = blockIdx.x / p.groups, group = blockIdx.x % p.groups;
  const Index b = group / p.keys.heads, h = group % p.keys.heads;
  const int d = p.keys.head_dim;
  const int first = static_cast<int>(split) * p.split_tokens,
            end = min(first + p.split_tokens, p.keys.tokens);

  const T* const v = p.values.at(b, 0, h);
  const auto fill_values = [&](int n) {
    const int chunk = static_cast<int>(threadIdx.x) % row_chunks;
    for (int row = static_cast<int>(threadIdx.x) / row_chunks; row < ttt_mma_tile;
         row += threads / row_chunks) {
      const int token = first + n * ttt_mma_tile + row;
      const bool valid = token < end && 8 * chunk < d;
      cp_async_16(shared.values[n % 2].chunk(row, chunk), valid ? v + token * p.values.token + 8 * chunk : v,
                  valid);
    }
  };
  TttLoader<T, W, Width, threads> keys(p.keys, b, h, first, end, shared.channels,
                                       reinterpret_cast<uint4*>(&shared + 1));
  fill_values(0);
  cp_async_commit();

  using Learner = TttMmaLearner<Model, Loss, T, Width>;
  Learner learner;
  if constexpr (Learner::projects) {
#pragma unroll
    for (int i = 0; i < matrices<Model>; ++i) {
      auto* tile = reinterpret_cast<MmaTile<Width, Width>*>(&shared.keys);
      if constexpr (Learner::chained && Learner::predicts)
        if (i == Model::projections) tile = &shared.chained;
      stage_matrix<T, threads>(*tile, p.weights[i].at(0, 0, h), p.weights[i].token, d);
      __syncthreads();
      learner.load_weights(*tile, i);
      __syncthreads();
    }
  }

  for (int n = 0; first + n * ttt_mma_tile < end; ++n) {
    const int token = first + n * ttt_mma_tile;
    cp_async_wait<0>();
    __syncthreads();
    keys.prepare(shared.keys, token);
    __syncthreads();
    if (token + ttt_mma_tile < end) {
      keys.advance();
      fill_values(n + 1);
      cp_async_commit();
    }
    learner.learn(shared, shared.values[n % 2], end - token);
  }
  learner.write(p.partials + blockIdx.x * (Index{matrices<Model>} * d * d), d);
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

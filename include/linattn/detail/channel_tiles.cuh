// How kernels that treat each channel alone cut (batch, token, head, channel): a block has a tile of neighbouring
// channels of one head and one part of the tokens; 16 threads side by side have a token's channels, 16 more the next
// token's.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/detail/cuda.cuh>
#include <linattn/detail/ptx.cuh>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

inline constexpr int tile_columns = 16, tile_rows = 16;  // of threads
inline constexpr int tile_threads = tile_columns * tile_rows;

// Channels of one thread. Four need rows that start at 16 bytes: then a warp's access is two spans of 128 bytes, or of
// 256 with float. One is for all other views.
inline constexpr int quad = 4, single = 1;
template <class T>
[[nodiscard]] bool takes_quads(const TensorView<T, 4>& v) {
  return has_aligned_rows(v) && v.extent(3) % quad == 0;
}

// f(std::integral_constant<int, Width>) for the Width that the views take.
template <class T, class U, class F>
[[nodiscard]] Status with_width(const TensorView<T, 4>& x, const TensorView<U, 4>& out, const F& f) {
  return takes_quads(x) && takes_quads(out) ? f(std::integral_constant<int, quad>{})
                                            : f(std::integral_constant<int, single>{});
}

// Tokens of a sample: a kernel's ints may hold twice as many.
template <class T>
[[nodiscard]] Status check_token_count(const TensorView<T, 4>& x) {
  constexpr Index most = Index{1} << 30;
  return x.extent(1) <= most ? Status{} : fail(Code::option, "x, tokens (on a device)", most, x.extent(1));
}

// The blocks along x, tiles fastest: neighbours in time are neighbours in memory.
struct ChannelTiles {
  int heads, head_dim, tiles, parts;

  struct Place {
    Index batch;
    int part, head, channel;  // the thread's first channel within its head
    bool inside;              // whether the head has that channel
  };
  template <int Width>
  [[nodiscard]] __device__ __forceinline__ Place place() const {
    const unsigned block = blockIdx.x, a_part = static_cast<unsigned>(tiles) * static_cast<unsigned>(heads);
    const unsigned tile = block % static_cast<unsigned>(tiles);
    const int channel =
        (static_cast<int>(tile) * tile_columns + static_cast<int>(threadIdx.x) % tile_columns) * Width;
    return {static_cast<Index>(block / a_part / static_cast<unsigned>(parts)),
            static_cast<int>(block / a_part % static_cast<unsigned>(parts)),
            static_cast<int>(block / static_cast<unsigned>(tiles) % static_cast<unsigned>(heads)), channel,
            channel < head_dim};
  }
};
template <int Width, class T>
[[nodiscard]] ChannelTiles channel_tiles(const TensorView<T, 4>& x, Index parts) {
  return {static_cast<int>(x.extent(2)), static_cast<int>(x.extent(3)),
          static_cast<int>(ceil_div(x.extent(3), tile_columns * Width)), static_cast<int>(parts)};
}
[[nodiscard]] inline Grid grid_of(const ChannelTiles& tiles, Index batch) {
  return {.x = batch * tiles.parts * tiles.heads * tiles.tiles};
}

// Width neighbouring channels, four of them by one instruction.
template <int Width, class T>
__device__ __forceinline__ void load_channels(const T* from, float (&to)[Width]) {
  if constexpr (Width == single) {
    to[0] = to_float(*from);
  } else if constexpr (std::is_same_v<T, float>) {
    const float4 v = load<float4>(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
    const uint2 v = load<uint2>(from);
    const float2 low = unpack<T>(v.x), high = unpack<T>(v.y);
    to[0] = low.x, to[1] = low.y, to[2] = high.x, to[3] = high.y;
  }
}
template <int Width, class T>
__device__ __forceinline__ void store_channels(T* to, const float (&from)[Width]) {
  if constexpr (Width == single) {
    *to = from_float<T>(from[0]);
  } else if constexpr (std::is_same_v<T, float>) {
    store(to, float4{from[0], from[1], from[2], from[3]});
  } else {
    store(to, uint2{pack<T>(from[0], from[1]), pack<T>(from[2], from[3])});
  }
}

// The same bits elsewhere.
template <int Width, class T>
__device__ __forceinline__ void copy_channels(T* to, const T* from) {
  if constexpr (Width == single) {
    *to = *from;
  } else if constexpr (std::is_same_v<T, float>) {
    store(to, load<float4>(from));
  } else {
    store(to, load<uint2>(from));
  }
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

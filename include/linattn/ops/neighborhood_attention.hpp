// Neighborhood attention: softmax attention of each token of a grid over a window of keys around it. The contract;
// the host's form is in neighborhood_attention_cpu.hpp.
//
//   out[i] = sum_j p[i, j] v[j],   p[i, j] = softmax over j of scale <q[i], k[j]>,   j in the window of i
//
// for every sample and head. The window of the token at (row, column) of the grid are `kernel.height` rows from
// clamp(row - kernel.height / 2, 0, grid.height - kernel.height) on, and columns alike: at the border it keeps its
// size and leaves the middle. A kernel of the size of the grid is softmax_attention, one of 1 x 1 gives v.
//
// Shapes: q, k (b, n, h, d), v, out (b, n, h, dv), n = grid.height * grid.width, row by row: all tokens are on the
// grid. Channels are dense, other strides are free. `out` must not overlap an input.
// Numerics: logits, exponentials and sums in Compute<T>, streaming over blocks of keys in fixed order. A logit
// carries an absolute error of about eps max(|s|, sqrt(d) |q| |k| scale), which is the relative error of its p; the
// exponential adds 2 eps, the sums sqrt(window) eps. eps that of Compute<T>; one rounding to T at the end. Results
// are bitwise equal for any layout and any number of workers. A value or key outside the window of a token has no
// influence on it, be it NaN.
// Errors: empty (an axis, the grid), shape (k, v, out; a grid that is not all tokens), option (a kernel that is
// not odd and positive, or larger than the grid; a grid with an offset; scale is not finite), stride, null_data,
// alias (out is q, k or v), workspace.
// Source: A. Hassani et al., "Neighborhood Attention Transformer", 2023; the border rule is that of NATTEN, with
// dilation 1 and no bias. It is the local half of DiT5's attention.
#pragma once

#include <optional>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/ops/depthwise_conv.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN

// Extents of a window on the grid.
struct Window {
  Index height = 5;
  Index width = 5;
};

struct NeighborhoodAttentionOptions {
  TokenGrid grid{};
  Window kernel{};
  std::optional<double> scale{};  // default head_dim^-1/2
};

namespace detail::inline LINATTN_TARGET {

// The first of `size` places around `position`, kept inside [0, extent).
[[nodiscard]] LINATTN_HD constexpr Index window_start(Index position, Index size, Index extent) {
  const Index start = position - size / 2, last = extent - size;
  return start < 0 ? 0 : start > last ? last : start;
}

[[nodiscard]] constexpr Status check_window(Index size, Index extent, const char* odd, const char* fits) {
  if (size <= 0 || size % 2 == 0) return fail(Code::option, odd, 1, size);
  return size <= extent ? Status{} : fail(Code::option, fits, extent, size);
}

// All but the memory.
template <class T>
[[nodiscard]] constexpr Status check_neighborhood_shapes(const TensorView<const T, 4>& q,
                                                         const TensorView<const T, 4>& k,
                                                         const TensorView<const T, 4>& v,
                                                         const TensorView<T, 4>& out,
                                                         const NeighborhoodAttentionOptions& options) {
  const Index batch = q.extent(0), tokens = q.extent(1), heads = q.extent(2);
  const TokenGrid& grid = options.grid;
  const Window& kernel = options.kernel;
  return first_failure(
      expect_positive(batch, "q, batch"), expect_positive(tokens, "q, tokens"),
      expect_positive(heads, "q, heads"), expect_positive(q.extent(3), "q, channels"),
      expect_equal(batch, k.extent(0), "k, batch"), expect_equal(tokens, k.extent(1), "k, tokens"),
      expect_equal(heads, k.extent(2), "k, heads"), expect_equal(q.extent(3), k.extent(3), "k, channels"),
      expect_equal(batch, v.extent(0), "v, batch"), expect_equal(tokens, v.extent(1), "v, tokens"),
      expect_equal(heads, v.extent(2), "v, heads"), expect_positive(v.extent(3), "v, channels"),
      expect_equal(batch, out.extent(0), "out, batch"), expect_equal(tokens, out.extent(1), "out, tokens"),
      expect_equal(heads, out.extent(2), "out, heads"),
      expect_equal(v.extent(3), out.extent(3), "out, channels"), check_whole_grid(grid, tokens),
      check_window(kernel.height, grid.height, "kernel, height (odd)", "kernel, height (at most the grid's)"),
      check_window(kernel.width, grid.width, "kernel, width (odd)", "kernel, width (at most the grid's)"));
}

template <class T>
[[nodiscard]] constexpr Status check_neighborhood_attention(const TensorView<const T, 4>& q,
                                                            const TensorView<const T, 4>& k,
                                                            const TensorView<const T, 4>& v,
                                                            const TensorView<T, 4>& out,
                                                            const NeighborhoodAttentionOptions& options) {
  const Status first =
      first_failure(check_neighborhood_shapes(q, k, v, out, options),
                    expect_view(q, "q", "q, channel stride"), expect_view(k, "k", "k, channel stride"),
                    expect_view(v, "v", "v, channel stride"), expect_view(out, "out", "out, channel stride"));
  if (!first.ok()) return first;
  if (options.scale && !(*options.scale - *options.scale == 0.0))
    return fail(Code::option, "scale (finite)", 1, 0);
  if (out.data == q.data || out.data == k.data || out.data == v.data)
    return fail(Code::alias, "out, apart from q, k and v", 1, 0);
  return {};
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

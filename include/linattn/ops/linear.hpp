// The linear layer: the contract. The forms are in linear_cpu.hpp and linear_cuda.cuh.
//
//   out[.., r, o] = bias[o] + sum_i x[.., r, i] weight[o, i]
//
// Shapes: x (rows, in) or (batch, rows, in); weight [out, in]; bias [out] or empty (extent 0: none); out
// (rows, out) or (batch, rows, out). Rows may be any stride apart; the last axes are dense. `out` must not
// overlap an input.
// x may be stored in another type than out; T is that of out.
// Numerics: sums in Compute<T>, 16-bit x and 16-bit or 8-bit weights widened exactly, one rounding to T at the end. On
// the host the order of a sum depends on the shapes alone: results are bitwise equal for any layout and any number of
// workers.
// |error| <= (in + 1) eps (|bias| + sum |x weight|) and, with lanes and blocks, in practice nearer
// sqrt(in) eps; eps that of Compute<T>.
// Errors: empty (an axis of x or weight), shape (weight, bias, out), stride (a last axis that is not dense),
// null_data, alias (out is x), workspace.
#pragma once

#include <type_traits>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/version.hpp>

LINATTN_BEGIN
namespace detail::inline LINATTN_TARGET {

// x is stored in another type than out.
template <class X, class T>
concept OtherStorage = Storage<std::remove_const_t<X>> && !std::is_same_v<std::remove_const_t<X>, T>;

template <class X, class W, class B, class T, int R>
[[nodiscard]] constexpr Status check_linear(const TensorView<const X, R>& x, const TensorView<W, 2>& weight,
                                            const TensorView<B, 1>& bias, const TensorView<T, R>& out) {
  static_assert(R == 2 || R == 3, "linear takes (rows, in) or (batch, rows, in)");
  const Index batch = R == 3 ? x.extent(0) : 1, batch_out = R == 3 ? out.extent(0) : 1;
  const Status first = first_failure(
      expect_positive(batch, "x, batch"), expect_positive(x.extent(R - 2), "x, rows"),
      expect_positive(x.extent(R - 1), "x, in"), expect_positive(weight.extent(0), "weight, out"),
      expect_equal(x.extent(R - 1), weight.extent(1), "weight, in"),
      expect_equal(batch, batch_out, "out, batch"),
      expect_equal(x.extent(R - 2), out.extent(R - 2), "out, rows"),
      expect_equal(weight.extent(0), out.extent(R - 1), "out, out"), expect_view(x, "x", "x, stride of in"),
      expect_view(weight, "weight", "weight, stride of in"), expect_view(out, "out", "out, stride of out"));
  if (!first.ok()) return first;
  if (bias.extent(0) != 0) {
    const Status second = first_failure(expect_equal(weight.extent(0), bias.extent(0), "bias, out"),
                                        expect_view(bias, "bias", "bias, stride"));
    if (!second.ok()) return second;
  }
  if (static_cast<const void*>(x.data) == out.data) return fail(Code::alias, "out, apart from x", 1, 0);
  return {};
}

}  // namespace detail::inline LINATTN_TARGET
LINATTN_END

// Loops over rows of floats or doubles, written once for packs and for what is left of the row.
#pragma once

#include <linattn/core/status.hpp>
#include <linattn/detail/simd.hpp>

namespace nn {

// out[i] = f(in[i]...); f takes packs or scalars. out may be one of in.
template <class T, class F, class... Inputs>
void map_row(T* out, linattn::Index n, const F& f, const Inputs*... in) {
  using P = linattn::detail::Pack<T>;
  linattn::Index i = 0;
  for (; i + P::size <= n; i += P::size) P(f(P::load(in + i)...)).store(out + i);
  for (; i < n; ++i) out[i] = f(in[i]...);
}

// The sum of f(in[i]), in an order that n alone fixes.
template <class T, class F>
[[nodiscard]] T sum_row(const T* in, linattn::Index n, const F& f) {
  using P = linattn::detail::Pack<T>;
  P total = P::zero();
  linattn::Index i = 0;
  for (; i + P::size <= n; i += P::size) total += f(P::load(in + i));
  T result = reduce_add(total);
  for (; i < n; ++i) result += f(in[i]);
  return result;
}

}  // namespace nn

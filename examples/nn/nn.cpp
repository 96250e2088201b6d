#include "nn.hpp"

#include <cmath>
#include <limits>
#include <numbers>
#include <stdexcept>
#include <type_traits>

#include <linattn/ops/linear_cpu.hpp>
#include <linattn/ops/rms_norm_cpu.hpp>
#include <linattn/ops/softmax_attention_cpu.hpp>

#include "rows.hpp"

namespace nn {
namespace {

using linattn::detail::fma;

// f(batch, row) for every row of (batch, rows, channels).
template <class T, class F>
void for_rows(const Runtime& rt, const TensorView<T, 3>& view, const F& f) {
  const Index rows = view.extent(1);
  rt.parallel_rows(view.extent(0) * rows, view.extent(2), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) f(i / rows, i % rows);
  });
}

template <class T>
void expect_same(std::string_view what, const TensorView<const T, 3>& a, const TensorView<const T, 3>& b) {
  if (a.extents != b.extents) throw std::logic_error(std::string(what) + ": extents differ");
  if (a.stride(2) != 1 || b.stride(2) != 1)
    throw std::logic_error(std::string(what) + ": channel stride is not 1");
}

// log(p / (1 - p)) / u of p = P(N(0, 1) <= u) = (1 + erf(u / sqrt(2))) / 2, as a polynomial in u^2: minimax for
// the error of p, which is 4.2e-8; u itself grows faster than p's tails need.
template <class V>
V normal_logit(V square) {
  V y = V(3.21217485e-9f);
  y = fma(y, square, V(-2.53074234e-7f));
  y = fma(y, square, V(7.77349074e-6f));
  y = fma(y, square, V(-1.09666216e-4f));
  y = fma(y, square, V(-6.77865622e-5f));
  y = fma(y, square, V(7.26690537e-2f));
  return fma(y, square, V(1.59576897f));
}

}  // namespace

template <class T>
void activate_row(Activation activation, const T* x, T* out, Index n) {
  using linattn::detail::sigmoid;
  switch (activation) {
    case Activation::silu:
      return map_row(
          out, n, [](auto u) { return u * sigmoid(u); }, x);
    case Activation::quick_gelu:
      return map_row(
          out, n, [](auto u) { return u * sigmoid(u * decltype(u)(T(1.702))); }, x);
    case Activation::gelu_tanh:
      return map_row(
          out, n,
          [](auto u) {
            using V = decltype(u);
            // (1 + tanh z) / 2 = sigmoid(2 z), and 2 sqrt(2 / pi) is
            constexpr double root = 1.5957691216057308;
            return u * sigmoid(u * fma(u * u, V(T(root * 0.044715)), V(T(root))));
          },
          x);
    case Activation::gelu_erf:
      if constexpr (std::is_same_v<T, double>) {
        for (Index i = 0; i < n; ++i) out[i] = x[i] / 2 * (1 + std::erf(x[i] * (std::numbers::sqrt2 / 2)));
        return;
      } else {
        return map_row(
            out, n, [](auto u) { return u * sigmoid(u * normal_logit(u * u)); }, x);
      }
  }
}

template <class T>
void activate(Runtime& rt, Activation activation, TensorView<T, 3> x) {
  for_rows(rt, x, [&](Index b, Index r) {
    T* const row = x.pointer(b, r);
    activate_row<T>(activation, row, row, x.extent(2));
  });
}

template <class T>
void activate_gated(Runtime& rt, Activation activation, TensorView<T, 3> x, In<T, 3> gate) {
  expect_same<T>("activate_gated", x, gate);
  for_rows(rt, x, [&](Index b, Index r) {
    T* const row = x.pointer(b, r);
    const T* const other = gate.pointer(b, r);
    activate_row<T>(activation, row, row, x.extent(2));
    map_row(
        row, x.extent(2), [](auto u, auto v) { return u * v; }, row, other);
  });
}

template <class T>
void add(Runtime& rt, TensorView<T, 3> x, In<T, 3> y) {
  expect_same<T>("add", x, y);
  for_rows(rt, x, [&](Index b, Index r) {
    T* const row = x.pointer(b, r);
    const T* const other = y.pointer(b, r);
    map_row(
        row, x.extent(2), [](auto u, auto v) { return u + v; }, row, other);
  });
}

template <class T>
void add_gated(Runtime& rt, TensorView<T, 3> x, In<T, 2> gate, In<T, 3> y) {
  expect_same<T>("add_gated", x, y);
  if (gate.extent(0) != x.extent(0) || gate.extent(1) != x.extent(2) || gate.stride(1) != 1)
    throw std::logic_error("add_gated: gate is not [batch, channels]");
  for_rows(rt, x, [&](Index b, Index r) {
    T* const row = x.pointer(b, r);
    const T* const other = y.pointer(b, r);
    const T* const factor = gate.pointer(b);
    map_row(
        row, x.extent(2), [](auto u, auto f, auto v) { return fma(f, v, u); }, row, factor, other);
  });
}

template <class T>
void layer_norm(Runtime& rt, In<T, 3> x, const LayerNormOptions<T>& options, TensorView<T, 3> out) {
  expect_same<T>("layer_norm", x, out);
  const Index channels = x.extent(2);
  for (const Index extent :
       {options.weight.extent(0), options.bias.extent(0), options.scale.extent(1), options.shift.extent(1)})
    if (extent != 0 && extent != channels)
      throw std::logic_error("layer_norm: " + std::to_string(channels) + " channels, but a parameter of " +
                             std::to_string(extent));
  for_rows(rt, out, [&](Index b, Index r) {
    const T* const in = x.pointer(b, r);
    T* const result = out.pointer(b, r);
    const T n = static_cast<T>(channels);
    const T mean = sum_row(in, channels, [](auto u) { return u; }) / n;
    const T variance =
        sum_row(in, channels, [&](auto u) { return (u - decltype(u)(mean)) * (u - decltype(u)(mean)); }) / n;
    // Squares that overflow would make the row zero.
    const T factor = std::isfinite(variance) ? T(1) / std::sqrt(variance + static_cast<T>(options.eps))
                                             : std::numeric_limits<T>::quiet_NaN();
    map_row(
        result, channels, [&](auto u) { return (u - decltype(u)(mean)) * decltype(u)(factor); }, in);
    if (!options.weight.empty())
      map_row(
          result, channels, [](auto u, auto w) { return u * w; }, result, options.weight.data);
    if (!options.bias.empty())
      map_row(
          result, channels, [](auto u, auto w) { return u + w; }, result, options.bias.data);
    if (!options.scale.empty())
      map_row(
          result, channels, [](auto u, auto w) { return fma(u, w, u); }, result, options.scale.pointer(b));
    if (!options.shift.empty())
      map_row(
          result, channels, [](auto u, auto w) { return u + w; }, result, options.shift.pointer(b));
  });
}

template <class T>
void linear(Runtime& rt, In<T, 3> x, const LinearWeights<T>& weights, TensorView<T, 3> out) {
  const Weight& weight = weights.weight;
  if (weight.shape.size() != 2)
    throw std::logic_error(weight.name + ": a matrix is needed, got " + to_string(weight.shape));
  const bool scaled = weight.scale != 1;
  visit_elements(weight, [&](const auto* pointer) {
    using W = std::remove_pointer_t<decltype(pointer)>;
    const TensorView<W, 2> matrix{pointer, {weight.extent(0), weight.extent(1)}};
    const TensorView<const T, 1> bias = scaled ? TensorView<const T, 1>{} : as_view(weights.bias);
    rt.run(
        weight.name,
        [&](const auto& context) { return linattn::linear_workspace(context, x, matrix, bias, out); },
        [&](const auto& context) { return linattn::linear(context, x, matrix, bias, out); });
  });
  if (!scaled) return;
  const T scale = static_cast<T>(weight.scale);
  for_rows(rt, out, [&](Index b, Index r) {
    T* const row = out.pointer(b, r);
    const Index n = out.extent(2);
    if (weights.bias.empty())
      map_row(
          row, n, [&](auto u) { return u * decltype(u)(scale); }, row);
    else
      map_row(
          row, n, [&](auto u, auto v) { return fma(u, decltype(u)(scale), v); }, row, weights.bias.data());
  });
}

template <class T>
void attention(Runtime& rt, std::string_view what, In<T, 4> q, In<T, 4> k, In<T, 4> v, TensorView<T, 4> out,
               const linattn::SoftmaxAttentionOptions<T>& options) {
  rt.run(
      what,
      [&](const auto& context) {
        return linattn::softmax_attention_workspace(context, q, k, v, out, options);
      },
      [&](const auto& context) { return linattn::softmax_attention(context, q, k, v, out, options); });
}

template <class T>
void rms_norm(Runtime& rt, std::string_view what, In<T, 3> x, const std::vector<T>& weight, double eps,
              TensorView<T, 3> out) {
  const TensorView<const T, 4> in = linattn::split_heads(x, 1);
  const TensorView<T, 4> result = linattn::split_heads(out, 1);
  const linattn::RmsNormOptions options{.eps = eps};
  rt.run(
      what, [](const auto&) { return std::size_t{0}; },
      [&](const auto& context) { return linattn::rms_norm(context, in, as_view(weight), result, options); });
}

template <class T>
Tensor<T> embed(Runtime& rt, const Weight& table, std::span<const std::int32_t> ids, Index batch) {
  const Index rows = table.extent(0), channels = table.extent(1);
  const Index count = static_cast<Index>(ids.size()) / std::max<Index>(1, batch);
  for (const std::int32_t id : ids)
    if (id < 0 || id >= rows)
      throw std::runtime_error(table.name + ": token id " + std::to_string(id) + ", but the table has " +
                               std::to_string(rows) + " rows");
  Tensor<T> out({batch, count, channels});
  const T scale = static_cast<T>(table.scale);
  visit_elements(table, [&](const auto* pointer) {
    rt.parallel_rows(batch * count, channels, [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) {
        const auto* row = pointer + ids[static_cast<std::size_t>(i)] * channels;
        for (Index c = 0; c < channels; ++c)
          out.data()[i * channels + c] = linattn::convert<T>(row[c]) * scale;
      }
    });
  });
  return out;
}

#define SD35_INSTANTIATE(T)                                                                              \
  template void linear<T>(Runtime&, In<T, 3>, const LinearWeights<T>&, TensorView<T, 3>);                \
  template void attention<T>(Runtime&, std::string_view, In<T, 4>, In<T, 4>, In<T, 4>, TensorView<T, 4>, \
                             const linattn::SoftmaxAttentionOptions<T>&);                                \
  template void rms_norm<T>(Runtime&, std::string_view, In<T, 3>, const std::vector<T>&, double,         \
                            TensorView<T, 3>);                                                           \
  template void layer_norm<T>(Runtime&, In<T, 3>, const LayerNormOptions<T>&, TensorView<T, 3>);         \
  template void activate<T>(Runtime&, Activation, TensorView<T, 3>);                                     \
  template void activate_gated<T>(Runtime&, Activation, TensorView<T, 3>, In<T, 3>);                     \
  template void activate_row<T>(Activation, const T*, T*, Index);                                        \
  template void add<T>(Runtime&, TensorView<T, 3>, In<T, 3>);                                            \
  template void add_gated<T>(Runtime&, TensorView<T, 3>, In<T, 2>, In<T, 3>);                            \
  template Tensor<T> embed<T>(Runtime&, const Weight&, std::span<const std::int32_t>, Index);
SD35_INSTANTIATE(float)
SD35_INSTANTIATE(double)
#undef SD35_INSTANTIATE

}  // namespace nn

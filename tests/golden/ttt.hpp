// What the runners of the attention ops share: tolerances, layouts, and the op under test at every storage.
//
// Core cases run in float and in double on dense, permuted, packed and sliced views; f16 and bf16 storage is
// compared with double on the same rounded inputs. Runners are templates over the place where ops run, `At`: Host
// (host.hpp) or Device (device.hpp), which has no double.
#pragma once

#include <array>
#include <cmath>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/ops/depthwise_conv.hpp>
#include <linattn/ops/instance_norm.hpp>
#include <linattn/ops/softmax_attention.hpp>
#include <linattn/ops/ttt.hpp>

#include "../buffers.hpp"
#include "golden.hpp"

namespace golden {

using namespace linattn;
using support::Buffer;
using support::Layout;

// A float result against a golden rounded to float, and a double one.
template <class T>
inline constexpr Tolerance recorded = {Norm::relative_l2, std::is_same_v<T, double> ? 1.5e-7 : 2e-6};
// 16-bit storage against double on the same rounded inputs.
template <class T>
inline constexpr Tolerance stored = {Norm::relative_l2, std::is_same_v<T, half> ? 5e-4 : 5e-3};

inline void require(const Status& status) {
  if (!status.ok()) throw std::runtime_error(message(status).c_str());
}

struct Host;

// What a check calls a run: "float packed".
template <class T>
std::string run_name(Layout layout) {
  return std::string(support::type_name<T>) + " " + support::name(layout);
}

// The recorded tensor rounded to T, in a layout.
template <class T>
Buffer<T, 4> in_layout(const TensorView<const double, 4>& values, Layout layout) {
  Buffer<T, 4> buffer = support::make<T>(layout, values.extents);
  support::copy(values, buffer.view());
  return buffer;
}
template <class T, int R>
Buffer<T, R> rounded(const TensorView<const double, R>& values) {
  Buffer<T, R> buffer(values.extents);
  support::copy(values, buffer.view());
  return buffer;
}
template <int R>
Tensor to_golden(const TensorView<const double, R>& values) {
  Tensor tensor{{values.extents.begin(), values.extents.end()}, {}};
  support::for_each_index(values.extents,
                          [&](const auto& i) { tensor.values.push_back(support::element(values, i)); });
  return tensor;
}

// (batch, head, token, channel) as recorded <-> (batch, token, head, channel).
template <class T>
TensorView<T, 4> swap_tokens_heads(const TensorView<T, 4>& v) {
  return permute<0, 2, 1, 3>(v);
}

// (batch, token, channel) as one head.
inline TensorView<const double, 4> one_head(const TensorView<const double, 3>& v) {
  return split_heads(v, 1);
}

// Runs f.operator()<T>(layout) for the checks against the file.
template <class At, class F>
void for_each_layout(const F& f) {
  for (const Layout layout : support::all_layouts) {
    f.template operator()<float>(layout);
    if constexpr (At::has_double) f.template operator()<double>(layout);
  }
}
// The same for 16-bit storage.
template <class At, class F>
void for_each_stored(const F& f) {
  for (const Layout layout : At::stored_layouts) f.template operator()<half>(layout);
  for (const Layout layout : At::stored_layouts) f.template operator()<bfloat16>(layout);
}

inline TokenGrid grid_of(const Case& c) {
  return {0, static_cast<Index>(c.number("grid_h")), static_cast<Index>(c.number("grid_w"))};
}

// ---- fast weights ----

// The matrices of a model, one set a head: [h, d, d]; a leading axis of 1 is dropped. The model's i-th is the
// recorded one whose number is numbers[i].
inline std::vector<Tensor> read_matrices(Case& c, const std::string& prefix, int count,
                                         std::string_view numbers = "123") {
  std::vector<Tensor> result;
  for (const char number : numbers.substr(0, static_cast<std::size_t>(count))) {
    Tensor w = c.read(prefix + "w" + number);
    if (w.shape.size() == 4 && w.shape[0] == 1) w.shape.erase(w.shape.begin());
    (void)w.view<3>();  // throws where the rank is another
    result.push_back(std::move(w));
  }
  return result;
}

// Rounded to T, and as the op's views.
template <class T>
struct Matrices {
  explicit Matrices(const std::vector<Tensor>& from) {
    for (const Tensor& w : from) memory.push_back(rounded<T>(w.view<3>()));
  }
  template <class S>
  explicit Matrices(const Matrices<S>& from) {
    for (const auto& w : from.memory) memory.push_back(support::to_double(w));
  }
  template <class At>
  [[nodiscard]] TttWeights<T> views(At&& at) const {
    const auto view = [&](std::size_t i) {
      return i < memory.size() ? at.view(memory[i]) : TensorView<T, 3>{};
    };
    return {view(0), view(1), view(2)};
  }
  std::vector<Buffer<T, 3>> memory;
};

// W' as an op leaves it.
template <class C>
struct Updated {
  Updated(Index batch, Index heads, Index d, std::size_t count) {
    for (std::size_t m = 0; m < count; ++m) memory.emplace_back(std::array<Index, 4>{batch, heads, d, d});
  }
  template <class At>
  [[nodiscard]] FastWeights<C> views(At&& at) {
    const auto view = [&](std::size_t i) {
      return i < memory.size() ? at.view(memory[i]) : TensorView<C, 4>{};
    };
    return {view(0), view(1), view(2)};
  }
  std::vector<Buffer<C, 4>> memory;
};

// The tensor `name` = (W - W') / inner_lr in double, W' of each sample.
template <class T>
void check_gradient(Case& c, const std::string& name, const std::string& run,
                    const TensorView<const double, 3>& initial, const TensorView<T, 4>& updated,
                    double inner_lr) {
  Buffer<double, 4> g(updated.extents);
  double largest = 0.0, gradient = 0.0;
  support::for_each_index(updated.extents, [&](const auto& i) {
    const double after = convert<double>(support::element(updated, i));
    support::element(g.view(), i) = (initial(i[1], i[2], i[3]) - after) / inner_lr;
    largest += after * after;
    gradient += support::element(g.view(), i) * support::element(g.view(), i);
  });
  // W' is rounded to T, and W - W' keeps that error whole: what W' may be off by, relative to inner_lr * g.
  Tolerance tolerance = recorded<T>;
  tolerance.value += support::unit_roundoff<T> * std::sqrt(largest / gradient) / std::abs(inner_lr);
  c.check(name, run, g.view(), tolerance);
}

// mid.g* of all matrices, the name being followed by `kind`.
template <class T>
void check_gradients(Case& c, const std::string& run, const std::vector<Tensor>& initial,
                     const Updated<T>& updated, double inner_lr, std::string_view numbers = "123",
                     const std::string& kind = "") {
  for (std::size_t m = 0; m < initial.size(); ++m)
    check_gradient(c, std::string("mid.g") + numbers[m] + kind, run, initial[m].view<3>(),
                   updated.memory[m].view(), inner_lr);
}

// mid.w* = W', and its gradients.
template <class T>
void check_update(Case& c, const std::string& run, const std::vector<Tensor>& initial,
                  const Updated<T>& updated, double inner_lr, std::string_view numbers = "123") {
  for (std::size_t m = 0; m < initial.size(); ++m)
    c.check(std::string("mid.w") + numbers[m], run, updated.memory[m].view(), recorded<T>);
  check_gradients(c, run, initial, updated, inner_lr, numbers);
}

}  // namespace golden

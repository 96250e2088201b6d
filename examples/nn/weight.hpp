// One tensor of a checkpoint, in the type that the file stores it in.
#pragma once

#include <cstddef>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <linattn/core/dtype.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/weights/safetensors.hpp>

namespace nn {

using linattn::Index;
using linattn::TensorView;

using linattn::Dtype;

// "[64, 16, 2, 2]"
[[nodiscard]] inline std::string to_string(const std::vector<Index>& shape) {
  std::string text = "[";
  for (const Index extent : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(extent);
  return text + "]";
}

// Dense and row-major. Copies share the memory, which lives as long as any of them. The values are the elements
// times `scale`, which a file of scaled 8-bit weights names beside them.
struct Weight {
  std::string name;
  Dtype dtype = Dtype::f32;  // or f16, bf16, f64, f8_e4m3
  std::vector<Index> shape;
  const void* data = nullptr;
  std::shared_ptr<const void> owner;
  float scale = 1;
  bool mapped = false;  // the memory is a file's

  [[nodiscard]] bool empty() const { return data == nullptr; }
  [[nodiscard]] Index extent(int axis) const { return shape[static_cast<std::size_t>(axis)]; }
  [[nodiscard]] Index elements() const {
    Index n = 1;
    for (const Index e : shape) n *= e;
    return n;
  }

  // The same elements as [rows, all the rest]: a convolution's [O, C, 3, 3] is a matrix [O, 9 C].
  [[nodiscard]] Weight matrix() const {
    Weight result = *this;
    result.shape = {shape.at(0), shape[0] == 0 ? 0 : elements() / shape[0]};
    return result;
  }
  // Rows [begin, begin + count) of the first axis.
  [[nodiscard]] Weight rows(Index begin, Index count) const;
};

// Calls f with a typed pointer to the elements: const float*, const half*, const bfloat16* or const double*; with
// F8 types, const float8_e4m3* too. What f makes of them is still to be multiplied by the scale.
template <bool F8 = true, class F>
decltype(auto) visit_elements(const Weight& weight, F&& f) {
  switch (weight.dtype) {
    case Dtype::f16:
      return f(static_cast<const linattn::half*>(weight.data));
    case Dtype::bf16:
      return f(static_cast<const linattn::bfloat16*>(weight.data));
    case Dtype::f64:
      return f(static_cast<const double*>(weight.data));
    case Dtype::f32:
      return f(static_cast<const float*>(weight.data));
    case Dtype::f8_e4m3:
      if constexpr (F8) return f(static_cast<const linattn::float8_e4m3*>(weight.data));
      [[fallthrough]];
    default:
      throw std::logic_error(weight.name + ": " + std::string(linattn::name(weight.dtype)) +
                             " is no weight type here");
  }
}

// The same for those who take the elements for the values: no 8-bit weight, and no scale.
template <class F>
decltype(auto) visit(const Weight& weight, F&& f) {
  if (weight.scale != 1) throw std::logic_error(weight.name + ": scaled weights are not supported here");
  return visit_elements<false>(weight, std::forward<F>(f));
}

inline Weight Weight::rows(Index begin, Index count) const {
  if (shape.empty() || begin < 0 || count < 0 || begin + count > shape[0])
    throw std::logic_error(name + ": rows " + std::to_string(begin) + " to " + std::to_string(begin + count) +
                           " of " + nn::to_string(shape));
  Weight result = *this;
  const Index offset = shape[0] == 0 ? 0 : begin * (elements() / shape[0]);
  result.shape[0] = count;
  result.data = static_cast<const std::byte*>(data) + static_cast<std::size_t>(offset) * size_of(dtype);
  return result;
}

// All elements as T: for the small tensors (biases, norms), which every step reads.
template <class T>
[[nodiscard]] std::vector<T> widen(const Weight& weight) {
  std::vector<T> values(static_cast<std::size_t>(weight.empty() ? 0 : weight.elements()));
  if (!weight.empty())
    visit_elements(weight, [&](const auto* pointer) {
      for (std::size_t i = 0; i < values.size(); ++i)
        values[i] = linattn::convert<T>(pointer[i]) * static_cast<T>(weight.scale);
    });
  return values;
}

// A weight whose elements are stored as T: itself, or a copy.
template <class T>
[[nodiscard]] Weight stored_as(const Weight& weight) {
  constexpr Dtype dtype = std::is_same_v<T, float> ? Dtype::f32 : Dtype::f64;
  if (weight.dtype == dtype) return weight;
  const auto values = std::make_shared<const std::vector<T>>(widen<T>(weight));
  Weight result = weight;
  result.dtype = dtype;
  result.data = values->data();
  result.owner = values;
  return result;
}

// A matrix that is stored as T, as an op takes it.
template <class T>
[[nodiscard]] TensorView<const T, 2> as_matrix(const Weight& weight) {
  return {static_cast<const T*>(weight.data), {weight.extent(0), weight.extent(1)}};
}

// A vector of the model as an op takes it.
template <class T>
[[nodiscard]] TensorView<const T, 1> as_view(const std::vector<T>& values) {
  return {values.data(), {static_cast<Index>(values.size())}};
}

// A projection: weight [out, in] in the file's type, bias [out] or empty.
template <class T>
struct LinearWeights {
  Weight weight;
  std::vector<T> bias;

  [[nodiscard]] Index in() const { return weight.extent(1); }
  [[nodiscard]] Index out() const { return weight.extent(0); }
};

}  // namespace nn

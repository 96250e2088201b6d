#include "finite.hpp"

#include <atomic>
#include <cmath>
#include <cstring>
#include <optional>

#include "rows.hpp"

namespace nn {
namespace {

// u - u is 0 for what is finite and NaN for the rest, and NaN stays in a sum.
template <class T>
bool all_finite(const T* values, Index count) {
  return sum_row(values, count, [](auto u) { return u - u; }) == T(0);
}

template <class E>
std::optional<float> first_not_finite(std::span<const std::byte> bytes) {
  for (; bytes.size() >= sizeof(E); bytes = bytes.subspan(sizeof(E))) {
    E element;
    std::memcpy(&element, bytes.data(), sizeof element);
    if (const auto value = linattn::convert<float>(element); !std::isfinite(value)) return value;
  }
  return std::nullopt;
}

}  // namespace

template <class T>
void expect_finite(const Runtime& rt, const std::string& place, const TensorView<const T, 3>& values) {
  const Index rows = values.extent(1), channels = values.extent(2);
  std::atomic<bool> finite = true;
  rt.parallel_rows(values.extent(0) * rows, channels, [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i)
      if (!all_finite(values.pointer(i / rows, i % rows), channels)) finite = false;
  });
  if (!finite) throw NotFinite(place);
}

template <class T>
void expect_finite(const std::string& place, std::span<const T> values) {
  if (!all_finite(values.data(), static_cast<Index>(values.size()))) throw NotFinite(place);
}

template void expect_finite<float>(const Runtime&, const std::string&, const TensorView<const float, 3>&);
template void expect_finite<double>(const Runtime&, const std::string&, const TensorView<const double, 3>&);
template void expect_finite<float>(const std::string&, std::span<const float>);
template void expect_finite<double>(const std::string&, std::span<const double>);

std::string not_finite_weight(const Checkpoint& checkpoint) {
  for (const linattn::TensorInfo& tensor : checkpoint.files().tensors()) {
    if (!tensor.name.starts_with(checkpoint.full_name(""))) continue;
    std::optional<float> found;
    if (tensor.dtype == Dtype::f8_e4m3)
      found = first_not_finite<linattn::float8_e4m3>(tensor.bytes);
    else
      linattn::visit_dtype(tensor.dtype,
                           [&](auto type) { found = first_not_finite<decltype(type)>(tensor.bytes); });
    if (found)
      return "tensor '" + tensor.name + "' of " + checkpoint.path().string() + " holds " +
             (std::isnan(*found) ? "NaN"
              : *found < 0       ? "-Inf"
                                 : "Inf");
  }
  return {};
}

}  // namespace nn

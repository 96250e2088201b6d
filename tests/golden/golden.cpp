#include "golden.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <span>
#include <utility>

namespace golden {

namespace {

[[noreturn]] void fail(const std::string& message) { throw std::runtime_error(message); }

std::string to_string(const std::vector<Index>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

double to_number(std::string_view key, const std::string& text) {
  std::size_t end = 0;
  double value = 0.0;
  try {
    value = std::stod(text, &end);
  } catch (const std::exception&) {
    end = 0;
  }
  if (text.empty() || end != text.size() || !std::isfinite(value))
    fail("metadata '" + std::string(key) + "': '" + text + "' is not a finite number");
  return value;
}

// A NaN on either side is infinitely wrong; equal infinities are equal.
double distance(double ours, double expected) {
  if (ours == expected) return 0.0;
  const double gap = std::abs(ours - expected);
  return std::isnan(gap) ? std::numeric_limits<double>::infinity() : gap;
}

double error_of(const Tensor& ours, const Tensor& expected, Norm norm) {
  double gap2 = 0.0, norm2 = 0.0, gap = 0.0, largest = 0.0;
  for (std::size_t i = 0; i < expected.values.size(); ++i) {
    const double d = distance(ours.values[i], expected.values[i]), e = std::abs(expected.values[i]);
    gap2 += d * d;
    gap = std::max(gap, d);
    if (std::isfinite(e)) norm2 += e * e, largest = std::max(largest, e);
  }
  if (norm == Norm::scaled_max) return gap / std::max(1.0, largest);
  return gap2 == 0.0 ? 0.0 : std::sqrt(gap2) / std::sqrt(norm2);
}

std::vector<Index> without_ones(std::vector<Index> shape) {
  shape.erase(std::remove(shape.begin(), shape.end(), Index{1}), shape.end());
  return shape;
}

}  // namespace

Case::Case(const std::filesystem::path& path) : path_(path) {
  const linattn::FileStatus status = linattn::Safetensors::open(path, file_);
  if (!status.ok()) fail(message(status));
}

std::string Case::meta(std::string_view key) const {
  const auto found = file_.metadata().find(std::string(key));
  if (found == file_.metadata().end()) fail("metadata '" + std::string(key) + "' is missing");
  return found->second;
}

std::string Case::meta(std::string_view key, std::string_view otherwise) const {
  const auto found = file_.metadata().find(std::string(key));
  return found == file_.metadata().end() ? std::string(otherwise) : found->second;
}

double Case::number(std::string_view key) const { return to_number(key, meta(key)); }

double Case::number(std::string_view key, double otherwise) const {
  const std::string text = meta(key, "");
  return text.empty() ? otherwise : to_number(key, text);
}

std::vector<std::string> Case::names() const {
  std::vector<std::string> result;
  for (const linattn::TensorInfo& info : file_.tensors()) result.push_back(info.name);
  return result;
}

void Case::use(std::string_view tensor) {
  if (!has(tensor)) fail("tensor '" + std::string(tensor) + "' is missing");
  used_.emplace(tensor);
}

Tensor Case::read(std::string_view tensor) {
  use(tensor);
  const linattn::TensorInfo& info = *file_.find(tensor);
  Tensor result{info.shape, {}};
  result.values.reserve(static_cast<std::size_t>(info.elements()));
  linattn::FileStatus status;
  const bool known = linattn::visit_dtype(info.dtype, [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> stored(static_cast<std::size_t>(info.elements()));
    status = linattn::read(info, std::span<T>(stored));
    for (const T value : stored) result.values.push_back(linattn::convert<double>(value));
  });
  if (!known) fail("tensor '" + std::string(tensor) + "' is of type " + std::string(name(info.dtype)));
  if (!status.ok()) fail(message(status));
  if (std::ranges::any_of(result.values, [](double value) { return std::isnan(value); }))
    fail("tensor '" + std::string(tensor) + "' holds NaN");
  return result;
}

void Case::check(std::string_view tensor, std::string_view variant, const Tensor& ours, Tolerance tolerance) {
  compare(tensor, variant, ours, read(tensor), tolerance);
}

void Case::compare(std::string_view what, std::string_view variant, const Tensor& ours,
                   const Tensor& expected, Tolerance tolerance) {
  ++checks_;
  if (without_ones(ours.shape) != without_ones(expected.shape) ||
      ours.values.size() != expected.values.size()) {
    ++failures_;
    std::printf("  FAIL %-28.*s %-24.*s shape %s, expected %s\n", static_cast<int>(what.size()), what.data(),
                static_cast<int>(variant.size()), variant.data(), to_string(ours.shape).c_str(),
                to_string(expected.shape).c_str());
    return;
  }
  const double error = error_of(ours, expected, tolerance.norm);
  const bool good = error <= tolerance.value;  // false for NaN
  if (!good) ++failures_;
  std::printf("  %s %-28.*s %-24.*s error %.3e  tolerance %.1e\n", good ? "ok  " : "FAIL",
              static_cast<int>(what.size()), what.data(), static_cast<int>(variant.size()), variant.data(),
              error, tolerance.value);
  if (good) return;
  const auto gap = [&](std::size_t i) { return distance(ours.values[i], expected.values[i]); };
  std::size_t worst = 0;
  for (std::size_t i = 1; i < expected.values.size(); ++i)
    if (gap(i) > gap(worst)) worst = i;
  if (!expected.values.empty())
    std::printf("       worst at element %zu of %s: got %.9g, expected %.9g\n", worst,
                to_string(expected.shape).c_str(), ours.values[worst], expected.values[worst]);
}

void Case::expect(bool condition, std::string_view what) {
  ++checks_;
  if (!condition) ++failures_;
  std::printf("  %s %.*s\n", condition ? "ok  " : "FAIL", static_cast<int>(what.size()), what.data());
}

bool Case::finish(bool completed) {
  if (!completed) return false;  // a runner that stopped has not used all that it would have
  for (const linattn::TensorInfo& info : file_.tensors()) {
    if (used_.contains(info.name)) continue;
    if (info.name.starts_with("grad.")) {
      std::printf("  -    %-28s not yet checked\n", info.name.c_str());
    } else {
      ++failures_;
      std::printf("  FAIL %-28s unknown tensor: nothing reads or checks it\n", info.name.c_str());
    }
  }
  if (checks_ == 0) {
    ++failures_;
    std::printf("  FAIL nothing was checked\n");
  }
  return failures_ == 0;
}

std::map<std::string, Runner, std::less<>>& registry(std::string_view context) {
  static std::map<std::string, std::map<std::string, Runner, std::less<>>, std::less<>> contexts;
  return contexts[std::string(context)];
}

Registration::Registration(std::string_view context, std::initializer_list<std::string_view> ops,
                           Runner runner) {
  for (const std::string_view op : ops)
    if (!registry(context).emplace(op, runner).second) {
      std::fprintf(stderr, "golden: two runners for op '%.*s'\n", static_cast<int>(op.size()), op.data());
      std::abort();
    }
}
Registration::Registration(std::initializer_list<std::string_view> ops, Runner runner)
    : Registration("cpu", ops, runner) {}

}  // namespace golden

// What the models run on: threads, one scratch buffer, and activations that own their memory.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <linattn/core/context.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>

namespace nn {

using linattn::In;
using linattn::Index;
using linattn::TensorView;

#if defined(_OPENMP)
using Threads = linattn::OpenMp;
inline Threads make_threads(int count) { return {count}; }
#else
using Threads = linattn::Serial;
inline Threads make_threads(int) { return {}; }
#endif

// Uninitialised memory, aligned for any vector register.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t bytes)
      : data_(bytes == 0 ? nullptr : static_cast<std::byte*>(::operator new(bytes, alignment))),
        size_(bytes) {}

  [[nodiscard]] std::byte* data() const { return data_.get(); }
  [[nodiscard]] std::size_t size() const { return size_; }

 private:
  static constexpr std::align_val_t alignment{64};
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, alignment); }
  };
  std::unique_ptr<std::byte, Free> data_;
  std::size_t size_ = 0;
};

// The product of sizes, none of which is negative. Throws std::runtime_error where it is no Index.
[[nodiscard]] inline Index checked_product(std::span<const Index> sizes) {
  Index product = 1;
  bool fits = true;
  for (const Index size : sizes) fits = !__builtin_mul_overflow(product, size, &product) && fits;
  if (!fits || product < 0) {
    std::string text;
    for (const Index size : sizes) text += (text.empty() ? "" : " x ") + std::to_string(size);
    throw std::runtime_error(text + ": the size overflows");
  }
  return product;
}

// A dense row-major activation that owns its memory: move-only, released when it goes out of scope.
template <class T>
class Tensor {
 public:
  Tensor() = default;
  // Not initialised.
  explicit Tensor(std::vector<Index> shape) : shape_(std::move(shape)), buffer_(bytes_of(shape_)) {}

  [[nodiscard]] static Tensor zeros(std::vector<Index> shape) {
    Tensor tensor(std::move(shape));
    std::fill_n(tensor.data(), tensor.elements(), T(0));
    return tensor;
  }

  [[nodiscard]] const std::vector<Index>& shape() const { return shape_; }
  [[nodiscard]] Index extent(int axis) const { return shape_[static_cast<std::size_t>(axis)]; }
  [[nodiscard]] Index elements() const {
    Index n = shape_.empty() ? 0 : 1;
    for (const Index extent : shape_) n *= extent;
    return n;
  }
  [[nodiscard]] bool empty() const { return elements() == 0; }

  [[nodiscard]] T* data() { return reinterpret_cast<T*>(buffer_.data()); }
  [[nodiscard]] const T* data() const { return reinterpret_cast<const T*>(buffer_.data()); }

  // As many axes as the shape has.
  template <int Rank>
  [[nodiscard]] TensorView<T, Rank> view() {
    return {data(), extents<Rank>()};
  }
  template <int Rank>
  [[nodiscard]] TensorView<const T, Rank> view() const {
    return {data(), extents<Rank>()};
  }

  // The same memory under another shape of as many elements.
  [[nodiscard]] Tensor reshaped(std::vector<Index> shape) && {
    Tensor result;
    result.shape_ = std::move(shape);
    if (result.elements() != elements()) throw std::logic_error("reshaped to another number of elements");
    result.buffer_ = std::move(buffer_);
    return result;
  }
  [[nodiscard]] Tensor clone() const {
    Tensor copy(shape_);
    std::copy_n(data(), elements(), copy.data());
    return copy;
  }

 private:
  [[nodiscard]] static std::size_t bytes_of(std::vector<Index> sizes) {
    sizes.push_back(sizes.empty() ? 0 : static_cast<Index>(sizeof(T)));
    return static_cast<std::size_t>(checked_product(sizes));
  }
  template <int Rank>
  [[nodiscard]] std::array<Index, Rank> extents() const {
    if (shape_.size() != Rank)
      throw std::logic_error("a tensor of rank " + std::to_string(shape_.size()) + " viewed with rank " +
                             std::to_string(Rank));
    std::array<Index, Rank> result{};
    std::copy_n(shape_.begin(), Rank, result.begin());
    return result;
  }

  std::vector<Index> shape_;
  Buffer buffer_;
};

// Threads and the scratch memory of the ops, which grows between ops and never inside one.
class Runtime {
 public:
  // `threads` = 0: as many as the OpenMP runtime wants.
  explicit Runtime(int threads = 0) : threads_(make_threads(threads)) {}

  [[nodiscard]] Index workers() const { return threads_.workers(); }

  // body(task) for every task in [0, tasks), in any order.
  template <class Body>
  void parallel(Index tasks, const Body& body) const {
    threads_.run(tasks, [&](Index task, Index) { body(task); });
  }
  // body(task, worker), worker in [0, workers()).
  template <class Body>
  void parallel_workers(Index tasks, const Body& body) const {
    threads_.run(tasks, body);
  }
  // body(begin, end) over parts of [0, rows) of about 16,384 elements. For work on rows that are independent
  // of each other, so that the cut does not show in the result.
  template <class Body>
  void parallel_rows(Index rows, Index elements_a_row, const Body& body) const {
    const Index step = std::max<Index>(1, 16384 / std::max<Index>(1, elements_a_row));
    parallel((rows + step - 1) / step,
             [&](Index task) { body(task * step, std::min(rows, (task + 1) * step)); });
  }

  // Runs an op: workspace(context) says how many bytes it needs, op(context) returns its Status. A failure
  // becomes an exception that begins with `what`.
  template <class Query, class Op>
  void run(std::string_view what, const Query& workspace, const Op& op) {
    linattn::Cpu<Threads> context{{}, threads_};
    const std::size_t bytes = workspace(context);
    if (bytes > scratch_.size()) {
      scratch_ = Buffer();  // first give back, then take
      scratch_ = Buffer(bytes);
    }
    context.workspace = {scratch_.data(), scratch_.size()};
    if (const linattn::Status status = op(context); !status.ok())
      throw std::runtime_error(std::string(what) + ": " + linattn::message(status).c_str());
  }

  // Scratch for a caller that cuts it himself; valid until the next run() or scratch().
  [[nodiscard]] linattn::Workspace scratch(std::size_t bytes) {
    run(
        "scratch", [&](const auto&) { return bytes; }, [](const auto&) { return linattn::Status{}; });
    return {scratch_.data(), scratch_.size()};
  }

 private:
  Threads threads_;
  Buffer scratch_;
};

}  // namespace nn

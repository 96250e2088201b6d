// Where an op runs, on which threads, and in whose memory: the first argument of every op.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/version.hpp>

// What cudaStream_t and cublasLtHandle_t point to.
struct CUstream_st;
struct cublasLtContext;

LINATTN_BEGIN

// Scratch memory that the caller owns. Ops carve it and never allocate; X_workspace(...) says how much X
// needs.
struct Workspace {
  std::byte* data = nullptr;
  std::size_t size = 0;
};

// Cuts a Workspace into aligned arrays. With a null base it only counts, so the size query of an op is the
// op's own carving and cannot differ from its use.
class Carver {
 public:
  static constexpr std::size_t alignment = 256;

  LINATTN_INLINE explicit Carver(Workspace workspace) : base_(workspace.data), size_(workspace.size) {
    // The caller's memory may start anywhere; counting assumes the worst.
    used_ = base_ == nullptr ? alignment - 1
                             : (alignment - reinterpret_cast<std::uintptr_t>(base_) % alignment) % alignment;
  }

  // `count` elements of T, or null when counting or when the memory is too short.
  template <class T>
  [[nodiscard]] LINATTN_INLINE T* take(Index count) {
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    const std::size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    T* const result = base_ != nullptr && used_ + rounded <= size_
                          ? static_cast<T*>(static_cast<void*>(base_ + used_))
                          : nullptr;
    used_ += rounded;
    return result;
  }

  // Bytes that the carving needs, alignment of the base included.
  [[nodiscard]] LINATTN_INLINE constexpr std::size_t used() const { return used_; }

  // What is left, for the ops that a layer calls in turn.
  [[nodiscard]] LINATTN_INLINE constexpr Workspace rest() const {
    return base_ != nullptr && used_ <= size_ ? Workspace{base_ + used_, size_ - used_} : Workspace{};
  }

  // Whether all that was taken was there.
  [[nodiscard]] LINATTN_INLINE constexpr Status check(const char* what) const {
    if (used_ <= alignment - 1) return {};  // nothing was taken
    if (base_ != nullptr && used_ <= size_) return {};
    return detail::fail(Code::workspace, what, static_cast<Index>(used_),
                        base_ == nullptr ? 0 : static_cast<Index>(size_));
  }

 private:
  std::byte* base_;
  std::size_t size_;
  std::size_t used_;
};

// A parallel policy runs body(task, worker) for every task in [0, tasks), in any order, worker in [0,
// workers()), no two tasks of one worker at once, and returns when all are done. Ops cut their work into
// tasks by shapes alone, so results are bitwise equal for every policy and every number of workers. Bring
// your own pool by writing one.
template <class P>
concept ParallelPolicy = requires(const P& policy, void (*body)(Index, Index)) {
  { policy.workers() } -> std::convertible_to<Index>;
  policy.run(Index{}, body);
};

struct Serial {
  [[nodiscard]] LINATTN_INLINE static constexpr Index workers() { return 1; }
  template <class Body>
  void run(Index tasks, const Body& body) const {
    for (Index task = 0; task < tasks; ++task) body(task, Index{0});
  }
};

#if defined(_OPENMP)
// Threads of the OpenMP runtime; `threads` = 0 asks it for its default. Present when compiled with -fopenmp.
struct OpenMp {
  int threads = 0;

  [[nodiscard]] LINATTN_INLINE Index workers() const { return threads > 0 ? threads : omp_get_max_threads(); }
  template <class Body>
  void run(Index tasks, const Body& body) const {
    const int count = static_cast<int>(workers());
    if (count == 1 || tasks <= 1) return Serial{}.run(tasks, body);
#pragma omp parallel for schedule(dynamic, 1) num_threads(count)
    for (Index task = 0; task < tasks; ++task) body(task, static_cast<Index>(omp_get_thread_num()));
  }
};
#endif

// The host. Results do not depend on `parallel`.
template <class Parallel = Serial>
struct Cpu {
  Workspace workspace{};
  Parallel parallel{};

  // In which layers hold activations of storage T from op to op.
  template <class T>
  using Between = Compute<T>;

  // The same context on other scratch memory.
  [[nodiscard]] LINATTN_INLINE constexpr Cpu with(Workspace other) const { return {other, parallel}; }
};
Cpu()->Cpu<Serial>;
Cpu(Workspace)->Cpu<Serial>;
template <class Parallel>
Cpu(Workspace, Parallel) -> Cpu<Parallel>;

// A CUDA device: the current one of the calling thread. Views and the workspace lie in its memory. Ops only put
// kernels on the stream: they neither allocate nor synchronise, so a stream that captures a graph will do, and
// the workspace is free again when the stream has come past the op. A Status of Code::native holds the cudaError_t
// or cublasStatus_t of a launch that failed; what fails while a kernel runs shows where the caller synchronises.
struct Cuda {
  Workspace workspace{};
  CUstream_st* stream = nullptr;         // a cudaStream_t; null: the default stream
  cublasLtContext* cublas_lt = nullptr;  // a cublasLtHandle_t, which `linear` needs

  template <class T>
  using Between = T;

  // The same context on other scratch memory.
  [[nodiscard]] LINATTN_INLINE constexpr Cuda with(Workspace other) const {
    return {other, stream, cublas_lt};
  }
};

LINATTN_END

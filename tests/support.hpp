// What the tests share: buffers and differences (buffers.hpp), checks that name the worst element, a counter of
// allocations and a parallel policy that shuffles its tasks.
#pragma once

#include <doctest/doctest.h>

#include <atomic>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include <linattn/core/context.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>

#include "buffers.hpp"

namespace support {

using linattn::Status;

// ---- checks ----

// |actual - expected| <= tolerance * |expected|, both L2 norms of the whole tensor.
template <class A, class E>
void check_relative(const A& actual, const E& expected, double tolerance) {
  const Difference d = difference(actual, expected);
  CHECK_MESSAGE(d.error <= tolerance * d.norm, "relative error ", d.relative(), " over ", tolerance,
                ", worst at ", d.worst);
}

// |actual - expected| <= c * eps * norm in L2, eps the unit roundoff of T. `norm` is that of the terms that
// were added (the expected values unless said).
template <class T, class A, class E>
void check_rounding(const A& actual, const E& expected, double c, double norm = -1.0) {
  const Difference d = difference(actual, expected);
  const double bound = c * unit_roundoff<T> * (norm < 0.0 ? d.norm : norm);
  CHECK_MESSAGE(d.error <= bound, std::string(type_name<T>), ": error ", d.error, " over ", bound,
                ", worst at ", d.worst);
}

inline void check_ok(const Status& status) {
  CHECK_MESSAGE(status.ok(), std::string(linattn::message(status).c_str()));
}

// ---- allocations ----

// Calls of malloc and its kin by this thread since the object was made; operator new calls malloc too. The
// counting functions are in support.cpp. With a sanitizer, which owns malloc, nothing is counted.
class Allocations {
 public:
  Allocations() : start_(total()) {}
  [[nodiscard]] std::size_t count() const { return total() - start_; }
  [[nodiscard]] static bool counted();

 private:
  [[nodiscard]] static std::size_t total();
  std::size_t start_;
};

// ---- parallelism ----

// `count` threads that draw the tasks in a shuffled order: an op whose result depends on the order or on the
// number of its workers does not survive two of these.
struct Threads {
  Index count = 2;
  std::uint64_t seed = 1;

  [[nodiscard]] Index workers() const { return count; }
  template <class Body>
  void run(Index tasks, const Body& body) const {
    std::vector<Index> order(static_cast<std::size_t>(tasks));
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<Index>(i);
    Random random(seed);
    for (std::size_t i = order.size(); i > 1; --i)
      std::swap(order[i - 1], order[static_cast<std::size_t>(random.below(static_cast<Index>(i)))]);
    std::atomic<std::size_t> next{0};
    std::vector<std::thread> threads;
    for (Index worker = 0; worker < count; ++worker)
      threads.emplace_back([&, worker] {
        for (std::size_t i = next++; i < order.size(); i = next++) body(order[i], worker);
      });
    for (std::thread& thread : threads) thread.join();
  }
};

}  // namespace support

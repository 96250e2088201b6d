#include <linattn/core/context.hpp>

#include "../support.hpp"

using namespace linattn;

namespace {

// What an op does: takes arrays in turn. Returns the bytes counted, and checks that the arrays are apart.
std::size_t carve(Carver& carver, bool expect_memory) {
  float* const a = carver.take<float>(3);
  double* const b = carver.take<double>(100);
  half* const c = carver.take<half>(1);
  CHECK((a != nullptr) == expect_memory);
  CHECK((b != nullptr) == expect_memory);
  CHECK((c != nullptr) == expect_memory);
  if (expect_memory) {
    for (const void* p : {static_cast<void*>(a), static_cast<void*>(b), static_cast<void*>(c)})
      CHECK(reinterpret_cast<std::uintptr_t>(p) % Carver::alignment == 0);
    CHECK(static_cast<void*>(a + 3) <= static_cast<void*>(b));
    CHECK(static_cast<void*>(b + 100) <= static_cast<void*>(c));
    std::fill(a, a + 3, 1.0f);
    std::fill(b, b + 100, 1.0);
    *c = half(1.0f);
  }
  return carver.used();
}

}  // namespace

TEST_CASE("counting and carving agree for any alignment of the memory") {
  Carver count(Workspace{});
  const std::size_t bytes = carve(count, false);
  CHECK_FALSE(count.check("scratch").ok());
  std::vector<std::byte> memory(bytes + 2 * Carver::alignment);
  for (std::size_t skew = 0; skew < Carver::alignment; ++skew) {
    std::fill(memory.begin(), memory.end(), std::byte{0xff});
    Carver carver(Workspace{memory.data() + skew, bytes});
    carve(carver, true);
    CHECK(carver.check("scratch").ok());
    CHECK(std::all_of(memory.begin() + static_cast<std::ptrdiff_t>(skew + bytes), memory.end(),
                      [](std::byte b) { return b == std::byte{0xff}; }));
  }
}

TEST_CASE("short and missing memory is a Status, never a pointer") {
  std::vector<std::byte> memory(1024);
  Carver shorter(Workspace{memory.data(), 300});
  CHECK(shorter.take<float>(200) == nullptr);
  const Status status = shorter.check("scratch");
  CHECK(status.code == Code::workspace);
  CHECK(status.actual == 300);
  CHECK(status.expected >= 800);
  CHECK(shorter.rest().data == nullptr);

  Carver missing(Workspace{nullptr, 4096});
  CHECK(missing.take<float>(1) == nullptr);
  CHECK(missing.check("scratch").code == Code::workspace);
  CHECK(missing.check("scratch").actual == 0);

  Carver unused(Workspace{});
  CHECK(unused.check("scratch").ok());
}

TEST_CASE("rest() is what is left") {
  std::vector<std::byte> memory(4096);
  Carver carver(Workspace{memory.data(), memory.size()});
  const float* const taken = carver.take<float>(64);
  const Workspace rest = carver.rest();
  CHECK(static_cast<void*>(rest.data) >= static_cast<const void*>(taken + 64));
  CHECK(rest.data + rest.size == memory.data() + memory.size());
}

namespace {

template <class Policy>
void check_policy(const Policy& policy) {
  static_assert(ParallelPolicy<Policy>);
  for (const Index tasks : {0, 1, 2, 3, 64, 1000}) {
    std::vector<std::atomic<int>> runs(static_cast<std::size_t>(tasks));
    std::vector<std::atomic<int>> busy(static_cast<std::size_t>(policy.workers()));
    std::atomic<int> wrong{0};
    policy.run(tasks, [&](Index task, Index worker) {
      if (task < 0 || task >= tasks || worker < 0 || worker >= policy.workers()) {
        ++wrong;
        return;
      }
      if (++busy[static_cast<std::size_t>(worker)] != 1) ++wrong;
      ++runs[static_cast<std::size_t>(task)];
      --busy[static_cast<std::size_t>(worker)];
    });
    CHECK(wrong == 0);
    for (const auto& r : runs) CHECK(r == 1);
  }
}

}  // namespace

TEST_CASE("parallel policies run every task once, a worker one task at a time") {
  check_policy(Serial{});
  check_policy(support::Threads{3, 7});
#if defined(_OPENMP)
  check_policy(OpenMp{});
  check_policy(OpenMp{3});
#endif
}

TEST_CASE("contexts deduce their policy and keep it on other memory") {
  std::vector<std::byte> memory(16);
  const Cpu plain{};
  static_assert(std::is_same_v<decltype(plain), const Cpu<Serial>>);
  const Cpu threaded{Workspace{}, support::Threads{4, 1}};
  static_assert(std::is_same_v<decltype(threaded), const Cpu<support::Threads>>);
  const auto other = threaded.with({memory.data(), memory.size()});
  CHECK(other.parallel.workers() == 4);
  CHECK(other.workspace.data == memory.data());
}

// The tools themselves: a guard that does not notice, or a counter that does not count, proves nothing.
#include "support.hpp"

#include <cstdlib>
#include <new>

using namespace support;

TEST_CASE("buffers of every layout notice a write beside the view, and none within") {
  for (const Layout layout : all_layouts) {
    CAPTURE(name(layout));
    auto buffer = make<linattn::bfloat16>(layout, {2, 3, 2, 5});
    CHECK(buffer.intact());
    CHECK(std::isnan(linattn::convert<double>(buffer.view()(1, 2, 1, 4))));
    fill(buffer.view(), 1.0);
    CHECK(buffer.intact());
    linattn::bfloat16* const behind = buffer.view().pointer(1, 2, 1, 4) + 1;
    *behind = linattn::bfloat16(0.0f);
    CHECK_FALSE(buffer.intact());
    buffer.poison();
    buffer.view().data[-1] = linattn::bfloat16(0.0f);
    CHECK_FALSE(buffer.intact());
  }
}

TEST_CASE("layouts hold the same values") {
  auto dense = make<float>(Layout::dense, {2, 3, 2, 5});
  fill_normal(dense.view(), 3);
  for (const Layout layout : all_layouts) {
    auto other = make<float>(layout, {2, 3, 2, 5});
    copy(dense.view(), other.view());
    CHECK(same_bits(dense, other));
    CHECK(difference(dense, other).error == 0.0);
    other.view()(1, 0, 1, 2) += 0.5f;
    CHECK_FALSE(same_bits(dense, other));
    CHECK(difference(other, dense).error == doctest::Approx(0.5));
    other.view()(1, 0, 1, 2) = std::numeric_limits<float>::quiet_NaN();
    CHECK(std::isinf(difference(other, dense).error));
  }
}

TEST_CASE("allocations are counted") {
  if (!Allocations::counted()) return;
  const Allocations allocations;
  void* volatile memory = std::malloc(16);
  const std::size_t after_malloc = allocations.count();
  std::free(memory);
  ::operator delete(::operator new(16));
  const std::size_t after_new = allocations.count();
  void* aligned = nullptr;
  const int error = posix_memalign(&aligned, 64, 64);
  std::free(aligned);
  const std::size_t after_memalign = allocations.count();
  CHECK(error == 0);
  CHECK(after_malloc == 1);
  CHECK(after_new == after_malloc + 1);
  CHECK(after_memalign == after_new + 1);
}

TEST_CASE("scratch notices a write behind its end") {
  Scratch scratch(100);
  CHECK(scratch.intact());
  scratch.workspace().data[99] = std::byte{0};
  CHECK(scratch.intact());
  scratch.workspace().data[100] = std::byte{0};
  CHECK_FALSE(scratch.intact());
}

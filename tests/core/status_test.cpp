#include <linattn/core/status.hpp>

#include <set>
#include <string>

#include "../support.hpp"

using namespace linattn;

TEST_CASE("a message names the tensor and both numbers") {
  CHECK(Status{}.ok());
  CHECK(std::string(message(Status{}).c_str()) == "ok");
  const Status bad = detail::fail(Code::shape, "k, tokens", 77, 64);
  CHECK_FALSE(bad.ok());
  CHECK(std::string(message(bad).c_str()) == "shape mismatch: k, tokens: expected 77, got 64");
  const Status native{Code::native, "cudaMalloc", 0, 0, 2};
  CHECK(std::string(message(native).c_str()) == "backend error: cudaMalloc: error 2");
}

TEST_CASE("a message is cut, not overrun") {
  const std::string lengthy(1000, 'x');
  CHECK(std::string(message(detail::fail(Code::shape, lengthy.c_str(), 1, 2)).c_str()).size() == 255);
}

TEST_CASE("every code has a name of its own") {
  std::set<std::string> names;
  for (int code = 0; code <= static_cast<int>(Code::native); ++code)
    names.insert(name(static_cast<Code>(code)));
  CHECK(names.size() == static_cast<std::size_t>(Code::native) + 1);
  CHECK(names.count("unknown code") == 0);
}

TEST_CASE("the first failure wins") {
  const Status a = detail::expect_equal(1, 2, "a"), b = detail::expect_positive(0, "b");
  CHECK(std::string(detail::first_failure(Status{}, a, b).what) == "a");
  CHECK(std::string(detail::first_failure(b, a).what) == "b");
  CHECK(detail::first_failure(Status{}, Status{}).ok());
  CHECK(a.code == Code::shape);
  CHECK(b.code == Code::empty);
}

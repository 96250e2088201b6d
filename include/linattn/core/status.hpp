// Errors are values: every op returns a Status, never throws and never prints.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>

#include <linattn/version.hpp>

LINATTN_BEGIN

// Extents, strides and counts. Signed, so that a difference of two is what it looks like.
using Index = std::ptrdiff_t;

enum class Code : std::uint8_t {
  ok,
  null_data,  // a view with elements has no memory; expected = its elements, actual = 0
  shape,      // an extent differs from what another argument fixes
  stride,     // a stride that the op cannot walk (the channel stride must be 1)
  empty,      // an axis that must not be empty is
  option,     // an option is out of its range
  workspace,  // the workspace is null or too short; expected and actual are bytes
  alias,      // output memory overlaps an input where the op does not allow it
  format,     // the content of a file is not what its format says (weights/)
  native,     // a call of the backend or of the system failed; Status::native holds its error code
};

// The outcome of an op. `what` is a string literal that names the tensor and the axis.
struct [[nodiscard]] Status {
  Code code = Code::ok;
  const char* what = "";
  Index expected = 0;
  Index actual = 0;
  int native = 0;

  [[nodiscard]] LINATTN_INLINE constexpr bool ok() const { return code == Code::ok; }
};

// A formatted Status, by value: formatting one allocates nothing.
struct StatusMessage {
  char text[256] = {};
  [[nodiscard]] LINATTN_INLINE const char* c_str() const { return text; }
};

inline namespace LINATTN_TARGET {

[[nodiscard]] constexpr const char* name(Code code) {
  switch (code) {
    case Code::ok:
      return "ok";
    case Code::null_data:
      return "null data";
    case Code::shape:
      return "shape mismatch";
    case Code::stride:
      return "unsupported stride";
    case Code::empty:
      return "empty axis";
    case Code::option:
      return "option out of range";
    case Code::workspace:
      return "workspace too small";
    case Code::alias:
      return "overlapping memory";
    case Code::format:
      return "malformed file";
    case Code::native:
      return "backend error";
  }
  return "unknown code";
}

// "shape mismatch: k, tokens: expected 77, got 64"
[[nodiscard]] inline StatusMessage message(const Status& status) {
  StatusMessage out;
  if (status.ok()) {
    std::snprintf(out.text, sizeof out.text, "ok");
  } else if (status.code == Code::native) {
    std::snprintf(out.text, sizeof out.text, "%s: %s: error %d", name(status.code), status.what,
                  status.native);
  } else {
    std::snprintf(out.text, sizeof out.text, "%s: %s: expected %lld, got %lld", name(status.code),
                  status.what, static_cast<long long>(status.expected),
                  static_cast<long long>(status.actual));
  }
  return out;
}

}  // namespace LINATTN_TARGET

namespace detail {

[[nodiscard]] LINATTN_INLINE constexpr Status fail(Code code, const char* what, Index expected,
                                                   Index actual) {
  return {code, what, expected, actual, 0};
}

}  // namespace detail

namespace detail::inline LINATTN_TARGET {

// The first failed one of several checks, in the order in which they are written.
[[nodiscard]] constexpr Status first_failure() { return {}; }
template <class... Rest>
[[nodiscard]] constexpr Status first_failure(const Status& first, const Rest&... rest) {
  return first.ok() ? first_failure(rest...) : first;
}

[[nodiscard]] constexpr Status expect_equal(Index expected, Index actual, const char* what) {
  return expected == actual ? Status{} : fail(Code::shape, what, expected, actual);
}

[[nodiscard]] constexpr Status expect_positive(Index actual, const char* what) {
  return actual > 0 ? Status{} : fail(Code::empty, what, 1, actual);
}

}  // namespace detail::inline LINATTN_TARGET

LINATTN_END

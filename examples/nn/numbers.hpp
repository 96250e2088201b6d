// Numbers from outside: on a command line, in a file. One that is out of its range is refused and never another.
#pragma once

#include <charconv>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include <nlohmann/json.hpp>

namespace nn {

template <class T>
concept Number = (std::integral<T> && !std::same_as<T, bool>) || std::floating_point<T>;

/// Both ends belong to it.
template <Number T>
struct Range {
  T least, most;

  [[nodiscard]] bool holds(T value) const { return least <= value && value <= most; }  // NaN: never
};

/// As short as it can be read back: "0.1", "64".
template <Number T>
[[nodiscard]] std::string number_text(T value) {
  char text[64];
  return {text, std::to_chars(text, text + sizeof text, value).ptr};
}

/// "a whole number from 1 to 1000"
template <Number T>
[[nodiscard]] std::string describe(const Range<T>& range) {
  return std::string(std::integral<T> ? "a whole number from " : "a number from ") +
         number_text(range.least) + " to " + number_text(range.most);
}

/// The decimal number that all of the text spells ("12", "-0.5", "1e3" where T is no integer), or nothing.
template <Number T>
[[nodiscard]] std::optional<T> parse_number(std::string_view text, const Range<T>& range) {
  T value{};
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc{} || stop != end || !range.holds(value)) return std::nullopt;
  return value;
}

/// The number that a JSON value is, or nothing. An integer is none where it is written as 16.0 or "16".
template <Number T>
[[nodiscard]] std::optional<T> json_number(const nlohmann::json& value, const Range<T>& range) {
  const auto checked = [&](auto number) -> std::optional<T> {
    if constexpr (std::integral<T>) {
      if (std::cmp_less(number, range.least) || std::cmp_greater(number, range.most)) return std::nullopt;
      return static_cast<T>(number);
    } else {
      const auto rounded = static_cast<T>(number);
      return range.holds(rounded) ? std::optional<T>(rounded) : std::nullopt;
    }
  };
  if (value.is_number_unsigned()) return checked(value.get<std::uint64_t>());
  if (value.is_number_integer()) return checked(value.get<std::int64_t>());
  if constexpr (std::floating_point<T>)
    if (value.is_number_float()) return checked(value.get<double>());
  return std::nullopt;
}

/// What stands between the ends of a range in a help text: "1..1000".
template <Number T>
[[nodiscard]] std::string short_text(const Range<T>& range) {
  return number_text(range.least) + ".." + number_text(range.most);
}

/// What a file may say for the epsilon of a norm.
inline constexpr Range<double> norm_eps_range{1e-12, 0.1};

}  // namespace nn

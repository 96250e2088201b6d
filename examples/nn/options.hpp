// The options of the commands: what each may be is said where it is declared, and what it is not is one sentence.
#pragma once

#include <CLI/CLI.hpp>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "numbers.hpp"

namespace nn {

/// An option with one value, which take() keeps, or refuses by `false`: "--grid: expected ROWSxCOLUMNS, got 'x'".
CLI::Option* add_value(CLI::App& app, const std::string& names, const std::string& expected,
                       std::function<bool(const std::string&)> take, const std::string& about);

/// What people write, without a byte-order mark, which comes along where a shell inserts a file.
CLI::Option* add_text(CLI::App& app, const std::string& names, std::string& target, const std::string& about);

/// A path that is not empty.
CLI::Option* add_path(CLI::App& app, const std::string& names, std::filesystem::path& target,
                      const std::string& about);
/// One or more of them.
CLI::Option* add_paths(CLI::App& app, const std::string& names, std::vector<std::filesystem::path>& target,
                       const std::string& about);

namespace detail {

template <class T>
struct NumberOption {
  using Value = T;
  static bool take(const std::string& text, const Range<T>& range, T& target) {
    const std::optional<T> value = parse_number(text, range);
    if (value) target = *value;
    return value.has_value();
  }
  static std::string expected(const Range<T>& range) { return describe(range); }
  static std::string text(const T& value) { return number_text(value); }
};

template <class T>
struct NumberOption<std::optional<T>> {
  using Value = T;
  static bool take(const std::string& text, const Range<T>& range, std::optional<T>& target) {
    target = parse_number(text, range);
    return target.has_value();
  }
  static std::string expected(const Range<T>& range) { return describe(range); }
  static std::string text(const std::optional<T>& value) { return value ? number_text(*value) : ""; }
};

// With commas between them.
template <class T>
struct NumberOption<std::vector<T>> {
  using Value = T;
  static bool take(std::string_view text, const Range<T>& range, std::vector<T>& target) {
    target.clear();
    while (true) {
      const std::size_t comma = text.find(',');
      const std::optional<T> value = parse_number(text.substr(0, comma), range);
      if (!value) return false;
      target.push_back(*value);
      if (comma == std::string_view::npos) return true;
      text.remove_prefix(comma + 1);
    }
  }
  static std::string expected(const Range<T>& range) {
    return "numbers with commas between them, each " + describe(range);
  }
  static std::string text(const std::vector<T>& values) {
    std::string text;
    for (const T value : values) text += (text.empty() ? "" : ",") + number_text(value);
    return text;
  }
};

}  // namespace detail

/// A number, an optional one, or a vector of them, within the range. The help shows the range, and what the target holds
/// as the default.
template <class T>
CLI::Option* add_number(CLI::App& app, const std::string& names, T& target,
                        Range<typename detail::NumberOption<T>::Value> range, const std::string& about) {
  using Kind = detail::NumberOption<T>;
  return add_value(
             app, names, Kind::expected(range),
             [range, &target](const std::string& text) { return Kind::take(text, range, target); }, about)
      ->type_name(short_text(range))
      ->default_str(Kind::text(target));
}

/// Of options that several commands have.
inline constexpr Range<int> thread_range{0, 4096};  // 0: all cores
inline constexpr Range<int> repeat_range{1, 1000000};
inline constexpr Range<std::uint64_t> seed_range{0, std::numeric_limits<std::uint64_t>::max()};
inline constexpr Range<std::ptrdiff_t> side_range{1, 65536};  // of a picture, in pixels
inline constexpr Range<std::ptrdiff_t> head_range{1, 4096};
inline constexpr Range<double> guidance_range{0, 1000};

}  // namespace nn

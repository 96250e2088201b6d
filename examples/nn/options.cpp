#include "options.hpp"

#include <utility>

#include "text.hpp"

namespace nn {
namespace {

// "--seed" of "-s,--seed", as CLI11 names an option in its own sentences.
std::string long_name(const std::string& names) {
  const std::size_t begin = names.find("--");
  return begin == std::string::npos ? names : names.substr(begin, names.find(',', begin) - begin);
}

std::string expect_path(const std::string& text) {
  return text.empty() ? "expected a path, got ''" : std::string();
}

}  // namespace

CLI::Option* add_value(CLI::App& app, const std::string& names, const std::string& expected,
                       std::function<bool(const std::string&)> take, const std::string& about) {
  const auto take_all = [name = long_name(names), expected,
                         take = std::move(take)](const CLI::results_t& values) {
    for (const std::string& value : values)
      if (!take(value)) throw CLI::ValidationError(name, "expected " + expected + ", got '" + value + "'");
    return true;
  };
  return app.add_option(names, CLI::callback_t(take_all), about);
}

CLI::Option* add_text(CLI::App& app, const std::string& names, std::string& target,
                      const std::string& about) {
  return app
      .add_option_function<std::string>(
          names, [&target](const std::string& text) { target = without_byte_order_mark(text); }, about)
      ->default_str(target);
}

CLI::Option* add_path(CLI::App& app, const std::string& names, std::filesystem::path& target,
                      const std::string& about) {
  return app.add_option(names, target, about)
      ->type_name("PATH")
      ->check(expect_path, "")
      ->default_str(target.string());
}

CLI::Option* add_paths(CLI::App& app, const std::string& names, std::vector<std::filesystem::path>& target,
                       const std::string& about) {
  // Of an option a bounded number, which is without CLI11's own syntax "[first,second]" for a list. A positional needs
  // allow_extra_args to take more than one.
  constexpr int most = 1 << 20;
  return app.add_option(names, target, about)
      ->type_name("PATH")
      ->expected(1, most)
      ->allow_extra_args(!names.starts_with("-"))
      ->check(expect_path, "");
}

}  // namespace nn

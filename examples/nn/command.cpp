#include "command.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <exception>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <linattn/version.hpp>

#include "signals.hpp"
#include "standard_output.hpp"
#include "text.hpp"

namespace nn {
namespace {

std::string checked(std::string argument) {
  if (const std::string why = text_error(argument); !why.empty())
    throw std::runtime_error("argument '" + argument + "': " + why);
  return argument;
}

// The arguments as CLI11 is to see them. It takes what follows `--option=` for the value, and what follows `--option`
// even where that is an option itself.
std::vector<std::string> prepare(const CLI::App& app, int count, char** values) {
  std::vector<std::string> arguments;
  bool options = true;  // until "--"
  for (int i = 1; i < count; ++i) {
    arguments.push_back(checked(values[i]));
    const std::string argument = arguments.back();
    options = options && argument != "--";
    // Of a positional, CLI11 takes "[a,b]" for a list.
    if (argument.starts_with("[") && argument.ends_with("]")) arguments.back().insert(0, "./");
    if (!options || !argument.starts_with("-")) continue;
    const std::size_t equals = argument.starts_with("--") ? argument.find('=') : std::string::npos;
    const std::string name = argument.substr(0, equals);
    const CLI::Option* const option = app.get_option_no_throw(name);
    if (option == nullptr) continue;
    const bool takes_value = option->get_items_expected_min() > 0;
    if (equals != std::string::npos) {
      if (!takes_value) throw std::runtime_error(name + ": takes no value");
      if (equals + 1 == argument.size()) {
        arguments.back() = name;
        arguments.emplace_back();
      }
    } else if (takes_value) {
      if (++i == count) throw std::runtime_error(name + ": expected a value");
      arguments.push_back(checked(values[i]));
      const std::string& value = arguments.back();
      if (value.starts_with("-") && app.get_option_no_throw(value) != nullptr)
        throw std::runtime_error(name + ": expected a value, got the option " + value);
    }
  }
  return arguments;
}

std::string no_place(const std::string& argument) {
  return "there is no place for the argument '" + argument + "'";
}

// Of an option or a positional that was given more often than it may be; empty where there is none.
std::string excess(const CLI::App& app) {
  for (const CLI::Option* option : app.get_options()) {
    const auto most = static_cast<std::size_t>(option->get_items_expected_max());
    if (most == 0 || option->count() <= most ||
        option->get_multi_option_policy() == CLI::MultiOptionPolicy::TakeAll)
      continue;
    if (!option->nonpositional()) return no_place(option->results()[most]);
    return option->get_name() + ": is given " + std::to_string(option->count()) + " times";
  }
  for (const CLI::App* group : app.get_subcommands(nullptr))
    if (std::string sentence = excess(*group); !sentence.empty()) return sentence;
  return {};
}

std::string sentence(const CLI::App& app, const CLI::ParseError& error) {
  if (const std::vector<std::string> rest = app.remaining(); !rest.empty()) {
    if (rest[0] == "--" && rest.size() > 1) return no_place(rest[1]);
    return rest[0].starts_with("-") ? "there is no option '" + rest[0] + "'" : no_place(rest[0]);
  }
  const std::string repeated = excess(app);
  return repeated.empty() ? error.what() : repeated;
}

// Whether there is anything to run: --help and --version print and are done.
bool parse(CLI::App& app, int count, char** values) {
  app.set_version_flag("--version", app.get_name() + " " LINATTN_VERSION);
  std::vector<std::string> arguments = prepare(app, count, values);
  std::reverse(arguments.begin(), arguments.end());  // as CLI11 wants them
  try {
    app.parse(arguments);
    return true;
  } catch (const CLI::Success& wish) {
    std::ostringstream text;
    app.exit(wish, text, text);
    print_text(text.str());
    return false;
  } catch (const CLI::ParseError& error) {
    throw std::runtime_error(sentence(app, error));
  }
}

int fail(const CLI::App& app, std::string_view why) {
  std::fprintf(stderr, "%s: %s\n", app.get_name().c_str(), printable(why).c_str());
  return 2;
}

}  // namespace

int run_command(CLI::App& app, int count, char** values, const std::function<int()>& run) {
  keep_standard_descriptors();
  handle_signals(app.get_name());
  try {
    int code = 0;
    if (parse(app, count, values)) {
      expect_standard_output();
      code = run();
    }
    finish_standard_output();
    return code;
  } catch (const std::bad_alloc&) {
    return fail(app, "out of memory");
  } catch (const std::exception& error) {
    return fail(app, error.what());
  }
}

}  // namespace nn

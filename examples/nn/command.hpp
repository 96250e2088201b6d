// The main program of a command.
#pragma once

#include <CLI/CLI.hpp>

#include <cstdio>
#include <exception>
#include <new>

#include "signals.hpp"

namespace nn {

// Parses the command line and calls run(), whose result is the exit code. After a wrong command line or an exception it
// is 2, and stderr says in one sentence why.
template <class Run>
[[nodiscard]] int run_command(CLI::App& app, int count, char** values, const Run& run) {
  try {
    app.parse(count, values);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  handle_signals(app.get_name());
  try {
    return run();
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "%s: out of memory\n", app.get_name().c_str());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", app.get_name().c_str(), error.what());
  }
  return 2;
}

}  // namespace nn

// The main program of a command.
#pragma once

#include <CLI/CLI.hpp>

#include <functional>

namespace nn {

// Parses the command line and calls run(), whose result is the exit code. After a wrong command line, an exception or a
// failure of standard output it is 2, and one line on stderr says why. Prints through nn/standard_output.hpp.
[[nodiscard]] int run_command(CLI::App& app, int count, char** values, const std::function<int()>& run);

}  // namespace nn

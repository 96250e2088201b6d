// What a command prints reaches standard output, or the command fails.
#pragma once

#include <string_view>

namespace nn {

/// For the start of a program: no file that it opens later becomes descriptor 0, 1 or 2 because that was closed.
void keep_standard_descriptors();

/// Throws where nothing can be printed, so that a long computation does not start in vain.
void expect_standard_output();

/// Prints all of it at once. Throws std::runtime_error that says what the system says.
void print_text(std::string_view text);
[[gnu::format(printf, 1, 2)]] void print(const char* format, ...);

/// For the end: a disk may say only now that it is full.
void finish_standard_output();

}  // namespace nn

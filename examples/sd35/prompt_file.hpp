// Prompts from a text file.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace sd35 {

/// The prompts of a text file, a line each: without blanks around them, empty lines, and lines that begin with #.
/// Throws std::runtime_error that names the file where there is none.
[[nodiscard]] std::vector<std::string> read_prompts(const std::filesystem::path& path);

}  // namespace sd35

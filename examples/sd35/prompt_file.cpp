#include "prompt_file.hpp"

#include <sstream>
#include <string_view>

#include "nn/small_file.hpp"
#include "nn/text.hpp"

namespace sd35 {

std::vector<std::string> read_prompts(const std::filesystem::path& path) {
  constexpr std::size_t limit = 16 << 20;
  constexpr std::string_view blanks = " \t\r";
  std::istringstream text(nn::checked_text(
      nn::read_small_file(path, limit, "a list of prompts", linattn::SmallFile::or_unnamed_pipe), path));
  std::vector<std::string> prompts;
  for (std::string line; std::getline(text, line);) {
    const std::size_t first = line.find_first_not_of(blanks);
    if (first == std::string::npos || line[first] == '#') continue;
    prompts.push_back(line.substr(first, line.find_last_not_of(blanks) - first + 1));
  }
  if (prompts.empty()) nn::fail(path, "holds no prompt");
  return prompts;
}

}  // namespace sd35

// clip_tokens MERGES clip_tokens.json: checks the whole-text ids of every prompt of the JSON file against the
// tokenizer that MERGES (a merges.txt, a tokenizer.json, or a folder with them) makes.
#include <cstdint>
#include <exception>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "sd35/clip_tokenizer.hpp"

int main(int argc, char** argv) try {
  if (argc != 3) {
    std::cerr << "usage: clip_tokens MERGES clip_tokens.json\n";
    return 2;
  }
  const auto tokenizer = sd35::ClipTokenizer::load(argv[1]);
  std::ifstream file(argv[2]);
  if (!file) {
    std::cerr << argv[2] << ": cannot be read\n";
    return 2;
  }
  const auto cases = nlohmann::json::parse(file).at("cases");
  int passed = 0;
  int failed = 0;
  for (const auto& one : cases) {
    const auto prompt = one.at("prompt").get<std::string>();
    const auto expected = one.at("bpe_whole_text").get<std::vector<std::int32_t>>();
    const auto actual = tokenizer.encode(prompt);
    const bool equal = actual == expected;
    ++(equal ? passed : failed);
    std::cout
        << (equal ? "ok    " : "FAIL  ") << expected.size() << " ids  "
        << nlohmann::json(prompt.substr(0, 60)).dump(-1, ' ', true, nlohmann::json::error_handler_t::replace)
        << '\n';
    if (!equal)
      std::cout << "      expected " << nlohmann::json(expected) << "\n      actual   "
                << nlohmann::json(actual) << '\n';
  }
  std::cout << passed << " passed, " << failed << " failed\n";
  return failed == 0 && passed > 0 ? 0 : 1;
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 2;
}

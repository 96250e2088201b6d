// clip_tokens MERGES clip_tokens.json: checks every prompt of the JSON file against the tokenizer that MERGES (a
// merges.txt, a tokenizer.json, or a folder with them) makes: the ids of the whole text, and what --official gives
// CLIP-L (padded with EOS) and CLIP-G (padded with 0).
#include <cstdint>
#include <exception>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "sd35/clip_tokenizer.hpp"
#include "sd35/conditioning.hpp"

int main(int argc, char** argv) try {
  using Ids = std::vector<std::int32_t>;
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
    const auto check = [&](const char* what, const Ids& actual) {
      const auto expected = one.at(what).get<Ids>();
      const bool equal = actual == expected;
      ++(equal ? passed : failed);
      std::cout << (equal ? "ok    " : "FAIL  ") << what << ", " << expected.size() << " ids  "
                << nlohmann::json(prompt.substr(0, 60))
                       .dump(-1, ' ', true, nlohmann::json::error_handler_t::replace)
                << '\n';
      if (!equal)
        std::cout << "      expected " << nlohmann::json(expected) << "\n      actual   "
                  << nlohmann::json(actual) << '\n';
    };
    check("bpe_whole_text", tokenizer.encode(prompt));
    check("clip_l_77", sd35::official_clip_ids(tokenizer, prompt, tokenizer.eos_id()));
    check("clip_g_77", sd35::official_clip_ids(tokenizer, prompt, 0));
  }
  std::cout << passed << " passed, " << failed << " failed\n";
  return failed == 0 && passed > 0 ? 0 : 1;
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 2;
}

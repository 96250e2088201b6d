// A file of prompts: any bytes are prompts or an error that names the file, and no word of a prompt is lost.
#include <sd35/prompt_file.hpp>

#include <nlohmann/json.hpp>

#include "fuzz.hpp"

namespace {

constexpr std::string_view mark = "\xef\xbb\xbf";
constexpr std::string_view blanks = " \t\r";

bool is_utf8(const std::string& text) {
  try {
    (void)nlohmann::json(text).dump();
    return true;
  } catch (const nlohmann::json::exception&) {
    return false;
  }
}

// What is neither a blank nor a line end, nor in a line that begins with #.
std::string letters(std::string_view text) {
  std::string kept;
  bool begun = false, comment = false;
  for (const char c : text) {
    if (c == '\n') begun = false;
    if (c == '\n' || blanks.find(c) != std::string_view::npos) continue;
    if (!begun) comment = c == '#';
    begun = true;
    if (!comment) kept += c;
  }
  return kept;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::string text(reinterpret_cast<const char*>(data), size);
  const auto path = fuzz::write("prompts.txt", text);
  if (text.starts_with(mark)) text.erase(0, mark.size());
  const std::string wanted = letters(text);
  std::vector<std::string> prompts;
  const std::string why = fuzz::refusal(path, [&] { prompts = sd35::read_prompts(path); });
  fuzz::expect(why.empty() == (is_utf8(text) && text.find('\0') == std::string::npos && !wanted.empty()),
               "what holds a prompt is taken, and nothing else");
  if (!why.empty()) return 0;
  std::string lines(mark);
  for (const std::string& prompt : prompts) {
    fuzz::expect(!prompt.empty() && prompt.front() != '#' &&
                     blanks.find(prompt.front()) == std::string_view::npos &&
                     blanks.find(prompt.back()) == std::string_view::npos &&
                     prompt.find('\n') == std::string::npos && text.find(prompt) != std::string::npos,
                 "a prompt is a line, without blanks around it");
    lines += prompt + '\n';
  }
  fuzz::expect(letters(lines.substr(mark.size())) == wanted, "the prompts hold every word, in order");
  fuzz::expect(sd35::read_prompts(fuzz::write("prompts.txt", lines)) == prompts,
               "prompts come back as they were written");
  return 0;
}

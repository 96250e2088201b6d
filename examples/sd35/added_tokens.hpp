// What the tokenizers do with a prompt before anything else: its length, and tokens that are looked for as they stand.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace sd35 {

/// Throws std::runtime_error where a prompt has more than `most` bytes.
void check_length(std::string_view prompt, std::size_t most);

class AddedTokens {
 public:
  static constexpr std::size_t max_bytes = 1024;  // of a token's text

  AddedTokens() = default;
  /// Texts and their ids. None is empty or longer than max_bytes; of equal texts the first counts.
  explicit AddedTokens(std::vector<std::pair<std::string, std::int32_t>> tokens);

  /// Calls on_text(part) and on_token(id) in the order of the text. Where several tokens begin at a place the longest
  /// is taken. O(log n) comparisons a byte, whatever the number n of tokens.
  template <class OnText, class OnToken>
  void split(std::string_view text, OnText on_text, OnToken on_token) const {
    std::size_t begin = 0;
    for (std::size_t at = 0; at < text.size();) {
      const Token* const token = longest_at(text.substr(at));
      if (token == nullptr) {
        ++at;
        continue;
      }
      if (at > begin) on_text(text.substr(begin, at - begin));
      on_token(token->id);
      begin = at += token->text.size();
    }
    if (begin < text.size()) on_text(text.substr(begin));
  }

 private:
  struct Token {
    std::string text;
    std::int32_t id;
    std::size_t prefix;  // the position of the longest other token that this one begins with
  };
  /// The longest token that `text` begins with; null where there is none.
  [[nodiscard]] const Token* longest_at(std::string_view text) const;

  std::vector<Token> tokens_;  // in the order of their bytes
};

}  // namespace sd35

#include "added_tokens.hpp"

#include <algorithm>
#include <stdexcept>

namespace sd35 {
namespace {

constexpr std::size_t no_prefix = static_cast<std::size_t>(-1);

}  // namespace

void check_length(std::string_view prompt, std::size_t most) {
  if (prompt.size() > most)
    throw std::runtime_error("the prompt has " + std::to_string(prompt.size()) + " bytes; at most " +
                             std::to_string(most) + " are taken");
}

AddedTokens::AddedTokens(std::vector<std::pair<std::string, std::int32_t>> tokens) {
  std::stable_sort(tokens.begin(), tokens.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  for (auto& [text, id] : tokens) {
    if (text.empty() || text.size() > max_bytes)
      throw std::logic_error("an added token of " + std::to_string(text.size()) + " bytes");
    if (!tokens_.empty() && tokens_.back().text == text) continue;
    std::size_t prefix = tokens_.empty() ? no_prefix : tokens_.size() - 1;
    while (prefix != no_prefix && !text.starts_with(tokens_[prefix].text)) prefix = tokens_[prefix].prefix;
    tokens_.push_back({std::move(text), id, prefix});
  }
}

// Whatever lies in order between a prefix of the text and the text begins with that prefix. So the prefixes among the
// tokens are the last token that is not behind the text, or prefixes of that one.
const AddedTokens::Token* AddedTokens::longest_at(std::string_view text) const {
  const auto behind = std::upper_bound(tokens_.begin(), tokens_.end(), text,
                                       [](std::string_view t, const Token& token) { return t < token.text; });
  if (behind == tokens_.begin()) return nullptr;
  const Token* token = &*(behind - 1);
  const auto differ = std::mismatch(text.begin(), text.end(), token->text.begin(), token->text.end());
  const auto common = static_cast<std::size_t>(differ.first - text.begin());
  while (token->text.size() > common) {
    if (token->prefix == no_prefix) return nullptr;
    token = &tokens_[token->prefix];
  }
  return token;
}

}  // namespace sd35

// CLIP's tokenizer by its definition: every merge searches the whole word, every added token is tried at every place.
// The cost is the square of the text's length.
#pragma once

#include <utf8proc.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace reference {

struct ClipTokenizer {
  struct Added {
    std::string text;  // itself normalized where it is looked for in normalized text
    std::int32_t id;
    bool normalized;
  };
  std::map<std::string, std::int32_t> ids;
  std::map<std::pair<std::string, std::string>, std::size_t> ranks;  // of the merges
  std::vector<Added> added;                                          // BOS and EOS too
  std::int32_t unknown = 0;

  [[nodiscard]] std::vector<std::int32_t> encode(std::string_view text) const {
    std::vector<std::int32_t> out;
    split(text, false, out);
    return out;
  }

  // U+FFFD for each byte that is not UTF-8, NFC, a space for each run of white space, lower case.
  [[nodiscard]] static std::string normalize(std::string_view text) {
    std::string valid;
    for (std::size_t i = 0; i < text.size();) {
      std::int32_t c = 0;
      const auto size = utf8proc_iterate(bytes(text) + i, static_cast<std::ptrdiff_t>(text.size() - i), &c);
      valid += size > 0 ? text.substr(i, static_cast<std::size_t>(size)) : "\xef\xbf\xbd";
      i += size > 0 ? static_cast<std::size_t>(size) : 1;
    }
    utf8proc_uint8_t* mapped = nullptr;
    const auto size = utf8proc_map(bytes(valid), static_cast<std::ptrdiff_t>(valid.size()), &mapped,
                                   static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
    const std::string composed(mapped, mapped + size);
    std::free(mapped);
    std::string out;
    for (const std::int32_t c : points(composed)) {
      if (is_space(c)) {
        out += out.ends_with(' ') ? "" : " ";
      } else if (c == 0x130) {
        out += "i\u0307";
      } else {
        out += utf8(utf8proc_tolower(c));
      }
    }
    return out;
  }

  // GPT-2's visible character for a byte.
  [[nodiscard]] static std::string byte_symbol(unsigned char byte) {
    const auto visible = [](int b) { return (b >= 33 && b <= 126) || (b >= 161 && b != 173); };
    if (visible(byte)) return utf8(byte);
    int hidden = 0;
    for (int b = 0; b < byte; ++b) hidden += visible(b) ? 0 : 1;
    return utf8(256 + hidden);
  }

 private:
  static const utf8proc_uint8_t* bytes(std::string_view text) {
    return reinterpret_cast<const utf8proc_uint8_t*>(text.data());
  }
  static std::string utf8(std::int32_t c) {
    utf8proc_uint8_t out[4];
    return {out, out + utf8proc_encode_char(c, out)};
  }
  static std::vector<std::int32_t> points(std::string_view text) {
    std::vector<std::int32_t> out;
    for (std::size_t i = 0; i < text.size();) {
      std::int32_t c = 0;
      i += static_cast<std::size_t>(
          utf8proc_iterate(bytes(text) + i, static_cast<std::ptrdiff_t>(text.size() - i), &c));
      out.push_back(c);
    }
    return out;
  }
  static bool is_space(std::int32_t c) {
    return utf8proc_category_string(c)[0] == 'Z' || (c >= 9 && c <= 13) || c == 0x85;
  }
  // L, N, white space, or else '?'.
  static char kind(std::int32_t c) {
    const char category = utf8proc_category_string(c)[0];
    return is_space(c) ? ' ' : category == 'L' || category == 'N' ? category : '?';
  }

  // At each place the longest token of this kind; what lies between goes one step further.
  void split(std::string_view text, bool normalized, std::vector<std::int32_t>& out) const {
    std::string rest;
    const auto flush = [&] {
      if (normalized) {
        words(rest, out);
      } else {
        split(normalize(rest), true, out);
      }
      rest.clear();
    };
    for (std::size_t at = 0; at < text.size();) {
      std::size_t longest = 0;
      std::int32_t id = 0;
      for (const Added& token : added) {
        if (token.normalized != normalized || token.text.size() <= longest ||
            !text.substr(at).starts_with(token.text))
          continue;
        longest = token.text.size();
        id = token.id;
      }
      if (longest == 0) {
        rest += text[at++];
        continue;
      }
      flush();
      out.push_back(id);
      at += longest;
    }
    if (!rest.empty()) flush();
  }

  void words(const std::string& text, std::vector<std::int32_t>& out) const {
    const std::vector<std::int32_t> all = points(text);
    for (std::size_t at = 0; at < all.size();) {
      std::size_t end = at;
      for (const std::string_view contraction : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"}) {
        std::size_t same = 0;
        while (same < contraction.size() && at + same < all.size() && all[at + same] == contraction[same])
          ++same;
        if (same == contraction.size()) end = at + same;
      }
      if (end == at) do
          ++end;
        while (end < all.size() && kind(all[at]) != 'N' && kind(all[end]) == kind(all[at]));
      std::string word;
      for (std::size_t i = at; i < end; ++i) word += utf8(all[i]);
      if (kind(all[at]) != ' ') merge(word, out);
      at = end;
    }
  }

  void merge(const std::string& word, std::vector<std::int32_t>& out) const {
    std::vector<std::string> symbols;
    for (const char c : word) symbols.push_back(byte_symbol(static_cast<unsigned char>(c)));
    symbols.back() += "</w>";
    for (;;) {
      std::size_t best = ranks.size(), where = 0;
      for (std::size_t i = 0; i + 1 < symbols.size(); ++i)
        if (const auto found = ranks.find({symbols[i], symbols[i + 1]});
            found != ranks.end() && found->second < best) {
          best = found->second;
          where = i;
        }
      if (best == ranks.size()) break;
      symbols[where] += symbols[where + 1];
      symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(where) + 1);
    }
    for (const std::string& symbol : symbols) out.push_back(ids.contains(symbol) ? ids.at(symbol) : unknown);
  }
};

}  // namespace reference

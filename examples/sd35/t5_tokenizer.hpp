// The SentencePiece tokenizer of T5.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string_view>
#include <vector>

#include "added_tokens.hpp"

namespace sentencepiece {
class SentencePieceProcessor;
}

namespace sd35 {

/// Text to T5 token ids, equal to transformers' T5TokenizerFast (legacy, 100 sentinels): `</s>`, `<pad>`,
/// `<unk>` and `<extra_id_0>` ... `<extra_id_99>` in the text become their ids, and SentencePiece encodes
/// what lies between them, each part with its own leading space. Known differences: tokenizer_config.json is
/// not read, so a folder with another number of sentinels or with `legacy: false` (no leading space after a
/// special token) differs there; U+0085 at the end is not stripped; a compatibility character before a
/// combining mark is normalized by itself; of two segmentations whose scores differ by a rounding error the
/// other one may be taken.
class T5Tokenizer {
 public:
  static constexpr std::int32_t pad_id = 0;
  static constexpr std::int32_t eos_id = 1;
  static constexpr std::int32_t unk_id = 2;

  /// Reads spiece.model from a folder, or the SentencePiece model that the path names. Throws
  /// std::runtime_error that names the file where it is missing, damaged, or has other ids than pad 0, </s> 1
  /// and <unk> 2.
  static T5Tokenizer load(const std::filesystem::path& folder_or_file);

  /// The ids of the whole text and EOS. Bytes that are not UTF-8 read as an unknown character. Throws
  /// std::runtime_error above 64 KiB of text.
  std::vector<std::int32_t> encode(std::string_view text) const;

  /// The first `length - 1` ids, EOS, then padding up to `length`. Throws as encode does, and where length
  /// < 1.
  std::vector<std::int32_t> encode_padded(std::string_view text, int length = 256) const;

  /// Pieces and sentinels: an upper bound of every id, so the rows that the token embedding needs.
  std::int32_t vocab_size() const;
  /// Of SentencePiece's own: the ids of a text that names no sentinel are below it.
  std::int32_t pieces() const;

  T5Tokenizer(T5Tokenizer&&) noexcept;
  T5Tokenizer& operator=(T5Tokenizer&&) noexcept;
  ~T5Tokenizer();

 private:
  T5Tokenizer();
  std::unique_ptr<sentencepiece::SentencePieceProcessor> model_;
  AddedTokens special_;
};

}  // namespace sd35

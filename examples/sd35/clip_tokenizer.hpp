// The byte-level BPE tokenizer of CLIP-L and CLIP-G.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "added_tokens.hpp"

namespace sd35 {

/// Text to CLIP token ids, equal to transformers' CLIPTokenizerFast: NFC, lower case, split into letter runs,
/// single digits, English contractions and runs of the rest, then byte-level BPE with `</w>` on the last symbol
/// of a piece. Unicode is libutf8proc's: characters of another version of it may fall into another class.
///
/// `<|startoftext|>` and `<|endoftext|>` in the text become their ids, and so do the other added tokens that
/// the files name, the padding token above all: every `!` of a prompt is id 0 in the tokenizer_2 of SD3.5, whose
/// padding it is, but 256 or a part of another symbol in a tokenizer that pads with EOS. A token that is
/// `normalized` is looked for in the normalized text, the others in the text as it stands. At each place the
/// longest is taken.
///
/// The slow CLIPTokenizer gives the same ids except where it sets CJK characters apart, drops control and format
/// characters and knows the final sigma (without ftfy), or repairs the text first (with ftfy).
class ClipTokenizer {
 public:
  /// Reads a vocabulary from, in this order:
  /// - a folder with merges.txt, and vocab.json beside it or not;
  /// - a folder with tokenizer.json alone;
  /// - a file *.json in the form of tokenizer.json (only `model` and `added_tokens` are read);
  /// - any other file in the form of merges.txt: a `#version` line, then a merge a line, of which the first
  ///   48,894 count (so OpenCLIP's bpe_simple_vocab_16e6.txt will do, uncompressed).
  ///
  /// Without vocab.json the ids are CLIP's: 256 byte symbols, the same with `</w>`, the results of the
  /// merges, BOS, EOS. A folder's tokenizer_config.json and special_tokens_map.json give the padding and the
  /// unknown token. Throws std::runtime_error that names the file and, where there is one, the line.
  static ClipTokenizer load(const std::filesystem::path& folder_or_file);

  /// The ids of the whole text, without BOS and EOS, never truncated. Bytes that are not UTF-8 read as
  /// U+FFFD, one each. O(n log n) in the length of the longest piece. Throws std::runtime_error above 256 KiB
  /// of text.
  std::vector<std::int32_t> encode(std::string_view text) const;

  /// BOS, the first `length - 2` ids, EOS, then padding up to `length`: the form that the encoders take.
  /// The padding is `pad`, or else the folder's pad_id(), or else EOS. CLIP-L is padded with EOS, CLIP-G with
  /// 0. Throws as encode does, and where length < 2.
  std::vector<std::int32_t> encode_padded(std::string_view text, int length = 77,
                                          std::optional<std::int32_t> pad = std::nullopt) const;

  std::int32_t bos_id() const { return bos_; }
  std::int32_t eos_id() const { return eos_; }
  /// What the folder's configuration names as the padding token; empty where it names none.
  std::optional<std::int32_t> pad_id() const { return pad_; }
  /// Largest id + 1: the rows that the token embedding needs.
  std::int32_t vocab_size() const { return vocab_size_; }

 private:
  struct Merge {
    std::uint32_t rank;
    std::int32_t result;
  };

  ClipTokenizer() = default;
  const Merge* find_merge(std::int32_t left, std::int32_t right) const;
  void append_pieces(std::string_view text, std::vector<std::int32_t>& ids) const;
  void append_bpe(std::string_view piece, std::vector<std::int32_t>& ids) const;

  std::array<std::int32_t, 256> inner_{};  // id of a byte inside a piece; no_id where the vocabulary lacks it
  std::array<std::int32_t, 256> last_{};   // id of a piece's last byte, which carries </w>
  std::unordered_map<std::uint64_t, Merge> merges_;  // by the ids of the pair
  AddedTokens as_written_, normalized_;              // where they are looked for
  std::int32_t bos_ = 0;
  std::int32_t eos_ = 0;
  std::int32_t unk_ = 0;
  std::optional<std::int32_t> pad_;
  std::int32_t vocab_size_ = 0;
};

}  // namespace sd35

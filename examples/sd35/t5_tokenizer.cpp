#include "t5_tokenizer.hpp"

#include <sentencepiece_processor.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

#include "nn/small_file.hpp"
#include "nn/text.hpp"

namespace sd35 {

using namespace nn;
namespace {

namespace fs = std::filesystem;

constexpr std::size_t max_file_bytes = 64u << 20;  // the real spiece.model has 0.8 MB
// SentencePiece joins characters that it does not know in quadratic time: 0.6 s for this much of U+3316, which it normalizes
// to six of them.
constexpr std::size_t max_text_bytes = 64u << 10;
constexpr std::size_t max_piece_bytes = 1024;       // the real ones have 16 characters at most
constexpr std::size_t max_replacement_bytes = 128;  // the real ones have 33 at most, of U+FDFA
constexpr int max_matches = 32;                     // what SentencePiece has room for, and does not check
constexpr std::int32_t sentinels = 100;

// A reader of protobuf's wire format, as far as SentencePiece models need it: the payloads of the
// length-delimited fields with one number, or nothing where the message is malformed.
std::optional<std::vector<std::string_view>> fields(std::string_view message, std::uint64_t number) {
  const auto varint = [&message](std::uint64_t& value) {
    value = 0;
    for (unsigned shift = 0; shift < 64 && !message.empty(); shift += 7) {
      const auto byte = static_cast<unsigned char>(message.front());
      message.remove_prefix(1);
      value |= std::uint64_t{byte & 0x7fu} << shift;
      if (byte < 0x80) return true;
    }
    return false;
  };
  std::vector<std::string_view> found;
  while (!message.empty()) {
    std::uint64_t tag = 0;
    std::uint64_t size = 0;
    if (!varint(tag) || tag > UINT32_MAX) return std::nullopt;
    switch (tag & 7) {
      case 0:
        if (!varint(size)) return std::nullopt;
        size = 0;
        break;
      case 1:
        size = 8;
        break;
      case 2:
        if (!varint(size)) return std::nullopt;
        break;
      case 5:
        size = 4;
        break;
      default:
        return std::nullopt;
    }
    if (size > message.size()) return std::nullopt;
    if ((tag & 7) == 2 && tag >> 3 == number) found.push_back(message.substr(0, size));
    message.remove_prefix(size);
  }
  return found;
}

// Whether a normalization table is safe to follow, which SentencePiece takes on trust: u32 byte count of the
// trie, the trie, then the replacements, each ended by NUL. The trie is a double array of Darts-clone: a search
// begins at unit 0 and goes from unit i by byte b to unit i ^ offset(i) ^ b where that has the label b; a value lies
// in unit i ^ offset(i) and is the position of a replacement. Bit 31 marks the units of values, which have no label,
// bit 8 those that have a value.
bool is_sound_charsmap(std::string_view map) {
  const auto u32 = [&map](std::size_t at) {
    std::uint32_t value = 0;
    for (std::size_t i = 4; i-- > 0;) value = value << 8 | static_cast<unsigned char>(map[at + i]);
    return value;
  };
  if (map.empty()) return true;
  if (map.size() < 4) return false;
  const std::size_t trie_bytes = u32(0);
  if (trie_bytes % 4 != 0 || trie_bytes < 4 || trie_bytes >= map.size() - 4 || map.back() != '\0')
    return false;
  const std::size_t units = trie_bytes / 4;
  const std::string_view replacements = map.substr(4 + trie_bytes);
  for (std::size_t at = 0; at < replacements.size(); ++at) {
    const std::size_t end = replacements.find('\0', at);
    if (end - at > max_replacement_bytes) return false;
    at = end;
  }

  const auto unit = [&](std::size_t i) { return u32(4 + 4 * i); };
  const auto is_passed = [&](std::size_t i) { return i == 0 || unit(i) >> 31 == 0; };
  const auto next = [&](std::size_t i) {
    return i ^ std::size_t{unit(i) >> 10} << ((unit(i) & 1u << 9) >> 6);
  };
  for (std::size_t i = 0; i < units; ++i) {
    if (!is_passed(i)) continue;
    if ((next(i) | 0xff) >= units) return false;
    if ((unit(i) & 1u << 8) != 0 && (unit(next(i)) & 0x7fffffffu) >= replacements.size()) return false;
  }

  // Where a search can be after so many bytes, each of which may be the end of a match.
  std::vector<bool> reached(units + 256);
  reached[next(0)] = true;
  for (int bytes = 0; bytes <= max_matches; ++bytes) {
    std::vector<bool> further(reached.size());
    bool ended = true;
    for (std::size_t i = 0; i < units; ++i)
      if (unit(i) >> 31 == 0 && reached[i ^ (unit(i) & 0xff)]) {
        further[next(i)] = true;
        ended = false;
      }
    if (ended) return true;
    reached.swap(further);
  }
  return false;
}

// Field 3 of ModelProto is normalizer_spec, whose field 2 is precompiled_charsmap (sentencepiece_model.proto).
bool has_sound_charsmap(std::string_view model) {
  const auto specs = fields(model, 3);
  if (!specs || specs->empty()) return false;  // every model has one; a truncated file may lack it
  for (const std::string_view spec : *specs) {
    const auto maps = fields(spec, 2);
    if (!maps || !std::all_of(maps->begin(), maps->end(), is_sound_charsmap)) return false;
  }
  return true;
}

// Field 1 of ModelProto are the pieces, whose field 1 is the text. SentencePiece puts them into a trie of C strings, whose
// builder aborts at a NUL inside of one, and goes over their bytes by recursion.
bool has_sound_pieces(std::string_view model) {
  const auto pieces = fields(model, 1);
  return pieces && std::all_of(pieces->begin(), pieces->end(), [](std::string_view piece) {
           const auto texts = fields(piece, 1);
           return texts && std::all_of(texts->begin(), texts->end(), [](std::string_view text) {
                    return text.size() <= max_piece_bytes && text_error(text).empty();
                  });
         });
}

// Sentinels are numbered downwards from the end of the vocabulary.
AddedTokens special_tokens(std::int32_t pieces) {
  std::vector<std::pair<std::string, std::int32_t>> tokens = {
      {"<pad>", T5Tokenizer::pad_id}, {"</s>", T5Tokenizer::eos_id}, {"<unk>", T5Tokenizer::unk_id}};
  for (std::int32_t i = 0; i < sentinels; ++i)
    tokens.emplace_back("<extra_id_" + std::to_string(i) + ">", pieces + sentinels - 1 - i);
  return AddedTokens(std::move(tokens));
}

}  // namespace

T5Tokenizer::T5Tokenizer() : model_(std::make_unique<sentencepiece::SentencePieceProcessor>()) {}
T5Tokenizer::T5Tokenizer(T5Tokenizer&&) noexcept = default;
T5Tokenizer& T5Tokenizer::operator=(T5Tokenizer&&) noexcept = default;
T5Tokenizer::~T5Tokenizer() = default;

T5Tokenizer T5Tokenizer::load(const fs::path& folder_or_file) {
  fs::path file = folder_or_file;
  if (fs::is_directory(file)) {
    file /= "spiece.model";
    if (!fs::exists(file) && fs::exists(folder_or_file / "tokenizer.json"))
      fail(file,
           "no such file; tokenizer.json alone will not do, because the T5 text is encoded by SentencePiece, "
           "which reads spiece.model (it belongs to every T5 release and to tokenizer_3 of SD3.5)");
  }
  const std::string content = read_small_file(file, max_file_bytes, "a SentencePiece model");
  T5Tokenizer out;
  if (!has_sound_pieces(content) || !has_sound_charsmap(content) ||
      !out.model_->LoadFromSerializedProto(content).ok())
    fail_by_content(file, content, "is not a SentencePiece model, or a damaged one");
  const auto expect = [&](const char* name, int actual, std::int32_t expected) {
    if (actual != expected)
      fail(file, "is not T5's: the id of " + std::string(name) + " is " +
                     (actual < 0 ? "missing" : std::to_string(actual)) + ", not " + std::to_string(expected));
  };
  expect("<pad>", out.model_->pad_id(), pad_id);
  expect("</s>", out.model_->eos_id(), eos_id);
  expect("<unk>", out.model_->unk_id(), unk_id);
  out.special_ = special_tokens(out.model_->GetPieceSize());
  return out;
}

std::vector<std::int32_t> T5Tokenizer::encode(std::string_view text) const {
  check_length(text, max_text_bytes);
  std::vector<std::int32_t> ids;
  const auto append = [&](std::string_view part) {
    std::vector<int> part_ids;
    const auto status = model_->Encode(part, &part_ids);
    if (!status.ok()) throw std::runtime_error(std::string("the prompt: ") + status.message());
    ids.insert(ids.end(), part_ids.begin(), part_ids.end());
  };
  special_.split(text, append, [&ids](std::int32_t id) { ids.push_back(id); });
  ids.push_back(eos_id);
  return ids;
}

std::vector<std::int32_t> T5Tokenizer::encode_padded(std::string_view text, int length) const {
  if (length < 1) throw std::runtime_error("a T5 token sequence has at least 1 place");
  const auto size = static_cast<std::size_t>(length);
  std::vector<std::int32_t> ids = encode(text);
  if (ids.size() > size) {
    ids.resize(size);
    ids.back() = eos_id;
  }
  ids.resize(size, pad_id);
  return ids;
}

std::int32_t T5Tokenizer::pieces() const { return model_->GetPieceSize(); }
std::int32_t T5Tokenizer::vocab_size() const { return pieces() + sentinels; }

}  // namespace sd35

// The T5 tokenizer: any bytes are a model or an error that names the file, and a model gives any text ids of its vocabulary.
// SentencePiece has the text and the checked model; see CONTRIBUTING.md for how it is instrumented as well.
#include <sd35/t5_tokenizer.hpp>

#include <fuzzer/FuzzedDataProvider.h>

#include <array>
#include <bit>
#include <optional>

#include "fuzz.hpp"

namespace {

using Ids = std::vector<std::int32_t>;

// Fields of protobuf's wire format, by their numbers in sentencepiece_model.proto.
std::string varint(std::uint64_t value) {
  std::string bytes;
  for (; value >= 0x80; value >>= 7) bytes += static_cast<char>(value | 0x80);
  return bytes + static_cast<char>(value);
}
std::string little_endian(std::uint32_t value) {
  std::string bytes;
  for (int shift = 0; shift < 32; shift += 8) bytes += static_cast<char>(value >> shift);
  return bytes;
}
std::string number_field(int number, std::uint64_t value) {
  return varint(static_cast<std::uint64_t>(number) << 3) + varint(value);
}
std::string bytes_field(int number, std::string_view bytes) {
  return varint(static_cast<std::uint64_t>(number) << 3 | 2) + varint(bytes.size()) + std::string(bytes);
}
std::string float_field(int number, float value) {
  return varint(static_cast<std::uint64_t>(number) << 3 | 5) +
         little_endian(std::bit_cast<std::uint32_t>(value));
}

std::string piece(std::string_view text, float score, int type) {
  return bytes_field(
      1, bytes_field(1, text) + float_field(2, score) + number_field(3, static_cast<std::uint64_t>(type)));
}

// A model with T5's three special pieces and others, of any kinds and scores.
std::string model(FuzzedDataProvider& in) {
  std::string bytes = piece("<pad>", 0, 3) + piece("</s>", 0, 3) + piece("<unk>", 0, 2);
  std::string trainer = number_field(40, 2u) + number_field(41, ~std::uint64_t{0}) + number_field(42, 1u) +
                        number_field(43, 0u);
  trainer += number_field(3, in.PickValueInArray<std::uint64_t>({1, 1, 1, 2, 3, 4, 5}));
  trainer += number_field(24, in.ConsumeBool() ? 1u : 0u);
  const bool byte_fallback = in.ConsumeIntegralInRange(0, 7) == 1;
  trainer += number_field(35, byte_fallback ? 1u : 0u);
  std::string normalizer;
  for (const int number : {3, 4, 5}) normalizer += number_field(number, in.ConsumeBool() ? 1u : 0u);
  if (in.ConsumeIntegralInRange(0, 3) == 1) {
    // A table with a trie of 256 units or twice that, few of which are any, or lead on from a byte; and replacements.
    std::vector<std::uint32_t> trie(in.ConsumeBool() ? 256 : 512, 1u << 31);
    trie[0] = 1 << 10;
    for (int count = in.ConsumeIntegralInRange(0, 8); count > 0; --count) {
      const std::uint32_t byte = in.ConsumeIntegral<std::uint8_t>(),
                          offset = in.ConsumeIntegral<std::uint8_t>();
      trie[1 ^ byte] = in.ConsumeBool() ? in.ConsumeIntegral<std::uint32_t>() : offset << 10 | 1u << 8 | byte;
    }
    std::string table = little_endian(static_cast<std::uint32_t>(4 * trie.size()));
    for (const std::uint32_t unit : trie) table += little_endian(unit);
    normalizer += bytes_field(2, table + in.ConsumeRandomLengthString(16) + '\0');
  }
  if (byte_fallback && in.ConsumeBool())
    for (std::size_t byte = 0; byte < 256; ++byte) {
      constexpr std::string_view digits = "0123456789ABCDEF";
      bytes += piece(std::string("<0x") + digits[byte >> 4] + digits[byte & 15] + ">", 0, 6);
    }
  while (in.remaining_bytes() > 0) {
    const float score = in.ConsumeBool()
                            ? -in.ConsumeProbability<float>() * 9
                            : in.PickValueInArray({0.0f, 1e38f, -3e38f, 0.0f / 0.0f, -1.0f / 0.0f});
    const int type = in.PickValueInArray({1, 1, 1, 1, 2, 3, 4, 5, 6, 7});
    const std::string text = in.ConsumeRandomLengthString(8);
    bytes += piece(in.ConsumeBool() ? "\xe2\x96\x81" + text : text, score, type);
  }
  return bytes + bytes_field(2, trainer) + bytes_field(3, normalizer);
}

const sd35::T5Tokenizer& tiny() {
  static const auto loaded = sd35::T5Tokenizer::load(LINATTN_TEST_DATA "/tokenizers/t5/spiece.model");
  return loaded;
}

void check(const sd35::T5Tokenizer& t5, const std::string& text) {
  const Ids ids = t5.encode(text);
  fuzz::expect(!ids.empty() && ids.back() == sd35::T5Tokenizer::eos_id, "the last id is that of the end");
  for (const std::int32_t id : ids)
    fuzz::expect(id >= 0 && id < t5.vocab_size(), "every id is one of the vocabulary");
  fuzz::expect(t5.encode(text) == ids, "the same text has the same ids");

  Ids padded(ids.begin(), ids.size() > 9 ? ids.begin() + 9 : ids.end());
  padded.back() = sd35::T5Tokenizer::eos_id;
  padded.resize(9, sd35::T5Tokenizer::pad_id);
  fuzz::expect(t5.encode_padded(text, 9) == padded, "padded ids are the first ones, the end, and padding");

  // No sentinel begins inside of another, so that one more parts the text at its place.
  const std::size_t half = text.size() / 2;
  const std::string left = text.substr(0, half), right = text.substr(half);
  Ids parted = t5.encode(left);
  parted.back() = t5.vocab_size() - 8;
  const Ids behind = t5.encode(right);
  parted.insert(parted.end(), behind.begin(), behind.end());
  fuzz::expect(t5.encode(left + "<extra_id_7>" + right) == parted,
               "a sentinel parts the text, and has its id");
}

}  // namespace

// A text; a text and the bytes of a model; or a text, what a model is made of, and nothing.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::vector<std::string> parts = fuzz::parts(data, size);
  if (parts.size() == 1) {
    check(tiny(), parts[0]);
    return 0;
  }
  std::string bytes = parts[1];
  if (parts.size() > 2) {
    FuzzedDataProvider in(reinterpret_cast<const std::uint8_t*>(parts[1].data()), parts[1].size());
    bytes = model(in);
  }
  const auto path = fuzz::write("spiece.model", bytes);
  std::optional<sd35::T5Tokenizer> t5;
  if (!fuzz::refusal(path, [&] { t5 = sd35::T5Tokenizer::load(path); }).empty()) return 0;
  fuzz::expect(t5->pieces() + 100 == t5->vocab_size(), "100 sentinels are behind the pieces");
  // A model may be unable to encode, in one sentence.
  (void)fuzz::refusal([&] { check(*t5, parts[0]); });
  return 0;
}

#include "t5_tokenizer.hpp"

#include <sentencepiece_processor.h>

#include <algorithm>
#include <fstream>
#include <optional>
#include <stdexcept>
#include <string>

namespace sd35 {
namespace {

namespace fs = std::filesystem;

constexpr std::uintmax_t max_file_bytes = 64u << 20;  // the real spiece.model has 0.8 MB
constexpr std::size_t max_text_bytes = 1u << 20;
constexpr std::int32_t sentinels = 100;

[[noreturn]] void fail(const fs::path& file, const std::string& what) {
  throw std::runtime_error(file.string() + ": " + what);
}

std::string read_file(const fs::path& file) {
  std::error_code error;
  const fs::file_status status = fs::status(file, error);
  if (!fs::exists(status)) fail(file, "no such file");
  if (!fs::is_regular_file(status)) fail(file, "is not a regular file");
  const std::uintmax_t size = fs::file_size(file, error);
  if (error) fail(file, "cannot be read: " + error.message());
  if (size > max_file_bytes)
    fail(file, "has " + std::to_string(size) + " bytes; a SentencePiece model has at most " +
                   std::to_string(max_file_bytes));
  std::ifstream stream(file, std::ios::binary);
  std::string content(static_cast<std::size_t>(size), '\0');
  if (!stream.read(content.data(), static_cast<std::streamsize>(size))) fail(file, "cannot be read");
  return content;
}

struct SpecialToken {
  std::int32_t id;
  std::size_t length;
};

// The special token that `text` begins with. Sentinels are numbered downwards from the end of the vocabulary.
std::optional<SpecialToken> special_token(std::string_view text, std::int32_t pieces) {
  if (text.starts_with("<pad>")) return SpecialToken{T5Tokenizer::pad_id, 5};
  if (text.starts_with("</s>")) return SpecialToken{T5Tokenizer::eos_id, 4};
  if (text.starts_with("<unk>")) return SpecialToken{T5Tokenizer::unk_id, 5};
  if (text.starts_with("<extra_id_"))
    for (std::int32_t i = 0; i < sentinels; ++i)
      if (const std::string name = "<extra_id_" + std::to_string(i) + ">"; text.starts_with(name))
        return SpecialToken{pieces + sentinels - 1 - i, name.size()};
  return std::nullopt;
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
  const std::string content = read_file(file);
  T5Tokenizer out;
  const auto status = out.model_->LoadFromSerializedProto(content);
  if (!status.ok()) fail(file, std::string("is not a SentencePiece model: ") + status.message());
  const auto expect = [&](const char* name, int actual, std::int32_t expected) {
    if (actual != expected)
      fail(file, "is not T5's: the id of " + std::string(name) + " is " +
                     (actual < 0 ? "missing" : std::to_string(actual)) + ", not " + std::to_string(expected));
  };
  expect("<pad>", out.model_->pad_id(), pad_id);
  expect("</s>", out.model_->eos_id(), eos_id);
  expect("<unk>", out.model_->unk_id(), unk_id);
  return out;
}

std::vector<std::int32_t> T5Tokenizer::encode(std::string_view text) const {
  if (text.size() > max_text_bytes)
    throw std::runtime_error("the prompt has " + std::to_string(text.size()) + " bytes; at most " +
                             std::to_string(max_text_bytes) + " are taken");
  std::vector<std::int32_t> ids;
  const auto append = [&](std::string_view part) {
    std::vector<int> part_ids;
    const auto status = model_->Encode(part, &part_ids);
    if (!status.ok()) throw std::runtime_error(std::string("the prompt: ") + status.message());
    ids.insert(ids.end(), part_ids.begin(), part_ids.end());
  };
  std::size_t begin = 0;
  for (std::size_t at = text.find('<'); at != std::string_view::npos; at = text.find('<', at)) {
    if (const auto special = special_token(text.substr(at), model_->GetPieceSize())) {
      append(text.substr(begin, at - begin));
      ids.push_back(special->id);
      begin = at += special->length;
    } else {
      ++at;
    }
  }
  append(text.substr(begin));
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

std::int32_t T5Tokenizer::vocab_size() const { return model_->GetPieceSize() + sentinels; }

}  // namespace sd35

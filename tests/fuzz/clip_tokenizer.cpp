// The CLIP tokenizer against its definition: the same ids for any prompt, merges and added tokens; and any bytes are a
// tokenizer.json or an error.
#include <sd35/clip_tokenizer.hpp>

#include <nlohmann/json.hpp>
#include <sstream>

#include "../reference/clip_tokenizer.hpp"
#include "fuzz.hpp"

namespace {

using nlohmann::json;

struct Tokenizers {
  json file;
  reference::ClipTokenizer plain;

  void add_symbol(const std::string& symbol) {
    plain.ids.emplace(symbol, static_cast<std::int32_t>(plain.ids.size()));
  }
  // CLIP's symbols of the bytes, and a merge a line.
  explicit Tokenizers(const std::string& merges) {
    for (const char* end : {"", "</w>"})
      for (int byte = 0; byte < 256; ++byte)
        add_symbol(reference::ClipTokenizer::byte_symbol(static_cast<unsigned char>(byte)) + end);
    json lines = json::array();
    std::istringstream text(merges);
    for (std::string line; std::getline(text, line);) {
      const std::size_t space = std::min(line.find(' '), line.size() - 1);
      const std::string left = line.substr(0, space), right = line.substr(space + 1);
      add_symbol(left + right);
      plain.ranks.emplace(std::pair(left, right), plain.ranks.size());
      lines.push_back(line);
    }
    for (const char* name : {"<|startoftext|>", "<|endoftext|>"}) {
      add_symbol(name);
      plain.added.push_back({name, plain.ids.at(name), true});
    }
    plain.unknown = plain.ids.at("<|endoftext|>");
    file["model"] = {{"type", "BPE"}, {"end_of_word_suffix", "</w>"}, {"unk_token", "<|endoftext|>"}};
    file["model"]["vocab"] = plain.ids;
    file["model"]["merges"] = lines;
    file["added_tokens"] = json::array();
  }
  // A token that is looked for in the normalized text where its name begins with a dot, which it loses.
  void add_token(std::string name) {
    const bool normalized = name.starts_with('.');
    if (normalized) name.erase(0, 1);
    const auto id = static_cast<std::int32_t>(plain.ids.size() + file["added_tokens"].size());
    file["added_tokens"].push_back({{"id", id}, {"content", name}, {"normalized", normalized}});
    plain.added.push_back({normalized ? reference::ClipTokenizer::normalize(name) : name, id, normalized});
  }
};

}  // namespace

// A prompt; a prompt and the bytes of a tokenizer.json; or a prompt, merges, and added tokens.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::vector<std::string> parts = fuzz::parts(data, size);
  if (parts.size() == 2) {
    const auto path = fuzz::write("tokenizer.json", parts[1]);
    (void)fuzz::refusal([&] {
      const auto clip = sd35::ClipTokenizer::load(path);
      for (const std::int32_t id : clip.encode(parts[0]))
        fuzz::expect(id >= 0 && id < clip.vocab_size(), "every id is one of the vocabulary");
      fuzz::expect(clip.encode_padded(parts[0], 9).size() == 9,
                   "padded ids have the length that was asked for");
    });
    return 0;
  }
  if (parts[0].size() > 256) return 0;  // the cube of its length is what the definition takes
  Tokenizers both(parts.size() < 2 ? "t h\nth e</w>\na t\nc at</w>\nc a\n! !</w>\n' s</w>" : parts[1]);
  for (std::size_t i = 2; i < parts.size(); ++i) both.add_token(parts[i]);
  std::string text;
  try {
    text = both.file.dump();
  } catch (const json::exception&) {
    return 0;  // not UTF-8
  }
  const auto path = fuzz::write("tokenizer.json", text);
  (void)fuzz::refusal([&] {
    const auto clip = sd35::ClipTokenizer::load(path);
    fuzz::expect(clip.encode(parts[0]) == both.plain.encode(parts[0]), "the ids are those of the definition");
  });
  return 0;
}

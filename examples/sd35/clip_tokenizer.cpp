#include "clip_tokenizer.hpp"

#include <utf8proc.h>

#include <algorithm>
#include <charconv>
#include <functional>
#include <queue>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_set>
#include <utility>

#include <linattn/weights/json.hpp>

#include "nn/small_file.hpp"
#include "nn/text.hpp"

namespace sd35 {

using namespace nn;
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using Ids = std::unordered_map<std::string, std::int32_t>;
using CodePoint = utf8proc_int32_t;

constexpr std::size_t max_file_bytes = 16u << 20;  // the real tokenizer.json has 3.6 MB
constexpr std::size_t max_text_bytes = 256u << 10;
constexpr std::size_t max_merges = 49152 - 256 - 2;  // CLIP takes this many, however many the file lists
constexpr std::int32_t max_vocab = 1 << 20;
constexpr std::size_t max_json_depth = 32;
constexpr std::int32_t no_id = -1;
constexpr CodePoint replacement_character = 0xFFFD;
constexpr std::string_view bos_name = "<|startoftext|>";
constexpr std::string_view eos_name = "<|endoftext|>";
constexpr std::string_view end_of_word = "</w>";

// A piece of an untrusted file, fit for a message.
std::string printable(std::string_view text, std::size_t limit) {
  return nn::printable(text.substr(0, limit)) + (text.size() > limit ? "..." : "");
}

std::string in_quotes(std::string_view symbol) { return "'" + printable(symbol, 48) + "'"; }

// Parses a JSON object; a key given twice or a nesting deeper than any tokenizer file has is an error.
json read_json(const fs::path& file) {
  const std::string content = read_small_file(file, max_file_bytes, "a CLIP vocabulary");
  json parsed;
  const std::string error = linattn::parse_json(content, parsed, {.depth = max_json_depth});
  if (!error.empty()) fail_by_content(file, content, "is not valid JSON: " + printable(error, 160));
  if (!parsed.is_object()) fail(file, "is not a JSON object");
  return parsed;
}

// The member of an object, null where it is absent.
const json& member(const json& object, const char* key) {
  static const json null;
  const auto found = object.find(key);
  return found == object.end() ? null : *found;
}

// A token that is looked for before the text is cut into pieces: in the text as it stands, or normalized in the
// normalized text.
struct Added {
  std::string name;
  bool normalized = false;
};

struct Vocabulary {
  fs::path ids_file;            // names the source in messages
  fs::path merges_file;         // likewise
  std::string merge_unit;       // "line" or "merge"
  std::size_t first_merge = 0;  // number of the first merge in that unit
  Ids ids;
  std::vector<std::pair<std::string, std::string>> merges;
  std::vector<Added> added;
  std::string unk_name{eos_name};

  [[noreturn]] void fail_at(std::size_t rank, const std::string& what) const {
    fail(merges_file, merge_unit + " " + std::to_string(first_merge + rank) + " " + what);
  }
};

std::int32_t checked_id(const json& value, const std::string& symbol, const fs::path& file) {
  if (!value.is_number_unsigned() || value.get<std::uint64_t>() >= static_cast<std::uint64_t>(max_vocab))
    fail(file,
         "the id of " + in_quotes(symbol) + " is not an integer from 0 to " + std::to_string(max_vocab - 1));
  return value.get<std::int32_t>();
}

Ids read_ids(const json& object, const fs::path& file) {
  Ids ids;
  for (const auto& [symbol, value] : object.items()) ids.emplace(symbol, checked_id(value, symbol, file));
  return ids;
}

// Each id from 0 to the largest belongs to one symbol. Returns how many there are.
std::int32_t check_numbering(const Ids& ids, const fs::path& file) {
  std::vector<const std::string*> symbols(static_cast<std::size_t>(max_vocab));
  std::int32_t count = 0;
  for (const auto& [symbol, id] : ids) {
    const std::string*& other = symbols[static_cast<std::size_t>(id)];
    if (other != nullptr)
      fail(file, "gives the id " + std::to_string(id) + " to both " + in_quotes(*other) + " and " +
                     in_quotes(symbol));
    other = &symbol;
    count = std::max(count, id + 1);
  }
  const auto gap = std::find(symbols.begin(), symbols.begin() + count, nullptr) - symbols.begin();
  if (gap < count)
    fail(file, "has no token with the id " + std::to_string(gap) + ", though its ids go up to " +
                   std::to_string(count - 1));
  return count;
}

void add_token(const std::string& name, const json& id, bool normalized, const fs::path& file,
               Vocabulary& v) {
  if (name.empty()) fail(file, "an added token is empty");
  if (name.size() > AddedTokens::max_bytes)
    fail(file, "the added token " + in_quotes(name) + " has " + std::to_string(name.size()) +
                   " bytes; at most " + std::to_string(AddedTokens::max_bytes) + " are taken");
  const std::int32_t number = checked_id(id, name, file);
  if (v.ids.emplace(name, number).first->second != number) fail(file, "gives two ids to " + in_quotes(name));
  v.added.push_back({name, normalized});
}

// An entry of added_tokens or added_tokens_decoder. Spaces around a token make none of CLIP's, so whether it takes
// them away (lstrip, rstrip) is all one.
void read_added_token(const json& token, const json& id, const fs::path& file, const char* list,
                      Vocabulary& v) {
  if (!token.is_object() || !member(token, "content").is_string())
    fail(file, "an entry of " + std::string(list) + " has no content");
  const std::string name = token["content"];
  const auto flag = [&](const char* key) {
    const json& value = member(token, key);
    if (!value.is_null() && !value.is_boolean())
      fail(file, std::string(key) + " of the added token " + in_quotes(name) + " is neither true nor false");
    return value == true;
  };
  if (flag("single_word"))
    fail(file, "the added token " + in_quotes(name) + " has single_word, which is not supported");
  add_token(name, id, flag("normalized"), file, v);
}

// Those of a folder with merges.txt: in tokenizer_config.json by id, or else in added_tokens.json by name.
void read_added_tokens(const fs::path& folder, Vocabulary& v) {
  if (const fs::path file = folder / "tokenizer_config.json"; fs::exists(file)) {
    const json config = read_json(file);
    const json& tokens = member(config, "added_tokens_decoder");
    if (!tokens.is_null() && !tokens.is_object()) fail(file, "added_tokens_decoder is not an object");
    for (const auto& [number, token] : tokens.items()) {
      std::uint32_t id = 0;
      const char* const end = number.data() + number.size();
      if (const auto [stop, error] = std::from_chars(number.data(), end, id);
          error != std::errc{} || stop != end)
        fail(file, "added_tokens_decoder has the key " + in_quotes(number) + ", which is not an id");
      read_added_token(token, id, file, "added_tokens_decoder", v);
    }
    if (!tokens.is_null()) return;
  }
  if (const fs::path file = folder / "added_tokens.json"; fs::exists(file)) {
    const json tokens = read_json(file);
    for (const auto& [name, id] : tokens.items()) add_token(name, id, true, file, v);
  }
}

std::pair<std::string, std::string> split_merge(std::string_view line, std::size_t rank,
                                                const Vocabulary& v) {
  const std::size_t space = line.find(' ');
  if (space == std::string_view::npos || space == 0 || space + 1 == line.size() ||
      line.find(' ', space + 1) != std::string_view::npos)
    v.fail_at(rank, "is not two symbols with a space between them: " + in_quotes(line));
  return {std::string(line.substr(0, space)), std::string(line.substr(space + 1))};
}

void read_tokenizer_json(const fs::path& file, Vocabulary& v) {
  v.ids_file = v.merges_file = file;
  v.merge_unit = "merge";
  const json root = read_json(file);
  const json& model = member(root, "model");
  const json& vocab = model.is_object() ? member(model, "vocab") : model;
  if (!vocab.is_object()) fail(file, "has no object model.vocab");
  const json& type = member(model, "type");  // absent in files of tokenizers < 0.9
  if (!type.is_null() && type != "BPE") fail(file, "model.type is not BPE, so this is no CLIP tokenizer");
  if (member(model, "end_of_word_suffix") != end_of_word)
    fail(file, "model.end_of_word_suffix is not '</w>', so this is no CLIP tokenizer");
  const json& prefix = member(model, "continuing_subword_prefix");
  if (!prefix.is_null() && prefix != "")
    fail(file, "model.continuing_subword_prefix is not empty, so this is no CLIP tokenizer");
  v.ids = read_ids(vocab, file);

  const json& added = member(root, "added_tokens");
  if (!added.is_null() && !added.is_array()) fail(file, "added_tokens is not an array");
  for (const json& token : added) read_added_token(token, member(token, "id"), file, "added_tokens", v);

  const json& merges = member(model, "merges");
  if (!merges.is_array()) fail(file, "has no array model.merges");
  for (const json& merge : merges) {
    const std::size_t rank = v.merges.size();
    if (merge.is_string())
      v.merges.push_back(split_merge(merge.get_ref<const std::string&>(), rank, v));
    else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string())
      v.merges.emplace_back(merge[0], merge[1]);
    else
      v.fail_at(rank, "is neither \"a b\" nor [\"a\", \"b\"]");
  }
  const json& unk = member(model, "unk_token");
  if (!unk.is_null() && (!unk.is_string() || unk == ""))
    fail(file, "model.unk_token is not the name of a token");
  if (unk.is_string()) v.unk_name = unk;
}

// GPT-2's printable stand-ins for the 256 bytes, in the order of their ids: the bytes that print in Latin-1
// stand for themselves, the other 68 follow as U+0100, U+0101, ...
struct ByteSymbols {
  std::array<std::string, 256> text;    // by byte
  std::array<unsigned char, 256> byte;  // by id

  ByteSymbols() {
    std::size_t count = 0;
    const auto add = [&](int b, CodePoint c) {
      utf8proc_uint8_t utf8[4];
      const auto n = utf8proc_encode_char(c, utf8);
      text[static_cast<std::size_t>(b)].assign(utf8, utf8 + n);
      byte[count++] = static_cast<unsigned char>(b);
    };
    const auto prints = [](int b) { return (b >= 33 && b <= 126) || (b >= 161 && b != 173); };
    for (int b = 0; b < 256; ++b)
      if (prints(b)) add(b, b);
    CodePoint next = 256;
    for (int b = 0; b < 256; ++b)
      if (!prints(b)) add(b, next++);
  }
};

// CLIP's own numbering, for a list of merges without vocab.json.
void number_by_rule(const ByteSymbols& bytes, Vocabulary& v) {
  v.ids_file = v.merges_file;
  std::int32_t next = 0;
  for (const unsigned char b : bytes.byte) v.ids.emplace(bytes.text[b], next++);
  for (const unsigned char b : bytes.byte) v.ids.emplace(bytes.text[b] + std::string(end_of_word), next++);
  for (std::size_t rank = 0; rank < v.merges.size(); ++rank) {
    const auto& [left, right] = v.merges[rank];
    for (const std::string& symbol : {left, right})
      if (!v.ids.contains(symbol))
        v.fail_at(rank, "names the symbol " + in_quotes(symbol) + ", which no earlier merge makes");
    if (!v.ids.emplace(left + right, next++).second)
      v.fail_at(rank, "makes the symbol " + in_quotes(left + right) + ", which exists already");
  }
  v.ids.emplace(bos_name, next++);
  v.ids.emplace(eos_name, next++);
}

void read_merges_txt(const fs::path& file, const ByteSymbols& bytes, Vocabulary& v) {
  v.merges_file = file;
  v.merge_unit = "line";
  v.first_merge = 2;
  const std::string content =
      without_byte_order_mark(read_small_file(file, max_file_bytes, "a CLIP vocabulary"));
  std::string_view rest = content;
  while (!rest.empty() && (rest.back() == '\n' || rest.back() == '\r')) rest.remove_suffix(1);
  const auto next_line = [&rest] {
    const std::size_t end = std::min(rest.find('\n'), rest.size());
    std::string_view line = rest.substr(0, end);
    rest.remove_prefix(std::min(end + 1, rest.size()));
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
    return line;
  };
  if (next_line().find("#version") == std::string_view::npos)
    fail_by_content(file, content,
                    "the first line is not a '#version' line, so this is not a list of BPE merges");
  while (!rest.empty() && v.merges.size() < max_merges) {
    const std::string_view line = next_line();
    if (const std::string why = text_error(line); !why.empty())
      v.fail_at(v.merges.size(), "is not text in UTF-8: " + why);
    v.merges.push_back(split_merge(line, v.merges.size(), v));
  }
  if (v.ids_file.empty()) number_by_rule(bytes, v);
}

// The token that a folder's configuration names by `key` ("pad_token"): a string, or an object with
// `content`.
std::optional<std::string> configured_token(const fs::path& folder, const char* key) {
  for (const char* name : {"tokenizer_config.json", "special_tokens_map.json"}) {
    const fs::path file = folder / name;
    if (!fs::exists(file)) continue;
    const json config = read_json(file);
    const json& value = member(config, key);
    const json& token = value.is_object() ? member(value, "content") : value;
    if (token.is_string() && token != "") return token.get<std::string>();
    if (!value.is_null()) fail(file, std::string(key) + " is not the name of a token");
  }
  return std::nullopt;
}

std::uint64_t pair_key(std::int32_t left, std::int32_t right) {
  return std::uint64_t{static_cast<std::uint32_t>(left)} << 32 | static_cast<std::uint32_t>(right);
}

enum class Class { space, letter, number, other };

Class class_of(CodePoint c) {
  switch (utf8proc_category(c)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
      return Class::letter;
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_NO:
      return Class::number;
    case UTF8PROC_CATEGORY_ZS:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
      return Class::space;
    default:  // White_Space holds six control characters besides the separators
      return (c >= 9 && c <= 13) || c == 0x85 ? Class::space : Class::other;
  }
}

void append_utf8(CodePoint c, std::string& out) {
  utf8proc_uint8_t utf8[4];
  out.append(utf8, utf8 + utf8proc_encode_char(c, utf8));
}

// NFC, a space for each run of white space, lower case by the full mapping of single characters (no final sigma):
// what the normalizers of CLIPTokenizerFast give.
std::string normalize(std::string_view text) {
  constexpr auto nfc = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
  std::vector<CodePoint> points;
  points.reserve(text.size());
  for (std::size_t i = 0; i < text.size();) {
    CodePoint c = 0;
    const auto read = utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()) + i,
                                       static_cast<utf8proc_ssize_t>(text.size() - i), &c);
    i += read > 0 ? static_cast<std::size_t>(read) : 1;
    std::array<CodePoint, 32> parts;  // a canonical decomposition has at most 4
    int boundary = 0;
    const auto count = utf8proc_decompose_char(read > 0 ? c : replacement_character, parts.data(),
                                               static_cast<utf8proc_ssize_t>(parts.size()), nfc, &boundary);
    points.insert(points.end(), parts.begin(), parts.begin() + count);
  }
  // Marks in canonical order. utf8proc_decompose would do it by exchanging neighbours, in quadratic time.
  const auto combining_class = [](CodePoint c) { return utf8proc_get_property(c)->combining_class; };
  const auto is_starter = [&](CodePoint c) { return combining_class(c) == 0; };
  for (auto run = points.begin(); run != points.end();) {
    run = std::find_if_not(run, points.end(), is_starter);
    const auto end = std::find_if(run, points.end(), is_starter);
    std::stable_sort(run, end,
                     [&](CodePoint a, CodePoint b) { return combining_class(a) < combining_class(b); });
    run = end;
  }
  points.resize(static_cast<std::size_t>(
      utf8proc_normalize_utf32(points.data(), static_cast<utf8proc_ssize_t>(points.size()), nfc)));

  std::string lower;
  lower.reserve(text.size());
  for (const CodePoint c : points) {
    if (class_of(c) == Class::space) {
      if (!lower.ends_with(' ')) lower += ' ';
    } else if (c == 0x130) {  // the one letter whose lower case is two code points: i and a dot above
      lower += "i\xcc\x87";
    } else {
      append_utf8(utf8proc_tolower(c), lower);
    }
  }
  return lower;
}

// The first character of well-formed text, and its bytes.
std::pair<Class, std::size_t> first_class(std::string_view text) {
  CodePoint c = 0;
  const auto size = utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                                     static_cast<utf8proc_ssize_t>(text.size()), &c);
  return {class_of(c), static_cast<std::size_t>(size)};
}

// The bytes of the piece that normalized text, which begins with no space, begins with.
std::size_t piece_size(std::string_view text) {
  for (const std::string_view contraction : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"})
    if (text.starts_with(contraction)) return contraction.size();
  auto [kind, size] = first_class(text);
  if (kind == Class::number) return size;
  while (size < text.size()) {
    const auto [next, bytes] = first_class(text.substr(size));
    if (next != kind) break;
    size += bytes;
  }
  return size;
}

// Those looked for in the text as it stands, and those in the normalized text. What is said first of a name counts.
std::pair<AddedTokens, AddedTokens> added_tokens(const Vocabulary& v) {
  std::vector<std::pair<std::string, std::int32_t>> as_written, normalized;
  std::unordered_set<std::string_view> names;
  Ids by_text;
  for (const Added& token : v.added) {
    if (!names.insert(token.name).second) continue;
    const std::int32_t id = v.ids.at(token.name);
    const std::string text = token.normalized ? normalize(token.name) : token.name;
    if (token.normalized && by_text.emplace(text, id).first->second != id)
      fail(v.ids_file, "has two added tokens that are " + in_quotes(text) + " in normalized text");
    (token.normalized ? normalized : as_written).emplace_back(text, id);
  }
  return {AddedTokens(std::move(as_written)), AddedTokens(std::move(normalized))};
}

}  // namespace

ClipTokenizer ClipTokenizer::load(const fs::path& folder_or_file) {
  static const ByteSymbols bytes;
  const bool folder = fs::is_directory(folder_or_file);
  Vocabulary v;
  if (folder && fs::exists(folder_or_file / "merges.txt")) {
    if (const fs::path file = folder_or_file / "vocab.json"; fs::exists(file)) {
      v.ids_file = file;
      v.ids = read_ids(read_json(file), file);
    }
    read_merges_txt(folder_or_file / "merges.txt", bytes, v);
    read_added_tokens(folder_or_file, v);
  } else if (folder && fs::exists(folder_or_file / "tokenizer.json")) {
    read_tokenizer_json(folder_or_file / "tokenizer.json", v);
  } else if (folder) {
    fail(folder_or_file, "holds no CLIP tokenizer: neither merges.txt nor tokenizer.json is there");
  } else if (folder_or_file.extension() == ".json") {
    read_tokenizer_json(folder_or_file, v);
  } else {
    read_merges_txt(folder_or_file, bytes, v);
  }

  ClipTokenizer out;
  const auto find = [&v](const std::string& symbol) {
    const auto found = v.ids.find(symbol);
    return found == v.ids.end() ? no_id : found->second;
  };
  const auto required = [&](const std::string& symbol, const char* role) {
    const std::int32_t id = find(symbol);
    if (id == no_id) fail(v.ids_file, "lacks the " + std::string(role) + " token " + in_quotes(symbol));
    return id;
  };
  std::vector<Added> others{};  // what the files name without saying how it is looked for
  out.bos_ = required(std::string(bos_name), "first");
  out.eos_ = required(std::string(eos_name), "last");
  out.vocab_size_ = check_numbering(v.ids, v.ids_file);
  if (folder) {
    if (const auto unk = configured_token(folder_or_file, "unk_token")) v.unk_name = *unk;
    if (const auto pad = configured_token(folder_or_file, "pad_token")) {
      out.pad_ = required(*pad, "padding");
      others.push_back({*pad});
    }
  }
  out.unk_ = required(v.unk_name, "unknown");
  others.push_back({v.unk_name});
  for (const std::string_view name : {bos_name, eos_name}) v.added.push_back({std::string(name), true});
  v.added.insert(v.added.end(), others.begin(), others.end());
  std::tie(out.as_written_, out.normalized_) = added_tokens(v);
  for (std::size_t b = 0; b < 256; ++b) {
    out.inner_[b] = find(bytes.text[b]);
    out.last_[b] = find(bytes.text[b] + std::string(end_of_word));
  }

  for (std::size_t rank = 0; rank < v.merges.size(); ++rank) {
    const auto& [left, right] = v.merges[rank];
    for (const std::string& symbol : {left, right, left + right})
      if (find(symbol) == no_id)
        v.fail_at(rank, "needs the symbol " + in_quotes(symbol) + ", which is not in the vocabulary");
    const Merge merge{static_cast<std::uint32_t>(rank), find(left + right)};
    if (!out.merges_.emplace(pair_key(find(left), find(right)), merge).second)
      v.fail_at(rank, "repeats an earlier merge of " + in_quotes(left) + " and " + in_quotes(right));
  }
  return out;
}

const ClipTokenizer::Merge* ClipTokenizer::find_merge(std::int32_t left, std::int32_t right) const {
  const auto found = merges_.find(pair_key(left, right));
  return found == merges_.end() ? nullptr : &found->second;
}

// Merges the pair of lowest rank, the leftmost of equals, until no pair has a rank. A heap holds the
// candidate pairs by rank and position; entries whose pair has changed since are known by their rank and
// skipped.
void ClipTokenizer::append_bpe(std::string_view piece, std::vector<std::int32_t>& ids) const {
  struct Symbol {
    std::int32_t id;  // no_id: absent from the vocabulary, or merged into its left neighbour
    std::size_t previous, next;
    bool merged = false;
  };
  const std::size_t n = piece.size();
  std::vector<Symbol> symbols(n);
  for (std::size_t i = 0; i < n; ++i) {
    const auto byte = static_cast<unsigned char>(piece[i]);
    symbols[i] = {i + 1 < n ? inner_[byte] : last_[byte], i - 1,
                  i + 1};  // i - 1 of the first is never a position
  }

  using Candidate = std::pair<std::uint32_t, std::size_t>;  // rank, position of the left symbol
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> candidates;
  const auto merge_at = [&](std::size_t left) -> const Merge* {
    if (left >= n || symbols[left].next >= n) return nullptr;
    return find_merge(symbols[left].id, symbols[symbols[left].next].id);
  };
  const auto propose = [&](std::size_t left) {
    if (const Merge* merge = merge_at(left)) candidates.emplace(merge->rank, left);
  };
  for (std::size_t i = 0; i < n; ++i) propose(i);
  while (!candidates.empty()) {
    const auto [rank, left] = candidates.top();
    candidates.pop();
    const Merge* merge = merge_at(left);
    if (merge == nullptr || merge->rank != rank) continue;
    Symbol& kept = symbols[left];
    Symbol& gone = symbols[kept.next];
    kept.id = merge->result;
    kept.next = gone.next;
    gone.id = no_id;
    gone.merged = true;
    if (kept.next < n) symbols[kept.next].previous = left;
    propose(kept.previous);
    propose(left);
  }
  for (const Symbol& symbol : symbols)
    if (!symbol.merged) ids.push_back(symbol.id == no_id ? unk_ : symbol.id);
}

std::vector<std::int32_t> ClipTokenizer::encode(std::string_view text) const {
  check_length(text, max_text_bytes);
  std::vector<std::int32_t> ids;
  const auto append = [&ids](std::int32_t id) { ids.push_back(id); };
  as_written_.split(
      text,
      [&](std::string_view section) {
        normalized_.split(
            normalize(section), [&](std::string_view part) { append_pieces(part, ids); }, append);
      },
      append);
  return ids;
}

void ClipTokenizer::append_pieces(std::string_view text, std::vector<std::int32_t>& ids) const {
  while (!text.empty()) {
    const bool space = text.front() == ' ';
    const std::size_t size = space ? 1 : piece_size(text);
    if (!space) append_bpe(text.substr(0, size), ids);
    text.remove_prefix(size);
  }
}

std::vector<std::int32_t> ClipTokenizer::encode_padded(std::string_view text, int length,
                                                       std::optional<std::int32_t> pad) const {
  if (length < 2) throw std::runtime_error("a CLIP token sequence has at least 2 places");
  const auto size = static_cast<std::size_t>(length);
  std::vector<std::int32_t> ids = encode(text);
  ids.resize(std::min(ids.size(), size - 2));
  ids.insert(ids.begin(), bos_);
  ids.push_back(eos_);
  ids.resize(size, pad.value_or(pad_.value_or(eos_)));
  return ids;
}

}  // namespace sd35

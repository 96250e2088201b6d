// The tokenizers against the ids that transformers gives (tests/data/tokenizers, made by
// tests/reference/small_tokenizers.py), and against damaged files.
#include <doctest/doctest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "reference/clip_tokenizer.hpp"
#include "sd35/clip_tokenizer.hpp"
#include "sd35/t5_tokenizer.hpp"

namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using sd35::ClipTokenizer;
using sd35::T5Tokenizer;
using Ids = std::vector<std::int32_t>;

#ifdef LINATTN_TEST_DATA
const fs::path data = fs::path(LINATTN_TEST_DATA) / "tokenizers";
#else
const fs::path data = fs::path(__FILE__).parent_path().parent_path() / "data" / "tokenizers";
#endif

std::string read(const fs::path& file) {
  std::ifstream stream(file, std::ios::binary);
  REQUIRE_MESSAGE(stream, file);
  return {std::istreambuf_iterator<char>(stream), {}};
}

json read_json(const fs::path& file) { return json::parse(read(file)); }

// A folder of its own, removed with what is in it.
class Folder {
 public:
  Folder() {
    static int count = 0;
    path_ = fs::temp_directory_path() /
            ("linattn-tokenizers-" + std::to_string(getpid()) + "-" + std::to_string(count++));
    fs::create_directories(path_);
  }
  ~Folder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  fs::path write(const char* name, std::string_view content) const {
    std::ofstream(path_ / name, std::ios::binary) << content;
    return path_ / name;
  }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

// What load says of a bad file; empty where it takes it.
template <class Tokenizer>
std::string refusal(const fs::path& path) {
  try {
    Tokenizer::load(path);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return {};
}

// CLIP's ids of a short list of merges: 0 to 255 byte symbols, 256 to 511 with </w>, then the merges.
std::int32_t letter(char c) { return c - '!'; }
std::int32_t last_letter(char c) { return 256 + letter(c); }

// A tokenizer.json of tests/data's CLIP with further added tokens, numbered upwards.
struct AddedName {
  std::string text;
  bool normalized;
};
json with_added(const std::vector<AddedName>& names) {
  json model{{"type", "BPE"}, {"end_of_word_suffix", "</w>"}, {"unk_token", "<|endoftext|>"}};
  model["vocab"] = read_json(data / "clip" / "vocab.json");
  std::ifstream merges(data / "clip" / "merges.txt");
  std::string line;
  std::getline(merges, line);
  for (model["merges"] = json::array(); std::getline(merges, line);) model["merges"].push_back(line);
  json added = json::array();
  for (std::size_t id = model["vocab"].size(); const AddedName& name : names)
    added.push_back({{"id", id++}, {"content", name.text}, {"normalized", name.normalized}});
  return {{"model", model}, {"added_tokens", added}};
}

reference::ClipTokenizer reference_of(const json& file) {
  reference::ClipTokenizer out;
  file.at("model").at("vocab").get_to(out.ids);
  for (const auto& merge : file.at("model").at("merges").get<std::vector<std::string>>())
    out.ranks.emplace(std::pair(merge.substr(0, merge.find(' ')), merge.substr(merge.find(' ') + 1)),
                      out.ranks.size());
  for (const json& token : file.at("added_tokens")) {
    const std::string text = token.at("content");
    const bool normalized = token.at("normalized");
    out.added.push_back(
        {normalized ? reference::ClipTokenizer::normalize(text) : text, token.at("id"), normalized});
  }
  for (const char* name : {"<|startoftext|>", "<|endoftext|>"})
    out.added.push_back({name, out.ids.at(name), true});
  out.unknown = out.ids.at("<|endoftext|>");
  return out;
}

// The least processor time of two tries, in seconds.
template <class Tokenizer>
double cost(const Tokenizer& tokenizer, const std::string& text) {
  double least = 1e9;
  for (int i = 0; i < 2; ++i) {
    const std::clock_t begin = std::clock();
    CHECK(!tokenizer.encode(text).empty());
    least = std::min(least, static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC);
  }
  return least;
}

// 64 KB of a unit cost at most twice four times what 16 KB do (the square would be 16 times), and a second.
template <class Tokenizer>
void check_linear(const Tokenizer& tokenizer, const std::string& unit) {
  std::string text;
  const auto grow = [&](std::size_t size) {
    while (text.size() + unit.size() <= size) text += unit;
  };
  grow(16u << 10);
  const double quarter = cost(tokenizer, text);
  grow(64u << 10);
  const double whole = cost(tokenizer, text);
  CAPTURE(unit);
  CHECK(whole <= 8 * std::max(quarter, 1e-3));
  CHECK(whole < 1);
}

}  // namespace

TEST_CASE("tokenizers give the ids of transformers") {
  const json expected = read_json(data / "expected.json");
  const auto clip = ClipTokenizer::load(data / "clip");
  const auto clip_ascii = ClipTokenizer::load(data / "clip_ascii");
  const auto t5 = T5Tokenizer::load(data / "t5");
  const auto check = [](const auto& tokenizer, const json& one, const std::string& name) {
    const auto text = one.at("text").get<std::string>();
    CAPTURE(name);
    CAPTURE(text);
    CHECK(tokenizer.encode(text) == one.at(name).get<Ids>());
    CHECK(tokenizer.encode_padded(text, 12) == one.at(name + "_12").get<Ids>());
  };
  CHECK(expected.at("cases").size() >= 50);
  for (const json& one : expected.at("cases")) {
    check(clip, one, "clip");
    check(clip_ascii, one, "clip_ascii");
    check(t5, one, "t5");
  }

  const json& truncated = expected.at("truncated");
  const auto text = truncated.at("text").get<std::string>();
  CHECK(clip.encode_padded(text) == truncated.at("clip").get<Ids>());
  CHECK(clip_ascii.encode_padded(text) == truncated.at("clip_ascii").get<Ids>());
  CHECK(t5.encode_padded(text) == truncated.at("t5").get<Ids>());

  const json& one_word = expected.at("one_word");
  std::string word;
  for (int i = 0; i < one_word.at("times").get<int>(); ++i) word += one_word.at("unit").get<std::string>();
  const Ids ids = clip.encode(word);
  CHECK(ids.size() == one_word.at("count").get<std::size_t>());
  CHECK(std::accumulate(ids.begin(), ids.end(), std::int64_t{0}) == one_word.at("sum").get<std::int64_t>());
}

TEST_CASE("CLIP vocabularies read the same in every form") {
  const auto cases = read_json(data / "expected.json").at("cases");
  const auto folder = ClipTokenizer::load(data / "clip");
  const auto ascii = ClipTokenizer::load(data / "clip_ascii");
  CHECK(folder.bos_id() == 672);
  CHECK(folder.eos_id() == 673);
  CHECK(folder.pad_id() == 673);
  CHECK(folder.vocab_size() == 674);
  CHECK(ascii.pad_id() == 0);

  const Folder temporary;
  std::string crlf;
  for (const char c : read(data / "clip" / "merges.txt")) crlf += c == '\n' ? "\r\n" : std::string(1, c);
  json strings = read_json(data / "clip_ascii" / "tokenizer.json");
  for (json& merge : strings["model"]["merges"])
    merge = merge[0].get<std::string>() + " " + merge[1].get<std::string>();

  const auto alone = ClipTokenizer::load(data / "clip" / "merges.txt");
  const auto windows = ClipTokenizer::load(temporary.write("merges.txt", crlf));
  const auto fast = ClipTokenizer::load(temporary.write("tokenizer.json", strings.dump()));
  CHECK(alone.pad_id() == std::nullopt);
  CHECK(alone.eos_id() == 673);
  for (const json& one : cases) {
    const auto text = one.at("text").get<std::string>();
    CAPTURE(text);
    CHECK(alone.encode(text) == folder.encode(text));
    CHECK(windows.encode(text) == folder.encode(text));
    CHECK(fast.encode(text) == ascii.encode(text));
  }

  SUBCASE("the folder prefers merges.txt") {
    CHECK(ClipTokenizer::load(temporary.path()).encode("a photo") == folder.encode("a photo"));
  }
  SUBCASE("padding: the caller's, the folder's, EOS") {
    CHECK(folder.encode_padded("", 4, 0) == Ids{672, 673, 0, 0});
    CHECK(folder.encode_padded("", 4) == Ids{672, 673, 673, 673});
    CHECK(alone.encode_padded("", 4) == Ids{672, 673, 673, 673});
    CHECK(ascii.encode_padded("", 4) == Ids{ascii.bos_id(), ascii.eos_id(), 0, 0});
    CHECK(folder.encode_padded("a photo", 2) == Ids{672, 673});
    CHECK(folder.encode_padded("a photo").size() == 77);
    CHECK_THROWS_AS(folder.encode_padded("a", 1), std::runtime_error);
  }
  SUBCASE("only CLIP's 48,894 merges count") {
    // Every pair of printable letters, then those pairs with a third letter, until there are enough.
    std::vector<std::string> left;
    for (char c = '!'; c <= '~'; ++c) left.emplace_back(1, c);
    const std::size_t letters = left.size();
    std::string many = "#version: 0.2\n";
    int merges = 0;
    for (std::size_t i = 0; merges < 48894; ++i)
      for (std::size_t j = 0; j < letters && merges < 48894; ++j, ++merges) {
        many += left[i] + " " + left[j] + "\n";
        if (i < letters) left.push_back(left[i] + left[j]);
      }
    many += "this line is no merge\n";
    const auto full = ClipTokenizer::load(temporary.write("many.txt", many));
    CHECK(full.bos_id() == 49406);
    CHECK(full.eos_id() == 49407);
    CHECK(full.vocab_size() == 49408);
  }
}

TEST_CASE("CLIP merges the lowest rank first, the leftmost of equals") {
  const Folder temporary;
  const auto clip =
      ClipTokenizer::load(temporary.write("m.txt", "#version: 0.2\na a\nb c\na b\naa a\nbc d</w>\n"));
  const std::int32_t aa = 512, bc = 513, ab = 514, aaa = 515, bcd_last = 516;
  CHECK(clip.encode("aax") == Ids{aa, last_letter('x')});
  CHECK(clip.encode("aaax") == Ids{aaa, last_letter('x')});
  CHECK(clip.encode("aaaax") == Ids{aa, aa, last_letter('x')});
  CHECK(clip.encode("aaaaax") == Ids{aa, aaa, last_letter('x')});
  CHECK(clip.encode("abx") == Ids{ab, last_letter('x')});
  CHECK(clip.encode("abcx") == Ids{letter('a'), bc, last_letter('x')});
  CHECK(clip.encode("abcd") == Ids{letter('a'), bcd_last});
  CHECK(clip.encode("bcde") == Ids{bc, letter('d'), last_letter('e')});
  CHECK(clip.encode("a") == Ids{last_letter('a')});
  CHECK(clip.encode("a a") == Ids{last_letter('a'), last_letter('a')});
}

TEST_CASE("prompts of any bytes are taken, up to a length") {
  const auto clip = ClipTokenizer::load(data / "clip");
  const auto t5 = T5Tokenizer::load(data / "t5");
  using namespace std::string_view_literals;
  const std::string_view replacement = "\xef\xbf\xbd";
  for (const auto& [bad, count] : {std::pair{"\xff"sv, 1},
                                   {"\xc3"sv, 1},
                                   {"\xe2\x82"sv, 2},
                                   {"\xed\xa0\x80"sv, 3},
                                   {"\xc0\xaf"sv, 2},
                                   {"\xf5\x80\x80\x80"sv, 4}}) {
    std::string repaired = "cat ";
    for (int i = 0; i < count; ++i) repaired += replacement;
    CAPTURE(repaired);
    CHECK(clip.encode("cat " + std::string(bad)) == clip.encode(repaired));
    CHECK(t5.encode("cat " + std::string(bad)) == t5.encode("cat \xe2\x98\x83"));  // unknown like U+2603
  }
  CHECK(clip.encode("a\0b"sv).size() > clip.encode("ab"sv).size());

  const std::string most(256u << 10, 'a');
  CHECK(clip.encode(most).size() > 1000);
  CHECK_THROWS_WITH_AS(clip.encode(most + "a"), "the prompt has 262145 bytes; at most 262144 are taken",
                       std::runtime_error);
  const std::string most_of_t5(64u << 10, 'a');
  CHECK(t5.encode_padded(most_of_t5).size() == 256);
  CHECK_THROWS_WITH_AS(t5.encode(most_of_t5 + "a"), "the prompt has 65537 bytes; at most 65536 are taken",
                       std::runtime_error);
}

TEST_CASE("CLIP gives the ids of its definition") {
  const Folder folder;
  const json file = with_added({{"<a>", false},
                                {"<a><b>", false},
                                {"<a><b>c", true},
                                {"taca", true},
                                {"É t", true},
                                {"e\u0301 ", false},
                                {"<Cat>", true},
                                {"<|start", true},
                                {"a<|end", false}});
  const auto clip = ClipTokenizer::load(folder.write("tokenizer.json", file.dump()));
  const reference::ClipTokenizer plain = reference_of(file);
  const std::vector<std::string> units = {"a",
                                          "b",
                                          "ca",
                                          "cat",
                                          "A",
                                          "É",
                                          "e\u0301",
                                          "e",
                                          "t",
                                          " ",
                                          "  ",
                                          "\t",
                                          "\u3000",
                                          "'s",
                                          "'",
                                          "'LL",
                                          "1",
                                          "²",
                                          "!",
                                          "-",
                                          "<",
                                          ">",
                                          "<a>",
                                          "<b>",
                                          "c",
                                          "<cat>",
                                          "<CAT>",
                                          "<|startoftext|>",
                                          "<|endoftext|>",
                                          "<|EndOfText|>",
                                          "<|end",
                                          "東",
                                          "🐱",
                                          "İ",
                                          "\xff",
                                          "\xc3",
                                          "\u0327",
                                          "\u0301",
                                          "the",
                                          "photo",
                                          "of"};
  std::mt19937 random(7);
  for (int i = 0; i < 300; ++i) {
    std::string text;
    for (auto left = random() % 40; left > 0; --left) text += units[random() % units.size()];
    CAPTURE(text);
    CHECK(clip.encode(text) == plain.encode(text));
  }
  // Long words of few letters, in which the merges compete.
  for (int i = 0; i < 20; ++i) {
    std::string text;
    for (int k = 0; k < 400; ++k) text += "acotfs"[random() % 6];
    CHECK(clip.encode(text) == plain.encode(text));
  }
}

TEST_CASE("the cost of a prompt grows as its length") {
  const auto clip = ClipTokenizer::load(data / "clip");
  const auto t5 = T5Tokenizer::load(data / "t5");
  for (const char* unit :
       {"a", "catsofa", "a photo of a cat ", "東", "\u0301\u0327", "<", "<|startoftext|", "!"}) {
    check_linear(clip, unit);
  }
  for (const char* unit : {"a", "catsofa", "a photo of a cat ", "☃ ", "<extra_id_", "<extra_id_7>"}) {
    check_linear(t5, unit);
  }
  // Unknown, and of three bytes once they are normalized: SentencePiece takes the square of their number.
  CHECK(cost(t5, std::string(64u << 10, '\xff')) < 1);

  std::vector<AddedName> names;
  for (int i = 0; i < 60000; ++i) names.push_back({"<token-" + std::to_string(i) + ">", i % 2 == 0});
  for (std::size_t i = 1; i <= 300; ++i) names.push_back({"<" + std::string(i, 'x'), true});
  const Folder folder;
  const auto many = ClipTokenizer::load(folder.write("tokenizer.json", with_added(names).dump()));
  CHECK(many.encode("<token-59999>") == Ids{674 + 59999});
  CHECK(many.encode("<TOKEN-59998>") == Ids{674 + 59998});
  CHECK(many.encode("<TOKEN-59999>").size() > 1);
  for (const char* unit : {"a photo of a cat ", "<token-", "<token-123> <TOKEN-7> ", "<", "<xxxx", "x"}) {
    check_linear(many, unit);
  }
}

TEST_CASE("T5 ids") {
  const auto t5 = T5Tokenizer::load(data / "t5" / "spiece.model");
  CHECK(t5.encode("") == Ids{1});
  CHECK(t5.encode_padded("", 3) == Ids{1, 0, 0});
  CHECK(t5.encode_padded("a photo of a cat", 1) == Ids{1});
  CHECK(t5.encode_padded("a photo of a cat").size() == 256);
  CHECK_THROWS_AS(t5.encode_padded("a", 0), std::runtime_error);
  CHECK(t5.encode("<extra_id_0>") == Ids{t5.vocab_size() - 1, 1});
  CHECK(t5.encode("<extra_id_99>") == Ids{t5.vocab_size() - 100, 1});
}

TEST_CASE("bad CLIP vocabularies are refused by name") {
  const std::string special = R"("<|startoftext|>":0,"<|endoftext|>":1)";
  const std::string vocab = "{" + special + R"(,"a":2,"b":3,"ab":4})";
  const std::string merges = "#version: 0.2\na b\n";
  const auto model = [&](const std::string& vocabulary, const std::string& list,
                         const std::string& rest = "") {
    return R"({"model":{"type":"BPE","end_of_word_suffix":"</w>","vocab":)" + vocabulary + R"(,"merges":)" +
           list + rest + "}}";
  };
  struct Case {
    const char* file;                                    // the one to blame
    const char* why;                                     // part of the message
    std::string vocab_json, merges_txt, tokenizer_json;  // files written where not empty
  };
  const std::vector<Case> cases = {
      // vocab.json
      {"vocab.json", "is not valid JSON", "{", merges, ""},
      {"vocab.json", "is not valid JSON", "{\"a\xff\":1}", merges, ""},
      {"vocab.json", "is not a JSON object", "[1,2]", merges, ""},
      {"vocab.json", "nested deeper", std::string(100000, '['), merges, ""},
      {"vocab.json", "duplicate key", "{" + special + R"(,"a":2,"a":3})", merges, ""},
      {"vocab.json", "both", "{" + special + R"(,"a":2,"b":2,"ab":4})", merges, ""},
      {"vocab.json", "not an integer", "{" + special + R"(,"a":-2})", merges, ""},
      {"vocab.json", "not an integer", "{" + special + R"(,"a":2.5})", merges, ""},
      {"vocab.json", "not an integer", "{" + special + R"(,"a":"2"})", merges, ""},
      {"vocab.json", "not an integer", "{" + special + R"(,"a":1048576})", merges, ""},
      {"vocab.json", "not an integer", "{" + special + R"(,"a":99999999999999999999999})", merges, ""},
      {"vocab.json", "'<|startoftext|>'", R"({"<|endoftext|>":1,"a":2,"b":3,"ab":4})", merges, ""},
      {"vocab.json", "'<|endoftext|>'", R"({"<|startoftext|>":1,"a":2,"b":3,"ab":4})", merges, ""},
      {"vocab.json", "no token with the id 5, though its ids go up to 6",
       "{" + special + R"(,"a":2,"b":3,"ab":4,"c":6})", merges, ""},
      {"vocab.json", "no token with the id 0",
       R"({"<|startoftext|>":5,"<|endoftext|>":1,"a":2,"b":3,"ab":4})", merges, ""},
      // merges.txt
      {"merges.txt", "#version", vocab, "a b\n", ""},
      {"merges.txt", "#version", vocab, "\n", ""},
      {"merges.txt", "line 2", vocab, "#version: 0.2\nab\n", ""},
      {"merges.txt", "line 3", vocab, merges + "a b c\n", ""},
      {"merges.txt", "line 3", vocab, merges + " b\n", ""},
      {"merges.txt", "line 3", vocab, merges + "\na b\n", ""},
      {"merges.txt", "'c', which is not in the vocabulary", vocab, merges + "a c\n", ""},
      {"merges.txt", "'ba', which is not in the vocabulary", vocab, merges + "b a\n", ""},
      {"merges.txt", "repeats", vocab, merges + "a b\n", ""},
      {"merges.txt", "line 3 names the symbol 'abc'", "", merges + "abc d\n", ""},
      {"merges.txt", "exists already", "", merges + "b c\na bc\nab c\n", ""},
      {"merges.txt", "line 3 is not text in UTF-8: byte 2 is not UTF-8", "", merges + "a \xff\xfe\na c\n",
       ""},
      {"merges.txt", "line 3 is not text in UTF-8: byte 0 is not UTF-8", vocab, merges + "\xff b\n", ""},
      {"merges.txt", "line 4 is not text in UTF-8: byte 1 is NUL", vocab,
       merges + "a ab\n" + std::string("b\0 c", 4), ""},
      {"merges.txt", "bytes", "", merges + std::string(17u << 20, '\n'), ""},
      // tokenizer.json
      {"tokenizer.json", "model.vocab", "", "", "{}"},
      {"tokenizer.json", "model.vocab", "", "", R"({"model":{"vocab":[["a",0.5]]}})"},
      {"tokenizer.json", "model.type", "", "", R"({"model":{"type":"Unigram","vocab":{}}})"},
      {"tokenizer.json", "end_of_word_suffix", "", "", R"({"model":{"type":"BPE","vocab":{}}})"},
      {"tokenizer.json", "continuing_subword_prefix", "", "",
       model(vocab, "[]", R"(,"continuing_subword_prefix":"##")")},
      {"tokenizer.json", "model.merges", "", "", model(vocab, "{}")},
      {"tokenizer.json", "merge 0", "", "", model(vocab, R"([["a"]])")},
      {"tokenizer.json", "merge 1", "", "", model(vocab, R"([["a","b"],["a",1]])")},
      {"tokenizer.json", "merge 0", "", "", model(vocab, R"(["a  b"])")},
      {"tokenizer.json", "unk_token", "", "", model(vocab, R"(["a b"])", R"(,"unk_token":7)")},
      {"tokenizer.json", "'<unk>'", "", "", model(vocab, R"(["a b"])", R"(,"unk_token":"<unk>")")},
      {"tokenizer.json", "lacks", "", "", model("{}", "[]")},
      {"tokenizer.json", "added_tokens", "", "", R"({"added_tokens":7,)" + model(vocab, "[]").substr(1)},
      {"tokenizer.json", "added_tokens", "", "",
       R"({"added_tokens":[{"id":1}],)" + model(vocab, "[]").substr(1)},
      {"tokenizer.json", "two ids", "", "",
       R"({"added_tokens":[{"id":9,"content":"a"}],)" + model(vocab, "[]").substr(1)},
      {"tokenizer.json", "both", "", "",
       R"({"added_tokens":[{"id":2,"content":"<pad>"}],)" + model(vocab, "[]").substr(1)},
      {"tokenizer.json", "no token with the id 5", "", "",
       R"({"added_tokens":[{"id":6,"content":"<pad>"}],)" + model(vocab, "[]").substr(1)},
      {"tokenizer.json", "not an integer", "", "",
       R"({"added_tokens":[{"id":-1,"content":"<pad>"}],)" + model(vocab, "[]").substr(1)},
      {"tokenizer.json", "an added token is empty", "", "",
       R"({"added_tokens":[{"id":5,"content":""}],)" + model(vocab, "[]").substr(1)},
      {"tokenizer.json", "has 1025 bytes; at most 1024 are taken", "", "",
       R"({"added_tokens":[{"id":5,"content":")" + std::string(1025, 'x') + "\"}]," +
           model(vocab, "[]").substr(1)},
      {"tokenizer.json", "'<p>' has single_word", "", "",
       R"({"added_tokens":[{"id":5,"content":"<p>","single_word":true}],)" + model(vocab, "[]").substr(1)},
      {"tokenizer.json", "normalized of the added token '<p>' is neither", "", "",
       R"({"added_tokens":[{"id":5,"content":"<p>","normalized":1}],)" + model(vocab, "[]").substr(1)},
      {"tokenizer.json", "two added tokens that are '<p>'", "", "",
       R"({"added_tokens":[{"id":5,"content":"<p>","normalized":true},{"id":6,"content":"<P>","normalized":true}],)" +
           model(vocab, "[]").substr(1)},
  };
  for (const Case& one : cases) {
    const Folder folder;
    if (!one.vocab_json.empty()) folder.write("vocab.json", one.vocab_json);
    if (!one.merges_txt.empty()) folder.write("merges.txt", one.merges_txt);
    if (!one.tokenizer_json.empty()) folder.write("tokenizer.json", one.tokenizer_json);
    const std::string said = refusal<ClipTokenizer>(folder.path());
    CAPTURE(said);
    CAPTURE(one.why);
    CHECK(said.starts_with((folder.path() / one.file).string() + ": "));
    CHECK(said.find(one.why) != std::string::npos);
    CHECK(said.find('\n') == std::string::npos);
    CHECK(said.size() < 500);
  }

  SUBCASE("the configuration") {
    const Folder folder;
    folder.write("vocab.json", vocab);
    folder.write("merges.txt", merges);
    REQUIRE(refusal<ClipTokenizer>(folder.path()).empty());
    folder.write("special_tokens_map.json", R"({"pad_token":{"content":"b"}})");
    CHECK(ClipTokenizer::load(folder.path()).pad_id() == 3);
    const std::string file = folder.write("tokenizer_config.json", R"({"pad_token":"a"})").string();
    CHECK(ClipTokenizer::load(folder.path()).pad_id() == 2);
    folder.write("tokenizer_config.json", R"({"pad_token":17})");
    CHECK(refusal<ClipTokenizer>(folder.path()) == file + ": pad_token is not the name of a token");
    folder.write("tokenizer_config.json", R"({"pad_token":""})");
    CHECK(refusal<ClipTokenizer>(folder.path()) == file + ": pad_token is not the name of a token");
    folder.write("tokenizer_config.json", R"({"pad_token":"<pad>"})");
    CHECK(refusal<ClipTokenizer>(folder.path()).find("'<pad>'") != std::string::npos);
  }
  SUBCASE("added tokens beside merges.txt") {
    const Folder folder;
    folder.write("vocab.json", vocab);
    folder.write("merges.txt", merges);
    const std::string list = folder.write("added_tokens.json", R"({"<dog>":5})").string();
    CHECK(ClipTokenizer::load(folder.path()).encode("<DOG>") == Ids{5});
    folder.write("added_tokens.json", R"({"<dog>":-5})");
    CHECK(refusal<ClipTokenizer>(folder.path()).starts_with(list + ": the id of '<dog>' is not an integer"));
    folder.write("added_tokens.json", R"({"a":5})");
    CHECK(refusal<ClipTokenizer>(folder.path()) == list + ": gives two ids to 'a'");

    // tokenizer_config.json goes before it
    const std::string file =
        folder.write("tokenizer_config.json", R"({"added_tokens_decoder":{"5":{"content":"<Cow>"}}})")
            .string();
    CHECK(ClipTokenizer::load(folder.path()).encode("<Cow>") == Ids{5});
    CHECK(ClipTokenizer::load(folder.path()).encode("<cow>").size() > 1);
    folder.write("tokenizer_config.json", R"({"added_tokens_decoder":{"5x":{"content":"<Cow>"}}})");
    CHECK(refusal<ClipTokenizer>(folder.path()) ==
          file + ": added_tokens_decoder has the key '5x', which is not an id");
    folder.write("tokenizer_config.json", R"({"added_tokens_decoder":["<Cow>"]})");
    CHECK(refusal<ClipTokenizer>(folder.path()) == file + ": added_tokens_decoder is not an object");
  }
  SUBCASE("nothing to read") {
    const Folder folder;
    CHECK(refusal<ClipTokenizer>(folder.path()).find("neither merges.txt nor tokenizer.json") !=
          std::string::npos);
    CHECK(refusal<ClipTokenizer>(folder.path() / "none") ==
          (folder.path() / "none").string() + ": no such file");
    CHECK(refusal<ClipTokenizer>("/dev/null") == "/dev/null: is a device, not a regular file");
  }
}

TEST_CASE("bad T5 models are refused by name") {
  const std::string model = read(data / "t5" / "spiece.model");
  const Folder folder;
  const std::string file = (folder.path() / "spiece.model").string();
  CHECK(refusal<T5Tokenizer>(folder.path()) == file + ": no such file");
  folder.write("tokenizer.json", "{}");
  CHECK(refusal<T5Tokenizer>(folder.path()).starts_with(file + ": no such file; tokenizer.json alone"));
  CHECK(refusal<T5Tokenizer>("/dev/null") == "/dev/null: is a device, not a regular file");

  const auto renamed = [&](const std::string& piece, const std::string& name) {
    std::string out = model;
    for (std::size_t at = out.find(piece); at != std::string::npos; at = out.find(piece, at + 1))
      out.replace(at, piece.size(), name);
    REQUIRE(out != model);
    return out;
  };
  // The first unit of the normalization's trie is another one.
  const auto with_unit = [&](std::uint32_t unit) {
    constexpr std::string_view before = "user_defined\x12";
    const std::size_t spec = model.find(before);
    REQUIRE(spec != std::string::npos);
    const std::size_t trie = spec + before.size() + 2 + 4;  // size varint, trie size
    std::string out = model;
    for (std::size_t byte = 0; byte < 4; ++byte) out[trie + byte] = static_cast<char>(unit >> 8 * byte);
    return out;
  };
  // SentencePiece itself would follow a first unit that leads outside, be it marked as a value or not.
  const std::string outside = with_unit(0x7fffffff), marked = with_unit(0xffffffff);
  // A normalization of the letter a alone, by others. It has 256 units, of which the first leads to 1, and that of the letter
  // to `next`, where its value is.
  const auto normalizing = [&](std::uint32_t next, std::size_t letters) {
    std::string map("\0\4\0\0", 4);
    for (std::uint32_t i = 0; i < 256; ++i) {
      const std::uint32_t unit = i == 0           ? 1 << 10
                                 : i == (1 ^ 'a') ? (i ^ next) << 10 | 1 << 8 | 'a'
                                                  : 1u << 31;
      for (int shift = 0; shift < 32; shift += 8) map += static_cast<char>(unit >> shift);
    }
    map += std::string(letters, 'b') + '\0';
    const auto field = [](char tag, const std::string& bytes) {
      return std::string{tag, static_cast<char>(bytes.size() | 0x80), static_cast<char>(bytes.size() >> 7)} +
             bytes;
    };
    return model + field('\x1a', field('\x12', map));
  };
  folder.write("spiece.model", normalizing(0xe0, 128));
  const auto t5 = T5Tokenizer::load(folder.path());
  CHECK(t5.encode("a") == t5.encode(std::string(128, 'b')));
  // Where it leads back to 1, every further letter is a match, of which SentencePiece has room for 32.
  const std::string circle = normalizing(1, 0);
  // A piece of 1 MiB, which is deeper than the stack: 16 bytes of two fields around it.
  const std::string deep = model + "\x0a\x84\x80\x40\x0a\x80\x80\x40" + std::string(1 << 20, 'a');
  for (const std::string& content :
       {std::string(), outside, marked, deep, normalizing(0xe0, 129), circle, std::string("not a model"),
        std::string(5000, '\xff'), model.substr(0, model.size() / 2), model.substr(0, 20),
        renamed("</s>", "<#s>"), renamed("<pad>", "<dap>"), renamed("photo", std::string("ph\0to", 5))}) {
    folder.write("spiece.model", content);
    const std::string said = refusal<T5Tokenizer>(folder.path());
    CAPTURE(said);
    CHECK(said.starts_with(file + ": "));
    CHECK(said.find('\n') == std::string::npos);
  }
}

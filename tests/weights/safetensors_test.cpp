#include <doctest/doctest.h>
#include <sys/resource.h>

#include <csignal>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include <linattn/weights/safetensors.hpp>

#include "temporary_folder.hpp"

using namespace linattn;
using support::read_text;
using support::TemporaryFolder;
using support::write_text;

namespace {

// A file of this header and this many bytes of data.
std::string encode(const std::string& header, std::size_t data) {
  std::string file(sizeof(std::uint64_t), '\0');
  const std::uint64_t length = header.size();
  std::memcpy(file.data(), &length, sizeof length);
  return file + header + std::string(data, '\x01');
}

std::string with_length(std::uint64_t length, const std::string& rest) {
  std::string file(sizeof length, '\0');
  std::memcpy(file.data(), &length, sizeof length);
  return file + rest;
}

// A header of one tensor "t".
std::string one(const std::string& entry) { return "{\"t\":" + entry + "}"; }

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

struct Bad {
  std::string what;
  std::string bytes;
  const char* message;
};

// The smallest good file, which the bad ones are variations of.
const std::string good = one(R"({"dtype":"F32","shape":[2,2],"data_offsets":[0,16]})");

std::vector<Bad> bad_files() {
  const std::string pair =
      R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":)";
  std::string deep, wide;
  for (int i = 0; i < 100; ++i) deep += "[";
  for (int i = 0; i < 65; ++i) wide += i > 0 ? ",1" : "1";
  return {
      // The frame.
      {"empty file", "", "is empty: it was not written or fetched to the end"},
      {"seven bytes", std::string(7, '\0'), "shorter than a header"},
      {"no header", with_length(0, ""), "empty header"},
      {"header longer than the file", with_length(1000, good), "truncated: a header of 1000 bytes"},
      {"header over the limit", with_length(100'000'001, good), "over the limit"},
      {"length that wraps around", with_length(~std::uint64_t{0}, good), "over the limit"},
      {"length with the sign bit", with_length(std::uint64_t{1} << 63, good), "over the limit"},
      {"text file", "# Title\nplain text", "not a safetensors file"},
      // The JSON.
      {"no JSON", encode("hello wo", 0), "syntax error"},
      {"cut JSON", encode(good.substr(0, good.size() - 1), 16), "syntax error"},
      {"two documents", encode(good + good, 16), "syntax error"},
      {"text behind a NUL", encode(good + std::string(1, '\0') + "x", 16), "holds a NUL byte"},
      {"bad UTF-8 in a name", encode("{\"\xff\xfe\":{}}", 0), "syntax error"},
      {"overlong UTF-8", encode("{\"\xc0\xaf\":{}}", 0), "syntax error"},
      {"array for header", encode("[]", 0), "header is not an object"},
      {"number for header", encode("12345678", 0), "header is not an object"},
      {"deep nesting", encode(one(deep), 0), "nested deeper"},
      {"duplicate tensor", encode(good.substr(0, good.size() - 1) + "," + good.substr(1), 16),
       "duplicate key 't'"},
      {"duplicate key", encode(one(R"({"dtype":"F32","dtype":"F16","shape":[4],"data_offsets":[0,16]})"), 16),
       "duplicate key 'dtype'"},
      {"duplicate key with a line end", encode(R"({"a\nb\u007f":{},"a\nb\u007f":{}})", 0),
       "duplicate key 'a?b?'"},
      // The metadata.
      {"metadata is an array", encode(R"({"__metadata__":[]})", 0), "__metadata__ is not an object"},
      {"metadata holds a number", encode(R"({"__metadata__":{"a":1}})", 0), "'a' is not a string"},
      {"metadata holds an object", encode(R"({"__metadata__":{"a":{}}})", 0), "'a' is not a string"},
      // An entry.
      {"entry is no object", encode(one("3"), 0), "entry is not an object"},
      {"no dtype", encode(one(R"({"shape":[4],"data_offsets":[0,16]})"), 16), "no dtype"},
      {"dtype is a number", encode(one(R"({"dtype":32,"shape":[4],"data_offsets":[0,16]})"), 16),
       "dtype is not a string"},
      {"unknown dtype", encode(one(R"({"dtype":"F33","shape":[4],"data_offsets":[0,16]})"), 16),
       "unknown dtype 'F33'"},
      {"no shape", encode(one(R"({"dtype":"F32","data_offsets":[0,16]})"), 16), "no shape"},
      {"shape is a number", encode(one(R"({"dtype":"F32","shape":4,"data_offsets":[0,16]})"), 16),
       "shape is not an array"},
      {"negative extent", encode(one(R"({"dtype":"F32","shape":[-4],"data_offsets":[0,16]})"), 16),
       "holds -4"},
      {"two negative extents", encode(one(R"({"dtype":"F32","shape":[-2,-2],"data_offsets":[0,16]})"), 16),
       "holds -2"},
      {"fractional extent", encode(one(R"({"dtype":"F32","shape":[4.0],"data_offsets":[0,16]})"), 16),
       "holds 4.0"},
      {"extent is a string", encode(one(R"({"dtype":"F32","shape":["4"],"data_offsets":[0,16]})"), 16),
       "holds \"4\""},
      {"extent of 2^63",
       encode(one(R"({"dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,0]})"), 0),
       "which is no extent"},
      {"extent of 2^64",
       encode(one(R"({"dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,0]})"), 0),
       "which is no extent"},
      {"product overflows to 0",
       encode(one(R"({"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]})"), 0),
       "overflows"},
      {"product overflows to the size",
       encode(one(R"({"dtype":"U8","shape":[6148914691236517205,3,16],"data_offsets":[0,16]})"), 16),
       "overflows"},
      {"bytes overflow",
       encode(one(R"({"dtype":"F64","shape":[2305843009213693952],"data_offsets":[0,0]})"), 0), "overflows"},
      {"empty axis hides huge ones",
       encode(one(R"({"dtype":"F32","shape":[0,4611686018427387904,4],"data_offsets":[0,0]})"), 0),
       "overflows"},
      {"too many axes", encode(one(R"({"dtype":"F32","shape":[)" + wide + R"(],"data_offsets":[0,4]})"), 4),
       "more than 64 elements"},
      {"no offsets", encode(one(R"({"dtype":"F32","shape":[4]})"), 16), "no data_offsets"},
      {"one offset", encode(one(R"({"dtype":"F32","shape":[4],"data_offsets":[16]})"), 16), "not a pair"},
      {"three offsets", encode(one(R"({"dtype":"F32","shape":[4],"data_offsets":[0,8,16]})"), 16),
       "not a pair"},
      {"negative offset", encode(one(R"({"dtype":"F32","shape":[4],"data_offsets":[-16,0]})"), 16),
       "not a pair"},
      {"fractional offset", encode(one(R"({"dtype":"F32","shape":[4],"data_offsets":[0,16.0]})"), 16),
       "not a pair"},
      {"reversed offsets", encode(one(R"({"dtype":"F32","shape":[4],"data_offsets":[16,0]})"), 16),
       "reversed"},
      {"offsets beyond the data", encode(one(R"({"dtype":"F32","shape":[8],"data_offsets":[0,32]})"), 16),
       "reach beyond the 16 bytes"},
      {"offsets near 2^64",
       encode(
           one(R"({"dtype":"F32","shape":[4],"data_offsets":[18446744073709551600,18446744073709551615]})"),
           16),
       "reach beyond the 16 bytes"},
      {"truncated data", encode(good, 15), "reach beyond the 15 bytes"},
      {"shape is larger than the bytes",
       encode(one(R"({"dtype":"F32","shape":[5],"data_offsets":[0,16]})"), 16),
       "16 bytes, but F32 [5] takes 20"},
      {"shape is smaller than the bytes",
       encode(one(R"({"dtype":"F16","shape":[2,2],"data_offsets":[0,16]})"), 16),
       "16 bytes, but F16 [2, 2] takes 8"},
      {"a key too many", encode(one(R"({"dtype":"F32","shape":[4],"data_offsets":[0,16],"stride":[1]})"), 16),
       "unknown key 'stride'"},
      // Tensors together.
      {"overlap", encode(pair + "[4,12]}}", 12), "overlaps another tensor"},
      {"twice the same bytes", encode(pair + "[0,8]}}", 8), "overlaps another tensor"},
      {"gap between", encode(pair + "[12,20]}}", 20), "a gap of 4 bytes"},
      {"gap before", encode(one(R"({"dtype":"U8","shape":[4],"data_offsets":[4,8]})"), 8),
       "a gap of 4 bytes"},
      {"bytes behind", encode(good, 17), "1 bytes of data belong to no tensor"},
      {"data without tensors", encode("{}", 5), "5 bytes of data belong to no tensor"},
  };
}

}  // namespace

TEST_CASE("safetensors: a file that breaks the format is refused in one clear sentence") {
  TemporaryFolder folder;
  const auto path = folder / "bad.safetensors";
  write_text(path, encode(good, 16));
  Safetensors opened;
  REQUIRE(Safetensors::open(path, opened).ok());

  for (const Bad& bad : bad_files()) {
    CAPTURE(bad.what);
    write_text(folder / "bad2.safetensors", bad.bytes);
    const FileStatus status = Safetensors::open(folder / "bad2.safetensors", opened);
    CHECK_FALSE(status.ok());
    CHECK(status.status.code == Code::format);
    CAPTURE(message(status));
    CHECK(contains(message(status), bad.message));
    CHECK(contains(message(status), "bad2.safetensors: "));
    CHECK(message(status).find('\n') == std::string::npos);
    CHECK(opened.tensors().size() == 1);  // what was open stays open
  }
  CHECK(bad_files().size() >= 50);
}

TEST_CASE("safetensors: the system's refusals keep their error number") {
  TemporaryFolder folder;
  Safetensors opened;
  const FileStatus missing = Safetensors::open(folder / "none.safetensors", opened);
  CHECK(missing.status.code == Code::native);
  CHECK(missing.status.native == ENOENT);
  CHECK(contains(message(missing), "cannot open"));
  CHECK(contains(message(Safetensors::open(folder.path(), opened)), "holds no safetensors file"));
  CHECK(contains(message(Safetensors::open("/dev/null", opened)), "not a regular file"));
}

TEST_CASE("safetensors: any damage to a good file is noticed or harmless") {
  TemporaryFolder folder;
  const auto path = folder / "x.safetensors";
  const std::string data(64, '\x11');
  std::vector<TensorInfo> tensors{{{"a", Dtype::f32, {2, 3}}, {}, 0},
                                  {{"b.weight", Dtype::f16, {4}}, {}, 0},
                                  {{"c", Dtype::u8, {}}, {}, 0}};
  for (TensorInfo& info : tensors) info.bytes = std::as_bytes(std::span(data)).first(info.byte_size());
  REQUIRE(write_safetensors(path, tensors, {{"format", "pt"}}).ok());
  const std::string original = read_text(path);

  std::mt19937 random(7);
  int refused = 0;
  for (int round = 0; round < 3000; ++round) {
    std::string damaged = original;
    for (unsigned edit = 0; edit <= random() % 3; ++edit) {
      const std::size_t at = random() % damaged.size();
      switch (random() % 4) {
        case 0:
          damaged[at] = static_cast<char>(random());
          break;
        case 1:
          damaged[at] = "0123456789[]{}\",:-"[random() % 18];
          break;
        case 2:
          damaged.erase(at, 1 + random() % 8);
          break;
        default:
          damaged.insert(at, 1, damaged[random() % damaged.size()]);
      }
      if (damaged.empty()) break;
    }
    write_text(path, damaged);
    Safetensors opened;
    if (!Safetensors::open(path, opened).ok()) {
      ++refused;
      continue;
    }
    unsigned sum = 0;
    for (const TensorInfo& info : opened.tensors()) {
      CHECK(info.bytes.size() == info.byte_size());
      for (const std::byte byte : info.bytes) sum += static_cast<unsigned>(byte);
    }
    CHECK(sum <= 255 * original.size() * 2);
  }
  CHECK(refused > 2000);
}

TEST_CASE("safetensors: every dtype makes the round trip") {
  TemporaryFolder folder;
  const auto path = folder / "all.safetensors";
  std::string data;
  for (int i = 0; i < 6 * 8; ++i) data += static_cast<char>(37 * i + 1);
  std::vector<TensorInfo> tensors;
  for (const DtypeTraits& traits : dtype_table)
    tensors.push_back({{"tensor of " + std::string(traits.name), traits.dtype, {2, 3}},
                       std::as_bytes(std::span(data)).first(6 * traits.size),
                       0});
  REQUIRE(write_safetensors(path, tensors, {{"a", "1"}, {"\u00e9", "\"quoted\"\n"}}).ok());
  Safetensors opened;
  REQUIRE(Safetensors::open(path, opened).ok());
  CHECK(opened.metadata() == Metadata{{"a", "1"}, {"\u00e9", "\"quoted\"\n"}});
  CHECK(opened.path() == path);
  REQUIRE(opened.tensors().size() == tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const TensorInfo& found = opened.tensors()[i];  // the order of the data
    CHECK(found.name == tensors[i].name);
    CHECK(opened.find(found.name) == &found);
    CHECK(found.dtype == tensors[i].dtype);
    CHECK(found.shape == tensors[i].shape);
    CHECK(
        std::equal(found.bytes.begin(), found.bytes.end(), tensors[i].bytes.begin(), tensors[i].bytes.end()));
  }
  CHECK(opened.find("none") == nullptr);
  CHECK(opened.find("") == nullptr);
  CHECK(opened.find("\xff") == nullptr);
}

TEST_CASE("safetensors: what is known of the format byte by byte") {
  TemporaryFolder folder;
  const float values[] = {1, -2};
  const std::vector<TensorInfo> tensors{{{"t", Dtype::f32, {2}}, std::as_bytes(std::span(values)), 0}};
  REQUIRE(write_safetensors(folder / "t.safetensors", tensors).ok());
  const std::string header = R"({"t":{"data_offsets":[0,8],"dtype":"F32","shape":[2]}})"
                             "  ";
  CHECK(read_text(folder / "t.safetensors") ==
        with_length(header.size(), header + std::string("\0\0\x80\x3f\0\0\0\xc0", 8)));
  CHECK(header.size() % 8 == 0);
}

TEST_CASE("safetensors: scalars, empty tensors, no tensors, many tensors") {
  TemporaryFolder folder;
  Safetensors opened;
  REQUIRE(write_safetensors(folder / "none.safetensors", {}).ok());
  REQUIRE(Safetensors::open(folder / "none.safetensors", opened).ok());
  CHECK(opened.tensors().empty());

  const double value = 2.5;
  const std::vector<TensorInfo> odd{{{"scalar", Dtype::f64, {}}, std::as_bytes(std::span(&value, 1)), 0},
                                    {{"empty", Dtype::f32, {3, 0, 2}}, {}, 0},
                                    {{"also empty", Dtype::u8, {0}}, {}, 0}};
  REQUIRE(write_safetensors(folder / "odd.safetensors", odd).ok());
  REQUIRE(Safetensors::open(folder / "odd.safetensors", opened).ok());
  CHECK(opened.find("scalar")->elements() == 1);
  TensorView<const double, 1> scalar;
  REQUIRE(view(*opened.find("scalar"), scalar).ok());
  CHECK(scalar.extent(0) == 1);
  CHECK(scalar(0) == 2.5);
  CHECK(opened.find("empty")->elements() == 0);
  TensorView<const float, 3> empty;
  REQUIRE(view(*opened.find("empty"), empty).ok());
  CHECK(empty.empty());

  std::vector<std::int32_t> numbers(10'000);
  std::vector<TensorInfo> many;
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    numbers[i] = static_cast<std::int32_t>(i);
    many.push_back({{"block." + std::to_string(i * 7919 % numbers.size()), Dtype::i32, {1}},
                    std::as_bytes(std::span(&numbers[i], 1)),
                    0});
  }
  REQUIRE(write_safetensors(folder / "many.safetensors", many).ok());
  REQUIRE(Safetensors::open(folder / "many.safetensors", opened).ok());
  REQUIRE(opened.tensors().size() == many.size());
  for (std::size_t i = 0; i < many.size(); ++i) {
    std::int32_t number = -1;
    const TensorInfo* found = opened.find(many[i].name);
    REQUIRE(found != nullptr);
    REQUIRE(read(*found, std::span(&number, 1)).ok());
    CHECK(number == numbers[i]);
  }
}

TEST_CASE("safetensors: typed views and copies") {
  TemporaryFolder folder;
  const std::vector<float> floats{1, -2, 0.5f, 65504, 3, 4};
  const std::vector<half> halves{half(1.0f), half(-0.25f), half(0x1p-24f), half(65504.0f)};
  const std::vector<bfloat16> brains{bfloat16(3.0f), bfloat16(-0x1p100f)};
  const std::vector<std::int64_t> longs{-5, std::int64_t{1} << 53};
  const std::vector<std::uint8_t> bools{0, 1, 7};
  const std::vector<TensorInfo> tensors{
      {{"i64", Dtype::i64, {2}}, std::as_bytes(std::span(longs)), 0},
      {{"f32", Dtype::f32, {2, 3}}, std::as_bytes(std::span(floats)), 0},
      {{"f16", Dtype::f16, {4}}, std::as_bytes(std::span(halves)), 0},
      {{"bf16", Dtype::bf16, {2}}, std::as_bytes(std::span(brains)), 0},
      {{"bool", Dtype::boolean, {3}}, std::as_bytes(std::span(bools)), 0},
      {{"odd", Dtype::f32, {6}}, std::as_bytes(std::span(floats)), 0},  // behind three bytes: misaligned
      {{"f8", Dtype::f8_e4m3, {3}}, std::as_bytes(std::span(bools)), 0}};
  REQUIRE(write_safetensors(folder / "t.safetensors", tensors).ok());
  Safetensors opened;
  REQUIRE(Safetensors::open(folder / "t.safetensors", opened).ok());
  const Safetensors file = std::move(opened);  // views survive a move

  TensorView<const float, 2> matrix;
  REQUIRE(view(*file.find("f32"), matrix).ok());
  CHECK(matrix.extents == std::array<Index, 2>{2, 3});
  CHECK(matrix.strides == std::array<Index, 2>{3, 1});
  CHECK(matrix(1, 0) == 65504.0f);
  TensorView<const std::uint8_t, 1> bytes;
  REQUIRE(view(*file.find("bool"), bytes).ok());
  CHECK(bytes(2) == 7);

  TensorView<const float, 1> vector;
  TensorView<const double, 2> doubles;
  CHECK(view(*file.find("f32"), vector).status.code == Code::shape);
  CHECK(contains(message(view(*file.find("f32"), vector)),
                 "tensor 'f32': is F32 [2, 3], but 1 axes are needed"));
  CHECK(view(*file.find("f32"), doubles).status.code == Code::option);
  CHECK(view(*file.find("odd"), vector).status.code == Code::stride);
  CHECK(vector.data == nullptr);
  CHECK_FALSE(aligned<float>(*file.find("odd")));
  CHECK(aligned<float>(*file.find("f32")));

  std::vector<float> copied(6);
  REQUIRE(read(*file.find("odd"), std::span(copied)).ok());
  CHECK(copied == floats);
  std::vector<half> narrow(6);
  REQUIRE(read(*file.find("odd"), std::span(narrow)).ok());
  CHECK(static_cast<float>(narrow[3]) == 65504.0f);
  std::vector<double> wide(4);
  REQUIRE(read(*file.find("f16"), std::span(wide)).ok());
  CHECK(wide == std::vector<double>{1, -0.25, 0x1p-24, 65504});
  wide.resize(2);
  REQUIRE(read(*file.find("bf16"), std::span(wide)).ok());
  CHECK(wide == std::vector<double>{3, -0x1p100});
  REQUIRE(read(*file.find("i64"), std::span(wide)).ok());
  CHECK(wide == std::vector<double>{-5, 0x1p53});
  CHECK(read(*file.find("f16"), std::span(wide)).status.code == Code::shape);
  std::vector<std::int64_t> integers(2);
  CHECK(read(*file.find("i64"), std::span(integers)).ok());
  CHECK(integers == longs);
  CHECK(read(*file.find("bf16"), std::span(integers)).status.code == Code::option);  // no silent truncation
  CHECK(read(*file.find("f8"), std::span(copied).first(3)).status.code == Code::option);
}

TEST_CASE("safetensors: shards") {
  TemporaryFolder folder;
  const std::vector<float> values{1, 2, 3};
  const auto part = [&](const char* name, std::size_t i) {
    return TensorInfo{{name, Dtype::f32, {1}}, std::as_bytes(std::span(values)).subspan(4 * i, 4), 0};
  };
  const std::vector<TensorInfo> first{part("a", 0), part("c", 2)}, second{part("b", 1)};
  REQUIRE(write_safetensors(folder / "model-1.safetensors", first, {{"format", "pt"}}).ok());
  REQUIRE(write_safetensors(folder / "model-2.safetensors", second, {{"format", "pt"}}).ok());
  const auto index = folder / "model.safetensors.index.json";
  const auto map = [&](const std::string& entries) {
    write_text(index, R"({"metadata":{"total_size":12},"weight_map":)" + entries + "}");
  };
  map(R"({"a":"model-1.safetensors","b":"model-2.safetensors","c":"model-1.safetensors"})");

  for (const auto& path : {index, folder.path()}) {
    Safetensors opened;
    REQUIRE_MESSAGE(Safetensors::open(path, opened).ok(), message(Safetensors::open(path, opened)));
    CHECK(opened.sharded());
    CHECK(opened.path() == index);
    CHECK(opened.shards().size() == 2);
    REQUIRE(opened.tensors().size() == 3);
    for (const auto& [name, value] : {std::pair("a", 1.0f), {"b", 2.0f}, {"c", 3.0f}}) {
      TensorView<const float, 1> element;
      REQUIRE(view(*opened.find(name), element).ok());
      CHECK(element(0) == value);
    }
    CHECK(opened.file(*opened.find("b")).path() == folder / "model-2.safetensors");
    CHECK(opened.metadata().at("format") == "pt");
  }

  const std::vector<std::pair<std::string, std::string>> bad{
      {R"({"a":"model-1.safetensors","b":"model-3.safetensors","c":"model-1.safetensors"})",
       "model-3.safetensors"},
      {R"({"a":"model-1.safetensors","b":"model-1.safetensors","c":"model-1.safetensors"})", "'b'"},
      {R"({"a":"model-1.safetensors","b":"model-2.safetensors"})",
       "'c': is in model-1.safetensors, but not in"},
      {R"({"a":"model-1.safetensors","b":"model-2.safetensors","c":"model-2.safetensors"})", "'c'"},
      {R"({"a":"../model-1.safetensors"})", "not the name of a file in the same folder"},
      {R"({"a":"/etc/passwd"})", "not the name of a file in the same folder"},
      {R"({"a":"x\\model-1.safetensors"})", "not the name of a file in the same folder"},
      {R"({"a":".."})", "not the name of a file in the same folder"},
      {R"({"a":""})", "not the name of a file in the same folder"},
      {R"({"a":"model-1.safetensors\u0000x"})", "holds a NUL in a string"},
      {R"({"a":7})", "file name is not a string"},
      {R"({"a":"model-1.safetensors","a":"model-2.safetensors"})", "duplicate key"},
      {R"([])", "no weight_map"}};
  for (const auto& entry : bad) {
    CAPTURE(entry.first);
    map(entry.first);
    Safetensors opened;
    const FileStatus status = Safetensors::open(index, opened);
    CHECK_FALSE(status.ok());
    CAPTURE(message(status));
    CHECK(contains(message(status), entry.second));
    CHECK(opened.tensors().empty());
  }
  // The same tensor in two shards.
  REQUIRE(write_safetensors(folder / "model-2.safetensors", first).ok());
  map(R"({"a":"model-1.safetensors","b":"model-2.safetensors","c":"model-1.safetensors"})");
  Safetensors opened;
  CHECK(contains(message(Safetensors::open(index, opened)), "more than one shard"));
  // No index, two files: which one is meant?
  std::filesystem::remove(index);
  CHECK(contains(message(Safetensors::open(folder.path(), opened)), "holds 2 models"));
  std::filesystem::rename(folder / "model-1.safetensors", folder / "model.safetensors");
  CHECK(Safetensors::open(folder.path(), opened).ok());
  CHECK(opened.path() == folder / "model.safetensors");
}

TEST_CASE("safetensors: the writer writes what its header says, or nothing") {
  TemporaryFolder folder;
  const auto path = folder / "out.safetensors";
  write_text(path, "the old content");
  const std::vector<TensorSpec> specs{{"a", Dtype::u8, {4}}, {"b", Dtype::u8, {2, 2}}};
  const std::string data = "abcdefgh";
  const auto bytes = std::as_bytes(std::span(data));
  const auto untouched = [&] {
    CHECK(read_text(path) == "the old content");
    CHECK(folder.names() == std::vector<std::string>{"out.safetensors"});
  };

  SUBCASE("in pieces that know nothing of tensors") {
    SafetensorsWriter writer;
    REQUIRE(SafetensorsWriter::create(path, specs, {}, writer).ok());
    REQUIRE(writer.write(bytes.first(3)).ok());
    REQUIRE(writer.write(bytes.subspan(3)).ok());
    CHECK(read_text(path) == "the old content");
    CHECK(folder.names().size() == 2);
    REQUIRE(writer.finish().ok());
    Safetensors opened;
    REQUIRE(Safetensors::open(path, opened).ok());
    CHECK(static_cast<char>(opened.find("b")->bytes[0]) == 'e');
    CHECK(folder.names().size() == 1);
    CHECK_FALSE(writer.finish().ok());
  }
  SUBCASE("too much") {
    {
      SafetensorsWriter writer;
      REQUIRE(SafetensorsWriter::create(path, specs, {}, writer).ok());
      REQUIRE(writer.write(bytes).ok());
      CHECK_FALSE(writer.write(bytes.first(1)).ok());
    }
    untouched();
  }
  SUBCASE("too little") {
    {
      SafetensorsWriter writer;
      REQUIRE(SafetensorsWriter::create(path, specs, {}, writer).ok());
      REQUIRE(writer.write(bytes.first(7)).ok());
      CHECK(contains(message(writer.finish()), "1 bytes of data are missing"));
    }
    untouched();
  }
  SUBCASE("given up") {
    {
      SafetensorsWriter writer;
      REQUIRE(SafetensorsWriter::create(path, specs, {}, writer).ok());
    }
    untouched();
  }
  SUBCASE("the disk is full") {
    // A limit of the file size stands for it: the write fails half way through.
    ::rlimit before{};
    REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
    const auto handler = std::signal(SIGXFSZ, SIG_IGN);
    const std::string large(1 << 20, 'x');
    const std::vector<TensorInfo> tensors{
        {{"large", Dtype::u8, {1 << 20}}, std::as_bytes(std::span(large)), 0}};
    const ::rlimit small{.rlim_cur = 100'000, .rlim_max = before.rlim_max};
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
    const FileStatus status = write_safetensors(path, tensors);
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &before) == 0);
    std::signal(SIGXFSZ, handler);
    CHECK(status.status.code == Code::native);
    CHECK(status.status.native == EFBIG);
    CHECK(contains(message(status), "cannot write"));
    untouched();
  }
  SUBCASE("the target is a folder") {
    std::filesystem::create_directory(folder / "folder.safetensors");
    CHECK_FALSE(write_safetensors(folder / "folder.safetensors", {}).ok());
    CHECK(folder.names() == std::vector<std::string>{"folder.safetensors", "out.safetensors"});
  }
  SUBCASE("there is no such folder") {
    CHECK(write_safetensors(folder / "none/x.safetensors", {}).status.native == ENOENT);
  }
  SUBCASE("headers that no reader would take") {
    SafetensorsWriter writer;
    const auto refused = [&](std::vector<TensorSpec> wrong, Metadata metadata = {}) {
      return !SafetensorsWriter::create(path, wrong, metadata, writer).ok();
    };
    CHECK(refused({specs[0], specs[0]}));
    CHECK(refused({{"__metadata__", Dtype::u8, {1}}}));
    CHECK(refused({{"a", Dtype::u8, {-1}}}));
    CHECK(refused({{"a", Dtype::f64, {Index{1} << 60, 2}}}));
    CHECK(refused({{"a", Dtype::u8, std::vector<Index>(65, 1)}}));
    CHECK(refused({{"\xff", Dtype::u8, {1}}}));
    CHECK(refused({}, {{"key", "\xc3"}}));
    CHECK(refused({{"a", Dtype::u8, {Index{1} << 62}},
                   {"b", Dtype::u8, {Index{1} << 62}},
                   {"c", Dtype::u8, {Index{1} << 62}},
                   {"d", Dtype::u8, {Index{1} << 62}}}));
    untouched();
  }
}

TEST_CASE("safetensors: align() orders tensors so that each lies on a multiple of its size") {
  TemporaryFolder folder;
  const std::string data(64, 'x');
  std::vector<TensorInfo> tensors;
  for (const DtypeTraits& traits : dtype_table)
    for (Index n : {3, 1})
      tensors.push_back({{std::string(traits.name) + std::to_string(n), traits.dtype, {n}},
                         std::as_bytes(std::span(data)).first(static_cast<std::size_t>(n) * traits.size),
                         0});
  std::shuffle(tensors.begin(), tensors.end(), std::mt19937(3));
  SafetensorsWriter::align(tensors);
  REQUIRE(write_safetensors(folder / "t.safetensors", tensors).ok());
  Safetensors opened;
  REQUIRE(Safetensors::open(folder / "t.safetensors", opened).ok());
  for (const TensorInfo& info : opened.tensors())
    CHECK(reinterpret_cast<std::uintptr_t>(info.bytes.data()) % size_of(info.dtype) == 0);
}

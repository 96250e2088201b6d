// What comes from outside: numbers and text.
#include <doctest/doctest.h>

#include <cstdint>
#include <limits>
#include <string>

#include "nn/numbers.hpp"
#include "nn/text.hpp"

using namespace nn;
using namespace std::string_literals;

TEST_CASE("a whole number is all of its text, and within its range") {
  const Range<int> range{-5, 1000};
  CHECK(parse_number("12", range) == 12);
  CHECK(parse_number("-5", range) == -5);
  CHECK(parse_number("1000", range) == 1000);
  CHECK(parse_number("0012", range) == 12);
  for (const char* text :
       {"", " 1", "1 ", "+1", "1.0", "1e2", "0x10", "1,0", "1_0", "x", "-", "--1", "-6", "1001", "٣",
        "2147483648", "4294967297", "18446744073709551617", "99999999999999999999999999"})
    CHECK_MESSAGE(!parse_number(text, range), text);
  CHECK(!parse_number("1\0"s, range));
}

TEST_CASE("every seed of 64 bits is itself, and no other text is one") {
  const Range<std::uint64_t> seeds{0, std::numeric_limits<std::uint64_t>::max()};
  CHECK(parse_number("18446744073709551615", seeds) == 18446744073709551615u);
  CHECK(parse_number("9223372036854775808", seeds) == 9223372036854775808u);
  CHECK(!parse_number("18446744073709551616", seeds));
  CHECK(!parse_number("-1", seeds));
}

TEST_CASE("a number with a fraction is finite and within its range") {
  const Range<double> range{-1, 1000};
  CHECK(parse_number("0.25", range) == 0.25);
  CHECK(parse_number("1e3", range) == 1000);
  CHECK(parse_number(".5", range) == 0.5);
  CHECK(parse_number("-1", range) == -1);
  for (const char* text : {"", "nan", "NaN", "-nan", "inf", "-inf", "infinity", "1e308", "1e309", "-1.001",
                           "1000.5", "1e-400", "0x1p3", "4,5", "4.5.1", " 1", "1 ", "+1", "1f"})
    CHECK_MESSAGE(!parse_number(text, range), text);
}

TEST_CASE("a range says what it holds") {
  CHECK(describe(Range<int>{1, 1000}) == "a whole number from 1 to 1000");
  CHECK(describe(Range<double>{0.001, 1}) == "a number from 0.001 to 1");
  CHECK(short_text(Range<std::uint64_t>{0, std::numeric_limits<std::uint64_t>::max()}) ==
        "0..18446744073709551615");
}

TEST_CASE("a number of a JSON file") {
  using nlohmann::json;
  const Range<std::int64_t> heads{1, 4096};
  CHECK(json_number(json(8), heads) == 8);
  CHECK(json_number(json(4096u), heads) == 4096);
  for (const char* text :
       {"0", "-8", "4097", "8.0", "8.5", "1e400", "18446744073709551615", "9223372036854775808",
        "99999999999999999999", "\"8\"", "true", "null", "[8]", "{}"})
    CHECK_MESSAGE(!json_number(json::parse(text, nullptr, false), heads), text);
  const Range<double> eps{1e-12, 0.1};
  CHECK(json_number(json::parse("1e-5"), eps) == 1e-5);
  CHECK(json_number(json(1), Range<double>{0, 2}) == 1.0);
  CHECK(json_number(json(-1), Range<double>{-2, 2}) == -1.0);
  for (const char* text : {"0", "-1e-5", "1", "1e300", "18446744073709551615", "\"1e-5\"", "false", "null"})
    CHECK_MESSAGE(!json_number(json::parse(text), eps), text);
}

TEST_CASE("text is UTF-8 without NUL") {
  CHECK(text_error("").empty());
  CHECK(text_error("plain\n\ttext \x7f").empty());
  CHECK(text_error("Füchse, 狐, 🦊").empty());
  CHECK(text_error("a\0b"s) == "byte 1 is NUL");
  // A lone byte, an overlong "/", a surrogate, a character beyond the last one, one that is cut off, Latin-1.
  for (const char* text : {"ab\x80", "ab\xc0\xaf", "ab\xe0\x80\xaf", "ab\xed\xa0\x80", "ab\xf4\x90\x80\x80",
                           "ab\xff", "ab\xf0\x9f\xa6", "ab\xfc"})
    CHECK_MESSAGE(text_error(text) == "byte 2 is not UTF-8", printable(text));
}

TEST_CASE("a text file loses its byte-order mark, and is UTF-8") {
  CHECK(checked_text("\xef\xbb\xbf"
                     "a fox\n",
                     "p.txt") == "a fox\n");
  CHECK(checked_text("\xef\xbb\xbf", "p.txt").empty());
  CHECK(checked_text("a\xef\xbb\xbf", "p.txt") == "a\xef\xbb\xbf");
  CHECK_THROWS_WITH(checked_text("\xff\xfe"
                                 "a\0"s,
                                 "p.txt"),
                    "p.txt: is UTF-16, UTF-8 is expected");
  CHECK_THROWS_WITH(checked_text("\xfe\xff\0a"s, "p.txt"), "p.txt: is UTF-16, UTF-8 is expected");
  CHECK_THROWS_WITH(checked_text("\xff\xfe\0\0a\0\0\0"s, "p.txt"), "p.txt: is UTF-32, UTF-8 is expected");
  CHECK_THROWS_WITH(checked_text("\0\0\xfe\xff\0\0\0a"s, "p.txt"), "p.txt: is UTF-32, UTF-8 is expected");
  CHECK_THROWS_WITH(checked_text("caf\xe9", "p.txt"),
                    "p.txt: byte 3 is not UTF-8, text in UTF-8 is expected");
  CHECK_THROWS_WITH(checked_text("a\0b"s, "p.txt"), "p.txt: byte 1 is NUL, text in UTF-8 is expected");
}

TEST_CASE("what quotes text from outside stays on one line and shows what it is") {
  CHECK(printable("Füchse 🦊") == "Füchse 🦊");
  CHECK(printable("a\nb\r\tc") == "a\\nb\\r\\tc");
  CHECK(printable("\x1b[31m") == "\\x1b[31m");
  CHECK(printable("\0\x7f"s) == "\\x00\\x7f");
  CHECK(printable("caf\xe9!") == "caf\\xe9!");
  CHECK(printable("a\u202eb\u2028c") == "a\\u{202e}b\\u{2028}c");
  CHECK(printable("\u0085") == "\\x85");
}

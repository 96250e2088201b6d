// JSON from untrusted files: no exceptions, no duplicate keys, bounded depth.
#pragma once

#include <cstddef>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <linattn/version.hpp>
#include <nlohmann/json.hpp>

LINATTN_BEGIN

// What a document may hold. Memory is bounded by its length times a constant.
struct JsonLimits {
  std::size_t depth = 64;
  std::size_t array = std::numeric_limits<std::size_t>::max();
};

namespace detail {

// Builds a document event by event. nlohmann's own builder lets the last of two equal keys win, which
// would let two readers see two files in one.
template <class Json>
class StrictJsonBuilder {
 public:
  using number_integer_t = typename Json::number_integer_t;
  using number_unsigned_t = typename Json::number_unsigned_t;
  using number_float_t = typename Json::number_float_t;
  using string_t = typename Json::string_t;
  using binary_t = typename Json::binary_t;

  StrictJsonBuilder(Json& root, const JsonLimits& limits) : root_(root), limits_(limits) {}

  [[nodiscard]] const std::string& error() const { return error_; }

  bool null() { return add(Json(nullptr)) != nullptr; }
  bool boolean(bool value) { return add(Json(value)) != nullptr; }
  bool number_integer(number_integer_t value) { return add(Json(value)) != nullptr; }
  bool number_unsigned(number_unsigned_t value) { return add(Json(value)) != nullptr; }
  bool number_float(number_float_t value, const string_t&) { return add(Json(value)) != nullptr; }
  bool string(string_t& value) { return add(Json(std::move(value))) != nullptr; }
  bool binary(binary_t&) { return fail("binary value"); }
  bool start_object(std::size_t) { return push(Json::object()); }
  bool start_array(std::size_t) { return push(Json::array()); }
  bool end_object() { return pop(); }
  bool end_array() { return pop(); }

  bool key(string_t& name) {
    if (stack_.back()->contains(name)) return fail("duplicate key '" + name.substr(0, 200) + "'");
    key_ = std::move(name);
    return true;
  }
  template <class Exception>
  bool parse_error(std::size_t position, const std::string&, const Exception&) {
    return fail("syntax error at byte " + std::to_string(position));
  }

 private:
  bool fail(std::string why) {
    error_ = std::move(why);
    return false;
  }
  Json* add(Json&& value) {
    if (stack_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    Json& parent = *stack_.back();
    if (parent.is_object()) return &(parent[key_] = std::move(value));
    if (parent.size() >= limits_.array) {
      error_ = "array of more than " + std::to_string(limits_.array) + " elements";
      return nullptr;
    }
    parent.push_back(std::move(value));
    return &parent.back();
  }
  // The parent of an open value does not grow until it is closed, so the pointers stay valid.
  bool push(Json&& value) {
    if (stack_.size() >= limits_.depth)
      return fail("nested deeper than " + std::to_string(limits_.depth) + " levels");
    Json* added = add(std::move(value));
    if (added == nullptr) return false;
    stack_.push_back(added);
    return true;
  }
  bool pop() {
    stack_.pop_back();
    return true;
  }

  Json& root_;
  JsonLimits limits_;
  std::vector<Json*> stack_;
  std::string key_;
  std::string error_;
};

}  // namespace detail

// Parses UTF-8 text into a document (nlohmann::json or nlohmann::ordered_json). Returns what is wrong with
// it, or nothing. Never throws; an unsuccessful parse leaves `out` null.
template <class Json>
[[nodiscard]] std::string parse_json(std::string_view text, Json& out, const JsonLimits& limits = {}) {
  out = nullptr;
  // nlohmann's lexer takes a NUL for the end of the text, whatever follows it.
  if (text.find('\0') != std::string_view::npos) return "holds a NUL byte";
  detail::StrictJsonBuilder<Json> builder(out, limits);
  const bool good = Json::sax_parse(text.begin(), text.end(), &builder);
  if (!good) out = nullptr;
  return good ? std::string() : builder.error();
}

LINATTN_END

// JSON from untrusted files: no exceptions, no duplicate keys, bounded depth.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <linattn/version.hpp>
#include <linattn/weights/file_status.hpp>
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
  bool string(string_t& value) { return no_nul(value) && add(Json(std::move(value))) != nullptr; }
  bool binary(binary_t&) { return fail("binary value"); }
  bool start_object(std::size_t) { return push(Json::object()); }
  bool start_array(std::size_t) { return push(Json::array()); }
  bool end_object() { return unique_keys(*stack_.back()) && pop(); }
  bool end_array() { return pop(); }

  bool key(string_t& name) {
    if (!no_nul(name)) return false;
    if constexpr (!keeps_order)
      if (stack_.back()->contains(name)) return duplicate(name);
    key_ = std::move(name);
    return true;
  }
  template <class Exception>
  bool parse_error(std::size_t position, const std::string&, const Exception& error) {
    constexpr int number_overflow = 406;
    return fail(
        (error.id == number_overflow ? "number beyond those of double at byte " : "syntax error at byte ") +
        std::to_string(position));
  }

 private:
  // ordered_json looks a key up by going through all of them, which a large object must not cost for each key.
  static constexpr bool keeps_order = std::is_same_v<Json, nlohmann::ordered_json>;

  // "\u0000" would end a name or a path for the system, but not for us.
  bool no_nul(const string_t& text) {
    return text.find('\0') == string_t::npos || fail("holds a NUL in a string");
  }
  bool fail(std::string why) {
    error_ = std::move(why);
    return false;
  }
  bool duplicate(const std::string& name) { return fail("duplicate key '" + printable(name) + "'"); }
  bool unique_keys([[maybe_unused]] const Json& object) {
    if constexpr (keeps_order) {
      std::vector<const std::string*> keys;
      for (const auto& [name, value] : object.template get_ref<const typename Json::object_t&>())
        keys.push_back(&name);
      std::sort(keys.begin(), keys.end(), [](const auto* a, const auto* b) { return *a < *b; });
      const auto same =
          std::adjacent_find(keys.begin(), keys.end(), [](const auto* a, const auto* b) { return *a == *b; });
      if (same != keys.end()) return duplicate(**same);
    }
    return true;
  }
  Json* add(Json&& value) {
    if (stack_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    Json& parent = *stack_.back();
    if (parent.is_object()) {
      auto& object = parent.template get_ref<typename Json::object_t&>();
      if constexpr (keeps_order)
        return &static_cast<typename Json::object_t::Container&>(object)
                    .emplace_back(std::move(key_), std::move(value))
                    .second;
      else
        return &object.insert_or_assign(std::move(key_), std::move(value)).first->second;
    }
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

// What nlohmann leaves out when it writes a text is not UTF-8.
[[nodiscard]] inline bool is_utf8(const std::string& text) {
  using nlohmann::json;
  return json::parse(json(text).dump(-1, ' ', false, json::error_handler_t::ignore)) == text;
}

}  // namespace detail

// Parses UTF-8 text into a document (nlohmann::json or nlohmann::ordered_json). Returns what is wrong with
// it, or nothing. Never throws; an unsuccessful parse leaves `out` null.
template <class Json>
[[nodiscard]] std::string parse_json(std::string_view text, Json& out, const JsonLimits& limits = {}) {
  out = nullptr;
  if (text.starts_with("\xff\xfe") || text.starts_with("\xfe\xff")) return "is UTF-16, UTF-8 is expected";
  // nlohmann's lexer takes a NUL for the end of the text, whatever follows it.
  if (text.find('\0') != std::string_view::npos) return "holds a NUL byte";
  detail::StrictJsonBuilder<Json> builder(out, limits);
  const bool good = Json::sax_parse(text.begin(), text.end(), &builder);
  if (!good) out = nullptr;
  return good ? std::string() : builder.error();
}

LINATTN_END

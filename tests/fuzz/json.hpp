// JSON documents from the bytes of an input: well-formed ones with odd values in them.
#pragma once

#include <fuzzer/FuzzedDataProvider.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace fuzz {

// Any value, numbers at the ends of their ranges among them.
[[nodiscard]] inline nlohmann::json value(FuzzedDataProvider& in, int depth = 2) {
  switch (in.ConsumeIntegralInRange(0, depth > 0 ? 9 : 7)) {
    case 0:
      return nullptr;
    case 1:
      return in.ConsumeBool();
    case 2:
      return in.ConsumeIntegral<std::int64_t>();
    case 3:
      return in.ConsumeIntegral<std::uint64_t>();
    case 4:
      return in.ConsumeIntegralInRange(-1, 300);
    case 5:
      return in.ConsumeFloatingPoint<double>();
    case 6:
      return in.PickValueInArray({0.0, -0.0, 1e-300, 1e300, 0.5, 4294967296.0, 9.3e18, -1.0});
    case 7:
      return in.ConsumeRandomLengthString(24);
    case 8: {
      nlohmann::json array = nlohmann::json::array();
      for (int n = in.ConsumeIntegralInRange(0, 3); n > 0; --n) array.push_back(value(in, depth - 1));
      return array;
    }
    default: {
      nlohmann::json object = nlohmann::json::object();
      for (int n = in.ConsumeIntegralInRange(0, 3); n > 0; --n)
        object[in.ConsumeRandomLengthString(8)] = value(in, depth - 1);
      return object;
    }
  }
}

// Puts another value somewhere into a document, takes one out, or adds one.
inline void mutate(FuzzedDataProvider& in, nlohmann::json& document) {
  nlohmann::json* at = &document;
  while (at->is_structured() && !at->empty() && in.ConsumeIntegralInRange(0, 4) != 0) {
    auto child = at->begin();
    std::advance(child,
                 in.ConsumeIntegralInRange<std::ptrdiff_t>(0, static_cast<std::ptrdiff_t>(at->size()) - 1));
    at = &*child;
  }
  if (!at->is_object() || in.ConsumeBool()) {
    *at = value(in);
  } else if (!at->empty() && in.ConsumeBool()) {
    auto gone = at->begin();
    std::advance(gone,
                 in.ConsumeIntegralInRange<std::ptrdiff_t>(0, static_cast<std::ptrdiff_t>(at->size()) - 1));
    at->erase(gone);
  } else {
    (*at)[in.ConsumeRandomLengthString(16)] = value(in);
  }
}

// Bytes that are not UTF-8 stay out: nlohmann does not write them.
[[nodiscard]] inline std::string text(const nlohmann::json& document) {
  return document.dump(-1, ' ', false, nlohmann::json::error_handler_t::ignore);
}

}  // namespace fuzz

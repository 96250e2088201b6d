// The tensors of a file that a model did not take. One of them may be part of what another program computes, so
// none is passed over unless it is known to change nothing.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include "checkpoint.hpp"

namespace nn {

// Names that may lie beside a model's own, below its prefix, and why they change nothing. A '*' at the beginning or
// the end stands for anything.
struct Harmless {
  std::string names;
  std::string reason;
};

// What was left, of one file and one such line.
struct Ignored {
  std::string file, names, reason;
  std::size_t count = 0;
};

// Whether a name is one of `pattern`.
[[nodiscard]] bool matches(std::string_view pattern, std::string_view name);

// The tensors that are the checkpoint's own and were not loaded from it, nor from a copy of it. Throws
// std::runtime_error that names the first which is not harmless, and says how many there are; `kind` says whose they
// are not: "a DiT".
[[nodiscard]] std::vector<Ignored> leftovers(const Checkpoint& checkpoint, std::string_view kind,
                                             std::span<const Harmless> harmless = {});

[[nodiscard]] nlohmann::ordered_json to_json(std::span<const Ignored> ignored);

}  // namespace nn

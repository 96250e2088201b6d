#include "leftovers.hpp"

#include <algorithm>
#include <optional>
#include <stdexcept>

namespace nn {

bool matches(std::string_view pattern, std::string_view name) {
  if (pattern.ends_with('*')) return name.starts_with(pattern.substr(0, pattern.size() - 1));
  if (pattern.starts_with('*')) return name.ends_with(pattern.substr(1));
  return name == pattern;
}

std::vector<Ignored> leftovers(const Checkpoint& checkpoint, std::string_view kind,
                               std::span<const Harmless> harmless) {
  std::vector<Ignored> ignored;
  for (const Harmless& line : harmless)
    ignored.push_back({checkpoint.path().string(), checkpoint.full_name("") + line.names, line.reason});
  std::string first;
  std::size_t unknown = 0;
  for (const linattn::TensorInfo& tensor : checkpoint.files().tensors()) {
    const std::optional<std::string_view> name = checkpoint.own_name(tensor.name);
    if (!name || checkpoint.has_loaded(tensor.name)) continue;
    const auto line = std::find_if(harmless.begin(), harmless.end(),
                                   [&](const Harmless& known) { return matches(known.names, *name); });
    if (line != harmless.end())
      ++ignored[static_cast<std::size_t>(line - harmless.begin())].count;
    else if (unknown++ == 0)
      first = tensor.name;
  }
  if (unknown > 0)
    throw std::runtime_error(checkpoint.path().string() + ": tensor '" + first + "'" +
                             (unknown > 1 ? " and " + std::to_string(unknown - 1) + " more are" : " is") +
                             " none of " + std::string(kind));
  std::erase_if(ignored, [](const Ignored& line) { return line.count == 0; });
  return ignored;
}

nlohmann::ordered_json to_json(std::span<const Ignored> ignored) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const Ignored& line : ignored)
    list.push_back(
        {{"file", line.file}, {"names", line.names}, {"count", line.count}, {"reason", line.reason}});
  return list;
}

}  // namespace nn

// The transformer of a case.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "expect.hpp"
#include "golden.hpp"
#include "sd35/mmdit.hpp"
#include "sd35_parameters.hpp"

namespace golden {

// What a model loads from the case's own file counts as used, and nothing else.
inline sd35::Checkpoint open_transformer(Case& c, const Parameters& parameters) {
  sd35::Checkpoint checkpoint = sd35::Checkpoint::open(parameters.path(), sd35::Component::transformer);
  checkpoint.on_load = [&c](const std::string& tensor) {
    if (c.has(tensor)) c.use(tensor);
  };
  return checkpoint;
}

// What the config says counts; the shapes of the tensors must then agree with it.
inline sd35::MmditConfig transformer_config(const sd35::Checkpoint& checkpoint, const nlohmann::json& json) {
  sd35::MmditConfig config = sd35::MmditConfig::of(checkpoint);
  config.depth = json.value("depth", config.depth);
  config.heads = json.value("heads", config.heads);
  config.patch = json.value("patch", config.patch);
  config.in_channels = json.value("in_channels", config.in_channels);
  config.position_grid = json.value("pos_embed_max_size", config.position_grid);
  config.context_width = json.value("context_in", config.context_width);
  config.pooled_width = json.value("adm_in_channels", config.pooled_width);
  if (json.contains("qk_norm")) config.qk_norm = json["qk_norm"] == "rms";
  for (const auto& [name, value] : {std::pair{"depth", config.depth},
                                    {"heads", config.heads},
                                    {"patch", config.patch},
                                    {"pos_embed_max_size", config.position_grid}})
    if (value < 1 || value > largest_extent)
      throw std::runtime_error(std::string("metadata 'config': ") + name + " is " + std::to_string(value) +
                               ", expected 1 to " + std::to_string(largest_extent));
  if (config.width % config.heads != 0)
    throw std::runtime_error("metadata 'config': " + std::to_string(config.width) +
                             " channels do not divide into " + std::to_string(config.heads) + " heads");
  config.dual.resize(static_cast<std::size_t>(config.depth));
  if (json.contains("x_block_self_attn_layers")) {
    config.dual.assign(config.dual.size(), false);
    for (const auto layer : json["x_block_self_attn_layers"].get<std::vector<std::size_t>>())
      config.dual.at(layer) = true;
  }
  return config;
}

// Reads latents (batch, channels, rows, columns) that the transformer takes.
[[nodiscard]] inline Tensor read_latents(Case& c, std::string_view name, const sd35::MmditConfig& config) {
  Tensor latents = read(c, name, {any, config.in_channels, any, any});
  for (const std::size_t axis : {2u, 3u})
    if (latents.extent(axis) % config.patch != 0 ||
        latents.extent(axis) / config.patch > config.position_grid)
      throw std::runtime_error("tensor '" + std::string(name) + "' has " +
                               std::to_string(latents.extent(axis)) +
                               " rows or columns, expected a multiple of " + std::to_string(config.patch) +
                               ", at most " + std::to_string(config.patch * config.position_grid));
  return latents;
}

}  // namespace golden

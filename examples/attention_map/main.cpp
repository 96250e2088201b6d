// linattn-attention-map: which tokens a query looks at, with softmax and with Test-Time-Training, as a picture.
#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <charconv>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "maps.hpp"
#include "nn/command.hpp"
#include "nn/finite.hpp"
#include "nn/outputs.hpp"
#include "nn/standard_output.hpp"
#include "picture.hpp"

namespace {

using namespace attention_map;

constexpr const char* about =
    R"(Draws the attention maps of one layer, softmax beside Test-Time-Training (TTT): a row of maps for each
head, two maps for each query, the query framed. Softmax's map are its probabilities; a TTT layer writes none
down, its map is (1/d) tr(d o_i / d v_j), how far output i follows value j. White is 0, red positive, blue
negative (a TTT map may be), each map on its own scale, which --json and the PNG's text state.)";

constexpr const char* examples =
    R"(Two files are a vision transformer (names of timm) and its conversion by linattn-inherit; --picture passes through
both. One file holds q, k and v [tokens, heads, head_dim] of one attention, behind the projections, and the TTT tensors
of that attention as they are named in a checkpoint (blocks.3.attn.w1, ...).
Examples:
  linattn-attention-map deit_tiny/ deit_tiny_t5.safetensors --picture cat.jpg --block 6 --query 5,5 --query 9,2
  linattn-attention-map layer.safetensors --grid 12x16 --heads 0,2 -o map.png --json
Exit code: 0 when the picture is written, 2 after an error, which stderr states in one sentence.)";

struct Arguments {
  std::vector<std::filesystem::path> models;
  std::filesystem::path picture, output = "attention-map.png";
  Index block = 0;
  std::string grid;
  std::vector<std::string> queries;
  std::vector<Index> heads;
  Index size = 168;
  int threads = 0;
  bool json = false;
};

// Two numbers with a separator between them, neither negative.
[[nodiscard]] std::pair<Index, Index> parse_pair(const std::string& text, char separator, const char* what) {
  Index first = -1, second = -1;
  const char* const end = text.data() + text.size();
  const auto [middle, error] = std::from_chars(text.data(), end, first);
  if (error != std::errc{} || middle == end || *middle != separator ||
      std::from_chars(middle + 1, end, second).ptr != end || first < 0 || second < 0)
    throw std::runtime_error(std::string(what) + " '" + text + "' is not two numbers with '" + separator +
                             "' between them");
  return {first, second};
}

// The tokens of the queries in the grid; its middle where none is named.
[[nodiscard]] std::vector<Index> query_tokens(const std::vector<std::string>& texts,
                                              const linattn::TokenGrid& grid) {
  if (texts.empty()) return {grid.height / 2 * grid.width + grid.width / 2};
  std::vector<Index> tokens;
  for (const std::string& text : texts) {
    const auto [row, column] = parse_pair(text, ',', "--query");
    if (row >= grid.height || column >= grid.width)
      throw std::runtime_error("--query " + text + " lies outside the grid of " +
                               std::to_string(grid.height) + " x " + std::to_string(grid.width) + " tokens");
    tokens.push_back(row * grid.width + column);
  }
  return tokens;
}

[[nodiscard]] std::vector<Index> head_list(std::vector<Index> heads, Index count) {
  if (heads.empty())
    for (Index h = 0; h < count; ++h) heads.push_back(h);
  for (const Index h : heads)
    if (h < 0 || h >= count)
      throw std::runtime_error("--heads " + std::to_string(h) + ": the layer has " + std::to_string(count) +
                               " heads");
  return heads;
}

[[nodiscard]] nlohmann::json report(Runtime& rt, const Layers& layers, const Picture& picture,
                                    const std::filesystem::path& output) {
  const linattn::TokenGrid& grid = layers.softmax.grid;
  nlohmann::json maps = nlohmann::json::array();
  for (const Scale& s : picture.scales)
    maps.push_back({{"head", s.head},
                    {"query", {s.query / grid.width, s.query % grid.width}},
                    {"map", s.map},
                    {"min", s.least},
                    {"max", s.most}});
  return {{"layer", layers.name},
          {"inner_model", name(layers.module.conversion.inner_model)},
          {"inner_loss", name(layers.module.conversion.inner_loss)},
          {"tokens", layers.softmax.tokens()},
          {"grid", {grid.height, grid.width}},
          {"key_shift_ratio",
           {{"softmax", key_shift_ratios(rt, layers.softmax)}, {"ttt", key_shift_ratios(rt, layers.ttt)}}},
          {"maps", maps},
          {"output", output.string()}};
}

int run(const Arguments& a) {
  linattn::FileSet inputs;
  for (const std::filesystem::path& model : a.models) nn::add_model(inputs, model);
  inputs.add(a.picture);
  nn::Outputs(std::move(inputs)).add_file(a.output);
  if (a.size < 1 || a.size > 4096)
    throw std::runtime_error("--size: 1 to 4096 pixels, got " + std::to_string(a.size));
  Runtime rt(a.threads);
  const auto [height, width] = a.grid.empty() ? std::pair<Index, Index>{} : parse_pair(a.grid, 'x', "--grid");
  if ((a.models.size() == 2) == a.picture.empty())
    throw std::runtime_error("two models and --picture go together; one file holds a layer");
  const Layers layers = a.models.size() == 2 ? run_models(rt, a.models[0], a.models[1], a.picture, a.block)
                                             : read_layer(a.models[0], height, width);
  const linattn::TokenGrid& grid = layers.softmax.grid;
  const std::vector<Index> queries = query_tokens(a.queries, grid);
  const std::vector<Index> heads = head_list(a.heads, layers.softmax.heads());

  const Picture picture = draw(softmax_map(rt, layers, queries), ttt_map(rt, layers, queries), grid, heads,
                               queries, a.size, layers.photo);
  const nlohmann::json facts = report(rt, layers, picture, a.output);
  nn::expect_finite_report(facts);
  nn::write_png(a.output, picture.image,
                {{"Title", "Attention maps of " + layers.name},
                 {"Description",
                  "rows: heads; columns: for each query softmax, then TTT; white 0, red positive, blue "
                  "negative, each map on its own scale; the query is framed"},
                 {"Software", "linattn-attention-map"},
                 {"Comment", facts["maps"].dump()}});
  if (a.json) {
    nn::print_text(facts.dump(2) + "\n");
    return 0;
  }
  for (const Scale& s : picture.scales)
    std::fprintf(stderr, "head %td, query %td,%td, %-7s %+.3e to %+.3e\n", s.head, s.query / grid.width,
                 s.query % grid.width, s.map.c_str(), static_cast<double>(s.least),
                 static_cast<double>(s.most));
  nn::print_text(a.output.string() + "\n");
  return 0;
}

}  // namespace

int main(int count, char** values) {
  Arguments a;
  CLI::App app(about, "linattn-attention-map");
  app.add_option("models", a.models, "a vision transformer and its conversion, or the file of one layer")
      ->required()
      ->expected(1, 2);
  app.add_option("--picture", a.picture, "PNG or JPEG that passes through the two models");
  app.add_option("--block", a.block, "block of the models, counted from 0")->capture_default_str();
  app.add_option("-o,--output", a.output, "PNG file to write")->capture_default_str();
  app.add_option(
      "--grid", a.grid,
      "rows x columns of the tokens, e.g. 12x16; a class token may lie before them (default: a square)");
  app.add_option("--query", a.queries, "row,column of a query token, may be repeated (default: the middle)");
  app.add_option("--heads", a.heads, "heads to draw, e.g. 0,2 (default: all)")->delimiter(',');
  app.add_option("--size", a.size, "pixels of a map's longer side, about")->capture_default_str();
  app.add_option("-t,--threads", a.threads, "default: all")->capture_default_str();
  app.add_flag("--json", a.json, "key shift ratios and the scale of every map on standard output");
  app.footer(examples);
  return nn::run_command(app, count, values, [&] { return run(a); });
}

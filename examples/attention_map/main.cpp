// linattn-attention-map: which tokens a query looks at, with softmax and with Test-Time-Training, as a picture.
#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <cstdio>
#include <exception>
#include <filesystem>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "maps.hpp"
#include "nn/command.hpp"
#include "nn/finite.hpp"
#include "nn/options.hpp"
#include "nn/outputs.hpp"
#include "nn/standard_output.hpp"
#include "nn/threads.hpp"
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

// Of a grid: a row, a column, or as many of them. Their product stays an Index.
constexpr Index most_tokens = 1 << 20;

using Pair = std::pair<Index, Index>;

struct Arguments {
  std::vector<std::filesystem::path> models;
  std::filesystem::path picture, output = "attention-map.png";
  Index block = 0;
  std::optional<Pair> grid;
  std::vector<Pair> queries;
  std::vector<Index> heads;
  Index size = 168;
  int threads = 0;
  bool json = false;
};

// Two numbers with a separator between them.
[[nodiscard]] std::optional<Pair> parse_pair(std::string_view text, char separator,
                                             const nn::Range<Index>& range) {
  const std::size_t middle = text.find(separator);
  if (middle == std::string_view::npos) return std::nullopt;
  const std::optional<Index> first = nn::parse_number(text.substr(0, middle), range),
                             second = nn::parse_number(text.substr(middle + 1), range);
  return first && second ? std::optional(Pair{*first, *second}) : std::nullopt;
}

// The tokens of the queries in the grid; its middle where none is named.
[[nodiscard]] std::vector<Index> query_tokens(const std::vector<Pair>& queries,
                                              const linattn::TokenGrid& grid) {
  if (queries.empty()) return {grid.height / 2 * grid.width + grid.width / 2};
  std::vector<Index> tokens;
  for (const auto& [row, column] : queries) {
    if (row >= grid.height || column >= grid.width)
      throw std::runtime_error("--query " + std::to_string(row) + "," + std::to_string(column) +
                               " lies outside the grid of " + std::to_string(grid.height) + " x " +
                               std::to_string(grid.width) + " tokens");
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
          {"ignored_tensors", to_json(layers.ignored)},
          {"output", output.string()}};
}

int run(const Arguments& a) {
  linattn::FileSet inputs;
  for (const std::filesystem::path& model : a.models) nn::add_model(inputs, model);
  inputs.add(a.picture);
  nn::Outputs outputs(std::move(inputs));
  outputs.add_file(a.output);
  nn::expect_threads(a.threads);
  Runtime rt(a.threads);
  const auto [height, width] = a.grid.value_or(Pair{});
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
  outputs.write(
      a.output,
      nn::encode_png(picture.image,
                     {{"Title", "Attention maps of " + layers.name},
                      {"Description",
                       "rows: heads; columns: for each query softmax, then TTT; white 0, red positive, blue "
                       "negative, each map on its own scale; the query is framed"},
                      {"Software", "linattn-attention-map"},
                      {"Comment", facts["maps"].dump()}}));
  if (a.json) {
    nn::print_text(facts.dump(2) + "\n");
    return 0;
  }
  for (const Scale& s : picture.scales)
    std::fprintf(stderr, "head %td, query %td,%td, %-7s %+.3e to %+.3e\n", s.head, s.query / grid.width,
                 s.query % grid.width, s.map.c_str(), static_cast<double>(s.least),
                 static_cast<double>(s.most));
  outputs.print_text(a.output.string() + "\n");
  return 0;
}

}  // namespace

int main(int count, char** values) {
  Arguments a;
  CLI::App app(about, "linattn-attention-map");
  nn::add_paths(app, "models", a.models, "a vision transformer and its conversion, or the file of one layer")
      ->required()
      ->expected(1, 2);
  nn::add_path(app, "--picture", a.picture, "PNG or JPEG that passes through the two models");
  nn::add_number(app, "--block", a.block, {0, 9999}, "block of the models, counted from 0");
  nn::add_path(app, "-o,--output", a.output, "PNG file to write");
  nn::add_value(
      app, "--grid", "ROWSxCOLUMNS, such as 12x16",
      [&](const std::string& text) {
        return (a.grid = parse_pair(text, 'x', {1, most_tokens})).has_value();
      },
      "rows x columns of the tokens, e.g. 12x16; a class token may lie before them (default: a square)");
  nn::add_value(
      app, "--query", "ROW,COLUMN, such as 5,9",
      [&](const std::string& text) {
        const auto query = parse_pair(text, ',', {0, most_tokens});
        if (query) a.queries.push_back(*query);
        return query.has_value();
      },
      "row,column of a query token, may be repeated (default: the middle)")
      ->take_all();
  nn::add_number(app, "--heads", a.heads, {0, 4095}, "heads to draw, e.g. 0,2 (default: all)");
  nn::add_number(app, "--size", a.size, {1, 4096}, "pixels of a map's longer side, about");
  nn::add_number(app, "-t,--threads", a.threads, nn::thread_range,
                 "0: all cores; the maps are the same with any number");
  app.add_flag("--json", a.json, "key shift ratios and the scale of every map on standard output");
  app.footer(examples);
  return nn::run_command(app, count, values, [&] { return run(a); });
}

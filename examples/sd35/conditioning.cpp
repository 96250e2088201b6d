#include "conditioning.hpp"

#include <algorithm>
#include <charconv>
#include <optional>
#include <stdexcept>
#include <utility>

#include "checkpoint.hpp"
#include "clip_text.hpp"
#include "t5_encoder.hpp"
#include "t5_tokenizer.hpp"

namespace sd35 {
namespace {

namespace fs = std::filesystem;

// Which folder holds a tokenizer: the named one of a diffusers directory, or the folder itself.
fs::path tokenizer_folder(const fs::path& tokenizers, const char* folder, std::string_view encoder,
                          std::initializer_list<const char*> files) {
  std::error_code ignored;
  for (const fs::path& candidate : {tokenizers / folder, tokenizers})
    for (const char* file : files)
      if (fs::exists(candidate / file, ignored)) return candidate;
  throw std::runtime_error("no tokenizer for the " + std::string(encoder) + ": looked for " + folder + "/" +
                           *files.begin() + " below '" + tokenizers.string() + "'; fetch the folder " +
                           folder + " of the model's diffusers repository");
}

// --- the official tokenization of CLIP ---

// Escaped parentheses become bytes that no text holds, so that they neither nest nor show.
constexpr char escaped_open = '\1', escaped_close = '\2';

std::string escape_parentheses(std::string_view text) {
  std::string result;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char next = text[i] == '\\' && i + 1 < text.size() ? text[i + 1] : '\0';
    const bool escaped = next == '(' || next == ')';
    result += !escaped ? text[i] : next == '(' ? escaped_open : escaped_close;
    i += escaped ? 1 : 0;
  }
  return result;
}

bool is_number(std::string_view text) {
  while (!text.empty() && text.front() == ' ') text.remove_prefix(1);
  while (!text.empty() && text.back() == ' ') text.remove_suffix(1);
  if (text.starts_with('+')) text.remove_prefix(1);
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return !text.empty() && error != std::errc::invalid_argument && end == text.data() + text.size();
}

// The stretches of text outside and inside parentheses, in order, without the parentheses and the weights.
void split_weights(std::string_view text, std::vector<std::string>& out, int level = 0) {
  if (level > 1000) throw std::runtime_error("prompt: more than 1000 parentheses inside each other");
  const auto add = [&](std::string_view part) {
    if (part.size() < 2 || part.front() != '(' || part.back() != ')') {
      if (!part.empty()) out.emplace_back(part);
      return;
    }
    part = part.substr(1, part.size() - 2);
    const std::size_t colon = part.rfind(':');
    const bool weight = colon != std::string_view::npos && colon > 0 && is_number(part.substr(colon + 1));
    split_weights(weight ? part.substr(0, colon) : part, out, level + 1);
  };
  int depth = 0;
  std::size_t begin = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const bool opens = text[i] == '(' && depth++ == 0;
    const bool closes = text[i] == ')' && --depth == 0;
    const std::size_t end = closes ? i + 1 : i;
    if (opens || closes) {
      add(text.substr(begin, end - begin));
      begin = end;
    }
  }
  add(text.substr(begin));
}

// The first `count` characters of UTF-8 text.
std::string_view first_characters(std::string_view text, std::size_t count) {
  std::size_t at = 0;
  for (; at < text.size(); ++at)
    if ((static_cast<unsigned char>(text[at]) & 0xc0) != 0x80 && count-- == 0) break;
  return text.substr(0, at);
}

// --- the encoders ---

template <class T>
struct ClipRows {
  Tensor<T> hidden, pooled;
};

template <class T>
ClipRows<T> run_clip(Runtime& rt, const TextSources& sources, Component component,
                     std::span<const std::string> prompts, const ConditioningOptions& options) {
  const bool large = component == Component::clip_l;
  const fs::path& path = large ? sources.clip_l : sources.clip_g;
  if (path.empty()) return {};
  if (options.on_encoder) options.on_encoder(name(component));

  // Both models share a vocabulary; CLIP-L is padded with the end token, CLIP-G with id 0.
  const ClipTokenizer tokenizer =
      ClipTokenizer::load(tokenizer_folder(sources.tokenizers, large ? "tokenizer" : "tokenizer_2",
                                           name(component), {"merges.txt", "tokenizer.json"}));
  std::error_code ignored;
  const bool own_folder = fs::is_directory(sources.tokenizers / "tokenizer_2", ignored);
  const std::int32_t pad = large        ? tokenizer.pad_id().value_or(tokenizer.eos_id())
                           : own_folder ? tokenizer.pad_id().value_or(0)
                                        : 0;

  const Checkpoint checkpoint = Checkpoint::open(path, component);
  const ClipText<T> model(checkpoint, ClipConfig::of(checkpoint, component));
  const Index length = model.config().positions;
  std::vector<std::int32_t> ids;
  for (const std::string& prompt : prompts) {
    const std::vector<std::int32_t> row =
        options.official ? official_clip_ids(tokenizer, prompt, pad, length)
                         : tokenizer.encode_padded(prompt, static_cast<int>(length), pad);
    ids.insert(ids.end(), row.begin(), row.end());
  }
  ClipFeatures<T> features = model.encode(rt, ids, static_cast<Index>(prompts.size()));
  ClipRows<T> rows{std::move(features.hidden), {}};
  rows.pooled = std::move(model.config().project ? features.projected : features.pooled);
  return rows;
}

template <class T>
Tensor<T> run_t5(Runtime& rt, const TextSources& sources, std::span<const std::string> prompts,
                 const ConditioningOptions& options) {
  if (options.on_encoder) options.on_encoder(name(Component::t5));
  const T5Tokenizer tokenizer = T5Tokenizer::load(tokenizer_folder(
      sources.tokenizers, "tokenizer_3", name(Component::t5), {"spiece.model", "tokenizer.json"}));
  std::vector<std::vector<std::int32_t>> rows;
  std::size_t length = 77;
  for (const std::string& prompt : prompts) {
    rows.push_back(options.official ? tokenizer.encode(first_characters(prompt, 226))
                                    : tokenizer.encode_padded(prompt, static_cast<int>(options.t5_tokens)));
    length = options.official ? std::max(length, rows.back().size()) : rows.back().size();
  }
  std::vector<std::int32_t> ids;
  for (std::vector<std::int32_t>& row : rows) {
    row.resize(length, T5Tokenizer::pad_id);
    ids.insert(ids.end(), row.begin(), row.end());
  }
  const T5Encoder<T> model(Checkpoint::open(sources.t5, Component::t5));
  return model.encode(rt, ids, static_cast<Index>(prompts.size()));
}

// Copies rows (batch, rows, channels) into a part of the target.
template <class T>
void place(const Tensor<T>& source, Tensor<T>& target, Index first_row, Index first_channel) {
  const auto from = source.template view<3>();
  const auto to = target.template view<3>();
  for (Index b = 0; b < from.extent(0); ++b)
    for (Index r = 0; r < from.extent(1); ++r)
      std::copy_n(from.pointer(b, r), from.extent(2), to.pointer(b, first_row + r, first_channel));
}

[[noreturn]] void wrong_width(std::string_view encoders, const char* what, Index got, Index expected) {
  throw std::runtime_error(std::string(encoders) + ": " + std::to_string(got) + " " + what +
                           ", but the transformer takes " + std::to_string(expected));
}

}  // namespace

std::vector<std::int32_t> official_clip_ids(const ClipTokenizer& tokenizer, std::string_view text,
                                            std::int32_t pad, Index length) {
  constexpr std::size_t may_be_cut = 8;
  std::vector<std::string> segments;
  split_weights(escape_parentheses(text), segments);

  const auto limit = static_cast<std::size_t>(length) - 1;
  std::vector<std::int32_t> ids{tokenizer.bos_id()};
  bool full = false;
  for (std::string& segment : segments) {
    std::replace(segment.begin(), segment.end(), escaped_open, '(');
    std::replace(segment.begin(), segment.end(), escaped_close, ')');
    std::replace(segment.begin(), segment.end(), '\n', ' ');
    for (std::size_t begin = 0; begin < segment.size() && !full;) {
      const std::size_t end = std::min(segment.find(' ', begin), segment.size());
      const std::vector<std::int32_t> word =
          tokenizer.encode(std::string_view(segment).substr(begin, end - begin));
      begin = end + 1;
      full = ids.size() + word.size() > limit;
      const std::size_t count = !full ? word.size() : word.size() >= may_be_cut ? limit - ids.size() : 0;
      ids.insert(ids.end(), word.begin(), word.begin() + static_cast<Index>(count));
    }
  }
  ids.push_back(tokenizer.eos_id());
  ids.resize(static_cast<std::size_t>(length), pad);
  return ids;
}

template <class T>
Conditioning<T> encode_prompts(Runtime& rt, const TextSources& sources, std::span<const std::string> prompts,
                               Index context_width, Index pooled_width, const ConditioningOptions& options) {
  constexpr Index clip_tokens = 77;
  const Index batch = static_cast<Index>(prompts.size());
  Index t5_tokens = options.official ? clip_tokens : options.t5_tokens;
  if (batch < 1 || t5_tokens < 1) throw std::runtime_error("no prompt, or no T5 token, to encode");

  // T5 is by far the largest: it comes first, when nothing else is held.
  Tensor<T> t5;
  if (!sources.t5.empty()) {
    t5 = run_t5<T>(rt, sources, prompts, options);
    t5_tokens = t5.extent(1);
    if (t5.extent(2) != context_width)
      wrong_width(name(Component::t5), "channels", t5.extent(2), context_width);
  }
  const ClipRows<T> l = run_clip<T>(rt, sources, Component::clip_l, prompts, options);
  const ClipRows<T> g = run_clip<T>(rt, sources, Component::clip_g, prompts, options);

  // Where L is missing, its place is what G leaves of the pooled width.
  const Index l_width = !l.pooled.empty()  ? l.pooled.extent(2)
                        : g.pooled.empty() ? 0
                                           : pooled_width - g.pooled.extent(2);
  const Index l_channels = l.hidden.empty() ? l_width : l.hidden.extent(2);
  const Index g_width = g.pooled.empty() ? pooled_width - l_width : g.pooled.extent(2);
  const Index g_channels = g.hidden.empty() ? 0 : g.hidden.extent(2);
  if (l_width < 0 || g_width < 0 || l_width + g_width != pooled_width)
    wrong_width("CLIP text encoders", "pooled channels", l_width + g_width, pooled_width);
  if (l_channels + g_channels > context_width)
    wrong_width("CLIP text encoders", "channels", l_channels + g_channels, context_width);
  for (const ClipRows<T>* clip : {&l, &g})
    if (!clip->hidden.empty() && clip->hidden.extent(1) != clip_tokens)
      wrong_width("CLIP text encoders", "positions", clip->hidden.extent(1), clip_tokens);

  Conditioning<T> result{Tensor<T>::zeros({batch, clip_tokens + t5_tokens, context_width}),
                         Tensor<T>::zeros({batch, 1, pooled_width})};
  if (!l.hidden.empty()) {
    place(l.hidden, result.context, 0, 0);
    place(l.pooled, result.pooled, 0, 0);
  }
  if (!g.hidden.empty()) {
    place(g.hidden, result.context, 0, l_channels);
    place(g.pooled, result.pooled, 0, l_width);
  }
  if (!t5.empty()) place(t5, result.context, clip_tokens, 0);
  return result;
}

template Conditioning<float> encode_prompts<float>(Runtime&, const TextSources&, std::span<const std::string>,
                                                   Index, Index, const ConditioningOptions&);
template Conditioning<double> encode_prompts<double>(Runtime&, const TextSources&,
                                                     std::span<const std::string>, Index, Index,
                                                     const ConditioningOptions&);

}  // namespace sd35

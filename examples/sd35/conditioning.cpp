#include "conditioning.hpp"

#include <algorithm>
#include <charconv>
#include <map>
#include <optional>
#include <stdexcept>
#include <utility>

#include "checkpoint.hpp"
#include "clip_text.hpp"
#include "nn/finite.hpp"
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

// A sentinel of T5 may lack its row in the embedding, which embed() says of the prompt that names it.
void check_ids(const fs::path& tokenizer, std::int32_t ids, Component encoder, Index rows) {
  if (ids > rows)
    throw std::runtime_error(tokenizer.string() + ": the tokenizer has " + std::to_string(ids) +
                             " ids, but the token embedding of the " + std::string(name(encoder)) + " has " +
                             std::to_string(rows) + " rows");
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

// Sample b of (batch, rows, channels), in memory of its own.
template <class T>
Tensor<T> take_sample(const Tensor<T>& source, Index b) {
  const auto from = source.template view<3>();
  Tensor<T> sample({1, from.extent(1), from.extent(2)});
  std::copy_n(from.pointer(b), sample.elements(), sample.data());
  return sample;
}

// f(), in whose errors the encoder comes first.
template <class F>
auto in_encoder(const Checkpoint& checkpoint, Component component, const F& f) {
  return with_weights_of(checkpoint, [&] { return in_stage(std::string(name(component)), f); });
}

template <class T>
struct ClipFeature {
  Tensor<T> hidden, pooled;  // (1, tokens, channels), (1, 1, width)
};

// The features of each text; none where the encoder is missing. Every text is encoded alone: the order of the
// sums in a product depends on its rows, and no text is to depend on the others.
template <class T>
std::vector<ClipFeature<T>> run_clip(Runtime& rt, const TextSources& sources, Component component,
                                     std::span<const std::string> texts, const ConditioningOptions& options) {
  const bool large = component == Component::clip_l;
  const fs::path& path = large ? sources.clip_l : sources.clip_g;
  if (path.empty()) return {};
  if (options.on_encoder) options.on_encoder(name(component));

  // Both models share a vocabulary; CLIP-L is padded with the end token, CLIP-G with id 0.
  const fs::path folder = tokenizer_folder(sources.tokenizers, large ? "tokenizer" : "tokenizer_2",
                                           name(component), {"merges.txt", "tokenizer.json"});
  const ClipTokenizer tokenizer = ClipTokenizer::load(folder);
  std::error_code ignored;
  const bool own_folder = fs::is_directory(sources.tokenizers / "tokenizer_2", ignored);
  const std::int32_t pad = large        ? tokenizer.pad_id().value_or(tokenizer.eos_id())
                           : own_folder ? tokenizer.pad_id().value_or(0)
                                        : 0;

  const Checkpoint checkpoint = Checkpoint::open(path, component);
  const ClipText<T> model(checkpoint, ClipConfig::of(checkpoint, component));
  check_ids(folder, tokenizer.vocab_size(), component, model.config().vocabulary);
  const Index length = model.config().positions;
  std::vector<ClipFeature<T>> result;
  for (const std::string& text : texts) {
    const std::vector<std::int32_t> ids = options.official
                                              ? official_clip_ids(tokenizer, text, pad, length)
                                              : tokenizer.encode_padded(text, static_cast<int>(length), pad);
    ClipFeatures<T> features = in_encoder(checkpoint, component, [&] { return model.encode(rt, ids, 1); });
    result.push_back({std::move(features.hidden),
                      std::move(model.config().project ? features.projected : features.pooled)});
  }
  return result;
}

// T5's features of the texts of each group, padded to one length: by length and text.
template <class T>
using T5Features = std::map<std::pair<std::size_t, std::string>, Tensor<T>>;

template <class T>
struct T5Rows {
  T5Features<T> features;
  std::vector<std::size_t> lengths;  // of each group
};

template <class T>
T5Rows<T> run_t5(Runtime& rt, const TextSources& sources, std::span<const Prompts> groups,
                 const ConditioningOptions& options) {
  // A pass reads all of the weights: so many texts share one that their activations stay below 1 GB. Few rows
  // are summed in another order, see run_clip, which the official way can come to.
  const std::size_t texts_at_once = options.official ? 1 : 16;
  if (options.on_encoder) options.on_encoder(name(Component::t5));
  const fs::path folder = tokenizer_folder(sources.tokenizers, "tokenizer_3", name(Component::t5),
                                           {"spiece.model", "tokenizer.json"});
  const T5Tokenizer tokenizer = T5Tokenizer::load(folder);
  const Checkpoint checkpoint = Checkpoint::open(sources.t5, Component::t5);
  const T5Encoder<T> model(checkpoint);
  check_ids(folder, tokenizer.pieces(), Component::t5, model.vocabulary());
  const auto encode = [&](const std::string& text) {
    return options.official ? tokenizer.encode(first_characters(text, 226))
                            : tokenizer.encode_padded(text, static_cast<int>(options.t5_tokens));
  };

  T5Rows<T> rows;
  for (const Prompts& group : groups) {
    std::size_t length = options.official ? 77 : 0;
    for (const std::string& text : group) length = std::max(length, encode(text).size());
    for (const std::string& text : group) rows.features[{length, text}];
    rows.lengths.push_back(length);
  }
  for (auto first = rows.features.begin(); first != rows.features.end();) {
    std::vector<std::int32_t> ids;
    std::size_t count = 0;
    const std::size_t length = first->first.first;
    auto last = first;
    for (; last != rows.features.end() && count < texts_at_once && last->first.first == length;
         ++last, ++count) {
      std::vector<std::int32_t> row = encode(last->first.second);
      row.resize(length, T5Tokenizer::pad_id);
      ids.insert(ids.end(), row.begin(), row.end());
    }
    const Tensor<T> hidden = in_encoder(checkpoint, Component::t5,
                                        [&] { return model.encode(rt, ids, static_cast<Index>(count)); });
    for (Index b = 0; first != last; ++first, ++b) first->second = take_sample(hidden, b);
  }
  return rows;
}

// Copies (1, rows, channels) into a part of sample b of the target.
template <class T>
void place(const Tensor<T>& source, Tensor<T>& target, Index b, Index first_row, Index first_channel) {
  const auto from = source.template view<3>();
  const auto to = target.template view<3>();
  for (Index r = 0; r < from.extent(1); ++r)
    std::copy_n(from.pointer(0, r), from.extent(2), to.pointer(b, first_row + r, first_channel));
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
std::vector<Conditioning<T>> encode_prompts(Runtime& rt, const TextSources& sources,
                                            std::span<const Prompts> groups, Index context_width,
                                            Index pooled_width, const ConditioningOptions& options) {
  constexpr Index clip_tokens = 77;
  std::vector<std::string> texts;  // that differ
  for (const Prompts& group : groups) texts.insert(texts.end(), group.begin(), group.end());
  std::sort(texts.begin(), texts.end());
  texts.erase(std::unique(texts.begin(), texts.end()), texts.end());
  if (std::any_of(groups.begin(), groups.end(), [](const Prompts& group) { return group.empty(); }) ||
      texts.empty() || options.t5_tokens < 1)
    throw std::runtime_error("no prompt, or no T5 token, to encode");

  // T5 is by far the largest: it comes first, when nothing else is held.
  T5Rows<T> t5;
  if (!sources.t5.empty()) {
    t5 = run_t5<T>(rt, sources, groups, options);
    if (const Index width = t5.features.begin()->second.extent(2); width != context_width)
      wrong_width(name(Component::t5), "channels", width, context_width);
  }
  const std::vector<ClipFeature<T>> l = run_clip<T>(rt, sources, Component::clip_l, texts, options);
  const std::vector<ClipFeature<T>> g = run_clip<T>(rt, sources, Component::clip_g, texts, options);

  // Where L is missing, its place is what G leaves of the pooled width.
  const Index l_width = !l.empty()  ? l[0].pooled.extent(2)
                        : g.empty() ? 0
                                    : pooled_width - g[0].pooled.extent(2);
  const Index l_channels = l.empty() ? l_width : l[0].hidden.extent(2);
  const Index g_width = g.empty() ? pooled_width - l_width : g[0].pooled.extent(2);
  const Index g_channels = g.empty() ? 0 : g[0].hidden.extent(2);
  if (l_width < 0 || g_width < 0 || l_width + g_width != pooled_width)
    wrong_width("CLIP text encoders", "pooled channels", l_width + g_width, pooled_width);
  if (l_channels + g_channels > context_width)
    wrong_width("CLIP text encoders", "channels", l_channels + g_channels, context_width);
  for (const auto* clip : {&l, &g})
    if (!clip->empty() && (*clip)[0].hidden.extent(1) != clip_tokens)
      wrong_width("CLIP text encoders", "positions", (*clip)[0].hidden.extent(1), clip_tokens);

  std::vector<Conditioning<T>> results;
  for (std::size_t i = 0; i < groups.size(); ++i) {
    const Index batch = static_cast<Index>(groups[i].size());
    const Index t5_tokens = !t5.lengths.empty() ? static_cast<Index>(t5.lengths[i])
                            : options.official  ? clip_tokens
                                                : options.t5_tokens;
    Conditioning<T> result{Tensor<T>::zeros({batch, clip_tokens + t5_tokens, context_width}),
                           Tensor<T>::zeros({batch, 1, pooled_width})};
    for (Index b = 0; b < batch; ++b) {
      const std::string& text = groups[i][static_cast<std::size_t>(b)];
      const auto at =
          static_cast<std::size_t>(std::lower_bound(texts.begin(), texts.end(), text) - texts.begin());
      if (!l.empty()) {
        place(l[at].hidden, result.context, b, 0, 0);
        place(l[at].pooled, result.pooled, b, 0, 0);
      }
      if (!g.empty()) {
        place(g[at].hidden, result.context, b, 0, l_channels);
        place(g[at].pooled, result.pooled, b, 0, l_width);
      }
      if (!t5.lengths.empty())
        place(t5.features.at({t5.lengths[i], text}), result.context, b, clip_tokens, 0);
    }
    results.push_back(std::move(result));
  }
  return results;
}

template std::vector<Conditioning<float>> encode_prompts<float>(Runtime&, const TextSources&,
                                                                std::span<const Prompts>, Index, Index,
                                                                const ConditioningOptions&);
template std::vector<Conditioning<double>> encode_prompts<double>(Runtime&, const TextSources&,
                                                                  std::span<const Prompts>, Index, Index,
                                                                  const ConditioningOptions&);

}  // namespace sd35

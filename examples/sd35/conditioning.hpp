// Prompts to what the transformer is conditioned on: the features of three text encoders, assembled.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "clip_tokenizer.hpp"
#include "nn/runtime.hpp"

namespace sd35 {

using namespace nn;  // what the examples share

struct TextSources {
  // What Checkpoint::open takes; an empty path is an encoder that is missing.
  std::filesystem::path clip_l, clip_g, t5;
  // A folder with tokenizer/, tokenizer_2/ and tokenizer_3/, as diffusers writes it, or with merges.txt and
  // spiece.model themselves.
  std::filesystem::path tokenizers;
};

struct ConditioningOptions {
  Index t5_tokens = 256;  // prompts are cut and padded to this many, as diffusers does
  bool official = false;  // the official code's way instead: see encode_prompts
  // Called with the name of each encoder before it is loaded.
  std::function<void(std::string_view encoder)> on_encoder{};
};

template <class T>
struct Conditioning {
  Tensor<T> context;  // (prompts, CLIP tokens + T5 tokens, context width)
  Tensor<T> pooled;   // (prompts, 1, pooled width)
};

// What goes through the transformer together: a prompt, and with guidance its negative prompt.
using Prompts = std::vector<std::string>;

// A conditioning for each group of prompts, a row a prompt. Rows of context: first the tokens of CLIP, channels
// L | G | zeros, then those of T5. pooled is L | G. An encoder that is missing leaves zeros in its place. The
// encoders are loaded one after the other, run on every prompt that differs, and are released. The widths are
// those that the transformer takes. A group gets the same bits whatever others come with it.
// The official way: T5 gets max(77, tokens) of the prompt's first 226 characters (the prompts of a group are padded
// to the longest), and CLIP official_clip_ids.
// Throws std::runtime_error where a file is missing or does not fit the widths.
template <class T>
[[nodiscard]] std::vector<Conditioning<T>> encode_prompts(Runtime& rt, const TextSources& sources,
                                                          std::span<const Prompts> groups,
                                                          Index context_width, Index pooled_width,
                                                          const ConditioningOptions& options = {});
// Of one group.
template <class T>
[[nodiscard]] Conditioning<T> encode_prompts(Runtime& rt, const TextSources& sources, const Prompts& prompts,
                                             Index context_width, Index pooled_width,
                                             const ConditioningOptions& options = {}) {
  return std::move(
      encode_prompts<T>(rt, sources, std::span(&prompts, 1), context_width, pooled_width, options).front());
}

// The ids that the official code gives CLIP for a row of `length`: `(text:1.3)` loses its parentheses and its
// weight (`\(` and `\)` are plain), the text is cut at spaces, and each word is tokenized alone. Words fill
// the row, the first that does not fit ends it; one of eight tokens or more fills what is left.
[[nodiscard]] std::vector<std::int32_t> official_clip_ids(const ClipTokenizer& tokenizer,
                                                          std::string_view text, std::int32_t pad,
                                                          Index length = 77);

}  // namespace sd35

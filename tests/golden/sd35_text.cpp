// clip_text and t5_encoder: token ids in, features and layers out. Tensors come in sets, `in.tokens77` with
// `out.hidden77` and `mid77.block0`; the suffix may be empty.
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "expect.hpp"
#include "golden.hpp"
#include "sd35.hpp"
#include "sd35/clip_text.hpp"
#include "sd35/t5_encoder.hpp"

namespace {

using golden::Case;
using golden::Index;
using golden::TensorView;
using golden::variant;

constexpr double single = 5e-6;

struct Tokens {
  std::string suffix;
  Index batch = 0;
  std::vector<std::int32_t> ids;
};

std::vector<Tokens> token_sets(Case& c) {
  static const std::string prefix = "in.tokens";
  std::vector<Tokens> sets;
  for (const std::string& name : c.names())
    if (name.starts_with(prefix)) {
      std::vector<std::int32_t> ids = golden::read_integers(c, name, {golden::any, golden::any});
      sets.push_back({name.substr(prefix.size()), c.file().find(name)->shape[0], std::move(ids)});
    }
  if (sets.empty()) throw std::runtime_error("tensor 'in.tokens' is missing");
  return sets;
}

// Checks the results of a set that are recorded; `hidden` and `pooled` must be.
template <class T>
struct Results {
  Case& c;
  std::string suffix;

  void check(const std::string& name, const sd35::Tensor<T>& ours) const {
    const std::string full = "out." + name + suffix;
    if (c.has(full) || name == "hidden" || name == "pooled")
      c.check(full, variant<T>, ours.template view<3>(), golden::model_tolerance<T>(single));
  }
  [[nodiscard]] sd35::Observer<T> layers() const {
    return [this](const std::string& name, const TensorView<const T, 3>& values) {
      const std::string full = "mid" + suffix + "." + name;
      if (c.has(full)) c.check(full, variant<T>, values, golden::model_tolerance<T>(single));
    };
  }
};

template <class T>
void run_clip(Case& c) {
  const bool large = c.meta("module", "").find("ClipG") == std::string::npos;
  const auto component = large ? sd35::Component::clip_l : sd35::Component::clip_g;
  const golden::Parameters parameters(c);
  const sd35::Checkpoint checkpoint = golden::open_checkpoint(c, parameters, component);
  const nlohmann::json json = parameters.config();
  sd35::ClipConfig config = sd35::ClipConfig::of(checkpoint, component);
  config.heads = json.value("num_attention_heads", config.heads);
  if (config.heads < 1 || config.width % config.heads != 0)
    throw std::runtime_error("metadata 'config': " + std::to_string(config.width) +
                             " channels do not divide into " + std::to_string(config.heads) + " heads");
  const std::string activation = json.value("hidden_act", large ? "quick_gelu" : "gelu");
  config.activation = sd35::clip_activation(activation);
  const sd35::ClipText<T> model(checkpoint, config);

  sd35::Runtime rt;
  for (const Tokens& set : token_sets(c)) {
    const Results<T> results{c, set.suffix};
    const sd35::ClipFeatures<T> features = model.encode(rt, set.ids, set.batch, results.layers());
    results.check("hidden", features.hidden);
    results.check("last_hidden_ln", features.last_hidden);
    results.check("pooled", model.pooled(features));
    results.check("pooled_unprojected", features.pooled);
    if (!features.projected.empty()) results.check("pooled_projected", features.projected);
  }
}

template <class T>
void run_t5(Case& c) {
  const golden::Parameters parameters(c);
  const sd35::T5Encoder<T> model(golden::open_checkpoint(c, parameters, sd35::Component::t5));
  sd35::Runtime rt;
  for (const Tokens& set : token_sets(c)) {
    const Results<T> results{c, set.suffix};
    results.check("hidden", model.encode(rt, set.ids, set.batch, results.layers()));
  }
}

void run_clip_text(Case& c) {
  run_clip<float>(c);
  run_clip<double>(c);
}

void run_t5_encoder(Case& c) {
  run_t5<float>(c);
  run_t5<double>(c);
  // Real files hold the embedding twice, too.
  const char *const shared = "shared.weight", *const embedding = "encoder.embed_tokens.weight";
  if (c.has(shared) && c.has(embedding))
    c.expect(c.read(shared).values == c.read(embedding).values, "both copies of the embedding are equal");
  if (c.has("out.rel")) {
    golden::Tensor buckets{c.file().find("out.rel")->shape, {}};
    for (const std::int32_t distance : golden::read_integers(c, "out.rel", {golden::any}))
      buckets.values.push_back(static_cast<double>(sd35::t5_bucket(distance)));
    c.check("out.rel_bucket", "exact", buckets, {golden::Norm::scaled_max, 0.0});
  }
}

const golden::Registration clip_registration({"clip_text"}, run_clip_text);
const golden::Registration t5_registration({"t5_encoder"}, run_t5_encoder);

}  // namespace

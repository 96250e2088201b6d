// Golden op mmditx: the transformer, its intermediates and its two results.
//
// out.* and mid.* belong to the official code with its float32 sinusoid, which mid.t_freq holds and which we
// feed in; outx.* and midx.* to a sinusoid in double, for which ours is taken.
#include <cmath>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "activations.hpp"
#include "golden.hpp"
#include "sd35.hpp"
#include "sd35/embeddings.hpp"
#include "sd35/mmdit.hpp"
#include "sd35_mmdit.hpp"

namespace {

using golden::Case;
using golden::Norm;
using golden::Tolerance;
using linattn::Index;
using linattn::TensorView;

// The inside of an attention, which the layer keeps to itself, from what goes into it: q and k after the
// qk-norm, and the result before its projection. Text rows come first.
template <class T>
class Inside {
 public:
  Inside(const sd35::Checkpoint& checkpoint, const sd35::MmditConfig& config)
      : checkpoint_(checkpoint), config_(config) {}

  struct Input {
    std::string module;
    TensorView<const T, 3> tokens;
  };
  struct Result {
    sd35::Tensor<T> q, k, attended;
  };
  Result operator()(sd35::Runtime& rt, const std::vector<Input>& inputs) const {
    Index tokens = 0;
    for (const Input& input : inputs) tokens += input.tokens.extent(1);
    const std::vector<Index> shape{inputs[0].tokens.extent(0), tokens, config_.width};
    Result result{sd35::Tensor<T>(shape), sd35::Tensor<T>(shape), sd35::Tensor<T>(shape)};
    sd35::Tensor<T> v(shape);
    Index first = 0;
    for (const Input& input : inputs) {
      const auto part = [&](sd35::Tensor<T>& all) {
        return slice<1>(all.template view<3>(), first, input.tokens.extent(1));
      };
      project(rt, input, ".q", ".ln_q", part(result.q));
      project(rt, input, ".k", ".ln_k", part(result.k));
      project(rt, input, ".v", nullptr, part(v));
      first += input.tokens.extent(1);
    }
    const auto heads = [&](sd35::Tensor<T>& all) {
      return split_heads(all.template view<3>(), config_.heads);
    };
    sd35::attention<T>(rt, "attention", heads(result.q), heads(result.k), heads(v), heads(result.attended));
    return result;
  }

 private:
  void project(sd35::Runtime& rt, const Input& input, const char* projection, const char* norm,
               TensorView<T, 3> out) const {
    sd35::linear<T>(rt, input.tokens,
                    checkpoint_.linear<T>(input.module + projection, config_.width, config_.width), out);
    if (!config_.qk_norm || norm == nullptr) return;
    const Index d = config_.head_dim();
    const std::vector<T> weight = checkpoint_.vector<T>(input.module + norm + ".weight", d);
    for (Index b = 0; b < out.extent(0); ++b)
      for (Index row = 0; row < out.extent(1); ++row)
        for (Index head = 0; head < config_.heads; ++head) {
          T* const values = out.pointer(b, row, head * d);
          T squares = 0;
          for (Index i = 0; i < d; ++i) squares += values[i] * values[i];
          const T factor = 1 / std::sqrt(squares / static_cast<T>(d) + T(1e-6));
          for (Index i = 0; i < d; ++i) values[i] *= factor * weight[static_cast<std::size_t>(i)];
        }
  }

  const sd35::Checkpoint& checkpoint_;
  const sd35::MmditConfig& config_;
};

template <class T>
void run_as(Case& c, const sd35::Checkpoint& checkpoint, const sd35::MmditConfig& config,
            const std::vector<int>& skip) {
  const sd35::Mmdit<T> model(checkpoint, config);
  const Inside<T> inside(checkpoint, model.config());
  const char* const variant = golden::variant<T>;
  constexpr bool exact = std::is_same_v<T, double>;
  sd35::Runtime rt;
  const sd35::Tensor<T> x = golden::rounded<T>(golden::read_latents(c, "in.x", config));
  const Index count = x.extent(0), time_width = config.time_width;
  const sd35::Tensor<T> y = golden::load<T>(c, "in.y", {count, config.pooled_width}),
                        context =
                            golden::load<T>(c, "in.context", {count, golden::any, config.context_width});
  const golden::Tensor times = golden::read(c, "in.t", {count});
  sd35::Tensor<T> own({count, time_width});
  for (Index i = 0; i < count; ++i)
    sd35::timestep_embedding<T>(times.values[static_cast<std::size_t>(i)],
                                {own.data() + i * time_width, static_cast<std::size_t>(time_width)});
  const TensorView<const T, 2> own_sinusoid = std::as_const(own).template view<2>();

  const auto forward = [&](TensorView<const T, 2> sinusoid, const std::string& mid, const std::string& out,
                           double tolerance) {
    const Tolerance within{Norm::scaled_max, exact ? tolerance : 1e-5};
    const auto check = [&](const std::string& name, const TensorView<const T, 3>& values) {
      if (c.has(mid + name)) c.check(mid + name, variant, values, within);
    };
    TensorView<const T, 3> text;  // seen just before the image
    const sd35::Observer<T> observe = [&](const std::string& name, const TensorView<const T, 3>& values) {
      check(name, values);
      const std::size_t dot = name.find('.');
      if (dot == std::string::npos || !name.starts_with("block")) return;
      const std::string block = name.substr(0, dot + 1), what = name.substr(dot + 1);
      const std::string module = "joint_blocks." + block.substr(5);
      if (what == "attn.context") {
        text = values;
      } else if (what == "attn.x") {
        const auto joint =
            inside(rt, {{module + "context_block.attn", text}, {module + "x_block.attn", values}});
        check(block + "joint_q", joint.q.template view<3>());
        check(block + "joint_k", joint.k.template view<3>());
        check(block + "joint_attn", joint.attended.template view<3>());
      } else if (what == "attn2.x") {
        const auto second = inside(rt, {{module + "x_block.attn2", values}});
        check(block + "attn2_q", second.q.template view<3>());
        check(block + "attn2_k", second.k.template view<3>());
        check(block + "attn2", second.attended.template view<3>());
      }
    };
    sd35::Tensor<T> v({x.extent(0), model.config().out_channels, x.extent(2), x.extent(3)});
    const auto predict = [&](const std::string& name, std::span<const int> blocks,
                             const sd35::Observer<T>& see) {
      const sd35::Modulations<T> modulations =
          model.modulate(rt, sinusoid, std::as_const(y).template view<2>(), see);
      const sd35::Tensor<T> embedded = model.embed_context(rt, context.template view<3>(), see);
      model.forward(rt, x.template view<4>(), embedded.template view<3>(), modulations, 0, blocks,
                    v.template view<4>(), see);
      if (c.has(out + name)) c.check(out + name, variant, v.template view<4>(), within);
    };
    predict("v", {}, observe);
    if (c.has(out + "v_skip")) predict("v_skip", skip, {});
  };

  const Tolerance sinusoid_error{Norm::scaled_max, 1e-4};
  if (c.has("midx.t_freq"))
    c.check("midx.t_freq", variant, own_sinusoid,
            exact ? Tolerance{Norm::scaled_max, 1e-11} : sinusoid_error);
  forward(own_sinusoid, "midx.", "outx.", 1e-11);
  if (c.has("mid.t_freq")) {
    c.check("mid.t_freq", variant, own_sinusoid, sinusoid_error);
    const sd35::Tensor<T> official = golden::load<T>(c, "mid.t_freq", {count, time_width});
    forward(official.template view<2>(), "mid.", "out.", 1e-11);
  } else {
    forward(own_sinusoid, "mid.", "out.", 1e-5);
  }
}

void run(Case& c) {
  const golden::Parameters parameters(c);
  const sd35::Checkpoint checkpoint = golden::open_transformer(c, parameters);
  const nlohmann::json json = parameters.config();
  const sd35::MmditConfig config = golden::transformer_config(checkpoint, json);
  std::vector<int> skip;
  if (json.contains("skip_layers")) skip = json["skip_layers"].get<std::vector<int>>();
  run_as<float>(c, checkpoint, config, skip);
  run_as<double>(c, checkpoint, config, skip);
}

const golden::Registration registration({"mmditx"}, run);

}  // namespace

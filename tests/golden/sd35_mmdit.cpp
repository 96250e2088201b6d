// Golden op mmditx: the transformer, its intermediates and its two results.
//
// out.* and mid.* belong to the official code with its float32 sinusoid, which mid.t_freq holds and which we
// feed in; outx.* and midx.* to a sinusoid in double, for which ours is taken.
#include <span>
#include <string>
#include <utility>
#include <vector>

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

template <class T>
sd35::Tensor<T> load(Case& c, const std::string& name) {
  const golden::Tensor recorded = c.read(name);
  sd35::Tensor<T> result(recorded.shape);
  for (std::size_t i = 0; i < recorded.values.size(); ++i)
    result.data()[i] = static_cast<T>(recorded.values[i]);
  return result;
}

template <class T>
void run_as(Case& c, const sd35::Mmdit<T>& model, const std::vector<int>& skip) {
  const char* const variant = golden::variant<T>;
  constexpr bool exact = std::is_same_v<T, double>;
  sd35::Runtime rt;
  const sd35::Tensor<T> x = load<T>(c, "in.x"), y = load<T>(c, "in.y"), context = load<T>(c, "in.context");
  const golden::Tensor times = c.read("in.t");
  const Index count = static_cast<Index>(times.values.size()), time_width = model.config().time_width;
  sd35::Tensor<T> own({count, time_width});
  for (Index i = 0; i < count; ++i)
    sd35::timestep_embedding<T>(times.values[static_cast<std::size_t>(i)],
                                {own.data() + i * time_width, static_cast<std::size_t>(time_width)});
  const TensorView<const T, 2> own_sinusoid = std::as_const(own).template view<2>();

  const auto forward = [&](TensorView<const T, 2> sinusoid, const std::string& mid, const std::string& out,
                           double tolerance) {
    const Tolerance within{Norm::scaled_max, exact ? tolerance : 1e-5};
    const sd35::Observer<T> observe = [&](const std::string& name, const TensorView<const T, 3>& values) {
      if (c.has(mid + name)) c.check(mid + name, variant, values, within);
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
    predict("v", {}, {});  // without an observer the last block leaves the text queries out
    if (c.has(out + "v_skip")) predict("v_skip", skip, {});
  };

  const Tolerance sinusoid_error{Norm::scaled_max, 1e-4};
  if (c.has("midx.t_freq"))
    c.check("midx.t_freq", variant, own_sinusoid,
            exact ? Tolerance{Norm::scaled_max, 1e-11} : sinusoid_error);
  forward(own_sinusoid, "midx.", "outx.", 1e-11);
  if (c.has("mid.t_freq")) {
    c.check("mid.t_freq", variant, own_sinusoid, sinusoid_error);
    const sd35::Tensor<T> official = load<T>(c, "mid.t_freq");
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
  run_as(c, sd35::Mmdit<float>(checkpoint, config), skip);
  run_as(c, sd35::Mmdit<double>(checkpoint, config), skip);
}

const golden::Registration registration({"mmditx"}, run);

}  // namespace

// Golden op model_dit: a DiT5, its intermediates and its output; where the case has them also forward_with_cfg.
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "activations.hpp"
#include "dit/diffusion.hpp"
#include "dit/dit.hpp"
#include "golden.hpp"
#include "sd35/embeddings.hpp"

namespace {

using golden::Case;
using golden::Norm;
using golden::Tolerance;
using linattn::Index;
using linattn::TensorView;

std::vector<std::int32_t> load_labels(Case& c, const std::string& name) {
  const golden::Tensor recorded = c.read(name);
  std::vector<std::int32_t> labels;
  for (const double label : recorded.values) labels.push_back(static_cast<std::int32_t>(label));
  return labels;
}

template <class T>
nn::Tensor<T> sinusoids(const golden::Tensor& times, Index frequencies) {
  nn::Tensor<T> result({times.extent(0), frequencies});
  for (Index i = 0; i < times.extent(0); ++i)
    sd35::timestep_embedding<T>(times.values[static_cast<std::size_t>(i)],
                                {result.data() + i * frequencies, static_cast<std::size_t>(frequencies)});
  return result;
}

template <class T>
void run_as(Case& c, const nn::Checkpoint& checkpoint) {
  constexpr const char* variant = std::is_same_v<T, double> ? "double" : "float";
  constexpr Tolerance sinusoid_error{Norm::scaled_max, 1e-4};
  constexpr Tolerance tolerance{Norm::relative_l2, std::is_same_v<T, double> ? 1.5e-7 : 2e-6};
  const dit::DitConfig config = dit::DitConfig::of(checkpoint, static_cast<Index>(c.number("heads")));
  c.expect(config.classes() == static_cast<Index>(c.number("num_classes")), "classes are num_classes");
  const dit::Dit<T> model(checkpoint, config);
  nn::Runtime rt;
  const auto predict = [&](const nn::Tensor<T>& x, const nn::Tensor<T>& frequencies,
                           std::span<const std::int32_t> labels, const nn::Observer<T>& observe) {
    nn::Tensor<T> out({x.extent(0), config.out_channels(), x.extent(2), x.extent(3)});
    const auto modulations = model.modulate(rt, frequencies.template view<2>(), labels, observe);
    model.forward(rt, x.template view<4>(), modulations, out.template view<4>(), observe);
    return out;
  };

  // The official code computes the sinusoid in float32, whatever else runs in double: its own is what is fed in.
  const nn::Tensor<T> x = golden::load<T>(c, "input"), official = golden::load<T>(c, "mid.t_freq");
  const nn::Tensor<T> own = sinusoids<T>(c.read("input.t"), config.shapes.frequencies);
  c.check("mid.t_freq", variant, own.template view<2>(), sinusoid_error);
  const nn::Tensor<T> out = predict(x, official, load_labels(c, "input.y"),
                                    [&](const std::string& name, const TensorView<const T, 3>& values) {
                                      if (c.has("mid." + name))
                                        c.check("mid." + name, variant, values, tolerance);
                                    });
  c.check("output", variant, out.template view<4>(), tolerance);

  if (!c.has("cfg.output")) return;
  // The first half of the input, twice, with and without its classes; the case has no sinusoid of its own here.
  const golden::Tensor times = c.read("cfg.t");
  const auto labels = load_labels(c, "cfg.y");
  const nn::Tensor<T> given = c.has("cfg.x") ? golden::load<T>(c, "cfg.x") : x.clone();
  const auto count = static_cast<Index>(labels.size()), half = count / 2;
  nn::Tensor<T> doubled({count, x.extent(1), x.extent(2), x.extent(3)});
  const Index elements = half * x.extent(1) * x.extent(2) * x.extent(3);
  for (Index part = 0; part < 2; ++part)
    std::copy_n(given.data(), elements, doubled.data() + part * elements);
  nn::Tensor<T> guided = predict(doubled, sinusoids<T>(times, config.shapes.frequencies), labels, {});
  const Index channels = config.out_channels(), positions = x.extent(2) * x.extent(3);
  T* const cond = guided.data();
  T* const uncond = cond + half * channels * positions;
  const nn::Tensor<T> before = guided.clone();
  dit::guide(before.data(), before.data() + (uncond - cond), c.number("cfg_scale"), half, channels, positions,
             cond);
  dit::guide(before.data(), before.data() + (uncond - cond), c.number("cfg_scale"), half, channels, positions,
             uncond);
  c.check("cfg.output", variant, std::as_const(guided).template view<4>(), sinusoid_error);
}

void run(Case& c) {
  nn::Checkpoint checkpoint = nn::Checkpoint::open(c.path(), "param.");
  checkpoint.on_load = [&c](const std::string& tensor) { c.use(tensor); };
  run_as<float>(c, checkpoint);
  run_as<double>(c, checkpoint);
}

const golden::Registration registration({"model_dit"}, run);

}  // namespace

// Golden op model_dit: a DiT5, its intermediates and its output; where the case has them also forward_with_cfg.
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "activations.hpp"
#include "dit/diffusion.hpp"
#include "dit/dit.hpp"
#include "expect.hpp"
#include "golden.hpp"
#include "sd35/embeddings.hpp"

namespace {

using golden::Case;
using golden::Norm;
using golden::Tolerance;
using linattn::Index;
using linattn::TensorView;

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
  const dit::DitConfig config = dit::DitConfig::of(checkpoint, golden::extent(c, "heads"));
  c.expect(config.classes() == golden::extent(c, "num_classes"), "classes are num_classes");
  const dit::Dit<T> model(checkpoint, config);
  nn::Runtime rt;
  const auto predict = [&](const nn::Tensor<T>& x, const nn::Tensor<T>& frequencies,
                           std::span<const std::int32_t> labels, const nn::Observer<T>& observe) {
    nn::Tensor<T> out({x.extent(0), config.out_channels(), x.extent(2), x.extent(3)});
    const auto modulations = model.modulate(rt, frequencies.template view<2>(), labels, observe);
    model.forward(rt, x.template view<4>(), modulations, out.template view<4>(), observe);
    return out;
  };

  using golden::any;
  const nn::Tensor<T> x = golden::load<T>(c, "input", {any, config.shapes.channels, any, any});
  const Index batch = x.extent(0), frequencies = config.shapes.frequencies;
  // The official code computes the sinusoid in float32, whatever else runs in double: its own is what is fed in.
  const nn::Tensor<T> official = golden::load<T>(c, "mid.t_freq", {batch, frequencies});
  const nn::Tensor<T> own = sinusoids<T>(golden::read(c, "input.t", {batch}), frequencies);
  c.check("mid.t_freq", variant, own.template view<2>(), sinusoid_error);
  const nn::Tensor<T> out = predict(x, official, golden::read_integers(c, "input.y", {batch}),
                                    [&](const std::string& name, const TensorView<const T, 3>& values) {
                                      if (c.has("mid." + name))
                                        c.check("mid." + name, variant, values, tolerance);
                                    });
  c.check("output", variant, out.template view<4>(), tolerance);

  if (!c.has("cfg.output")) return;
  // The first half of the input, twice, with and without its classes; the case has no sinusoid of its own here.
  const golden::Tensor times = golden::read(c, "cfg.t", {any});
  const Index count = times.extent(0), half = count / 2;
  const auto labels = golden::read_integers(c, "cfg.y", {count});
  const nn::Tensor<T> given =
      c.has("cfg.x") ? golden::load<T>(c, "cfg.x", {any, x.extent(1), x.extent(2), x.extent(3)}) : x.clone();
  if (count % 2 != 0 || given.extent(0) < half)
    throw std::runtime_error("tensor 'cfg.t' has " + std::to_string(count) +
                             " times, expected two for each latent of at most " +
                             std::to_string(given.extent(0)));
  nn::Tensor<T> doubled({count, x.extent(1), x.extent(2), x.extent(3)});
  const Index elements = half * x.extent(1) * x.extent(2) * x.extent(3);
  for (Index part = 0; part < 2; ++part)
    std::copy_n(given.data(), elements, doubled.data() + part * elements);
  nn::Tensor<T> guided = predict(doubled, sinusoids<T>(times, frequencies), labels, {});
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

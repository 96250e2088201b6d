#include "sampling.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

#include "nn/finite.hpp"
#include "sd35/embeddings.hpp"

namespace dit {
namespace {

// The next `count` numbers of the generator.
template <class T>
std::vector<T> normal(linattn::TorchGenerator& generator, Index count) {
  std::vector<float> values(static_cast<std::size_t>(count));
  generator.normal(values);
  return {values.begin(), values.end()};
}

}  // namespace

template <class T>
Sampling<T>::Sampling(const Dit<T>& model, std::span<const std::int32_t> classes, Index height, Index width,
                      const SamplingOptions& options)
    : model_(model),
      diffusion_(options.method, options.steps),
      cfg_scale_(options.cfg_scale),
      generator_(options.seed),
      labels_(classes.begin(), classes.end()) {
  const DitConfig& config = model.config();
  if (classes.empty()) throw std::runtime_error("no class was given");
  for (const std::int32_t label : classes)
    if (label < 0 || label >= config.classes())
      throw std::runtime_error("class " + std::to_string(label) + ": the model has classes 0 to " +
                               std::to_string(config.classes() - 1));
  if (!std::isfinite(options.cfg_scale)) throw std::runtime_error("cfg scale: a number is needed");
  const Index samples = static_cast<Index>(classes.size()), channels = config.shapes.channels;
  model.expect_size(height, width);

  if (cfg_scale_ > 1) labels_.resize(2 * classes.size(), static_cast<std::int32_t>(config.no_class()));
  const auto batch = static_cast<Index>(labels_.size());
  x_ = Tensor<T>({samples, channels, height, width});
  output_ = Tensor<T>({batch, config.out_channels(), height, width});
  const std::vector<T> start = normal<T>(generator_, x_.elements());
  std::copy(start.begin(), start.end(), x_.data());
}

template <class T>
void Sampling<T>::step(Runtime& rt) {
  const DitConfig& config = model_.config();
  const auto batch = static_cast<Index>(labels_.size()), samples = x_.extent(0);
  const Index channels = config.shapes.channels, outputs = config.out_channels(),
              frequencies = config.shapes.frequencies, positions = x_.extent(2) * x_.extent(3);

  Tensor<T> sinusoids({batch, frequencies});
  for (Index b = 0; b < batch; ++b)
    sd35::timestep_embedding<T>(diffusion_.time(step_),
                                {sinusoids.data() + b * frequencies, static_cast<std::size_t>(frequencies)});
  const std::string stage = "transformer", number = step_text(step_);
  const Modulations<T> modulations = in_stage(
      stage, [&] { return model_.modulate(rt, std::as_const(sinusoids).template view<2>(), labels_); },
      number);
  Tensor<T> input({batch, channels, x_.extent(2), x_.extent(3)});
  for (Index first = 0; first < batch; first += samples)
    std::copy_n(x_.data(), x_.elements(), input.data() + first * channels * positions);
  in_stage(
      stage,
      [&] {
        model_.forward(rt, std::as_const(input).template view<4>(), modulations, output_.template view<4>());
      },
      number);
  const auto expect = [&](const std::string& place, const Tensor<T>& values) {
    expect_finite<T>(place + number, {values.data(), static_cast<std::size_t>(values.elements())});
  };
  T* const output = output_.data();
  if (batch > samples) {
    guide(output, output + samples * outputs * positions, cfg_scale_, samples, outputs, positions, output);
    expect("guidance", output_);
  }

  std::vector<T> fresh;
  if (diffusion_.method() == Method::ddpm) fresh = normal<T>(generator_, batch * channels * positions);
  const auto size = static_cast<std::size_t>(channels * positions);
  for (Index b = 0; b < samples; ++b) {
    const T* const noise = output + b * outputs * positions;
    diffusion_.advance(step_, {noise, size}, {noise + size, config.learns_variance() ? size : 0},
                       fresh.empty() ? std::span<const T>()
                                     : std::span<const T>(fresh.data() + b * channels * positions, size),
                       {x_.data() + b * channels * positions, size});
  }
  expect("sampler", x_);
  ++step_;
}

template class Sampling<float>;
template class Sampling<double>;

}  // namespace dit

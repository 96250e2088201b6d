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

  x_ = Tensor<T>({samples, channels, height, width});
  const std::vector<T> start = normal<T>(generator_, x_.elements());
  std::copy(start.begin(), start.end(), x_.data());
}

template <class T>
void Sampling<T>::step(Runtime& rt) {
  const DitConfig& config = model_.config();
  const Index samples = x_.extent(0), height = x_.extent(2), width = x_.extent(3), positions = height * width;
  const Index channels = config.shapes.channels, outputs = config.out_channels(),
              frequencies = config.shapes.frequencies;
  const bool guided = cfg_scale_ > 1;
  const std::string stage = "transformer", number = step_text(step_);
  const auto size = static_cast<std::size_t>(channels * positions);
  std::vector<T> fresh;
  if (diffusion_.method() == Method::ddpm)
    fresh = normal<T>(generator_, (guided ? 2 : 1) * samples * channels * positions);

  for (Index first = 0; first < samples; first += at_once) {
    const Index count = std::min(at_once, samples - first), batch = guided ? 2 * count : count;
    std::vector<std::int32_t> labels(labels_.begin() + first, labels_.begin() + first + count);
    labels.resize(static_cast<std::size_t>(batch), static_cast<std::int32_t>(config.no_class()));
    T* const x = x_.data() + first * channels * positions;

    Tensor<T> sinusoids({batch, frequencies});
    for (Index b = 0; b < batch; ++b)
      sd35::timestep_embedding<T>(diffusion_.time(step_), {sinusoids.data() + b * frequencies,
                                                           static_cast<std::size_t>(frequencies)});
    Tensor<T> input({batch, channels, height, width}), output({batch, outputs, height, width});
    for (Index half = 0; half < batch; half += count)
      std::copy_n(x, count * channels * positions, input.data() + half * channels * positions);
    in_stage(
        stage,
        [&] {
          const Modulations<T> modulations =
              model_.modulate(rt, std::as_const(sinusoids).template view<2>(), labels);
          model_.forward(rt, std::as_const(input).template view<4>(), modulations, output.template view<4>());
        },
        number);
    if (guided) {
      T* const cond = output.data();
      guide(cond, cond + count * outputs * positions, cfg_scale_, count, outputs, positions, cond);
      expect_finite<T>("guidance" + number, {cond, static_cast<std::size_t>(output.elements())});
    }
    for (Index b = 0; b < count; ++b) {
      const T* const noise = output.data() + b * outputs * positions;
      diffusion_.advance(step_, {noise, size}, {noise + size, config.learns_variance() ? size : 0},
                         fresh.empty()
                             ? std::span<const T>()
                             : std::span<const T>(fresh.data() + (first + b) * channels * positions, size),
                         {x + b * channels * positions, size});
    }
    expect_finite<T>("sampler" + number, {x, static_cast<std::size_t>(count) * size});
  }
  ++step_;
}

template class Sampling<float>;
template class Sampling<double>;

}  // namespace dit

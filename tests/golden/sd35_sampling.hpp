// What the runners that sample share.
#pragma once

#include <algorithm>
#include <array>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <nlohmann/json.hpp>

#include "expect.hpp"
#include "golden.hpp"
#include "sd35/mmdit.hpp"
#include "sd35/pipeline.hpp"
#include "sd35/sampler.hpp"

namespace golden {

// The README's column for float, and 1e-9 in double for both methods.
template <class T>
[[nodiscard]] Tolerance sampler_tolerance(sd35::Method method) {
  if (std::is_same_v<T, double>) return {Norm::scaled_max, 1e-9};
  return {Norm::scaled_max, method == sd35::Method::euler ? 2e-5 : 5e-5};
}

// Inputs in.cond.* and in.uncond.*: of each latent of the batch, or of all of them alike.
class Prompts {
 public:
  Prompts(Case& c, Index latents, const sd35::MmditConfig& config)
      : context_(read(c, "context", {any, any, config.context_width})),
        pooled_(read(c, "y", {any, config.pooled_width})) {
    for (const Pair* pair : {&context_, &pooled_})
      for (const Tensor& tensor : *pair)
        if (tensor.shape != (*pair)[0].shape || (tensor.extent(0) != 1 && tensor.extent(0) != latents))
          throw std::runtime_error("in.cond.* and in.uncond.* are not those of " + std::to_string(latents) +
                                   " latents");
  }

  // As the pipeline stacks them.
  template <class T>
  [[nodiscard]] sd35::Conditioning<T> of(Index latent) const {
    return {stack<T>(context_, latent, {2, context_[0].extent(1), context_[0].extent(2)}),
            stack<T>(pooled_, latent, {2, 1, pooled_[0].extent(1)})};
  }

 private:
  using Pair = std::array<Tensor, 2>;

  [[nodiscard]] static Pair read(Case& c, const std::string& name, const std::vector<Index>& shape) {
    return {golden::read(c, "in.cond." + name, shape), golden::read(c, "in.uncond." + name, shape)};
  }
  template <class T>
  [[nodiscard]] static sd35::Tensor<T> stack(const Pair& pair, Index latent,
                                             const std::vector<Index>& shape) {
    sd35::Tensor<T> result(shape);
    T* to = result.data();
    for (const Tensor& tensor : pair) {
      const auto row = static_cast<Index>(tensor.values.size()) / tensor.extent(0);
      const double* const from = tensor.values.data() + (tensor.extent(0) == 1 ? 0 : latent * row);
      to = std::transform(from, from + row, to, [](double value) { return static_cast<T>(value); });
    }
    return result;
  }

  Pair context_, pooled_;
};

// Samples a batch, each latent on its own, in place. observe(latent, step, x, denoised).
template <class T, class Observe>
void sample_all(const sd35::Mmdit<T>& transformer, const Prompts& prompts, const std::vector<double>& levels,
                const sd35::SamplingOptions& options, TensorView<T, 4> latents, const Observe& observe) {
  for (const int layer : options.skip_layers.layers)
    if (options.skip_layers.scale != 0 && (layer < 0 || layer >= transformer.config().depth))
      throw std::runtime_error("skip-layer guidance names block " + std::to_string(layer) + " of " +
                               std::to_string(transformer.config().depth));
  sd35::Runtime rt;
  for (Index i = 0; i < latents.extent(0); ++i)
    sd35::sample<T>(
        rt, transformer, prompts.of<T>(i), levels, options, slice<0>(latents, i, 1),
        [&](int step, std::span<const T> x, std::span<const T> denoised) { observe(i, step, x, denoised); });
}

// {"scale", "start", "end", "layers"}, or nothing.
[[nodiscard]] inline sd35::SkipLayerGuidance skip_layers(const nlohmann::json& json) {
  if (json.empty()) return {};
  return {json.at("scale"), json.at("start"), json.at("end"), json.at("layers").get<std::vector<int>>()};
}

}  // namespace golden

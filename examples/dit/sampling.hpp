// From noise to latents: one model, one set of classes, one sampler.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include <linattn/weights/random.hpp>

#include "diffusion.hpp"
#include "dit.hpp"

namespace dit {

struct SamplingOptions {
  Method method = Method::ddpm;
  int steps = 250;
  double cfg_scale = 4;  // 1 or less: no guidance
  std::uint64_t seed = 0;
};

/// A run that is taken step by step, so that several models can take turns. The numbers are those of torch on the
/// CPU after torch.manual_seed(seed): randn(samples, channels, height, width) for the start, then, for ddpm,
/// randn_like of the network's whole batch a step. With guidance that batch is the samples twice, with their classes
/// and with none; fresh noise for the second half is drawn and not used, as in the official sampler, where both
/// halves of the network's input are the first half of the state.
/// The network sees `at_once` samples at a time, so that memory does not grow with the samples but by their latents.
template <class T>
class Sampling {
 public:
  static constexpr Index at_once = 8;

  /// Latents of height x width. Throws std::runtime_error where a class is none of the model's, the number of steps
  /// is not possible, or the size is none that the model can take.
  Sampling(const Dit<T>& model, std::span<const std::int32_t> classes, Index height, Index width,
           const SamplingOptions& options);

  [[nodiscard]] int steps() const { return diffusion_.steps(); }
  [[nodiscard]] int steps_taken() const { return step_; }
  void step(Runtime& rt);
  /// (samples, channels, height, width)
  [[nodiscard]] TensorView<const T, 4> latents() const { return x_.template view<4>(); }

 private:
  const Dit<T>& model_;
  Diffusion<T> diffusion_;
  double cfg_scale_;
  linattn::TorchGenerator generator_;
  std::vector<std::int32_t> labels_;  // of the samples
  Tensor<T> x_;
  int step_ = 0;
};

extern template class Sampling<float>;
extern template class Sampling<double>;

}  // namespace dit

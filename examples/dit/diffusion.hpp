// The diffusion that DiT was trained on, and its two samplers, on plain arrays. The network is the caller's.
//
//   x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise,   a_t = prod_{s <= t} (1 - b_s),   b = 1e-4 to 0.02 in 1000 equal steps
//
// A sampler takes fewer times t_0 < t_1 < ...; with a'_i = a_{t_i} and a'_{-1} = 1 they form a diffusion of their
// own, b'_i = 1 - a'_i / a'_{i-1}, and the network is still asked at t_i.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "nn/runtime.hpp"

namespace dit {

using namespace nn;  // what the examples share

enum class Method : std::uint8_t {
  ddpm,  // ancestral: fresh noise a step; times evenly from 0 to 999, rounded
  ddim,  // eta 0: no fresh noise; times 0, n, 2 n, ...
};

/// Throws std::runtime_error that lists the names.
[[nodiscard]] Method parse_method(std::string_view name);
[[nodiscard]] std::string_view name(Method method);

/// As many times as the models were trained with.
inline constexpr int training_steps = 1000;

/// The times of a sampler, ascending. ddpm takes 2 to 1000 steps: i 999 / (steps - 1), added up one by one and
/// rounded, halves to even. ddim takes the smallest stride that gives exactly that many times below 1000; where none
/// does, std::runtime_error names the numbers of steps beside it.
[[nodiscard]] std::vector<int> spaced_times(Method method, int steps);

/// Goes from noise to a sample, step 0 being the noisiest. The network's output is noise e, and v between -1 and 1
/// where it has learned its variance. With i the place of the step among the times:
///
///   x0   = sqrt(1 / a'_i) x - sqrt(1 / a'_i - 1) e
///   ddpm   x = mean + exp(s / 2) fresh noise, none in the last step (i = 0)
///          mean = b'_i sqrt(a'_{i-1}) / (1 - a'_i) x0 + (1 - a'_{i-1}) sqrt(1 - b'_i) / (1 - a'_i) x
///          s = f log b'_i + (1 - f) log p_i, f = (v + 1) / 2, p_i = b'_i (1 - a'_{i-1}) / (1 - a'_i);
///          without v, f = 1
///   ddim   x = sqrt(a'_{i-1}) x0 + sqrt(1 - a'_{i-1}) e
///
/// x0 is not clipped. Coefficients are double, arrays are T.
/// Source: Ho et al., Denoising diffusion probabilistic models, 2020; Nichol and Dhariwal, Improved denoising diffusion
/// probabilistic models, 2021; Song et al., Denoising diffusion implicit models, 2021, equation 12; facebookresearch/
/// DiT, diffusion/.
template <class T>
class Diffusion {
 public:
  Diffusion(Method method, int steps);

  [[nodiscard]] Method method() const { return method_; }
  [[nodiscard]] int steps() const { return static_cast<int>(times_.size()); }
  /// What the network is asked at.
  [[nodiscard]] int time(int step) const { return times_[place(step)]; }

  /// x becomes the latent of step + 1. All of one length; `variance` may be empty, and `fresh` (N(0, 1)) is read by
  /// ddpm alone.
  void advance(int step, std::span<const T> noise, std::span<const T> variance, std::span<const T> fresh,
               std::span<T> x) const;

 private:
  [[nodiscard]] std::size_t place(int step) const { return static_cast<std::size_t>(steps() - 1 - step); }

  Method method_;
  std::vector<int> times_;
  std::vector<double> kept_;  // a'
};

/// Classifier-free guidance of the official sampler: out = uncond + scale (cond - uncond) on the first three
/// channels of the noise. The fourth, and the variance, stay those of cond: out may be cond itself, whose other
/// channels are then in place. Samples of `channels` x `positions` one after another.
template <class T>
void guide(const T* cond, const T* uncond, double scale, Index samples, Index channels, Index positions,
           T* out);

extern template class Diffusion<float>;
extern template class Diffusion<double>;

}  // namespace dit

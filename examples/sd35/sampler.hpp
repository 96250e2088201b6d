// The sampler: noise levels, guidance and the integrators, on plain arrays. The network is the caller's.
//
// x_sigma = (1 - sigma) x0 + sigma noise; the network predicts v = noise - x0 at t = 1000 sigma, so the
// denoised latent is D = x - sigma v.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "nn/runtime.hpp"

namespace sd35 {

using namespace nn;  // what the examples share

enum class Scheduler : std::uint8_t {
  sd3,       // u_i = linspace(1, s(0.001), steps): the end point is already shifted, as in the official code
  discrete,  // u_i = linspace(1, 0.001, steps), as in stable-diffusion.cpp
};
enum class Method : std::uint8_t { euler, dpmpp_2m };

/// The enumerators by the names that users know ("dpm++2m" is another name of dpmpp_2m). Throw
/// std::runtime_error that lists the names.
[[nodiscard]] Scheduler parse_scheduler(std::string_view name);
[[nodiscard]] Method parse_method(std::string_view name);
[[nodiscard]] std::string_view name(Scheduler scheduler);
[[nodiscard]] std::string_view name(Method method);

/// Time shift s(u) = shift u / (1 + (shift - 1) u).
[[nodiscard]] double shift_sigma(double u, double shift);

/// As many noise levels as the models were trained with.
inline constexpr int max_steps = 1000;

/// The `steps` + 1 noise levels from 1 down to 0: s(u_i), then 0. One step gives 1, 0. In double; the official
/// tables are these rounded through float32 (1.4e-7). Throws std::runtime_error where steps are not 1
/// to max_steps, or the shift is not positive.
[[nodiscard]] std::vector<double> sigmas(Scheduler scheduler, int steps, double shift = 3);

/// The levels that are left where sampling starts from a picture: those from index int(steps (1 - strength)) on,
/// as the official code counts (in double: 40 steps of strength 0.8 skip 7). Throws std::runtime_error where the
/// strength is not above 0 and at most 1, or too small for one step.
[[nodiscard]] std::vector<double> remaining_sigmas(const std::vector<double>& sigmas, double strength);

/// What the sampler starts from: latent = sigma noise + (1 - sigma) latent.
template <class T>
void add_noise(double sigma, std::span<const T> noise, std::span<T> latent);

/// Classifier-free guidance: out = uncond + scale (cond - uncond). All of one length; out may be any of them.
template <class T>
void guide(std::span<const T> cond, std::span<const T> uncond, double scale, std::span<T> out);

/// Skip-layer guidance: a third prediction, with some blocks skipped, pushes the result away from itself in
/// the steps between the two fractions of the run.
struct SkipLayerGuidance {
  double scale = 0;  // 0 is off
  double start = 0.01, end = 0.2;
  std::vector<int> layers{7, 8, 9};

  /// start * steps < step < end * steps, strictly, steps counted from 0.
  [[nodiscard]] bool active(int step, int steps) const {
    return scale != 0 && !layers.empty() && step > start * steps && step < end * steps;
  }
};

/// out += scale (cond - skipped)
template <class T>
void guide_skip_layer(std::span<const T> cond, std::span<const T> skipped, double scale, std::span<T> out);

/// Walks the noise levels. One step, with a = sigma_{i+1} / sigma_i:
///
///   x = a x + (1 - a) D'
///
/// D' = D for Euler. DPM++ 2M extrapolates from the step before: with h_i = ln(sigma_i / sigma_{i+1}) and
/// r = h_{i-1} / h_i, D' = D + (D - D_before) / (2 r), but D' = D in the first step and in a last one to 0.
/// Guidance is linear, so v may be guided instead of D. Coefficients in double, arrays in T.
/// Source: k-diffusion, sample_euler and sample_dpmpp_2m.
template <class T>
class Integrator {
 public:
  Integrator(Method method, std::vector<double> sigmas) : method_(method), sigmas_(std::move(sigmas)) {}

  [[nodiscard]] int steps() const { return static_cast<int>(sigmas_.size()) - 1; }
  [[nodiscard]] double sigma(int step) const { return sigmas_[static_cast<std::size_t>(step)]; }
  /// What the network takes for the time of a step: 1000 sigma.
  [[nodiscard]] double time(int step) const { return 1000 * sigma(step); }

  /// `denoised` = x - sigma v, from the network's v.
  void denoise(int step, std::span<const T> x, std::span<const T> v, std::span<T> denoised) const;
  /// x becomes the latent of step + 1. Steps are taken in order.
  void advance(int step, std::span<const T> denoised, std::span<T> x);

 private:
  Method method_;
  std::vector<double> sigmas_;
  std::vector<T> before_;  // D of the step before (dpmpp_2m)
};

}  // namespace sd35

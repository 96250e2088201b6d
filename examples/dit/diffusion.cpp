#include "diffusion.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

namespace dit {
namespace {

constexpr std::array<std::pair<std::string_view, Method>, 2> methods{
    {{"ddpm", Method::ddpm}, {"ddim", Method::ddim}}};

// How many multiples of a stride there are below the training steps.
constexpr int count_at(int stride) { return (training_steps + stride - 1) / stride; }

}  // namespace

Method parse_method(std::string_view name) {
  std::string names;
  for (const auto& [known, method] : methods) {
    if (known == name) return method;
    names += (names.empty() ? "" : ", ") + std::string(known);
  }
  throw std::runtime_error("unknown sampler '" + std::string(name) + "' (there are " + names + ")");
}

std::string_view name(Method method) {
  return std::find_if(methods.begin(), methods.end(),
                      [&](const auto& entry) { return entry.second == method; })
      ->first;
}

std::vector<int> spaced_times(Method method, int steps) {
  if (steps < 2 || steps > training_steps)
    throw std::runtime_error("steps: 2 to " + std::to_string(training_steps) + " are possible, got " +
                             std::to_string(steps));
  std::vector<int> times;
  if (method == Method::ddpm) {
    const double stride = static_cast<double>(training_steps - 1) / (steps - 1);
    double time = 0;
    for (int i = 0; i < steps; ++i, time += stride) times.push_back(static_cast<int>(std::nearbyint(time)));
    return times;
  }
  int stride = 1;
  while (count_at(stride) > steps) ++stride;
  if (count_at(stride) != steps)
    throw std::runtime_error("steps: ddim takes equal strides through " + std::to_string(training_steps) +
                             " times, which gives " + std::to_string(count_at(stride)) + " or " +
                             std::to_string(count_at(stride - 1)) + " steps, but not " +
                             std::to_string(steps));
  for (int time = 0; time < training_steps; time += stride) times.push_back(time);
  return times;
}

template <class T>
Diffusion<T>::Diffusion(Method method, int steps) : method_(method), times_(spaced_times(method, steps)) {
  constexpr double first = 1e-4, last = 0.02;
  double kept = 1;
  auto wanted = times_.begin();
  for (int t = 0; t < training_steps && wanted != times_.end(); ++t) {
    kept *= 1 - (first + (last - first) * t / (training_steps - 1));
    if (t == *wanted) {
      kept_.push_back(kept);
      ++wanted;
    }
  }
}

template <class T>
void Diffusion<T>::advance(int step, std::span<const T> noise, std::span<const T> variance,
                           std::span<const T> fresh, std::span<T> x) const {
  const std::size_t i = place(step);
  const auto before = [&](std::size_t j) { return j == 0 ? 1.0 : kept_[j - 1]; };
  const auto beta = [&](std::size_t j) { return 1 - kept_[j] / before(j); };
  const T from_x = static_cast<T>(std::sqrt(1 / kept_[i])),
          from_noise = static_cast<T>(std::sqrt(1 / kept_[i] - 1));
  if (method_ == Method::ddim) {
    const T signal = static_cast<T>(std::sqrt(before(i))), rest = static_cast<T>(std::sqrt(1 - before(i)));
    for (std::size_t n = 0; n < x.size(); ++n)
      x[n] = signal * (from_x * x[n] - from_noise * noise[n]) + rest * noise[n];
    return;
  }
  const T of_x0 = static_cast<T>(beta(i) * std::sqrt(before(i)) / (1 - kept_[i])),
          of_x = static_cast<T>((1 - before(i)) * std::sqrt(1 - beta(i)) / (1 - kept_[i]));
  for (std::size_t n = 0; n < x.size(); ++n)
    x[n] = of_x0 * (from_x * x[n] - from_noise * noise[n]) + of_x * x[n];
  if (i == 0) return;
  const T upper = static_cast<T>(std::log(beta(i))),
          lower = static_cast<T>(std::log(beta(i) * (1 - before(i)) / (1 - kept_[i])));
  for (std::size_t n = 0; n < x.size(); ++n) {
    const T f = variance.empty() ? T(1) : (variance[n] + 1) / 2;
    x[n] += std::exp((f * upper + (1 - f) * lower) / 2) * fresh[n];
  }
}

template <class T>
void guide(const T* cond, const T* uncond, double scale, Index samples, Index channels, Index positions,
           T* out) {
  const T factor = static_cast<T>(scale);
  for (Index b = 0; b < samples; ++b)
    for (Index i = b * channels * positions; i < (b * channels + std::min<Index>(3, channels)) * positions;
         ++i)
      out[i] = uncond[i] + factor * (cond[i] - uncond[i]);
}

template void guide<float>(const float*, const float*, double, Index, Index, Index, float*);
template void guide<double>(const double*, const double*, double, Index, Index, Index, double*);
template class Diffusion<float>;
template class Diffusion<double>;

}  // namespace dit

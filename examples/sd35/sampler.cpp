#include "sampler.hpp"

#include <array>
#include <cmath>
#include <cstddef>
#include <stdexcept>
#include <utility>

namespace sd35 {
namespace {

template <class E>
struct Named {
  std::string_view name;
  E value;
};

// The first name of a value is the one shown.
constexpr std::array<Named<Scheduler>, 2> schedulers{
    {{"sd3", Scheduler::sd3}, {"discrete", Scheduler::discrete}}};
constexpr std::array<Named<Method>, 3> methods{
    {{"euler", Method::euler}, {"dpm++2m", Method::dpmpp_2m}, {"dpmpp_2m", Method::dpmpp_2m}}};

template <class Table>
auto parse(const Table& table, std::string_view name, std::string_view what) {
  std::string names;
  for (const auto& entry : table) {
    if (entry.name == name) return entry.value;
    names += (names.empty() ? "" : ", ") + std::string(entry.name);
  }
  throw std::runtime_error("unknown " + std::string(what) + " '" + std::string(name) + "' (there are " +
                           names + ")");
}

template <class Table, class E>
std::string_view name_of(const Table& table, E value) {
  for (const auto& entry : table)
    if (entry.value == value) return entry.name;
  return "?";
}

}  // namespace

Scheduler parse_scheduler(std::string_view name) { return parse(schedulers, name, "scheduler"); }
Method parse_method(std::string_view name) { return parse(methods, name, "sampling method"); }
std::string_view name(Scheduler scheduler) { return name_of(schedulers, scheduler); }
std::string_view name(Method method) { return name_of(methods, method); }

double shift_sigma(double u, double shift) { return shift * u / (1 + (shift - 1) * u); }

std::vector<double> sigmas(Scheduler scheduler, int steps, double shift) {
  if (steps < 1 || steps > max_steps)
    throw std::runtime_error("steps: 1 to " + std::to_string(max_steps) + " are possible, got " +
                             std::to_string(steps));
  if (!(shift > 0) || !std::isfinite(shift))
    throw std::runtime_error("flow shift: a positive number is needed, got " + std::to_string(shift));
  const double last = scheduler == Scheduler::sd3 ? shift_sigma(0.001, shift) : 0.001;
  std::vector<double> result;
  for (int i = 0; i < steps; ++i)
    result.push_back(shift_sigma(i == 0 ? 1.0 : 1 + (last - 1) * i / (steps - 1), shift));
  result.push_back(0);
  return result;
}

std::vector<double> remaining_sigmas(const std::vector<double>& sigmas, double strength) {
  if (!(strength > 0) || !(strength <= 1))
    throw std::runtime_error("strength: a number above 0 and at most 1 is needed, got " +
                             std::to_string(strength));
  const auto steps = static_cast<double>(sigmas.size() - 1);
  const auto skipped = static_cast<std::ptrdiff_t>(steps * (1 - strength));
  if (skipped + 1 >= static_cast<std::ptrdiff_t>(sigmas.size()))
    throw std::runtime_error("strength " + std::to_string(strength) + " of " +
                             std::to_string(sigmas.size() - 1) + " steps leaves no step to take");
  return {sigmas.begin() + skipped, sigmas.end()};
}

template <class T>
void add_noise(double sigma, std::span<const T> noise, std::span<T> latent) {
  const T level = static_cast<T>(sigma), rest = static_cast<T>(1 - sigma);
  for (std::size_t i = 0; i < latent.size(); ++i) latent[i] = level * noise[i] + rest * latent[i];
}

template <class T>
void guide(std::span<const T> cond, std::span<const T> uncond, double scale, std::span<T> out) {
  const T factor = static_cast<T>(scale);
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = uncond[i] + factor * (cond[i] - uncond[i]);
}

template <class T>
void guide_skip_layer(std::span<const T> cond, std::span<const T> skipped, double scale, std::span<T> out) {
  const T factor = static_cast<T>(scale);
  for (std::size_t i = 0; i < out.size(); ++i) out[i] += factor * (cond[i] - skipped[i]);
}

template <class T>
void Integrator<T>::denoise(int step, std::span<const T> x, std::span<const T> v,
                            std::span<T> denoised) const {
  const T level = static_cast<T>(sigma(step));
  for (std::size_t i = 0; i < x.size(); ++i) denoised[i] = x[i] - level * v[i];
}

template <class T>
void Integrator<T>::advance(int step, std::span<const T> denoised, std::span<T> x) {
  const double now = sigma(step), next = sigma(step + 1);
  const T keep = static_cast<T>(next / now), take = static_cast<T>(1 - next / now);
  T extrapolate = 0;  // 1 / (2 r)
  if (method_ == Method::dpmpp_2m && step > 0 && next > 0)
    extrapolate = static_cast<T>(std::log(now / next) / (2 * std::log(sigma(step - 1) / now)));
  if (extrapolate == 0) {
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = keep * x[i] + take * denoised[i];
  } else {
    for (std::size_t i = 0; i < x.size(); ++i)
      x[i] = keep * x[i] + take * (denoised[i] + extrapolate * (denoised[i] - before_[i]));
  }
  if (method_ == Method::dpmpp_2m) before_.assign(denoised.begin(), denoised.end());
}

template void add_noise<float>(double, std::span<const float>, std::span<float>);
template void add_noise<double>(double, std::span<const double>, std::span<double>);
template void guide<float>(std::span<const float>, std::span<const float>, double, std::span<float>);
template void guide<double>(std::span<const double>, std::span<const double>, double, std::span<double>);
template void guide_skip_layer<float>(std::span<const float>, std::span<const float>, double,
                                      std::span<float>);
template void guide_skip_layer<double>(std::span<const double>, std::span<const double>, double,
                                       std::span<double>);
template class Integrator<float>;
template class Integrator<double>;

}  // namespace sd35

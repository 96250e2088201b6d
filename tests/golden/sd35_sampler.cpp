// Golden ops sampler, sampler_analytic, sigmas and tables: noise levels, guidance, integrators, noise.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include <linattn/weights/random.hpp>

#include "golden.hpp"
#include "sd35.hpp"
#include "sd35/embeddings.hpp"
#include "sd35/pipeline.hpp"
#include "sd35/sampler.hpp"
#include "sd35_mmdit.hpp"
#include "sd35_sampling.hpp"

namespace {

using golden::Case;
using golden::Norm;
using golden::Tolerance;
using linattn::Index;

// Fails on what follows the number, so that no tensor is taken for another one.
bool match(const std::string& name, const char* pattern, int& number) {
  int end = 0;
  return std::sscanf(name.c_str(), pattern, &number, &end) == 1 &&
         name.size() == static_cast<std::size_t>(end);
}

// As both types hold it.
void check_both(Case& c, const std::string& name, const std::vector<double>& ours, double exact,
                double rounded) {
  const Index n = static_cast<Index>(ours.size());
  const std::vector<Index> shape = c.file().find(name)->shape;
  golden::Tensor tensor{shape, ours};
  Index elements = 1;
  for (const Index extent : shape) elements *= extent;
  if (elements != n) tensor.shape = {n};
  c.check(name, "double", tensor, {Norm::scaled_max, exact});
  for (double& value : tensor.values) value = static_cast<float>(value);
  c.check(name, "float", tensor, {Norm::scaled_max, rounded});
}

void run_sigmas(Case& c) {
  const double shift = c.number("shift", 3);
  constexpr double float_table = 3e-7;
  for (const std::string& name : c.names()) {
    int n = 0;
    double train_shift = 0;
    if (match(name, "outx.official.%d%n", n) && n > 0) {
      check_both(c, name, sigmas(sd35::Scheduler::sd3, n, shift), 1e-14, float_table);
    } else if ((match(name, "out.official.%d%n", n) || match(name, "out.diffusers.%d%n", n)) && n > 0) {
      check_both(c, name, sigmas(sd35::Scheduler::sd3, n, shift), float_table, float_table);
    } else if (match(name, "out.diffusers_timesteps.%d%n", n) && n > 0) {
      std::vector<double> times = sigmas(sd35::Scheduler::sd3, n, shift);
      times.pop_back();
      for (double& time : times) time *= 1000;
      check_both(c, name, times, float_table, float_table);
    } else if (match(name, "alt.sdcpp_discrete.%d%n", n) && n > 0) {
      check_both(c, name, sigmas(sd35::Scheduler::discrete, n, shift), 1e-14, float_table);
    } else if (std::sscanf(name.c_str(), "out.train_sigmas_shift%lf", &train_shift) == 1) {
      std::vector<double> table;
      for (int i = 1; i <= 1000; ++i) table.push_back(sd35::shift_sigma(i / 1000.0, train_shift));
      check_both(c, name, table, float_table, float_table);
    }
  }
}

void run_tables(Case& c) {
  const auto expect_elements = [&c](const std::string& name, double count) {
    if (static_cast<double>(c.file().find(name)->elements()) != count)
      throw std::runtime_error("tensor '" + name + "' has other elements than its name says");
  };
  for (const std::string& name : c.names()) {
    int channels = 0, grid = 0, end = 0, count = 0;
    double scale = 1;
    unsigned long long seed = 0;
    const int read = std::sscanf(name.c_str(), "out.sincos_%d_grid%d_scale%lf", &channels, &grid, &scale);
    if (read >= 2 && channels > 0 && channels % 4 == 0 && grid > 0) {
      expect_elements(name, static_cast<double>(channels) * grid * grid);
      check_both(c, name, sd35::position_table(channels, grid, scale), 1e-11, 3e-6);
    } else if (std::sscanf(name.c_str(), "out.randn_seed%llu_n%d%n", &seed, &count, &end) == 2 && count > 0) {
      expect_elements(name, count);
      std::vector<float> noise(static_cast<std::size_t>(count));
      linattn::TorchGenerator(seed).normal(noise);
      c.check(name, "float", golden::Tensor{{count}, {noise.begin(), noise.end()}}, {Norm::scaled_max, 3e-6});
    } else if (name == "out.t_freq" || name == "outx.t_freq") {
      const golden::Tensor times = c.read("in.t");
      const std::vector<Index>& shape = c.file().find(name)->shape;
      const std::size_t width = shape.empty() ? 0 : static_cast<std::size_t>(shape.back());
      if (width == 0 || width % 2 != 0)
        throw std::runtime_error("tensor '" + name + "' has no even number of columns");
      std::vector<double> table(times.values.size() * width);
      for (std::size_t i = 0; i < times.values.size(); ++i)
        sd35::timestep_embedding<double>(times.values[i], std::span(table).subspan(i * width, width));
      check_both(c, name, table, name == "outx.t_freq" ? 1e-11 : 1e-4, 1e-4);
    }
  }
}

template <class T>
void run_analytic_as(Case& c) {
  const golden::Tensor noise = c.read("in.noise");
  for (const std::string& name : c.names()) {
    for (const auto& [prefix, method] : {std::pair{"outx.euler.%d%n", sd35::Method::euler},
                                         std::pair{"outx.dpmpp_2m.%d%n", sd35::Method::dpmpp_2m}}) {
      int steps = 0;
      if (!match(name, prefix, steps) || steps < 1) continue;
      sd35::Integrator<T> integrator(method, sigmas(sd35::Scheduler::sd3, steps, c.number("shift", 3)));
      std::vector<T> x, denoised(noise.values.size());
      for (const double value : noise.values) x.push_back(static_cast<T>(integrator.sigma(0) * value));
      for (int step = 0; step < steps; ++step) {
        for (std::size_t i = 0; i < x.size(); ++i)
          denoised[i] = std::tanh(x[i]) * static_cast<T>(1 - 0.5 * integrator.sigma(step));
        integrator.advance(step, denoised, x);
      }
      c.check(name, golden::variant<T>, golden::Tensor{noise.shape, {x.begin(), x.end()}},
              golden::sampler_tolerance<T>(method));
    }
  }
}

void run_analytic(Case& c) {
  if (c.meta("denoiser") != "D(x,s) = tanh(x)*(1-0.5*s)")
    throw std::runtime_error("unknown denoiser '" + c.meta("denoiser") + "'");
  run_analytic_as<float>(c);
  run_analytic_as<double>(c);
}

template <class T>
void run_sampler_as(Case& c, const sd35::Mmdit<T>& transformer) {
  const char* const variant = golden::variant<T>;
  constexpr bool exact = std::is_same_v<T, double>;
  sd35::SamplingOptions options;
  options.method = sd35::parse_method(c.meta("sampler"));
  options.cfg_scale = c.number("cfg_scale");
  options.skip_layers = golden::skip_layers(nlohmann::json::parse(c.meta("skip_layer_config", "{}")));
  const std::vector<double> levels =
      sigmas(sd35::Scheduler::sd3, static_cast<int>(golden::integer(c, "steps", 1, sd35::max_steps)),
             c.number("shift", 3));
  const std::vector<Index> count{static_cast<Index>(levels.size())};
  const Tolerance within = golden::sampler_tolerance<T>(options.method);
  for (const char* name : {"outx.sigmas", "out.sigmas"})
    if (c.has(name))
      c.check(name, variant, golden::Tensor{count, levels},
              {Norm::scaled_max, exact && name[3] == 'x' ? 1e-14 : 3e-7});

  const sd35::MmditConfig& config = transformer.config();
  const golden::Tensor noise = golden::read_latents(c, "in.noise", config);
  const golden::Prompts prompts(c, noise.extent(0), config);
  sd35::Tensor<T> latent(noise.shape);
  for (std::size_t i = 0; i < noise.values.size(); ++i)
    latent.data()[i] = static_cast<T>(levels[0] * noise.values[i]);
  // A row a step, of all latents.
  const std::size_t row = noise.values.size(), one = row / static_cast<std::size_t>(noise.extent(0));
  std::vector<double> inputs(levels.size() * row), denoised_steps((levels.size() - 1) * row);
  golden::sample_all<T>(transformer, prompts, levels, options, latent.template view<4>(),
                        [&](Index i, int step, std::span<const T> x, std::span<const T> denoised) {
                          const auto at = static_cast<std::ptrdiff_t>(static_cast<std::size_t>(step) * row +
                                                                      static_cast<std::size_t>(i) * one);
                          std::copy(x.begin(), x.end(), inputs.begin() + at);
                          std::copy(denoised.begin(), denoised.end(), denoised_steps.begin() + at);
                        });
  std::copy_n(latent.data(), row, inputs.end() - static_cast<std::ptrdiff_t>(row));

  const auto check_steps = [&](const char* name, const std::vector<double>& values, Index steps) {
    std::vector<Index> shape = noise.shape;
    shape.insert(shape.begin(), steps);
    if (c.has(name)) c.check(name, variant, golden::Tensor{shape, values}, within);
  };
  check_steps("outx.x_steps", inputs, count[0]);
  check_steps("outx.denoised_steps", denoised_steps, count[0] - 1);
  golden::Tensor result{noise.shape, {}};
  for (Index i = 0; i < latent.elements(); ++i)
    result.values.push_back(static_cast<double>(latent.data()[i]) / 1.5305 + 0.0609);
  if (c.has("outx.latent")) c.check("outx.latent", variant, result, within);
  // The official code rounds the network's output to float32.
  if (c.has("out.latent"))
    c.check("out.latent", variant, result, exact ? Tolerance{Norm::scaled_max, 1e-5} : within);
}

void run_sampler(Case& c) {
  const golden::Parameters parameters(c);
  const sd35::Checkpoint checkpoint = golden::open_transformer(c, parameters);
  const sd35::MmditConfig config = golden::transformer_config(checkpoint, parameters.config());
  run_sampler_as<float>(c, sd35::Mmdit<float>(checkpoint, config));
  run_sampler_as<double>(c, sd35::Mmdit<double>(checkpoint, config));
}

const golden::Registration sigma_runner({"sigmas"}, run_sigmas);
const golden::Registration table_runner({"tables"}, run_tables);
const golden::Registration analytic_runner({"sampler_analytic"}, run_analytic);
const golden::Registration sampler_runner({"sampler"}, run_sampler);

}  // namespace

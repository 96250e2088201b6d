// linattn-inherit: turns a softmax checkpoint (Stable Diffusion 3.5, ViT or DeiT, DiT) into one with
// Test-Time-Training attentions that inherits its weights.
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include <CLI/CLI.hpp>
#include <linattn/weights/inherit.hpp>

#include "nn/command.hpp"
#include "nn/options.hpp"
#include "nn/outputs.hpp"
#include "nn/signals.hpp"
#include "nn/standard_output.hpp"

namespace {

// A bar on a terminal, a line every few seconds elsewhere; asks to stop when a signal has come.
class ProgressBar {
 public:
  bool operator()(std::uint64_t done, std::uint64_t total) {
    const auto now = std::chrono::steady_clock::now();
    const bool terminal = isatty(STDERR_FILENO) != 0;
    const std::chrono::milliseconds interval(terminal ? 100 : 5000);
    if (now - shown_ >= interval || (terminal && done == total)) {
      shown_ = now;
      const double part = total > 0 ? static_cast<double>(done) / static_cast<double>(total) : 1.0;
      const double seconds = std::chrono::duration<double>(now - start_).count();
      const double left = part > 0 ? seconds / part - seconds : 0;
      if (terminal) {
        constexpr std::size_t width = 40;
        const auto filled = static_cast<std::size_t>(part * static_cast<double>(width));
        const std::string bar = std::string(filled, '#') + std::string(width - filled, '.');
        std::fprintf(stderr, "\r[%s] %3.0f %%  %.2f of %.2f GB  %.0f s left ", bar.c_str(), 100 * part,
                     gigabytes(done), gigabytes(total), left);
        drawn_ = true;
      } else {
        std::fprintf(stderr, "%.2f of %.2f GB, %.0f s left\n", gigabytes(done), gigabytes(total), left);
      }
    }
    return !nn::stop_requested();
  }
  void finish() const {
    if (drawn_) std::fputc('\n', stderr);
  }
  static double gigabytes(std::uint64_t bytes) { return static_cast<double>(bytes) * 1e-9; }
  [[nodiscard]] double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now(), shown_ = start_;
  bool drawn_ = false;
};

struct Arguments {
  std::filesystem::path input, output, report;
  std::string replace = "paper", init = "zero-conv";
  std::optional<std::string> inner_model, weights;
  std::uint64_t seed = 0;
  bool no_conv = false, dry_run = false, json = false, force = false;
  linattn::FamilyOptions family;
};

void expect(const linattn::FileStatus& status) {
  if (!status.ok()) throw std::runtime_error(message(status));
}

int run(const Arguments& arguments) {
  if (arguments.output.empty() && !arguments.dry_run)
    throw std::runtime_error("output: is required, unless --dry-run is given");
  linattn::Checkpoint checkpoint;
  expect(linattn::open_checkpoint(arguments.input, checkpoint));

  linattn::InheritOptions options{.replace = arguments.replace,
                                  .conv = !arguments.no_conv,
                                  .seed = arguments.seed,
                                  .family = arguments.family};
  linattn::Safetensors init_file;
  if (arguments.init == "official") {
    options.init = linattn::Initialisation::official;
  } else if (arguments.init != "zero-conv") {
    expect(linattn::Safetensors::open(arguments.init, init_file));
    options.init = linattn::Initialisation::file;
    options.init_file = &init_file;
  }
  if (arguments.inner_model)
    options.inner_model =
        *arguments.inner_model == "mlp" ? linattn::InnerModelKind::mlp : linattn::InnerModelKind::swiglu;
  if (arguments.weights)
    options.family.weights = *arguments.weights == "ema" ? linattn::WeightSet::ema : linattn::WeightSet::raw;

  linattn::FileSet inputs;
  nn::add_model(inputs, arguments.input);
  if (options.init_file != nullptr) nn::add_model(inputs, arguments.init);
  nn::Outputs outputs(std::move(inputs));
  if (!arguments.dry_run) outputs.claim(arguments.output);
  if (!arguments.report.empty()) outputs.add_file(arguments.report);

  linattn::Plan plan;
  const auto planned = make_plan(checkpoint, options, plan);
  if (plan.mismatches.empty()) expect(planned);
  const std::string report = linattn::report_json(plan).dump(2) + "\n";
  if (planned.ok() && !arguments.dry_run) {
    const nn::Unfinished unfinished;
    linattn::FileStatus status = check_output(checkpoint, plan, options, arguments.output, arguments.force);
    if (status.detail == "exists already") status.detail += " (--force replaces it)";
    expect(status);
  }
  if (arguments.json)
    nn::print_text(report);
  else
    outputs.print_text(linattn::report_table(plan));
  if (!arguments.report.empty()) outputs.write(arguments.report, report);
  expect(planned);
  if (arguments.dry_run) return 0;

  ProgressBar progress;
  linattn::FileStatus status;
  {
    std::optional<nn::Unfinished> unfinished;
    if (!nn::is_stream(arguments.output)) unfinished.emplace();
    status = apply(checkpoint, plan, options, arguments.output, arguments.force, std::ref(progress));
    progress.finish();
  }
  expect(status);
  std::fprintf(stderr, "wrote %s in %.1f s\n", arguments.output.c_str(), progress.seconds());
  if (options.init != linattn::Initialisation::file)
    std::fprintf(stderr, "its new weights are untrained: until it is fine-tuned, what it gives is broken\n");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Arguments arguments;
  CLI::App app(
      "Replaces softmax attentions of a checkpoint by Test-Time-Training modules that inherit its\n"
      "projections: Stable Diffusion 3.5 becomes SD3.5-T5, a ViT or DeiT (names of timm) DeiT-T5, a DiT\n"
      "DiT5. Every tensor of both models is accounted for; the report goes to standard output.\n"
      "Exit code 0: done, 2: bad input or a failed write, and nothing is written; nor is it after a signal.",
      "linattn-inherit");
  nn::add_path(app, "input", arguments.input,
               "a single .safetensors file, or a model folder (with config.json)")
      ->required();
  nn::add_path(app, "output", arguments.output, "the file or folder to write; must not exist");
  nn::add_text(
      app, "--replace", arguments.replace,
      "what to replace: paper (ViT, DiT: everything; SD3.5: every attn2, and the joint attention\n"
      "of the last 5/24 of the blocks), all, a kind (ViT, DiT: attn; SD3.5: attn2, joint), or blocks\n"
      "as attn:0-5 or attn2:0-12,joint:19-23");
  nn::add_text(
      app, "--init", arguments.init,
      "new weights: zero-conv (w ~ N(0, 0.02^2), no conv at first), official (conv ~ U(-1/3, 1/3)), or\n"
      "a .safetensors file that gives them by name");
  app.add_option("--inner-model", arguments.inner_model, "swiglu (default) or mlp; DiT5 has mlp")
      ->check(CLI::IsMember({"swiglu", "mlp"}));
  app.add_flag("--no-conv", arguments.no_conv,
               "without convolutions; with --inner-model mlp it is the two-layer form of the paper (ttt-v0)");
  nn::add_number(app, "-s,--seed", arguments.seed, nn::seed_range, "seed of the new weights");
  nn::add_number(app, "--heads", arguments.family.heads, nn::head_range,
                 "ViT, DiT: heads of an attention, where neither config.json nor the size tells them");
  nn::add_number(app, "--classes", arguments.family.classes, {1, 1000000},
                 "ViT: classes of the converted model; a head of another size is dropped and new");
  app.add_flag("--drop-cls", arguments.family.drop_cls,
               "ViT: leave out the positions of class and distillation token");
  app.add_option("--weights", arguments.weights,
                 "ViT, DiT: raw (default where both are there) or ema, of a training checkpoint")
      ->check(CLI::IsMember({"raw", "ema"}));
  app.add_flag("--dry-run", arguments.dry_run, "report only, write no model");
  nn::add_path(app, "--report", arguments.report, "write the report, tensor by tensor, to this JSON file");
  app.add_flag("--json", arguments.json, "the report on standard output as JSON");
  app.add_flag("--force", arguments.force, "replace an output that exists");
  app.footer(
      "Examples:\n"
      "  linattn-inherit sd3.5_medium.safetensors sd3.5_medium_t5.safetensors\n"
      "  linattn-inherit --dry-run --report plan.json stable-diffusion-3.5-large/\n"
      "  linattn-inherit --replace attn2:0-12,joint:19-23 --init tuned.safetensors medium/ medium-t5/\n"
      "  linattn-inherit --drop-cls deit_tiny.safetensors deit_tiny_t5.safetensors\n"
      "  linattn-inherit --drop-cls --inner-model mlp --no-conv deit_tiny.safetensors ttt_v0.safetensors\n"
      "  linattn-inherit --weights ema DiT-XL-2-256x256.safetensors DiT5-XL-2.safetensors");
  return nn::run_command(app, argc, argv, [&] { return run(arguments); });
}

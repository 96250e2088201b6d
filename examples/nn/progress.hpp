// What a long run shows on stderr: its stages, and a bar with the time left.
#pragma once

#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <string>
#include <string_view>

namespace nn {

/// Minutes and seconds: "2:05".
[[nodiscard]] inline std::string clock_text(double seconds) {
  const long whole = seconds > 0 ? static_cast<long>(seconds + 0.5) : 0;
  char text[48];
  std::snprintf(text, sizeof text, "%ld:%02ld", whole / 60, whole % 60);
  return text;
}

/// The bar redraws one line of a terminal; elsewhere (a log file) each tenth of the steps is a line.
class ProgressBar {
 public:
  ProgressBar() = default;
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;
  // An error has a line of its own.
  ~ProgressBar() {
    if (open_) std::fputc('\n', stderr);
  }

  void begin() { start_ = std::chrono::steady_clock::now(); }

  void show(int step, int steps) {
    const double elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    const bool terminal = ::isatty(STDERR_FILENO) != 0;
    if (!terminal && (step == 0 || (step != steps && step * 10 / steps == (step - 1) * 10 / steps))) return;
    constexpr int width = 30;
    const int filled = steps > 0 ? step * width / steps : 0;
    const std::string bar = std::string(static_cast<std::size_t>(filled), '=') +
                            std::string(static_cast<std::size_t>(width - filled), ' ');
    std::string time;
    if (step > 0) {
      const double a_step = elapsed / step;
      char text[96];
      std::snprintf(text, sizeof text, "  %.2f s/step, %s left", a_step,
                    clock_text(a_step * (steps - step)).c_str());
      time = text;
    }
    std::fprintf(stderr, "%s  step %d of %d [%s]%s%s", terminal ? "\r\033[K" : "", step, steps, bar.c_str(),
                 time.c_str(), terminal && step < steps ? "" : "\n");
    std::fflush(stderr);
    open_ = terminal && step < steps;
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  bool open_ = false;  // the line of the bar
};

}  // namespace nn

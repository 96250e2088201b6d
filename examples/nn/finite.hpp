// Ends a run where a value stops being finite: what is computed from it would be a black picture or no number.
#pragma once

#include <cmath>
#include <span>
#include <stdexcept>
#include <string>

#include "checkpoint.hpp"
#include "runtime.hpp"

namespace nn {

// "transformer, block 7 (step 2): a value is not finite". The cause, where it is known, follows.
class NotFinite : public std::runtime_error {
 public:
  explicit NotFinite(const std::string& place, const std::string& cause = {})
      : std::runtime_error(place + ": a value is not finite" + (cause.empty() ? "" : ", " + cause)),
        place_(place),
        cause_(cause) {}

  [[nodiscard]] const std::string& place() const { return place_; }
  [[nodiscard]] const std::string& cause() const { return cause_; }

 private:
  std::string place_, cause_;
};

// Throw NotFinite where a value is Inf or NaN.
template <class T>
void expect_finite(const Runtime& rt, const std::string& place, const TensorView<const T, 3>& values);
template <class T>
void expect_finite(const std::string& place, std::span<const T> values);

// The same of every number of a report, for which JSON would show null.
template <class Json>
void expect_finite_report(const Json& report, const std::string& place = "report") {
  if (report.is_structured())
    for (const auto& [key, value] : report.items()) expect_finite_report(value, place + "/" + key);
  else if (report.is_number_float() && !std::isfinite(report.template get<double>()))
    throw NotFinite(place);
}

// " (step 2)" of index 1.
[[nodiscard]] inline std::string step_text(int index) { return " (step " + std::to_string(index + 1) + ")"; }

// f(), in whose places `stage` comes first: "block 7" becomes "transformer, block 7 (step 2)".
template <class F>
decltype(auto) in_stage(const std::string& stage, const F& f, const std::string& step = {}) {
  try {
    return f();
  } catch (const NotFinite& error) {
    throw NotFinite(stage + ", " + error.place() + step, error.cause());
  }
}

// The first tensor below the checkpoint's prefix that holds a value which is not finite, as a clause; empty where
// there is none. Reads all of them.
[[nodiscard]] std::string not_finite_weight(const Checkpoint& checkpoint);

// f(), the cause being a weight of the checkpoint where one is not finite.
template <class F>
decltype(auto) with_weights_of(const Checkpoint& checkpoint, const F& f) {
  try {
    return f();
  } catch (const NotFinite& error) {
    throw NotFinite(error.place(), error.cause().empty() ? not_finite_weight(checkpoint) : error.cause());
  }
}

}  // namespace nn

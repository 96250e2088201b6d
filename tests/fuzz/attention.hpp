// Softmax attention row by row in double, with the bound of every element, as the targets of the attention ops compare with it.
#pragma once

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "op.hpp"

namespace fuzz {

template <class LogitOffset>
class Attention {
 public:
  // What is added to the logit of key j for the query at (batch, query, head); -infinity hides the key, so that nothing of it
  // may be observed.
  Attention(double scale, LogitOffset logit_offset) : scale_(scale), logit_offset_(std::move(logit_offset)) {}

  template <class T>
  void expect_close(const TensorView<T, 4>& q, const TensorView<T, 4>& k, const TensorView<T, 4>& v,
                    const TensorView<T, 4>& out, const TensorView<Compute<T>, 3>& lse = {}) const {
    const AsDouble numbers{.odd_to_nan = true};
    const auto dq = numbers(q), dk = numbers(k), dv = numbers(v);
    for_each_index(
        std::array{out.extent(0), out.extent(1), out.extent(2)},
        [&](const std::array<Index, 3>& at) { row<T>(at, dq.view(), dk.view(), dv.view(), out, lse); });
  }

 private:
  double scale_;
  LogitOffset logit_offset_;
  using Doubles = TensorView<double, 4>;

  // Where the reference meets no NaN, and the logits are not so large that they have no digits.
  template <class T>
  void row(const std::array<Index, 3>& at, const Doubles& q, const Doubles& k, const Doubles& v,
           const TensorView<T, 4>& out, const TensorView<Compute<T>, 3>& lse) const {
    const auto [b, i, h] = at;
    const Index keys = k.extent(1), head_dim = q.extent(3);
    const double d = static_cast<double>(head_dim), n = static_cast<double>(keys);
    std::vector<double> p(static_cast<std::size_t>(keys), -HUGE_VAL);
    std::vector<Index> seen;
    double top = -HUGE_VAL, logit_terms = 0;
    for (Index j = 0; j < keys; ++j) {
      double s = logit_offset_(at, j);
      if (s == -HUGE_VAL) continue;
      seen.push_back(j);
      double terms = std::abs(s);
      for (Index c = 0; c < head_dim; ++c) {
        const double term = q(b, i, h, c) * k(b, j, h, c) * scale_;
        s += term, terms += std::abs(term);
      }
      if (std::isnan(s)) return;
      p[static_cast<std::size_t>(j)] = s;
      top = std::max(top, s), logit_terms = std::max(logit_terms, terms);
    }
    // A probability errs by twice what its logit and the largest do, by the exponential, and by the sum.
    const double u = support::unit_roundoff<Compute<T>>;
    const double relative = u * (4 * logit_terms * (d + 4) + 2 * n + 16);
    if (relative > 0.01) return;
    double sum = 0;
    for (double& s : p) sum += s = s == -HUGE_VAL ? 0 : std::exp(s - top);
    if (!lse.empty()) {
      const double want = sum > 0 ? top + std::log(sum) : top, got = lse(b, i, h);
      expect(got == want || std::abs(got - want) <= relative + 2 * u * std::abs(want),
             "log-sum-exp: got " + std::to_string(got) + ", expected " + std::to_string(want));
    }
    for (Index c = 0; c < v.extent(3); ++c) {
      double want = 0, terms = 0;
      for (const Index j : seen) {
        const double weight = p[static_cast<std::size_t>(j)];
        // Too small a weight may be 0 in the op.
        if (weight < 1e-30 && !std::isfinite(v(b, j, h, c))) return;
        want += weight / sum * v(b, j, h, c), terms += weight / sum * std::abs(v(b, j, h, c));
      }
      const double got = linattn::convert<double>(out(b, i, h, c));
      const double allowed =
          2 * relative * terms + 1.01 * support::unit_roundoff<T> * std::abs(want) + 0x1p-24;
      if (std::isfinite(want) && !(std::abs(got - want) <= allowed))
        fail("out" + support::text(std::array{b, i, h, c}) + ": got " + std::to_string(got) + ", expected " +
             std::to_string(want) + " within " + std::to_string(allowed));
    }
  }
};
}  // namespace fuzz

// The colour map of signed values: zero is white, negative values go to blue and positive ones to red.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

namespace attention_map {

// A colour in OKLab, where equal distances look equal, as sRGB (B. Ottosson, "A perceptual color space for image
// processing", 2020); what the screen cannot show is clipped.
[[nodiscard]] inline std::array<std::uint8_t, 3> srgb(double lightness, double a, double b) {
  const auto cube = [](double x) { return x * x * x; };
  const double l = cube(lightness + 0.3963377774 * a + 0.2158037573 * b);
  const double m = cube(lightness - 0.1055613458 * a - 0.0638541728 * b);
  const double s = cube(lightness - 0.0894841775 * a - 1.2914855480 * b);
  const auto encode = [](double x) {
    const double curved = x <= 0.0031308 ? 12.92 * x : 1.055 * std::pow(x, 1.0 / 2.4) - 0.055;
    return static_cast<std::uint8_t>(std::lround(255.0 * std::clamp(curved, 0.0, 1.0)));
  };
  return {encode(4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s),
          encode(-1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s),
          encode(-0.0041960863 * l - 0.7034186147 * m + 1.7076147010 * s)};
}

// A value in [-1, 1]. Either side is a straight line in OKLab, so that equal steps of the value are equal steps to
// the eye, and both sides are equally dark. Softmax maps are the positive side alone: one colour has one meaning in
// either kind of map.
[[nodiscard]] inline std::array<std::uint8_t, 3> diverging(double value) {
  const double t = std::clamp(std::abs(value), 0.0, 1.0);
  constexpr double white = 0.98, dark = 0.42, chroma = 0.165, degree = 0.017453292519943295;
  const double hue = (value < 0 ? 258.0 : 27.0) * degree;
  return srgb(white + (dark - white) * t, chroma * t * std::cos(hue), chroma * t * std::sin(hue));
}

}  // namespace attention_map

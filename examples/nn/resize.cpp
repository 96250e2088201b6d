#include "resize.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <stdexcept>

namespace nn {
namespace {

constexpr int fraction_bits = 22;

// What an output pixel reads: `count` inputs from `first` on, with these weights.
struct Window {
  Index first = 0;
  std::vector<std::int32_t> weights;
};

// The kernel of R. Keys, Cubic convolution interpolation for digital image processing, 1981, at distance x.
double cubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

double sinc(double x) {
  if (x == 0) return 1;
  x *= std::numbers::pi;
  return std::sin(x) / x;
}

// A filter reaches `support` pixels to either side.
struct Kernel {
  double support;
  double (*at)(double x);
};

Kernel kernel_of(Filter filter) {
  switch (filter) {
    case Filter::box:
      return {0.5, [](double x) { return x > -0.5 && x <= 0.5 ? 1.0 : 0.0; }};
    case Filter::bilinear:
      return {1, [](double x) { return std::max(1 - std::abs(x), 0.0); }};
    case Filter::hamming:
      return {1, [](double x) {
                return std::abs(x) < 1 ? sinc(x) * (0.54 + 0.46 * std::cos(std::numbers::pi * x)) : 0.0;
              }};
    case Filter::lanczos:
      return {3, [](double x) { return x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0.0; }};
    case Filter::nearest:  // is no sum
    case Filter::bicubic:
      break;
  }
  return {2, cubic};
}

std::vector<Window> windows(Index in, Index out, const Kernel& kernel) {
  const double scale = static_cast<double>(in) / static_cast<double>(out), stretch = std::max(scale, 1.0),
               reach = kernel.support * stretch;
  std::vector<Window> result(static_cast<std::size_t>(out));
  std::vector<double> weights;
  for (Index i = 0; i < out; ++i) {
    const double centre = (static_cast<double>(i) + 0.5) * scale;
    const auto first = std::max<Index>(static_cast<Index>(centre - reach + 0.5), 0);
    const auto end = std::min(static_cast<Index>(centre + reach + 0.5), in);
    weights.clear();
    double sum = 0;
    for (Index j = first; j < end; ++j) {
      weights.push_back(kernel.at((static_cast<double>(j) - centre + 0.5) * (1 / stretch)));
      sum += weights.back();
    }
    Window& window = result[static_cast<std::size_t>(i)];
    window.first = first;
    for (const double weight : weights)
      window.weights.push_back(static_cast<std::int32_t>(std::round(weight / sum * (1 << fraction_bits))));
  }
  return result;
}

std::uint8_t to_byte(std::int32_t sum) {
  return static_cast<std::uint8_t>(std::clamp(sum >> fraction_bits, 0, 255));
}

Image resize_rows(const Image& image, Index width, const Kernel& kernel) {
  const std::vector<Window> all = windows(image.width, width, kernel);
  Image result{width, image.height,
               std::vector<std::uint8_t>(static_cast<std::size_t>(width * image.height * 3))};
  std::uint8_t* out = result.rgb.data();
  for (Index y = 0; y < image.height; ++y)
    for (const Window& window : all) {
      std::int32_t sums[3] = {1 << (fraction_bits - 1), 1 << (fraction_bits - 1), 1 << (fraction_bits - 1)};
      const std::uint8_t* in = image.rgb.data() + (y * image.width + window.first) * 3;
      for (const std::int32_t weight : window.weights)
        for (std::int32_t& sum : sums) sum += weight * *in++;
      for (const std::int32_t sum : sums) *out++ = to_byte(sum);
    }
  return result;
}

Image resize_columns(const Image& image, Index height, const Kernel& kernel) {
  const Index stride = image.width * 3;
  Image result{image.width, height, std::vector<std::uint8_t>(static_cast<std::size_t>(stride * height))};
  std::uint8_t* out = result.rgb.data();
  std::vector<std::int32_t> sums(static_cast<std::size_t>(stride));
  for (const Window& window : windows(image.height, height, kernel)) {
    std::fill(sums.begin(), sums.end(), 1 << (fraction_bits - 1));
    const std::uint8_t* in = image.rgb.data() + window.first * stride;
    for (const std::int32_t weight : window.weights)
      for (std::int32_t& sum : sums) sum += weight * *in++;
    for (const std::int32_t sum : sums) *out++ = to_byte(sum);
  }
  return result;
}

// The input at the centre of each output. PIL adds the scale up, which rounds.
std::vector<Index> nearest(Index in, Index out) {
  const double scale = static_cast<double>(in) / static_cast<double>(out);
  double centre = scale * 0.5;
  std::vector<Index> result;
  for (Index i = 0; i < out; ++i, centre += scale)
    result.push_back(std::min(static_cast<Index>(centre), in - 1));
  return result;
}

Image resize_nearest(const Image& image, Index width, Index height) {
  const std::vector<Index> rows = nearest(image.height, height), columns = nearest(image.width, width);
  Image result{width, height, {}};
  result.rgb.reserve(static_cast<std::size_t>(width * height * 3));
  for (const Index row : rows)
    for (const Index column : columns) {
      const auto pixel = image.rgb.begin() + (row * image.width + column) * 3;
      result.rgb.insert(result.rgb.end(), pixel, pixel + 3);
    }
  return result;
}

}  // namespace

Image resize(const Image& image, Index width, Index height, Filter filter) {
  if (width < 1 || height < 1 || image.width < 1 || image.height < 1)
    throw std::runtime_error("cannot resize a picture of " + std::to_string(image.width) + " x " +
                             std::to_string(image.height) + " pixels to " + std::to_string(width) + " x " +
                             std::to_string(height));
  constexpr Index most = Index{1} << 27;
  if (width > most / height)
    throw std::runtime_error("a picture of " + std::to_string(image.width) + " x " +
                             std::to_string(image.height) + " pixels would be resized to " +
                             std::to_string(width) + " x " + std::to_string(height) + "; at most " +
                             std::to_string(most) + " pixels are made");
  if (filter == Filter::nearest) return resize_nearest(image, width, height);
  const Kernel kernel = kernel_of(filter);
  const auto across = [&](const Image& from) {
    return width == from.width ? from : resize_rows(from, width, kernel);
  };
  const auto down = [&](const Image& from) {
    return height == from.height ? from : resize_columns(from, height, kernel);
  };
  // The order of Pillow since 13, which rounds between the two.
  const bool down_first = height < image.height && image.height - height > 2 * (image.width - width);
  return down_first ? across(down(image)) : down(across(image));
}

Image crop(const Image& image, Index left, Index top, Index width, Index height) {
  if (left < 0 || top < 0 || width < 1 || height < 1 || left > image.width - width ||
      top > image.height - height)
    throw std::runtime_error("a part of " + std::to_string(width) + " x " + std::to_string(height) + " at (" +
                             std::to_string(left) + ", " + std::to_string(top) + ") is not in a picture of " +
                             std::to_string(image.width) + " x " + std::to_string(image.height));
  Image result{width, height, {}};
  for (Index y = top; y < top + height; ++y) {
    const auto row = image.rgb.begin() + (y * image.width + left) * 3;
    result.rgb.insert(result.rgb.end(), row, row + width * 3);
  }
  return result;
}

Image pad(const Image& image, Index width, Index height, std::array<std::uint8_t, 3> colour) {
  Image result{std::max(width, image.width), std::max(height, image.height), {}};
  result.rgb.reserve(static_cast<std::size_t>(result.width * result.height * 3));
  for (Index i = 0; i < result.width * result.height; ++i)
    result.rgb.insert(result.rgb.end(), colour.begin(), colour.end());
  const Index left = (result.width - image.width) / 2, top = (result.height - image.height) / 2;
  for (Index y = 0; y < image.height; ++y)
    std::copy_n(image.rgb.begin() + y * image.width * 3, image.width * 3,
                result.rgb.begin() + ((top + y) * result.width + left) * 3);
  return result;
}

}  // namespace nn

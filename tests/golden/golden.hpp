// The golden runner: files of recorded inputs and results, each run by the runner of its `op`.
//
// A runner reads what it needs from its Case and gives back what it computed:
//
//   void run(golden::Case& c) {
//     const golden::Tensor q = c.read("q");                      // input or parameter: counts as used
//     ...
//     c.check("output", "float", ours, {golden::Norm::relative_l2, 2e-6});   // counts as used too
//   }
//   const golden::Registration registration({"my_op"}, run);
//
// A tensor that nobody used fails the case, and so does one that is asked for and not there. Gradients
// ("grad.*") are listed as not yet checked. Runners may throw: the case fails with the message.
#pragma once

#include <cstddef>
#include <filesystem>
#include <initializer_list>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include <linattn/core/dtype.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/weights/safetensors.hpp>

namespace golden {

using linattn::Index;
using linattn::TensorView;

// A recorded tensor, widened to double (exactly, whatever it is stored as: F64, F32, F16, BF16, I64, I32, U8).
struct Tensor {
  std::vector<Index> shape;
  std::vector<double> values;

  [[nodiscard]] Index extent(std::size_t axis) const { return shape.at(axis); }
  // As a dense view. Throws when the rank differs.
  template <int R>
  [[nodiscard]] TensorView<const double, R> view() const {
    if (shape.size() != static_cast<std::size_t>(R))
      throw std::runtime_error("a tensor of " + std::to_string(shape.size()) + " axes where " +
                               std::to_string(R) + " are expected");
    std::array<Index, static_cast<std::size_t>(R)> extents{};
    for (std::size_t axis = 0; axis < shape.size(); ++axis) extents[axis] = shape[axis];
    return {values.data(), extents};
  }
};

enum class Norm {
  relative_l2,  // |ours - golden| / |golden|, both L2
  scaled_max,   // max |ours - golden| / max(1, max |golden|)
};

struct Tolerance {
  Norm norm = Norm::relative_l2;
  double value = 0.0;
};

class Case {
 public:
  // Throws std::runtime_error when the file cannot be read.
  explicit Case(const std::filesystem::path& path);

  [[nodiscard]] const std::filesystem::path& path() const { return path_; }
  [[nodiscard]] const linattn::Safetensors& file() const { return file_; }
  [[nodiscard]] std::string op() const { return meta("op"); }

  // "__metadata__". The first form throws when the key is missing, the second gives `otherwise`.
  [[nodiscard]] std::string meta(std::string_view key) const;
  [[nodiscard]] std::string meta(std::string_view key, std::string_view otherwise) const;
  [[nodiscard]] double number(std::string_view key) const;
  [[nodiscard]] double number(std::string_view key, double otherwise) const;

  [[nodiscard]] bool has(std::string_view tensor) const { return file_.find(tensor) != nullptr; }
  [[nodiscard]] std::vector<std::string> names() const;
  // Reads a tensor and counts it as used. Throws when it is missing.
  [[nodiscard]] Tensor read(std::string_view tensor);
  // Counts a tensor as used that is read by other means (such as a checkpoint that opens the same file).
  void use(std::string_view tensor);

  // Compares ours with the recorded tensor of that name, prints a line and counts the tensor as used. The
  // shapes must agree, axes of extent 1 aside. `variant` says which run this is: "float", "double, packed".
  template <class T, int R>
  void check(std::string_view tensor, std::string_view variant, const TensorView<T, R>& ours,
             Tolerance tolerance) {
    Tensor dense{{ours.extents.begin(), ours.extents.end()}, {}};
    flatten(ours, dense.values);
    check(tensor, variant, dense, tolerance);
  }
  void check(std::string_view tensor, std::string_view variant, const Tensor& ours, Tolerance tolerance);
  // The same against values that are not in the file, such as the double run of the same rounded inputs.
  void compare(std::string_view what, std::string_view variant, const Tensor& ours, const Tensor& expected,
               Tolerance tolerance);
  template <class T, int R>
  void compare(std::string_view what, std::string_view variant, const TensorView<T, R>& ours,
               const Tensor& expected, Tolerance tolerance) {
    Tensor dense{{ours.extents.begin(), ours.extents.end()}, {}};
    flatten(ours, dense.values);
    compare(what, variant, dense, expected, tolerance);
  }
  // A condition without a number.
  void expect(bool condition, std::string_view what);

  // Lists what was not used, and says whether all checks passed. `completed`: the runner did not throw. Called
  // by the program, once.
  [[nodiscard]] bool finish(bool completed);

 private:
  template <class T, int R>
  static void flatten(const TensorView<T, R>& v, std::vector<double>& out) {
    if constexpr (R == 1) {
      for (Index i = 0; i < v.extent(0); ++i) out.push_back(linattn::convert<double>(v(i)));
    } else {
      for (Index i = 0; i < v.extent(0); ++i) flatten(at(v, i), out);
    }
  }

  std::filesystem::path path_;
  linattn::Safetensors file_;
  std::set<std::string, std::less<>> used_;
  int checks_ = 0, failures_ = 0;
};

using Runner = void (*)(Case&);

// Every op name and its runner, of a context: "cpu" or "cuda". Files of this folder add theirs by a Registration at
// namespace scope.
[[nodiscard]] std::map<std::string, Runner, std::less<>>& registry(std::string_view context);

struct Registration {
  Registration(std::string_view context, std::initializer_list<std::string_view> ops, Runner runner);
  Registration(std::initializer_list<std::string_view> ops, Runner runner);
};

}  // namespace golden

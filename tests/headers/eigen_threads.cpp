// linattn before Eigen, in a unit with OpenMP: a product of Eigen's own would run on threads, an op's does not.
#include <linattn/cpu.hpp>

#include <cstddef>
#include <cstdio>
#include <vector>

#include <Eigen/Core>

using namespace linattn;

int main() {
  constexpr Index size = 64;
  std::vector<float> x(size * size, 0.5f), y(size * size);
  const TensorView<const float, 2> in(x.data(), {size, size});
  const TensorView<float, 2> out(y.data(), {size, size});
  const TensorView<const float, 1> none;
  std::vector<std::byte> scratch(linear_workspace(Cpu{}, in, in, none, out));
  const Status status = linear(Cpu{Workspace{scratch.data(), scratch.size()}}, in, in, none, out);
  std::printf("%s, Eigen has %d threads\n", message(status).c_str(), Eigen::nbThreads());
  return status.ok() && Eigen::nbThreads() == 2 ? 0 : 1;
}

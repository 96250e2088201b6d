#include "threads.hpp"

#include <latch>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "runtime.hpp"

namespace nn {

void expect_threads(int threads) {
  const auto count = static_cast<std::size_t>(make_threads(threads).workers());
  std::vector<std::thread> started;
  std::latch all(1);
  std::string why;
  try {
    started.reserve(count);
    while (started.size() + 1 < count) started.emplace_back([&all] { all.wait(); });
  } catch (const std::system_error& error) {
    why = error.code().message();
  }
  all.count_down();
  for (std::thread& thread : started) thread.join();
  if (!why.empty())
    throw std::runtime_error("--threads: the system starts " + std::to_string(started.size() + 1) + " of " +
                             std::to_string(count) + " threads (" + why + ")");
}

}  // namespace nn

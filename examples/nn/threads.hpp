// Whether the system has the threads that a command is to run on.
#pragma once

namespace nn {

// Starts as many threads as OpenMP would for Runtime(threads), all at once, and lets them end. Throws std::runtime_error
// where the system does not start them all: OpenMP would end the program, in the midst of its work and in its own words.
void expect_threads(int threads);

}  // namespace nn

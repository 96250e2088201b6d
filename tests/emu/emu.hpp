// A CUDA device on the host, for tests: kernels that include <cuda_runtime.h>, <linattn/detail/ptx.cuh> and CUB's block
// reduction are compiled by g++ or clang++ with tests/emu/include first in the path, and run with every thread of a
// block as a fiber. What it finds and what it does not model is in docs/emulation.md.
//
//   checked    g++ -std=c++20 -O1 -gdwarf-4 -fno-strict-aliasing -fsanitize=thread -Itests/emu/include -Iinclude -c X_test.cpp
//              (the link goes without -fsanitize=thread: the engine supplies the callbacks)
//   sanitized  the same and the engine with -fsanitize=address,undefined instead
//   engine     g++ -std=c++20 -O2 -Itests/emu/include -Iinclude -c tests/emu/*.cpp; link with -lboost_context
//
// The order in which threads run: EMU_SCHEDULE=in-order (default), reverse, skew, random, or random:SEED.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace emu {

enum class Schedule {
  in_order,  // warps in turn, each to its next synchronisation
  reverse,   // the same from the last block, warp and lane
  random,    // any warp, its lanes in any order
  skew       // one warp as far ahead as barriers allow, then the next; which is first depends on the seed
};
// Asynchronous copies land when they are waited for (late), at once (early), or either (mixed). Until the wait it is a
// fault to read their destination.
enum class Landing { late, early, mixed };

void set_schedule(Schedule schedule, std::uint64_t seed = 1);
void set_landing(Landing landing);

// ---- faults ----

enum class Fault {
  race,           // two accesses, one of them a write, that no barrier orders
  uninitialised,  // a read of shared memory that the block did not write
  in_flight,      // a read of, or a second copy to, the destination of a copy that was not waited for
  out_of_bounds,  // beyond an allocation, or the shared memory that the launch asked for
  misaligned,     // an access at an address that its size does not divide
  divergence,     // threads of a block or warp wait at different places, or have left
  unwaited_copy,  // a thread ends with copies under way
  host_access     // the host uses a device pointer
};
[[nodiscard]] const char* name(Fault fault);

struct Report {
  Fault fault;
  std::string text;  // kernel, block, thread, and the places in the source
};

// While one is alive, a fault ends the launch (cudaErrorLaunchFailure) and is kept; else it ends the program.
class Recorder {
 public:
  Recorder();
  ~Recorder();
  Recorder(const Recorder&) = delete;
  Recorder& operator=(const Recorder&) = delete;
  [[nodiscard]] const std::vector<Report>& reports() const;
};

// Whether the program has instrumented kernels: then all faults are found, else those that need no instrumentation.
[[nodiscard]] bool checked();

// ---- counters ----

enum class Kind { global_load, global_store, shared_load, shared_store };

// What one line of the source did, in requests of a whole warp. A transaction is a sector of 32 bytes of global memory,
// or a pass over the banks of shared memory; `minimum` is how many there would be if the bytes lay side by side.
struct Line {
  std::string where;  // file:line
  Kind kind = Kind::global_load;
  std::uint64_t requests = 0, transactions = 0, minimum = 0, bytes = 0;
  [[nodiscard]] double ratio() const {
    return minimum == 0 ? 0.0 : static_cast<double>(transactions) / static_cast<double>(minimum);
  }
};

// Counts what is launched while it lives. Complete where checked().
class Count {
 public:
  Count();
  ~Count();
  Count(const Count&) = delete;
  Count& operator=(const Count&) = delete;

  [[nodiscard]] std::vector<Line> lines() const;  // by place
  [[nodiscard]] std::uint64_t mma() const;        // warp-wide m16n8k16
  // Bytes that threads asked for, whatever the caches would have kept.
  [[nodiscard]] std::uint64_t global_bytes_loaded() const;
  [[nodiscard]] std::uint64_t global_bytes_stored() const;
  // Transactions over their minimum: of all lines, and of the worst line whose file ends with `file`; 0: there is none.
  [[nodiscard]] double ratio(Kind kind) const;
  [[nodiscard]] double worst(Kind kind, const std::string& file = "") const;
  // The worst of both kinds of shared memory: 1 where no access conflicts with another.
  [[nodiscard]] double worst_bank_conflict() const;
  void print() const;
};

}  // namespace emu

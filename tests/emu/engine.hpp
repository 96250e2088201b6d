// What the parts of the emulator know of each other: the block that runs (engine.cpp), device and shared memory with
// the record of who touched it (memory.cpp), the counters (count.cpp).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "emu.hpp"

namespace emu {

using Place = std::uintptr_t;  // a return address in a kernel

inline constexpr std::size_t max_shared = 227 * 1024, shared_without_asking = 48 * 1024;

// The block that runs, and its thread that does. `serial` counts blocks since the program began; those of this launch
// are not older than `launch_serial`. Epochs count barriers.
struct Running {
  bool kernel = false;  // a thread of a kernel runs, not the host or the engine
  int thread = 0;
  std::uint32_t serial = 0, launch_serial = 0, block_epoch = 0;
  std::uint32_t warp_epoch[32] = {};
  std::size_t shared_bytes = 0;
  const void* function = nullptr;
};
extern Running running;

// ---- engine.cpp ----

// Ends the launch, or the program. Does not return to a kernel.
[[noreturn]] void fault(Fault fault, const std::string& what, Place place);
// "file:line" of the kernel's code, the emulator's own inlined functions skipped; the name of a function.
[[nodiscard]] std::string source_line(Place place);
[[nodiscard]] std::string function_name(const void* function);
[[nodiscard]] std::uint64_t random_bits();
[[nodiscard]] Place place_of(int thread);  // where it waits

// ---- memory.cpp ----

[[nodiscard]] bool is_device_memory(const void* address);
void open_device_memory(bool open);  // to the host
void begin_block();
void touch(const void* address, std::size_t bytes, bool write, Place place);
[[nodiscard]] Place unfinished_copy();  // of the thread; 0: none
void forget_copies();

// ---- count.cpp ----

void count_access(const void* address, std::size_t bytes, bool write, bool shared, Place place);
void count_block();  // at its end
extern bool counting;

}  // namespace emu

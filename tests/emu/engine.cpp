// The threads of a block as fibers, and the schedule that decides which runs.
#include "engine.hpp"

#include <sys/mman.h>
#include <unistd.h>
#include <boost/context/detail/fcontext.hpp>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <string_view>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define EMU_START_SWITCH __sanitizer_start_switch_fiber
#define EMU_FINISH_SWITCH __sanitizer_finish_switch_fiber
#else
#define EMU_START_SWITCH(...) static_cast<void>(0)
#define EMU_FINISH_SWITCH(...) static_cast<void>(0)
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emu {

Running running;

namespace {

namespace context = boost::context::detail;

struct Abandoned {};  // thrown by a fault in the engine itself

enum class Wait { none, collective, warp, block, done };
constexpr std::array wait_names = {"running", "in a warp-wide instruction", "at __syncwarp",
                                   "at __syncthreads", "gone"};

struct Thread {
  context::fcontext_t fiber = nullptr;
  Wait wait = Wait::none;
  Place place = 0;
  void (*act)(void* const (&)[32]) = nullptr;
  void* arguments = nullptr;
  bool vote = false;
};

constexpr std::size_t stack_bytes = 256 * 1024;
constexpr int max_threads = 1024;

struct Engine {
  std::array<Thread, max_threads> threads;
  int count = 0;  // threads of the block
  context::fcontext_t scheduler = nullptr;
  char* stacks = nullptr;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
  bool abandoned = false;
  bool any = false;  // of the votes at the last barrier

  Schedule schedule = Schedule::in_order;
  std::uint64_t random = 1;

  std::vector<Report> reports;
  int recorders = 0;
  cudaError_t last_error = cudaSuccess;
  std::map<const void*, std::size_t> asked;  // for shared memory, by kernel

  Engine() {
    stacks = static_cast<char*>(mmap(nullptr, stack_bytes * max_threads, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    const char* variable = std::getenv("EMU_SCHEDULE");
    const std::string_view text = variable == nullptr ? "in-order" : variable;
    if (text == "reverse") {
      schedule = Schedule::reverse;
    } else if (text == "skew") {
      schedule = Schedule::skew;
    } else if (text.starts_with("random")) {
      schedule = Schedule::random;
      if (text.size() > 7) random = std::strtoull(variable + 7, nullptr, 10) * 2 + 1;
    } else if (text != "in-order") {
      std::fprintf(stderr, "emu: EMU_SCHEDULE: in-order, reverse, skew, random or random:SEED, not %s\n",
                   variable);
      std::exit(2);
    }
  }
};
// Made on first use: kernels may run before main().
Engine& engine() {
  static Engine e;
  return e;
}

int warps() { return (engine().count + 31) / 32; }
int warp_end(int warp) { return std::min(32 * warp + 32, engine().count); }

// ---- fibers ----

void entry(context::transfer_t from) {
  EMU_FINISH_SWITCH(nullptr, nullptr, nullptr);
  engine().scheduler = from.fctx;
  engine().body(engine().arguments);
  if (const Place place = unfinished_copy(); place != 0)
    fault(Fault::unwaited_copy, "the thread ends with copies that it did not wait for", place);
  running.kernel = false;
  engine().threads[static_cast<std::size_t>(running.thread)].wait = Wait::done;
  EMU_START_SWITCH(nullptr, nullptr, 0);
  context::jump_fcontext(engine().scheduler, nullptr);
}

// From the thread that runs to the scheduler; back when the thread is resumed.
void leave() {
  running.kernel = false;
  [[maybe_unused]] void* fake = nullptr;
  EMU_START_SWITCH(&fake, nullptr, 0);
  const context::transfer_t from = context::jump_fcontext(engine().scheduler, nullptr);
  EMU_FINISH_SWITCH(fake, nullptr, nullptr);
  engine().scheduler = from.fctx;
}

void resume(int index) {
  Thread& thread = engine().threads[static_cast<std::size_t>(index)];
  const auto linear = static_cast<unsigned>(index);
  threadIdx = {linear % blockDim.x, linear / blockDim.x % blockDim.y, linear / blockDim.x / blockDim.y};
  running.thread = index;
  running.kernel = true;
  [[maybe_unused]] void* fake = nullptr;
  EMU_START_SWITCH(&fake, engine().stacks + stack_bytes * static_cast<std::size_t>(index), stack_bytes);
  const context::transfer_t from = context::jump_fcontext(thread.fiber, nullptr);
  EMU_FINISH_SWITCH(fake, nullptr, nullptr);
  thread.fiber = from.fctx;
}

void wait(Wait wait, Place place) {
  Thread& thread = engine().threads[static_cast<std::size_t>(running.thread)];
  thread.wait = wait;
  thread.place = place;
  leave();
}

// ---- the schedule ----

// Lanes of the warp that may run, run, each until it waits.
bool run_lanes(int warp) {
  std::array<int, 32> order;
  std::iota(order.begin(), order.end(), 32 * warp);
  const int count = warp_end(warp) - 32 * warp;
  if (engine().schedule == Schedule::reverse) std::reverse(order.begin(), order.begin() + count);
  if (engine().schedule == Schedule::random)
    for (int i = count - 1; i > 0; --i)
      std::swap(order[static_cast<std::size_t>(i)], order[random_bits() % static_cast<unsigned>(i + 1)]);
  bool ran = false;
  for (int i = 0; i < count && !engine().abandoned; ++i) {
    const int index = order[static_cast<std::size_t>(i)];
    if (engine().threads[static_cast<std::size_t>(index)].wait != Wait::none) continue;
    resume(index);
    ran = true;
  }
  return ran;
}

std::string situation(int first, int end) {
  std::map<std::string, int> places;
  for (int i = first; i < end; ++i) {
    const Thread& thread = engine().threads[static_cast<std::size_t>(i)];
    std::string text = wait_names[static_cast<std::size_t>(thread.wait)];
    if (thread.wait != Wait::done) text += ", " + source_line(thread.place);
    ++places[text];
  }
  std::string out;
  for (const auto& [text, count] : places)
    out += (out.empty() ? "" : "; ") + std::to_string(count) + " threads " + text;
  return out;
}

// Inlined or unrolled, one line has several places. Without debug information all are taken for the same.
bool same_line(Place a, Place b) {
  return a == b || source_line(a) == source_line(b) || source_line(a).starts_with('?');
}

// Whether the threads wait for the same thing.
bool together(int first, int end) {
  const Thread& thread = engine().threads[static_cast<std::size_t>(first)];
  for (int i = first + 1; i < end; ++i) {
    const Thread& other = engine().threads[static_cast<std::size_t>(i)];
    if (other.wait != thread.wait || (thread.wait == Wait::collective && other.act != thread.act))
      return false;
    if (thread.wait != Wait::done && !same_line(thread.place, other.place)) return false;
  }
  return true;
}

// Lets the lanes go on that have all come to a __syncwarp or a warp-wide instruction.
bool release_warp(int warp) {
  const int first = 32 * warp, end = warp_end(warp);
  const Thread& leader = engine().threads[static_cast<std::size_t>(first)];
  if ((leader.wait != Wait::warp && leader.wait != Wait::collective) || !together(first, end)) return false;
  if (leader.wait == Wait::collective) {
    void* lanes[32] = {};
    for (int i = first; i < end; ++i)
      lanes[i - first] = engine().threads[static_cast<std::size_t>(i)].arguments;
    running.thread = first;
    leader.act(lanes);
  } else {
    ++running.warp_epoch[warp];
  }
  for (int i = first; i < end; ++i) engine().threads[static_cast<std::size_t>(i)].wait = Wait::none;
  return true;
}

// Runs a block to its end, or until a fault.
void run_block() {
  Engine& e = engine();
  for (int i = 0; i < e.count; ++i) {
    Thread& thread = e.threads[static_cast<std::size_t>(i)];
    thread = {};
    thread.fiber =
        context::make_fcontext(e.stacks + stack_bytes * static_cast<std::size_t>(i + 1), stack_bytes, entry);
  }
  begin_block();
  std::vector<int> order(static_cast<std::size_t>(warps()));
  std::iota(order.begin(), order.end(), 0);
  if (e.schedule == Schedule::reverse) std::reverse(order.begin(), order.end());
  if (e.schedule == Schedule::skew)
    std::rotate(order.begin(), order.begin() + static_cast<long>(random_bits() % order.size()), order.end());
  while (!e.abandoned) {
    bool moved = false;
    if (e.schedule == Schedule::random)
      for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_bits() % i]);
    for (const int warp : order) {
      do {
        const bool ran = run_lanes(warp);
        if (e.abandoned) return;
        const bool released = release_warp(warp);
        if (e.abandoned) return;
        moved = moved || ran || released;
        if (!released) break;
      } while (e.schedule == Schedule::skew);
      if (e.schedule == Schedule::random && moved) break;
    }
    if (moved) continue;
    if (together(0, e.count) && e.threads[0].wait == Wait::done) return;
    if (!together(0, e.count) || e.threads[0].wait != Wait::block) {
      running.thread = 0;
      fault(Fault::divergence, situation(0, e.count), 0);
    }
    ++running.block_epoch;
    for (int warp = 0; warp < warps(); ++warp) ++running.warp_epoch[warp];
    e.any = false;
    for (int i = 0; i < e.count; ++i) {
      Thread& thread = e.threads[static_cast<std::size_t>(i)];
      thread.wait = Wait::none;
      e.any = std::exchange(thread.vote, false) || e.any;
    }
  }
}

std::string run_tool(const std::string& command) {
  std::string out;
  if (FILE* pipe = popen(command.c_str(), "r")) {
    char buffer[512];
    while (std::fgets(buffer, sizeof buffer, pipe) != nullptr) out += buffer;
    pclose(pipe);
  }
  return out;
}

}  // namespace

extern "C" const char __executable_start;  // NOLINT: the linker's name

std::string source_line(Place place) {
  static std::map<Place, std::string> known;
  if (place == 0) return "(no place)";
  if (const auto found = known.find(place); found != known.end()) return found->second;
  // A return address lies behind the call.
  char command[128];
  std::snprintf(command, sizeof command, "addr2line -ie /proc/%d/exe %#zx", static_cast<int>(getpid()),
                place - 1 - reinterpret_cast<std::uintptr_t>(&__executable_start));
  const std::string lines = run_tool(command);
  std::string result = "(unknown place)";
  for (std::size_t begin = 0; begin < lines.size();) {
    const std::size_t end = std::min(lines.find('\n', begin), lines.size());
    std::string line = lines.substr(begin, end - begin);
    line = line.substr(0, line.find(" (discriminator"));
    begin = end + 1;
    if (line.find("/emu/include/") != std::string::npos && begin < lines.size()) continue;
    result = line;
    break;
  }
  return known[place] = result;
}

std::string function_name(const void* function) {
  char command[128];
  std::snprintf(
      command, sizeof command, "addr2line -Cfe /proc/%d/exe %#zx", static_cast<int>(getpid()),
      reinterpret_cast<std::uintptr_t>(function) - reinterpret_cast<std::uintptr_t>(&__executable_start));
  const std::string text = run_tool(command);
  return text.substr(0, text.find('\n'));
}

Place place_of(int thread) { return engine().threads[static_cast<std::size_t>(thread)].place; }

std::uint64_t random_bits() {
  std::uint64_t& state = engine().random;
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return (state * 0x2545f4914f6cdd1du) >> 16;
}

void set_schedule(Schedule schedule, std::uint64_t seed) {
  engine().schedule = schedule;
  engine().random = 2 * seed + 1;
}

const char* name(Fault fault) {
  constexpr std::array names = {"race",
                                "read of uninitialised shared memory",
                                "use of a copy under way",
                                "out of bounds",
                                "misaligned access",
                                "divergence",
                                "copy not waited for",
                                "device pointer used by the host"};
  return names[static_cast<std::size_t>(fault)];
}

void fault(Fault fault, const std::string& what, Place place) {
  const bool in_kernel = running.kernel;
  running.kernel = false;
  std::string text = std::string(name(fault)) + ": " + what;
  if (running.function != nullptr) {
    if (place != 0) text += "\n  at " + source_line(place);
    text += "\n  thread " + std::to_string(running.thread) + ", block (" + std::to_string(blockIdx.x) + ", " +
            std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ") of " +
            function_name(running.function);
  }
  if (engine().recorders == 0 || running.function == nullptr) {
    std::fprintf(stderr, "emu: %s\n", text.c_str());
    std::abort();
  }
  engine().reports.push_back({fault, text});
  engine().abandoned = true;
  // The thread is never resumed; what lies on its stack is trivial.
  if (in_kernel) leave();
  throw Abandoned{};
}

Recorder::Recorder() {
  ++engine().recorders;
  engine().reports.clear();
}
Recorder::~Recorder() {
  --engine().recorders;
  engine().last_error = cudaSuccess;
}
const std::vector<Report>& Recorder::reports() const { return engine().reports; }

void launch(const void* kernel, dim3 grid, dim3 block, std::size_t shared, void (*body)(void*),
            void* arguments, int& error) {
  Engine& e = engine();
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  const bool possible = threads > 0 && threads <= max_threads && block.z <= 64 && grid.x > 0 &&
                        grid.x < 1u << 31 && grid.y > 0 && grid.y <= 65535 && grid.z > 0 && grid.z <= 65535;
  const auto asked = e.asked.find(kernel);
  const std::size_t allowed = asked == e.asked.end() ? shared_without_asking : asked->second;
  if (!possible || shared > std::max(allowed, shared_without_asking)) {
    error = possible ? cudaErrorInvalidValue : cudaErrorInvalidConfiguration;
    return;
  }
  e.count = static_cast<int>(threads);
  e.body = body;
  e.arguments = arguments;
  e.abandoned = false;
  blockDim = block;
  gridDim = grid;
  running.function = kernel;
  running.shared_bytes = shared;
  running.launch_serial = running.serial + 1;
  open_device_memory(true);
  const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  const std::uint64_t offset = e.schedule == Schedule::random ? random_bits() % blocks : 0;
  try {
    for (std::uint64_t i = 0; i < blocks && !e.abandoned; ++i) {
      const std::uint64_t index = e.schedule == Schedule::reverse ? blocks - 1 - i : (i + offset) % blocks;
      blockIdx = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                  static_cast<unsigned>(index / grid.x / grid.y)};
      ++running.serial;
      run_block();
      if (counting) count_block();
    }
  } catch (const Abandoned&) {
  }
  open_device_memory(false);
  forget_copies();
  running.kernel = false;
  running.function = nullptr;
  if (e.abandoned) e.last_error = cudaErrorLaunchFailure;
}

void barrier() { wait(Wait::block, reinterpret_cast<Place>(__builtin_return_address(0))); }
bool barrier_any(bool vote) {
  engine().threads[static_cast<std::size_t>(running.thread)].vote = vote;
  wait(Wait::block, reinterpret_cast<Place>(__builtin_return_address(0)));
  return engine().any;
}
void warp_barrier() { wait(Wait::warp, reinterpret_cast<Place>(__builtin_return_address(0))); }
void collective(void (*act)(void* const (&)[32]), void* arguments) {
  Thread& thread = engine().threads[static_cast<std::size_t>(running.thread)];
  thread.act = act;
  thread.arguments = arguments;
  wait(Wait::collective, reinterpret_cast<Place>(__builtin_return_address(0)));
}

}  // namespace emu

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || static_cast<std::size_t>(value) > emu::max_shared) return cudaErrorInvalidValue;
  emu::engine().asked[kernel] = static_cast<std::size_t>(value);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return std::exchange(emu::engine().last_error, cudaSuccess); }

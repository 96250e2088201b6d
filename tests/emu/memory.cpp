// Device memory with guard pages, shared memory, asynchronous copies, and who touched what: the callbacks of
// -fsanitize=thread end here.
#include <linattn/detail/ptx.cuh>

#include "engine.hpp"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <map>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace emu {
namespace {

constexpr std::size_t arena_bytes = std::size_t{1} << 36, page = 4096;
constexpr std::size_t cell_bytes = 2;  // what is told apart: 16-bit elements, not bytes

// The last access of a kind to a cell, or several that are alike to those that follow.
enum class By : std::uint8_t { thread, warp, block, grid };
struct Access {
  std::uint32_t serial = 0, block_epoch = 0, warp_epoch = 0;
  std::uint16_t thread = 0;
  By by = By::thread;
  bool in_flight = false;
  Place place = 0;
};
struct Cell {
  Access write, read;
};
struct FreeCells {
  void operator()(Cell* cells) const { std::free(cells); }
};

struct Allocation {
  std::size_t bytes = 0, mapped = 0;
  std::unique_ptr<Cell[], FreeCells> cells;  // zero: the system brings pages of it as they are touched
};

// A copy under way: 16 bytes, of zero where `from` is null.
struct Copy {
  std::byte* to;
  const void* from;
  int group;
  bool landed;
  Place place;
};
struct Copies {
  std::vector<Copy> list;
  int group = 0;  // that the next copy belongs to
};

struct Memory {
  std::byte* arena = nullptr;
  std::size_t used = page;
  std::map<std::byte*, Allocation> allocations;
  std::byte* shared = nullptr;
  std::vector<Cell> shared_cells = std::vector<Cell>(max_shared / cell_bytes);
  std::array<Copies, 1024> copies;
  Landing landing = Landing::late;
  bool instrumented = false, open = false;

  Memory() {
    const auto map = [](std::size_t bytes, int protection) {
      return static_cast<std::byte*>(
          mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    };
    arena = map(arena_bytes, PROT_NONE);
    shared = map(max_shared + page, PROT_READ | PROT_WRITE);
#if !defined(__SANITIZE_ADDRESS__)
    struct sigaction action {};
    action.sa_sigaction = [](int signal, siginfo_t* info, void*) {
      if (is_device_memory(info->si_addr)) {
        if (running.kernel) fault(Fault::out_of_bounds, "beyond the allocations of the device", 0);
        fault(Fault::host_access, "the host reads or writes device memory", 0);
      }
      ::signal(signal, SIG_DFL);  // returns to the same access, and ends there
    };
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, nullptr);
#endif
  }
};
Memory& memory() {
  static Memory m;
  return m;
}

Allocation* allocation_of(const std::byte* address, std::size_t bytes, std::byte*& base) {
  Memory& m = memory();
  auto next = m.allocations.upper_bound(const_cast<std::byte*>(address));
  if (next == m.allocations.begin()) return nullptr;
  --next;
  base = next->first;
  return address + bytes <= base + next->second.bytes ? &next->second : nullptr;
}

bool is_shared(const void* address) {
  const auto* p = static_cast<const std::byte*>(address);
  return p >= memory().shared && p < memory().shared + max_shared;
}

// ---- races ----

int warp_of(int thread) { return thread / 32; }

// Whether all that `access` stands for happened before what the thread does now.
bool before(const Access& access) {
  if (access.serial < running.launch_serial) return true;
  if (access.serial != running.serial || access.by == By::grid) return false;
  if (access.block_epoch < running.block_epoch) return true;
  if (access.by == By::block || warp_of(access.thread) != warp_of(running.thread)) return false;
  if (access.warp_epoch < running.warp_epoch[warp_of(running.thread)]) return true;
  return access.by == By::thread && access.thread == running.thread;
}

Access now(Place place, By by = By::thread, bool in_flight = false) {
  return {running.serial,
          running.block_epoch,
          running.warp_epoch[warp_of(running.thread)],
          static_cast<std::uint16_t>(running.thread),
          by,
          in_flight,
          place};
}

std::string describe(const char* what, const Access& access) {
  return std::string(what) + " by thread " + std::to_string(access.thread) +
         (access.serial == running.serial ? "" : " of another block") + " at " + source_line(access.place);
}

void touch_cell(Cell& cell, bool shared, bool write, Place place, bool in_flight) {
  const bool written = !shared || cell.write.serial == running.serial;
  if (written && cell.write.in_flight)
    fault(Fault::in_flight, describe("the destination of a copy", cell.write), place);
  if (!write && !written) fault(Fault::uninitialised, "no thread of the block has written it", place);
  const bool after_write = !written || before(cell.write);
  const bool stale_read = shared && cell.read.serial != running.serial;
  if (!after_write) fault(Fault::race, describe("with a write", cell.write), place);
  if (!write) {
    const Access& old = cell.read;
    if (stale_read || before(old)) {
      cell.read = now(place);
    } else {
      const By by = old.serial != running.serial                     ? By::grid
                    : warp_of(old.thread) != warp_of(running.thread) ? By::block
                                                                     : By::warp;
      cell.read = now(place, std::max(by, old.by));
    }
    return;
  }
  if (!stale_read && !before(cell.read)) fault(Fault::race, describe("with a read", cell.read), place);
  cell.write = now(place, By::thread, in_flight);
}

// The cells of an access, after its bounds were checked. Empty where nothing is to be recorded.
struct Cells {
  Cell *begin = nullptr, *end = nullptr;
  bool shared = false;
};
Cells cells_of(const void* address, std::size_t bytes, Place place) {
  Memory& m = memory();
  const auto* p = static_cast<const std::byte*>(address);
  const auto range = [&](Cell* cells, std::size_t offset, bool shared) {
    return Cells{cells + offset / cell_bytes, cells + (offset + bytes) / cell_bytes, shared};
  };
  if (is_shared(p)) {
    const auto offset = static_cast<std::size_t>(p - m.shared);
    if (offset + bytes > running.shared_bytes)
      fault(Fault::out_of_bounds,
            std::to_string(bytes) + " bytes at " + std::to_string(offset) + " of " +
                std::to_string(running.shared_bytes) + " bytes of shared memory",
            place);
    return range(m.shared_cells.data(), offset, true);
  }
  if (!is_device_memory(p)) return {};
  std::byte* base = nullptr;
  Allocation* allocation = allocation_of(p, bytes, base);
  if (allocation == nullptr)
    fault(Fault::out_of_bounds, std::to_string(bytes) + " bytes beyond the allocations of the device", place);
  return range(allocation->cells.get(), static_cast<std::size_t>(p - base), false);
}

void check_alignment(const void* address, std::size_t bytes, Place place) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0)
    fault(Fault::misaligned, std::to_string(bytes) + " bytes at an address that is no multiple of that",
          place);
}

void record(const void* address, std::size_t bytes, bool write, Place place, bool in_flight = false) {
  const Cells cells = cells_of(address, bytes, place);
  if (counting && (cells.begin != nullptr)) count_access(address, bytes, write, cells.shared, place);
  if (memory().instrumented)
    for (Cell* cell = cells.begin; cell < cells.end; ++cell)
      touch_cell(*cell, cells.shared, write, place, in_flight);
}

void land(Copy& copy) {
  if (copy.from == nullptr) {
    std::memset(copy.to, 0, 16);
  } else {
    std::memcpy(copy.to, copy.from, 16);
  }
  copy.landed = true;
}

}  // namespace

void touch(const void* address, std::size_t bytes, bool write, Place place) {
  if (!is_shared(address) && !is_device_memory(address)) return;
  check_alignment(address, bytes, place);
  record(address, bytes, write, place);
}

bool is_device_memory(const void* address) {
  const auto* p = static_cast<const std::byte*>(address);
  return p >= memory().arena && p < memory().arena + arena_bytes;
}

void open_device_memory(bool open) {
  Memory& m = memory();
  if (m.open == open) return;
  m.open = open;
  for (const auto& [base, allocation] : m.allocations)
    mprotect(base, allocation.mapped, open ? PROT_READ | PROT_WRITE : PROT_NONE);
}

void begin_block() {
  ASAN_UNPOISON_MEMORY_REGION(memory().shared, max_shared);
  std::memset(memory().shared, 0xff, running.shared_bytes);
  ASAN_POISON_MEMORY_REGION(memory().shared + running.shared_bytes, max_shared - running.shared_bytes);
}

void set_landing(Landing landing) { memory().landing = landing; }
bool checked() { return memory().instrumented; }
void* shared_memory() { return memory().shared; }

void load(void* to, const void* from, std::size_t bytes) {
  const auto place = reinterpret_cast<Place>(__builtin_return_address(0));
  check_alignment(from, bytes, place);
  record(from, bytes, false, place);
  std::memcpy(to, from, bytes);
}
void store(void* to, const void* from, std::size_t bytes) {
  const auto place = reinterpret_cast<Place>(__builtin_return_address(0));
  check_alignment(to, bytes, place);
  record(to, bytes, true, place);
  std::memcpy(to, from, bytes);
}

// ---- asynchronous copies ----

void copy_async(void* shared, const void* global, bool valid) {
  const auto place = reinterpret_cast<Place>(__builtin_return_address(0));
  Memory& m = memory();
  check_alignment(shared, 16, place);
  check_alignment(global, 16, place);
  if (!is_shared(shared)) fault(Fault::out_of_bounds, "a copy to what is not shared memory", place);
  if (valid) record(global, 16, false, place);
  record(shared, 16, true, place, true);
  Copies& copies = m.copies[static_cast<std::size_t>(running.thread)];
  Copy copy{static_cast<std::byte*>(shared), valid ? global : nullptr, copies.group, false, place};
  std::memset(shared, 0xff, 16);
  if (m.landing == Landing::early || (m.landing == Landing::mixed && random_bits() % 2 == 0)) land(copy);
  copies.list.push_back(copy);
}
void copy_commit() { ++memory().copies[static_cast<std::size_t>(running.thread)].group; }
void copy_wait(int pending) {
  Memory& m = memory();
  Copies& copies = m.copies[static_cast<std::size_t>(running.thread)];
  const auto arrived = [&](Copy& copy) {
    if (copy.group >= copies.group - pending) return false;
    if (!copy.landed) land(copy);
    if (m.instrumented) {
      const Cells cells = cells_of(copy.to, 16, copy.place);
      for (Cell* cell = cells.begin; cell < cells.end; ++cell) cell->write = now(copy.place);
    }
    return true;
  };
  std::erase_if(copies.list, arrived);
}
Place unfinished_copy() {
  const Copies& copies = memory().copies[static_cast<std::size_t>(running.thread)];
  return copies.list.empty() ? 0 : copies.list.front().place;
}
void forget_copies() {
  for (Copies& copies : memory().copies) copies = {};
}

// ---- ldmatrix ----

namespace {

const std::uint16_t* row(void* const (&lanes)[32], int lane) {
  return static_cast<const std::uint16_t*>(static_cast<const Ldmatrix*>(lanes[lane])->row);
}
// Each lane's row is read in its name.
void read_rows(void* const (&lanes)[32]) {
  const int reader = running.thread, first = reader / 32 * 32;
  for (int lane = 0; lane < 32; ++lane) {
    running.thread = first + lane;
    const Place place = place_of(running.thread);
    check_alignment(row(lanes, lane), 16, place);
    if (!is_shared(row(lanes, lane)))
      fault(Fault::out_of_bounds, "ldmatrix of what is not shared memory", place);
    record(row(lanes, lane), 16, false, place);
  }
  running.thread = reader;
}

}  // namespace

void ldmatrix(void* const (&lanes)[32]) {
  read_rows(lanes);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      std::memcpy(&static_cast<Ldmatrix*>(lanes[lane])->r[i], row(lanes, 8 * i + lane / 4) + lane % 4 * 2, 4);
}
void ldmatrix_transposed(void* const (&lanes)[32]) {
  read_rows(lanes);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t low = row(lanes, 8 * i + lane % 4 * 2)[lane / 4];
      const std::uint32_t high = row(lanes, 8 * i + lane % 4 * 2 + 1)[lane / 4];
      static_cast<Ldmatrix*>(lanes[lane])->r[i] = low | high << 16;
    }
}

}  // namespace emu

// ---- the runtime's memory ----

namespace {

constexpr std::size_t round_up(std::size_t bytes, std::size_t to) { return (bytes + to - 1) / to * to; }

}  // namespace

// Begins at a page, with an unmapped one before and behind it.
cudaError_t cudaMalloc(void** pointer, std::size_t bytes) {
  emu::Memory& m = emu::memory();
  emu::Allocation allocation;
  allocation.bytes = bytes;
  allocation.mapped = round_up(std::max<std::size_t>(bytes, 1), emu::page);
  if (m.used + allocation.mapped + emu::page > emu::arena_bytes) return cudaErrorMemoryAllocation;
  if (m.instrumented)
    allocation.cells.reset(
        static_cast<emu::Cell*>(std::calloc(bytes / emu::cell_bytes + 1, sizeof(emu::Cell))));
  std::byte* const base = m.arena + m.used;
  m.used += allocation.mapped + emu::page;
  mprotect(base, allocation.mapped, PROT_READ | PROT_WRITE);
  std::memset(base, 0xff, allocation.mapped);
  ASAN_POISON_MEMORY_REGION(base + bytes, allocation.mapped - bytes);
  if (!m.open) mprotect(base, allocation.mapped, PROT_NONE);
  m.allocations.emplace(base, std::move(allocation));
  *pointer = base;
  return cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
  if (pointer == nullptr) return cudaSuccess;
  emu::Memory& m = emu::memory();
  const auto found = m.allocations.find(static_cast<std::byte*>(pointer));
  if (found == m.allocations.end()) return cudaErrorInvalidValue;
  // The addresses are not used again, so a pointer that outlives its memory is found.
  ASAN_UNPOISON_MEMORY_REGION(pointer, found->second.mapped);
  madvise(pointer, found->second.mapped, MADV_DONTNEED);
  mprotect(pointer, found->second.mapped, PROT_NONE);
  m.allocations.erase(found);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  emu::open_device_memory(true);
  std::memcpy(to, from, bytes);
  emu::open_device_memory(false);
  return cudaGetLastError();
}

// ---- the callbacks of -fsanitize=thread ----

#define EMU_PLACE reinterpret_cast<emu::Place>(__builtin_return_address(0))
#define EMU_CALLBACK(name, bytes, touch, write)                 \
  void __tsan_##name##bytes(void* p) {                          \
    if (emu::running.kernel) touch(p, bytes, write, EMU_PLACE); \
  }
#define EMU_ACCESS(bytes)                                  \
  EMU_CALLBACK(read, bytes, emu::touch, false)             \
  EMU_CALLBACK(write, bytes, emu::touch, true)             \
  EMU_CALLBACK(unaligned_read, bytes, touch_pieces, false) \
  EMU_CALLBACK(unaligned_write, bytes, touch_pieces, true)
#define EMU_ATOMIC(bits, type)                                                \
  type __tsan_atomic##bits##_load(const volatile type* p, int) { return *p; } \
  void __tsan_atomic##bits##_store(volatile type* p, type v, int) { *p = v; } \
  type __tsan_atomic##bits##_exchange(volatile type* p, type v, int) {        \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                       \
  }                                                                           \
  type __tsan_atomic##bits##_fetch_add(volatile type* p, type v, int) {       \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                        \
  }

// What a compiler moves although its type is aligned to less, a struct of floats, a device moves in pieces.
static void touch_pieces(void* p, std::size_t bytes, bool write, emu::Place place) {
  const std::size_t piece =
      std::min<std::size_t>(bytes, reinterpret_cast<std::uintptr_t>(p) % 4 == 0 ? 4 : 2);
  for (std::size_t i = 0; emu::running.kernel && i < bytes; i += piece)
    emu::touch(static_cast<char*>(p) + i, piece, write, place);
}
extern "C" {
void __tsan_init() { emu::memory().instrumented = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
EMU_ACCESS(1)
EMU_ACCESS(2)
EMU_ACCESS(4)
EMU_ACCESS(8)
EMU_ACCESS(16)
void __tsan_read_range(void* p, std::size_t bytes) { touch_pieces(p, bytes, false, EMU_PLACE); }
void __tsan_write_range(void* p, std::size_t bytes) { touch_pieces(p, bytes, true, EMU_PLACE); }
EMU_ATOMIC(8, unsigned char)
EMU_ATOMIC(32, unsigned)
EMU_ATOMIC(64, unsigned long)
}

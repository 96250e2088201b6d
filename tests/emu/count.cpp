// What a profiler would count: sectors, passes over the banks and bytes, by line of the source.
#include "engine.hpp"

#include <linattn/detail/ptx.cuh>

#include <algorithm>
#include <array>
#include <cstdio>
#include <map>
#include <set>
#include <tuple>
#include <unordered_map>

namespace emu {

bool counting = false;

namespace {

// The lanes of a warp that execute one instruction together: the n-th time that each comes to the same place.
struct Request {
  Kind kind = Kind::global_load;
  std::size_t bytes = 0;
  std::array<std::uintptr_t, 32> address{};  // 0: the lane takes no part
};
struct Counters {
  std::map<std::tuple<int, Place, int>, Request> open;  // of the block: warp, place, n
  std::unordered_map<std::uint64_t, int> times;         // (place, thread) -> n
  std::map<std::pair<Place, Kind>, Line> lines;
  std::uint64_t mma = 0;
};
Counters counters;

// Words of 4 bytes that a phase of lanes asks for, and the passes that it takes: the most of different words in one
// bank. Lanes of one word share it.
void count_shared(const Request& request, Line& line) {
  const int lanes = request.bytes <= 4 ? 32 : request.bytes == 8 ? 16 : 8;  // that go together
  for (int first = 0; first < 32; first += lanes) {
    std::set<std::uintptr_t> words;
    for (int i = first; i < first + lanes; ++i)
      if (request.address[static_cast<std::size_t>(i)] != 0)
        for (std::size_t b = 0; b < std::max<std::size_t>(request.bytes, 4); b += 4)
          words.insert(request.address[static_cast<std::size_t>(i)] / 4 + b / 4);
    if (words.empty()) continue;
    std::array<unsigned, 32> banks{};
    for (const std::uintptr_t word : words) ++banks[word % 32];
    line.transactions += *std::max_element(banks.begin(), banks.end());
    line.minimum += (words.size() + 31) / 32;
  }
}

void count_global(const Request& request, Line& line) {
  std::set<std::uintptr_t> sectors, bytes;
  for (const std::uintptr_t address : request.address)
    if (address != 0) {
      sectors.insert(address / 32);
      for (std::size_t b = 0; b < request.bytes; ++b) bytes.insert(address + b);
    }
  line.transactions += sectors.size();
  line.minimum += (bytes.size() + 31) / 32;
}

void add(Line& sum, const Line& line) {
  sum.requests += line.requests;
  sum.transactions += line.transactions;
  sum.minimum += line.minimum;
  sum.bytes += line.bytes;
}
Line sum_of(Kind kind) {
  Line sum;
  for (const auto& [key, line] : counters.lines)
    if (line.kind == kind) add(sum, line);
  return sum;
}

}  // namespace

void count_access(const void* address, std::size_t bytes, bool write, bool shared, Place place) {
  const Kind kind = shared ? (write ? Kind::shared_store : Kind::shared_load)
                           : (write ? Kind::global_store : Kind::global_load);
  // A copy is two accesses of one place.
  const Place where = 4 * place + static_cast<Place>(kind);
  const int n = counters.times[where * 1024 + static_cast<std::uint64_t>(running.thread)]++;
  Request& request = counters.open[{running.thread / 32, where, n}];
  request.kind = kind;
  request.bytes = bytes;
  request.address[static_cast<std::size_t>(running.thread % 32)] = reinterpret_cast<std::uintptr_t>(address);
}

void count_block() {
  for (const auto& [key, request] : counters.open) {
    Line& line = counters.lines[{std::get<1>(key) / 4, request.kind}];
    line.kind = request.kind;
    ++line.requests;
    for (const std::uintptr_t address : request.address) line.bytes += address != 0 ? request.bytes : 0;
    request.kind <= Kind::global_store ? count_global(request, line) : count_shared(request, line);
  }
  counters.open.clear();
  counters.times.clear();
}

void count_mma() { counters.mma += counting; }

Count::Count() {
  counters = {};
  counting = true;
}
Count::~Count() { counting = false; }

std::vector<Line> Count::lines() const {
  std::map<std::pair<std::string, Kind>, Line> merged;  // what is inlined more than once
  for (const auto& [key, line] : counters.lines) {
    const std::string where = source_line(key.first);
    Line& sum = merged[{where, line.kind}];
    sum.where = where;
    sum.kind = line.kind;
    add(sum, line);
  }
  std::vector<Line> all;
  for (const auto& [key, line] : merged) all.push_back(line);
  return all;
}
std::uint64_t Count::mma() const { return counters.mma; }

std::uint64_t Count::global_bytes_loaded() const { return sum_of(Kind::global_load).bytes; }
std::uint64_t Count::global_bytes_stored() const { return sum_of(Kind::global_store).bytes; }

double Count::ratio(Kind kind) const { return sum_of(kind).ratio(); }
double Count::worst(Kind kind, const std::string& file) const {
  double worst = 0.0;
  for (const Line& line : lines())
    if (line.kind == kind && line.where.substr(0, line.where.rfind(':')).ends_with(file))
      worst = std::max(worst, line.ratio());
  return worst;
}
double Count::worst_bank_conflict() const {
  return std::max(worst(Kind::shared_load), worst(Kind::shared_store));
}

void Count::print() const {
  constexpr std::array names = {"global load", "global store", "shared load", "shared store"};
  std::printf("%-14s %10s %12s %6s  %s\n", "", "requests", "bytes", "ratio", "line");
  for (const Line& line : lines())
    std::printf("%-14s %10llu %12llu %6.2f  %s\n", names[static_cast<std::size_t>(line.kind)],
                static_cast<unsigned long long>(line.requests), static_cast<unsigned long long>(line.bytes),
                line.ratio(), line.where.c_str());
  std::printf("%-14s %10llu\n", "mma", static_cast<unsigned long long>(mma()));
}

}  // namespace emu

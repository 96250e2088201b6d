// The emulator finds what it says it finds: one small kernel, right, and with one fault at a time. And it counts what a
// profiler would.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <doctest/doctest.h>

#include <linattn/detail/ptx.cuh>

#include <algorithm>
#include <array>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "device.hpp"
#include "emu.hpp"

namespace {

using namespace linattn::detail;
using emu::Fault;
using emu::Schedule;
using linattn::half;

enum class Bug {
  none,
  no_barrier_after_wait,
  no_wait,
  no_commit,
  early_prefetch,
  no_syncwarp,
  tail_read,
  tail_write,
  early_exit,
  barrier_in_branch,
  uninitialised,
  overlapping_blocks,
  misaligned,
  copy_at_exit,
  beyond_shared,
  wrong_fragment,
  wrong_row
};

// y (rows x 8) = x (rows x 16) w^T, w 8 x 16. A block of two warps has three tiles of 32 rows in double buffers.
constexpr int tile_rows = 32, depth = 16, columns = 8, tiles = 3, block_threads = 64;
struct Product {
  const half *x, *w;
  float* y;
  int rows;
};
struct ProductShared {
  alignas(16) std::uint16_t x[2][tile_rows][depth];  // bits of half
  alignas(16) std::uint16_t w[columns][depth];
  alignas(16) float y[2][16][columns];  // of each warp, to leave in whole rows
};

template <Bug bug>
void product_kernel(Product p) {
  auto& shared = dynamic_shared<ProductShared>();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int block = static_cast<int>(blockIdx.x);
  const int first = (bug == Bug::overlapping_blocks ? block : block * tiles) * tile_rows;
  const auto fetch = [&](int tile) {
    // Rows that the other warp multiplies.
    const int row = (thread / 2 + 16) % tile_rows, from = first + tile * tile_rows + row,
              chunk = thread % 2 * 8;
    const half* const x = p.x + from * depth + chunk + (bug == Bug::misaligned ? 4 : 0);
    cp_async_16(&shared.x[tile % 2][row][chunk], x, bug == Bug::tail_read || from < p.rows);
    if constexpr (bug != Bug::no_commit) cp_async_commit();
  };
  const int weights = bug == Bug::uninitialised ? columns - 1 : columns;
  for (int i = thread; i < weights * depth; i += block_threads) shared.w[i / depth][i % depth] = p.w[i].bits;
  if constexpr (bug == Bug::early_exit)
    if (first + (tiles - 1) * tile_rows + thread / 2 >= p.rows) return;
  fetch(0);
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles || bug == Bug::copy_at_exit) {
      fetch(tile + 1);
      if constexpr (bug != Bug::no_wait) cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    if constexpr (bug == Bug::barrier_in_branch) {
      if (warp == 0) __syncthreads();
    } else if constexpr (bug != Bug::no_barrier_after_wait) {
      __syncthreads();
    }
    std::uint32_t a[4], b[4];
    const int matrix = lane / 8;
    ldmatrix_x4(a, &shared.x[tile % 2][16 * warp + lane % 8 + matrix % 2 * 8][matrix / 2 * 8]);
    if constexpr (bug == Bug::wrong_fragment) std::swap(a[1], a[2]);
    ldmatrix_x4(b, &shared.w[bug == Bug::wrong_row ? (lane + 1) % 8 : lane % 8][matrix % 2 * 8]);
    float d[4] = {};
    mma_m16n8k16<half>(d, a, b[0], b[1]);
    float(&staged)[16][columns] = shared.y[warp];
    store(&staged[lane / 4][lane % 4 * 2], float2{d[0], d[1]});
    store(&staged[lane / 4 + 8][lane % 4 * 2], float2{d[2], d[3]});
    if constexpr (bug != Bug::no_syncwarp) __syncwarp();
    const int row = lane / 2, to = first + tile * tile_rows + 16 * warp + row;
    if (to < p.rows || bug == Bug::tail_write)
      store(p.y + to * columns + lane % 2 * 4, load<float4>(&staged[row][lane % 2 * 4]));
    if constexpr (bug != Bug::early_prefetch) __syncthreads();
    if constexpr (bug == Bug::early_prefetch) __syncwarp();
  }
  if constexpr (bug == Bug::beyond_shared) {
    int behind = columns;  // no constant, which a compiler would object to
    shared.y[1][15][behind] = 0.0f;
  }
}

constexpr std::array schedules = {Schedule::in_order, Schedule::reverse, Schedule::random, Schedule::skew};
const std::array<std::string, 4> schedule_names = {"in-order", "reverse", "random", "skew"};

// What came of a launch: a fault, a wrong result, or neither ("").
template <Bug bug>
std::string outcome(Schedule schedule, emu::Landing landing) {
  constexpr int rows = 2 * tiles * tile_rows - 5;
  std::vector<half> x(rows * depth), w(columns * depth);
  for (std::size_t i = 0; i < x.size(); ++i)
    x[i] = half(static_cast<float>(static_cast<int>(i * 7 % 13) - 6));
  for (std::size_t i = 0; i < w.size(); ++i)
    w[i] = half(static_cast<float>(static_cast<int>(i * 5 % 11) - 5));
  std::vector<float> y(rows * columns);
  support::DeviceMemory device_x(x.size() * sizeof(half)), device_w(w.size() * sizeof(half)),
      device_y(y.size() * sizeof(float));
  device_x.upload(x.data());
  device_w.upload(w.data());
  emu::set_schedule(schedule, 3);
  emu::set_landing(landing);
  emu::Recorder recorder;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(2);
  config.blockDim = dim3(block_threads);
  config.dynamicSmemBytes = sizeof(ProductShared);
  const Product p{reinterpret_cast<const half*>(device_x.data()),
                  reinterpret_cast<const half*>(device_w.data()), reinterpret_cast<float*>(device_y.data()),
                  rows};
  REQUIRE(cudaLaunchKernelEx(&config, product_kernel<bug>, p) == cudaSuccess);
  if (!recorder.reports().empty()) {
    const emu::Report& report = recorder.reports().front();
    CHECK(cudaGetLastError() == cudaErrorLaunchFailure);
    CHECK(report.text.find("product_kernel") != std::string::npos);
    if (report.fault != Fault::divergence && report.fault != Fault::unwaited_copy)
      CHECK(report.text.find("faults_test.cpp:") != std::string::npos);
    return emu::name(report.fault);
  }
  device_y.download(y.data());
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) {
      float sum = 0.0f;
      for (int k = 0; k < depth; ++k)
        sum += static_cast<float>(x[static_cast<std::size_t>(i * depth + k)]) *
               static_cast<float>(w[static_cast<std::size_t>(j * depth + k)]);
      if (y[static_cast<std::size_t>(i * columns + j)] != sum) return "wrong result";
    }
  return "";
}

// Each schedule gives one of the outcomes.
template <Bug bug>
void finds(const std::string& what, const std::vector<std::string>& outcomes) {
  std::string seen;
  for (std::size_t i = 0; i < schedules.size(); ++i) {
    const std::string found = outcome<bug>(schedules[i], emu::Landing::late);
    INFO(what << ", " << schedule_names[i] << ": " << found);
    CHECK(std::find(outcomes.begin(), outcomes.end(), found) != outcomes.end());
    if (seen.find(found) == std::string::npos) seen += (seen.empty() ? "" : ", ") + found;
  }
  std::printf("| %-52s | %-44s |\n", what.c_str(), seen.c_str());
}

struct Defaults {
  ~Defaults() {
    emu::set_schedule(Schedule::in_order);
    emu::set_landing(emu::Landing::late);
  }
};

}  // namespace

TEST_CASE("a right kernel is clean and right in every schedule") {
  const Defaults defaults;
  for (const Schedule schedule : schedules)
    for (const emu::Landing landing : {emu::Landing::late, emu::Landing::early, emu::Landing::mixed})
      CHECK(outcome<Bug::none>(schedule, landing) == "");
}

TEST_CASE("a fault in a kernel is found in every schedule") {
  REQUIRE(emu::checked());
  const Defaults defaults;
  const std::string race = "race", in_flight = emu::name(Fault::in_flight), wrong = "wrong result",
                    bounds = emu::name(Fault::out_of_bounds), divergence = emu::name(Fault::divergence),
                    uninitialised = emu::name(Fault::uninitialised);
  // What is found of a missing barrier depends on who comes first.
  const std::vector<std::string> unordered = {race, in_flight, uninitialised};
  finds<Bug::no_barrier_after_wait>("no __syncthreads between the copy and its use", unordered);
  finds<Bug::no_wait>("no cp_async_wait", {in_flight});
  finds<Bug::no_commit>("no cp_async_commit", {in_flight});
  finds<Bug::early_prefetch>("the next copy before the buffer was read", unordered);
  finds<Bug::no_syncwarp>("no __syncwarp between staging and its use", unordered);
  finds<Bug::tail_read>("rows beyond the end are read", {bounds});
  finds<Bug::tail_write>("rows beyond the end are written", {bounds});
  finds<Bug::early_exit>("threads leave before a barrier", {divergence});
  finds<Bug::barrier_in_branch>("a barrier that one warp alone comes to", unordered);
  finds<Bug::uninitialised>("a row of shared memory that is never written", {uninitialised});
  finds<Bug::overlapping_blocks>("two blocks write the same rows", {race});
  finds<Bug::misaligned>("copies from addresses that are no multiple of 16", {emu::name(Fault::misaligned)});
  finds<Bug::copy_at_exit>("a copy under way when the thread ends", {emu::name(Fault::unwaited_copy)});
  finds<Bug::beyond_shared>("a write behind the shared memory of the launch", {bounds});
  finds<Bug::wrong_fragment>("two registers of a fragment swapped", {wrong});
  finds<Bug::wrong_row>("ldmatrix of the next lane's row", {wrong});
}

namespace {

struct Big {
  float values[16 * 1024];
};
void big_kernel(int) { dynamic_shared<Big>().values[threadIdx.x] = 0.0f; }
cudaError_t launch_big(unsigned threads) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = sizeof(Big);
  return cudaLaunchKernelEx(&config, big_kernel, 0);
}

}  // namespace

TEST_CASE("a launch beyond the limits is refused") {
  CHECK(launch_big(32) == cudaErrorInvalidValue);  // more than 48 KB, without asking
  const auto ask = [](int bytes) {
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(big_kernel),
                                cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  CHECK(ask(228 * 1024) == cudaErrorInvalidValue);
  REQUIRE(ask(sizeof(Big)) == cudaSuccess);
  CHECK(launch_big(32) == cudaSuccess);
  CHECK(launch_big(1025) == cudaErrorInvalidConfiguration);
  CHECK(launch_big(0) == cudaErrorInvalidConfiguration);
}

TEST_CASE("a device pointer is of no use to the host") {
  const support::DeviceMemory memory(4);
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    signal(SIGSEGV, SIG_DFL);
    [[maybe_unused]] const std::byte value = *reinterpret_cast<const volatile std::byte*>(memory.data());
    _exit(0);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(WIFSIGNALED(status));
}

namespace {

enum class Pattern { dense, every_second, column, padded_column, wide, rows, swizzled_rows, one_word };

struct Patterns {
  alignas(128) float values[33 * 32];
};

// One request of shared memory by a warp.
template <Pattern pattern>
void shared_kernel(float* out) {
  auto& shared = dynamic_shared<Patterns>();
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 33 * 32; i += 32) shared.values[i] = 1.0f;
  __syncwarp();
  float sum = 0.0f;
  if constexpr (pattern == Pattern::wide) {
    sum = load<float4>(shared.values + 4 * lane).w;
  } else if constexpr (pattern == Pattern::rows || pattern == Pattern::swizzled_rows) {
    std::uint32_t r[4];  // rows of 128 bytes, 16 bytes of each
    const int row = lane, chunk = pattern == Pattern::rows ? 0 : row % 8;
    ldmatrix_x4(r, shared.values + 32 * row + 4 * chunk);
    sum = __uint_as_float(r[0]);
  } else {
    const int step = pattern == Pattern::dense          ? 1
                     : pattern == Pattern::every_second ? 2
                     : pattern == Pattern::one_word     ? 0
                     : pattern == Pattern::column       ? 32
                                                        : 33;
    sum = load<float>(shared.values + step * lane);
  }
  out[lane] = sum;
}

template <Pattern pattern>
double conflicts() {
  const support::DeviceMemory out(32 * sizeof(float));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(32);
  config.dynamicSmemBytes = sizeof(Patterns);
  const emu::Count count;
  REQUIRE(cudaLaunchKernelEx(&config, shared_kernel<pattern>, reinterpret_cast<float*>(out.data())) ==
          cudaSuccess);
  CHECK(count.worst(emu::Kind::shared_store) == 1.0);
  CHECK(count.worst(emu::Kind::global_store) == 1.0);
  CHECK(count.global_bytes_stored() == 128);
  return count.worst_bank_conflict();
}

// A request of global memory, `step` floats from lane to lane, the first `skip` floats behind a sector's start.
void global_kernel(const float* in, float* out, int step, int skip) {
  const int lane = static_cast<int>(threadIdx.x);
  store(out + lane, load<float>(in + skip + step * lane));
}
double sectors(int step, int skip) {
  const support::DeviceMemory in(32 * 32 * sizeof(float)), out(32 * sizeof(float));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(32);
  const emu::Count count;
  REQUIRE(cudaLaunchKernelEx(&config, global_kernel, reinterpret_cast<const float*>(in.data()),
                             reinterpret_cast<float*>(out.data()), step, skip) == cudaSuccess);
  CHECK(count.global_bytes_loaded() == 128);
  return count.worst(emu::Kind::global_load);
}

}  // namespace

TEST_CASE("bank conflicts and sectors are counted") {
  REQUIRE(emu::checked());
  CHECK(conflicts<Pattern::dense>() == 1.0);
  CHECK(conflicts<Pattern::one_word>() == 1.0);
  CHECK(conflicts<Pattern::every_second>() == 2.0);
  CHECK(conflicts<Pattern::column>() == 32.0);
  CHECK(conflicts<Pattern::padded_column>() == 1.0);
  CHECK(conflicts<Pattern::wide>() == 1.0);
  CHECK(conflicts<Pattern::rows>() == 8.0);
  CHECK(conflicts<Pattern::swizzled_rows>() == 1.0);
  CHECK(sectors(1, 0) == 1.0);
  CHECK(sectors(1, 1) == 1.25);
  CHECK(sectors(2, 0) == 2.0);
  CHECK(sectors(8, 0) == 8.0);
}

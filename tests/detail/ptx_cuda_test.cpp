// The instructions of detail/ptx.cuh against the PTX manual's tables, on a device or on the emulator.
#include <linattn/detail/ptx.cuh>

#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "device.hpp"

namespace {

using namespace linattn::detail;
using linattn::bfloat16;
using linattn::half;

constexpr int lanes = 32;

// kernel(in, out, count) on enough blocks of 128 threads, or on one warp.
template <class In, class Out>
std::vector<Out> run(void (*kernel)(const In*, Out*, int), const std::vector<In>& in, std::size_t outputs,
                     bool one_warp = false, std::size_t shared_bytes = 0) {
  std::vector<Out> out(outputs);
  support::DeviceMemory device_in(in.size() * sizeof(In)), device_out(outputs * sizeof(Out));
  device_in.upload(in.data());
  cudaLaunchConfig_t config{};
  const int count = static_cast<int>(in.size());
  config.gridDim = dim3(one_warp ? 1u : static_cast<unsigned>((count + 127) / 128));
  config.blockDim = dim3(one_warp ? 32u : 128u);
  config.dynamicSmemBytes = shared_bytes;
  support::require_cuda(cudaLaunchKernelEx(&config, kernel, reinterpret_cast<const In*>(device_in.data()),
                                           reinterpret_cast<Out*>(device_out.data()), count));
  device_out.download(out.data());
  return out;
}

// ---- mma ----

template <class T>
__global__ void __launch_bounds__(32) mma_kernel(const std::uint32_t* in, float* out, int) {
  const int lane = static_cast<int>(threadIdx.x);
  const std::uint32_t a[4] = {in[6 * lane], in[6 * lane + 1], in[6 * lane + 2], in[6 * lane + 3]};
  float d[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  mma_m16n8k16<T>(d, a, in[6 * lane + 4], in[6 * lane + 5]);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = d[i];
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point types": the row and column of element i of a lane's
// fragment, element by element.
struct Place {
  int row, column;
};
constexpr int a_row[8] = {0, 0, 8, 8, 0, 0, 8, 8}, a_column[8] = {0, 1, 0, 1, 8, 9, 8, 9};
constexpr int b_row[4] = {0, 1, 8, 9};
constexpr int d_row[4] = {0, 0, 8, 8}, d_column[4] = {0, 1, 0, 1};
Place place_a(int lane, int i) { return {(lane >> 2) + a_row[i], (lane & 3) * 2 + a_column[i]}; }
Place place_b(int lane, int i) { return {(lane & 3) * 2 + b_row[i], lane >> 2}; }
Place place_d(int lane, int i) { return {(lane >> 2) + d_row[i], (lane & 3) * 2 + d_column[i]}; }

template <class T>
void check_mma() {
  // Small integers: every sum is exact in every order.
  const auto a = [](Place p) { return static_cast<float>((p.row * 16 + p.column) * 7 % 23 - 11); };
  const auto b = [](Place p) { return static_cast<float>((p.row * 8 + p.column) * 5 % 19 - 9); };
  std::vector<std::uint32_t> in;
  const auto push = [&](float first, float second) {
    in.push_back(T(first).bits | static_cast<std::uint32_t>(T(second).bits) << 16);
  };
  for (int lane = 0; lane < lanes; ++lane) {
    for (int i = 0; i < 8; i += 2) push(a(place_a(lane, i)), a(place_a(lane, i + 1)));
    for (int i = 0; i < 4; i += 2) push(b(place_b(lane, i)), b(place_b(lane, i + 1)));
  }
  const std::vector<float> out = run(mma_kernel<T>, in, 4 * lanes, true);
  for (int lane = 0; lane < lanes; ++lane)
    for (int i = 0; i < 4; ++i) {
      const Place p = place_d(lane, i);
      float sum = static_cast<float>(i + 1);
      for (int k = 0; k < 16; ++k) sum += a({p.row, k}) * b({k, p.column});
      CHECK(out[static_cast<std::size_t>(4 * lane + i)] == sum);
    }
}

// ---- ldmatrix ----

struct Matrices {
  std::uint32_t words[4 * 8 * 4];  // four of 8 x 8 16-bit elements
};

// Matrix i's row r lies at row 5 (8 i + r) mod 32 of the shared memory.
template <bool transposed>
__global__ void __launch_bounds__(32)
    ldmatrix_kernel(const std::uint32_t* in, std::uint32_t* out, int count) {
  auto& shared = dynamic_shared<Matrices>();
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < count; i += lanes) shared.words[i] = in[i];
  __syncwarp();
  std::uint32_t r[4];
  const std::uint32_t* const row = shared.words + 5 * lane % 32 * 4;
  if constexpr (transposed)
    ldmatrix_x4_trans(r, row);
  else
    ldmatrix_x4(r, row);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = r[i];
}

template <bool transposed>
void check_ldmatrix() {
  std::vector<std::uint32_t> in(sizeof(Matrices) / 4), expected(4 * lanes);
  for (std::uint32_t i = 0; i < in.size(); ++i) in[i] = 2 * i | (2 * i + 1) << 16;  // elements are numbered
  for (std::uint32_t matrix = 0; matrix < 4; ++matrix)
    for (std::uint32_t row = 0; row < 8; ++row)
      for (std::uint32_t column = 0; column < 8; ++column) {
        const std::uint32_t element = 5 * (8 * matrix + row) % 32 * 8 + column;
        const std::uint32_t i = transposed ? column : row, j = transposed ? row : column;
        expected[4 * (4 * i + j / 2) + matrix] |= element << 16 * (j % 2);
      }
  CHECK(run(ldmatrix_kernel<transposed>, in, expected.size(), true, sizeof(Matrices)) == expected);
}

// ---- cp.async ----

struct Copied {
  alignas(16) std::uint32_t words[3 * lanes * 4];
};

// Three groups: in is copied, zero is written where not valid, in is copied again and stays under way at first.
__global__ void __launch_bounds__(32) copy_kernel(const std::uint32_t* in, std::uint32_t* out, int) {
  auto& shared = dynamic_shared<Copied>();
  const int lane = static_cast<int>(threadIdx.x);
  std::uint32_t* const first = shared.words + 4 * lane;
  cp_async_16(first, in + 4 * lane);
  cp_async_commit();
  cp_async_16(first + 4 * lanes, in + 4 * lane, lane % 2 == 0);
  cp_async_commit();
  cp_async_16(first + 8 * lanes, in + 4 * lane);
  cp_async_commit();
  cp_async_wait<1>();
  for (int i = 0; i < 4; ++i) {
    out[4 * lane + i] = first[i];
    out[4 * (lanes + lane) + i] = first[4 * lanes + i];
  }
  cp_async_wait<0>();
  __syncwarp();
  const int other = lanes - 1 - lane;
  for (int i = 0; i < 4; ++i) out[4 * (2 * lanes + other) + i] = shared.words[4 * (2 * lanes + other) + i];
}

// ---- shuffles, which the emulator has of its own ----

__global__ void __launch_bounds__(32) shuffle_kernel(const int* in, int* out, int) {
  const int lane = static_cast<int>(threadIdx.x), value = in[lane];
  out[lane] = __shfl_sync(0xffffffffu, value, 3, 8);
  out[lanes + lane] = __shfl_xor_sync(0xffffffffu, value, 5);
  out[2 * lanes + lane] = __shfl_down_sync(0xffffffffu, value, 3, 8);
  out[3 * lanes + lane] = __shfl_up_sync(0xffffffffu, value, 3);
}

// ---- conversions ----

template <class T>
__global__ void __launch_bounds__(128) widen_kernel(const T* in, float* out, int count) {
  const int i = static_cast<int>(blockIdx.x * 128 + threadIdx.x);
  if (i >= count) return;
  out[i] = to_float(in[i]);
  const float2 both = unpack<T>(static_cast<std::uint32_t>(in[i].bits) << 16 | in[count - 1 - i].bits);
  out[count + i] = both.y;
  out[2 * count + i] = both.x;
}
template <class T>
__global__ void __launch_bounds__(128) narrow_kernel(const float* in, std::uint32_t* out, int count) {
  const int i = static_cast<int>(blockIdx.x * 128 + threadIdx.x);
  if (i >= count) return;
  out[i] = from_float<T>(in[i]).bits;
  out[count + i] = pack<T>(in[count - 1 - i], in[i]);
}

// IEEE 754: sign, exponent and significand, of so many bits.
template <class T>
constexpr int significand_bits = std::is_same_v<T, half> ? 10 : 7;
template <class T>
float value_of(std::uint32_t bits) {
  constexpr int m = significand_bits<T>, bias = (1 << (14 - m)) - 1;
  const int exponent = static_cast<int>(bits >> m & ((1u << (15 - m)) - 1)),
            significand = static_cast<int>(bits & ((1u << m) - 1));
  float value = 0.0f;
  if (exponent == 2 * bias + 1) {
    value =
        significand == 0 ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
  } else {
    value = std::ldexp(static_cast<float>(significand + (exponent == 0 ? 0 : 1 << m)),
                       std::max(exponent, 1) - bias - m);
  }
  return bits >> 15 != 0 ? -value : value;
}
bool same(float a, float b) { return std::isnan(a) ? std::isnan(b) : std::memcmp(&a, &b, sizeof a) == 0; }

template <class T>
void check_widening() {
  std::vector<T> in;
  for (std::uint32_t bits = 0; bits < 65536; ++bits)
    in.push_back(T::from_bits(static_cast<std::uint16_t>(bits)));
  const std::vector<float> out = run(widen_kernel<T>, in, 3 * in.size());
  int wrong = 0;
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const float expected = value_of<T>(bits);
    wrong += !same(out[bits], expected) + !same(out[65536 + bits], expected) +
             !same(out[2 * 65536 + 65535 - bits], expected);
  }
  CHECK(wrong == 0);
}

// Every finite number of T, and what lies half way to the next and just beside that. The next after the largest would be
// a power of 2: what rounds to it is infinite.
template <class T>
void check_narrowing() {
  constexpr std::uint32_t infinity = (1u << 15) - (1u << significand_bits<T>);
  std::vector<float> in;
  std::vector<std::uint32_t> expected;
  for (std::uint32_t bits = 0; bits < infinity; ++bits)
    for (const std::uint32_t sign : {0u, 0x8000u}) {
      const double low = value_of<T>(bits);
      const double high = bits + 1 < infinity ? static_cast<double>(value_of<T>(bits + 1))
                                              : 2 * low - static_cast<double>(value_of<T>(bits - 1));
      const auto middle = static_cast<float>((low + high) / 2);
      const auto add = [&](float x, std::uint32_t to) {
        in.push_back(sign != 0 ? -x : x);
        expected.push_back(to | sign);
      };
      add(static_cast<float>(low), bits);
      add(std::nextafter(middle, 0.0f), bits);
      add(middle, bits + bits % 2);
      add(std::nextafter(middle, std::numeric_limits<float>::infinity()), bits + 1);
    }
  in.push_back(std::numeric_limits<float>::infinity());
  expected.push_back(infinity);
  const std::vector<std::uint32_t> out = run(narrow_kernel<T>, in, 2 * in.size());
  int wrong = 0;
  for (std::size_t i = 0; i < in.size(); ++i) {
    const std::uint32_t mirrored = expected[in.size() - 1 - i];
    wrong += (out[i] != expected[i]) + (out[in.size() + i] != (mirrored | expected[i] << 16));
  }
  CHECK(wrong == 0);
  const std::vector<std::uint32_t> none = run(narrow_kernel<T>, {std::numeric_limits<float>::quiet_NaN()}, 2);
  CHECK(std::isnan(value_of<T>(none[0])));
}

// ---- votes ----

__global__ void __launch_bounds__(128) vote_kernel(const int* in, int* out, int count) {
  const int i = static_cast<int>(threadIdx.x);
  out[i] = __syncthreads_or(in[i]);
  out[count + i] = __syncthreads_or(0);
}

// ---- the special function unit ----

__global__ void __launch_bounds__(128) special_kernel(const float* in, float* out, int count) {
  const int i = static_cast<int>(blockIdx.x * 128 + threadIdx.x);
  if (i >= count) return;
  out[i] = exp2_approx(in[i]);
  out[count + i] = reciprocal_approx(in[i]);
}
double ulps(float a, double b) {
  return std::abs(static_cast<double>(a) - b) / std::ldexp(1.0, std::ilogb(b) - 23);
}

}  // namespace

TEST_CASE("mma multiplies the matrices that its fragments hold") {
  check_mma<half>();
  check_mma<bfloat16>();
}

TEST_CASE("ldmatrix gives each lane its elements") {
  check_ldmatrix<false>();
  check_ldmatrix<true>();
}

TEST_CASE("asynchronous copies are there after the wait") {
  std::vector<std::uint32_t> in(4 * lanes);
  for (std::uint32_t i = 0; i < in.size(); ++i) in[i] = i + 1;
  const std::vector<std::uint32_t> out = run(copy_kernel, in, 3 * in.size(), true, sizeof(Copied));
  for (std::size_t i = 0; i < in.size(); ++i) {
    CHECK(out[i] == in[i]);
    CHECK(out[in.size() + i] == (i / 4 % 2 == 0 ? in[i] : 0));
    CHECK(out[2 * in.size() + i] == in[i]);
  }
}

TEST_CASE("shuffles stay within their group of lanes") {
  std::vector<int> in(lanes);
  for (int i = 0; i < lanes; ++i) in[static_cast<std::size_t>(i)] = i;
  const std::vector<int> out = run(shuffle_kernel, in, 4 * lanes, true);
  for (int i = 0; i < lanes; ++i) {
    const auto at = [&](int form) { return out[static_cast<std::size_t>(form * lanes + i)]; };
    CHECK(at(0) == (i & ~7) + 3);
    CHECK(at(1) == (i ^ 5));
    CHECK(at(2) == ((i & 7) < 5 ? i + 3 : i));
    CHECK(at(3) == (i < 3 ? i : i - 3));
  }
}

TEST_CASE("a barrier tells all threads whether any votes") {
  for (const int voter : {-1, 0, 77, 127}) {
    std::vector<int> in(128);
    if (voter >= 0) in[static_cast<std::size_t>(voter)] = 4;
    const std::vector<int> out = run(vote_kernel, in, 2 * in.size());
    for (std::size_t i = 0; i < in.size(); ++i) {
      CHECK((out[i] != 0) == (voter >= 0));
      CHECK(out[in.size() + i] == 0);
    }
  }
}

TEST_CASE("every 16-bit number becomes the float of the same value") {
  check_widening<half>();
  check_widening<bfloat16>();
}

TEST_CASE("floats are rounded to the nearest 16-bit number, ties to even") {
  check_narrowing<half>();
  check_narrowing<bfloat16>();
}

TEST_CASE("exp2 and the reciprocal keep their error, and flush subnormal numbers") {
  std::vector<float> in;
  for (int i = 0; i < 4000; ++i) in.push_back(-125.9f + 0.0627f * static_cast<float>(i));
  const std::vector<float> out = run(special_kernel, in, 2 * in.size());
  double worst_exp2 = 0.0, worst_reciprocal = 0.0;
  for (std::size_t i = 0; i < in.size(); ++i) {
    worst_exp2 = std::max(worst_exp2, ulps(out[i], std::exp2(static_cast<double>(in[i]))));
    worst_reciprocal = std::max(worst_reciprocal, ulps(out[in.size() + i], 1.0 / static_cast<double>(in[i])));
  }
  CHECK(worst_exp2 <= 2.0);
  CHECK(worst_reciprocal <= 1.0);
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> ends = run(special_kernel, {-infinity, -127.5f, infinity, 0x1p127f}, 8);
  CHECK(ends[0] == 0.0f);
  CHECK(ends[1] == 0.0f);
  CHECK(ends[2] == infinity);
  CHECK(ends[6] == 0.0f);
  CHECK(ends[7] == 0.0f);
}

// What ttt asks of memory, as the emulator counts it: a head of SD3.5 Medium at 1024 x 1024 pixels, a grid of 64 x 64
// tokens and 333 of text, and the upper half of one at 2048 x 2048, whose rows are the longest that are kept in shared
// memory. On a device the counts are not to be had, and the results alone are checked.
#include <linattn/ops/ttt_cuda.cuh>

#include <array>
#include <cmath>
#include <string>

#include "../device.hpp"
#include "../support.hpp"
#if !defined(__CUDACC__)
#include "../emu/emu.hpp"
#endif

namespace {

using namespace linattn;
using namespace support;

constexpr Index prompt = 333, d = 64, matrices = 3;

// The op on inputs of its own, twice if asked.
template <class T>
class Head {
 public:
  Head(Index side, bool conv) : conv_(conv), side_(side) {
    fill_normal(q_.view(), 1);
    fill_normal(k_.view(), 2, 1.0, 0.5);
    fill_normal(v_.view(), 3);
    fill_normal(taps_.view(), 4, 0.3);
    fill_normal(bias_.view(), 5, 0.3);
    for (std::size_t i = 0; i < w_.size(); ++i) fill_normal(w_[i].view(), 6 + i, 0.125);
  }

  // Runs ttt; around(run) may count.
  template <class Around>
  [[nodiscard]] Buffer<T, 4> run(const Around& around) const {
    const OnDevice<T, 4> q(q_), k(k_), v(v_), taps(taps_);
    const OnDevice<T, 1> bias(bias_);
    const OnDevice<T, 3> w1(w_[0]), w2(w_[1]), w3(w_[2]);
    const TttWeights<T> weights{w1.view(), w2.view(), w3.view()};
    TttOptions<T> options;
    options.prologue.key_norm = true;
    if (conv_) {
      options.prologue.q_conv = options.prologue.k_conv = taps.view();
      options.prologue.q_conv_bias = options.prologue.k_conv_bias = bias.view();
      options.prologue.grid = {0, 64, side_};
    }
    Buffer<T, 4> out(shape_);
    OnDevice<T, 4> device_out(out);
    const DeviceScratch scratch(ttt_workspace(Cuda{}, q, k, v, weights, device_out.view(), options));
    const Cuda ctx{scratch.workspace()};
    around([&] { check_ok(ttt(ctx, q, k, v, weights, device_out.view(), options)); });
    device_out.download(out);
    return out;
  }

 private:
  bool conv_;
  Index side_;
  std::array<Index, 4> shape_ = {1, 64 * side_ + prompt, 1, d};
  Buffer<T, 4> q_{shape_}, k_{shape_}, v_{shape_}, taps_{{d, 1, 3, 3}};
  Buffer<T, 1> bias_{{d}};
  std::array<Buffer<T, 3>, matrices> w_ = {Buffer<T, 3>({1, d, d}), Buffer<T, 3>({1, d, d}),
                                           Buffer<T, 3>({1, d, d})};
};

}  // namespace

TEST_CASE("ttt reads and writes little more than it must, in whole sectors and without bank conflicts") {
  struct Case {
    Index side;  // columns of the grid
    bool conv;
    double splits;  // of the tokens
  };
  for (const Case& c : {Case{64, false, 8}, Case{64, true, 5}, Case{128, true, 4}}) {
    const Index side = c.side;
    const bool conv = c.conv;
    CAPTURE(side);
    CAPTURE(conv);
    const Head<bfloat16> head(side, conv);
#if !defined(__CUDACC__)
    if (!emu::checked()) continue;
    const emu::Count count;
    const auto out = head.run([](const auto& launch) { launch(); });
    const auto loaded = static_cast<double>(count.global_bytes_loaded());
    const auto stored = static_cast<double>(count.global_bytes_stored());

    // What the shapes ask for: q, k, v and k once more, out; of each split the weights read, the gradients written
    // and read and the fast weights read; the step's weights; the statistics of each chunk written and read.
    const Index tokens = 64 * side + prompt;
    const double matrix = matrices * d * d;
    const double least = 5.0 * static_cast<double>(tokens) * d * 2 + c.splits * matrix * (2 + 2 * 4 + 4) +
                         matrix * (2 + 4) +
                         2.0 * static_cast<double>(detail::stats_chunks(tokens)) * 3 * d * 4;
    MESSAGE("bytes over the least: ", (loaded + stored) / least);
    CHECK(loaded + stored >= least);
    CHECK(loaded + stored <=
          (conv ? 1.05 : 1.005) * least);  // the halo of the splits, and the prologue's parameters
    // Each line that moves more than a hundredth of the bytes moves whole sectors.
    for (const emu::Line& line : count.lines())
      if (line.kind == emu::Kind::global_load || line.kind == emu::Kind::global_store) {
        CAPTURE(line.where);
        if (static_cast<double>(line.bytes) > 0.01 * (loaded + stored)) CHECK(line.ratio() == 1.0);
      }
    for (const std::string file : {"ttt_mma_load.cuh", "mma_tiles.cuh"})
      for (const emu::Kind kind : {emu::Kind::shared_load, emu::Kind::shared_store}) {
        CAPTURE(file);
        CHECK(count.worst(kind, file) == 1.0);
      }
    CHECK(count.worst(emu::Kind::shared_store, "ttt_mma_update.cuh") == 1.0);
    CHECK(count.worst(emu::Kind::shared_load, "ttt_mma_apply.cuh") == 1.0);
    // A tile of 64 tokens: six products of 64 x 64 x 64 to learn, three to answer, each 128 mma.
    const double tiles = std::ceil(static_cast<double>(tokens) / 64.0);
    CHECK(static_cast<double>(count.mma()) == tiles * (6 + 3) * 128);
#else
    const auto plainly = [](const auto& launch) { launch(); };
    CHECK(same_bits(head.run(plainly), head.run(plainly)));
#endif
  }
}

#if !defined(__CUDACC__)
TEST_CASE("ttt without tensor cores moves whole sectors, without bank conflicts") {
  if (!emu::checked()) return;
  const Head<float> head(4, true);
  const emu::Count count;
  (void)head.run([](const auto& launch) { launch(); });
  CHECK(count.worst(emu::Kind::shared_load, "ttt_plain.cuh") == 1.0);
  CHECK(count.worst(emu::Kind::shared_store, "ttt_plain.cuh") == 1.0);
  const auto all = static_cast<double>(count.global_bytes_loaded() + count.global_bytes_stored());
  for (const emu::Line& line : count.lines())
    if (line.kind == emu::Kind::global_load || line.kind == emu::Kind::global_store) {
      CAPTURE(line.where);
      // Not the nine taps of a channel, which come from the cache.
      if (static_cast<double>(line.bytes) > 0.02 * all) CHECK(line.ratio() == 1.0);
    }
}
#endif

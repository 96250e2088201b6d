// Every op, layer and diagnostic of the host, as strict users compile it. Run, it calls each on views whose axes of
// extent 1 or 0 have the largest stride there is, on which no address may be formed: the bits are those of dense views,
// and with an axis of extent 0 the answer is a Status. Compile with UBSan, which sees the addresses.
#include <linattn/cpu.hpp>
#include <linattn/diagnostics/attention_map_cpu.hpp>
#include <linattn/diagnostics/key_shift_ratio_cpu.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

using namespace linattn;

namespace {

struct Shape {
  Index batch, tokens, heads, channels;
};

// Makes views of a few numbers each, dense or stretched, and remembers what the ops wrote.
class Memory {
 public:
  explicit Memory(bool stretched) : stretched_(stretched), scratch_(std::size_t{1} << 20) {
    arrays_.reserve(4096);
  }

  template <class T, std::size_t R>
  [[nodiscard]] TensorView<T, static_cast<int>(R)> view(std::array<Index, R> extents) {
    TensorView<T, static_cast<int>(R)> v(nullptr, extents);
    const auto count = static_cast<std::size_t>(v.elements());
    auto& array = arrays_.emplace_back((count + 1) * sizeof(T));
    for (std::size_t i = 0; i < count; ++i) {
      seed_ = seed_ * 1664525u + 1013904223u;
      const T x = convert<T>(static_cast<float>(seed_ >> 8) * 0x1p-24f - 0.5f);
      std::memcpy(array.data() + i * sizeof(T), &x, sizeof(T));
    }
    v.data = static_cast<T*>(static_cast<void*>(array.data()));
    for (std::size_t axis = 0; axis < R; ++axis)
      if (stretched_ && extents[axis] <= 1) v.strides[axis] = std::numeric_limits<Index>::max();
    return v;
  }

  [[nodiscard]] Cpu<> context(std::size_t bytes) {
    if (bytes > scratch_.size()) scratch_.resize(bytes);
    return Cpu{Workspace{scratch_.data(), bytes}};
  }

  void note(const char* op, const Status& status) {
    names_.push_back(op);
    codes_.push_back(status);
  }

  // Where the two differ; null: nowhere.
  [[nodiscard]] const char* differs(const Memory& other) const {
    for (std::size_t i = 0; i < names_.size(); ++i)
      if (codes_[i].code != other.codes_[i].code) return names_[i];
    return arrays_ == other.arrays_ ? nullptr : "an output";
  }
  [[nodiscard]] const char* failed(bool expected) const {
    for (std::size_t i = 0; i < names_.size(); ++i)
      if (codes_[i].ok() == expected) return names_[i];
    return nullptr;
  }

 private:
  bool stretched_;
  std::uint32_t seed_ = 1;
  std::vector<std::byte> scratch_;
  std::vector<std::vector<std::byte>> arrays_;
  std::vector<const char*> names_;
  std::vector<Status> codes_;
};

template <class T>
void ops(Memory& m, const Shape& s, const TokenGrid& grid) {
  const std::array<Index, 4> tokens{s.batch, s.tokens, s.heads, s.channels};
  const Index width = s.heads * s.channels;
  const auto q = m.view<T>(tokens), k = m.view<T>(tokens), v = m.view<T>(tokens), out = m.view<T>(tokens);
  const auto weight = m.view<T, 1>({s.channels});

  m.note("rms_norm", rms_norm(Cpu{}, q, weight, out));
  m.note("instance_norm", instance_norm(m.context(instance_norm_workspace(Cpu{}, q, out)), q, out));
  const auto taps = m.view<T, 4>({width, 1, 3, 3});
  const auto bias = m.view<T, 1>({width});
  m.note("depthwise_conv", depthwise_conv(Cpu{}, q, taps, bias, m.view<T>(tokens), {grid}));
  m.note("affine", affine(Cpu{}, q, bias, bias, m.view<T>(tokens)));
  m.note("mix", mix(Cpu{}, q, k, 0.25, m.view<T>(tokens)));

  SoftmaxAttentionOptions<Compute<T>> softmax;
  for (const bool causal : {false, true}) {
    softmax.causal = causal;
    const auto to = m.view<T>(tokens);
    m.note("softmax_attention",
           softmax_attention(m.context(softmax_attention_workspace(Cpu{}, q, k, v, to, softmax)), q, k, v, to,
                             softmax));
    softmax.bias = m.view<Compute<T>, 4>({s.batch, s.heads, s.tokens, s.tokens});
    softmax.lse = m.view<Compute<T>, 3>({s.batch, s.tokens, s.heads});
  }
  const NeighborhoodAttentionOptions near{grid, {1, 1}, {}};
  m.note("neighborhood_attention",
         neighborhood_attention(m.context(neighborhood_attention_workspace(Cpu{}, q, k, v, out, near)), q, k,
                                v, m.view<T>(tokens), near));

  const std::array<Index, 3> square{s.heads, s.channels, s.channels};
  const TttWeights<T> weights{m.view<T>(square), m.view<T>(square), m.view<T>(square)};
  TttOptions<T> options;
  for (const bool prologue : {false, true}) {
    if (prologue) options.prologue = {true, 1, taps, taps, bias, bias, grid};
    const auto to = m.view<T>(tokens);
    m.note("ttt", ttt(m.context(ttt_workspace(Cpu{}, q, k, v, weights, to, options)), q, k, v, weights, to,
                      options));
    const std::array<Index, 4> learned{s.batch, s.heads, s.channels, s.channels};
    const FastWeights<Compute<T>> fast{m.view<Compute<T>>(learned), m.view<Compute<T>>(learned),
                                       m.view<Compute<T>>(learned)};
    m.note("ttt_update", ttt_update(m.context(ttt_update_workspace(Cpu{}, k, v, weights, fast, options)), k,
                                    v, weights, fast, options));
    m.note("ttt_apply",
           ttt_apply(m.context(ttt_apply_workspace(Cpu{}, q, fast, to, options)), q, fast, to, options));
    const auto map = m.view<Compute<T>, 4>({s.batch, s.heads, s.tokens, s.tokens});
    const TttMapOptions<T> drawn{{}, options};
    m.note("ttt_attention_map",
           ttt_attention_map(m.context(ttt_attention_map_workspace(Cpu{}, q, k, v, weights, map, drawn)), q,
                             k, v, weights, map, drawn));
    m.note("softmax_attention_map", softmax_attention_map(Cpu{}, q, k, map));
  }
  const auto mlp = m.view<T>(tokens);
  const TttWeights<T> two{weights.w1, weights.w2, {}};
  const std::size_t bytes = ttt_workspace<Mlp, SquaredError, ColumnClip>(Cpu{}, q, k, v, two, mlp);
  m.note("ttt, Mlp", ttt<Mlp, SquaredError, ColumnClip>(m.context(bytes), q, k, v, two, mlp));
  const TttConvOptions conv{grid};
  m.note("ttt_conv", ttt_conv(m.context(ttt_conv_workspace(Cpu{}, q, k, v, taps, out, conv)), q, k, v, taps,
                              m.view<T>(tokens), conv));
  const auto ratio = m.view<Compute<T>, 2>({s.batch, s.heads});
  m.note("key_shift_ratio", key_shift_ratio(m.context(key_shift_ratio_workspace(Cpu{}, k, ratio)), k, ratio));
}

template <class T>
void layers(Memory& m, const Shape& s, const TokenGrid& grid) {
  const Index width = s.heads * s.channels;
  const std::array<Index, 3> rows{s.batch, s.tokens, width};
  const auto x = m.view<T>(rows), text = m.view<T>(rows), out = m.view<T>(rows), text_out = m.view<T>(rows);
  const auto projection = [&](Index to, Index from) {
    return Projection<T>{m.view<T, 2>({to, from}), m.view<T, 1>({to})};
  };
  const auto linear_to = [&](const char* name, const auto& from, const auto& p, const auto& to) {
    m.note(name, linear(m.context(linear_workspace(Cpu{}, from, p.weight, p.bias, to)), from, p.weight,
                        p.bias, to));
  };
  linear_to("linear of batches", x, projection(width, width), m.view<T>(rows));
  linear_to("linear", at(x, 0), projection(width, width), m.view<T, 2>({s.tokens, width}));

  const auto norm = m.view<T, 1>({s.channels});
  const AttentionWeights<T> square{projection(width, width),
                                   projection(width, width),
                                   projection(width, width),
                                   projection(width, width),
                                   norm,
                                   norm};
  const SoftmaxLayerOptions softmax{s.heads};
  m.note("softmax_attention_layer",
         softmax_attention_layer(m.context(softmax_attention_layer_workspace(Cpu{}, x, square, out, softmax)),
                                 x, square, out, softmax));
  m.note("joint_attention", joint_attention(m.context(joint_attention_workspace(
                                                Cpu{}, x, text, square, square, out, text_out, softmax)),
                                            x, text, square, square, out, text_out, softmax));

  const std::array<Index, 3> matrices{s.heads, s.channels, s.channels};
  const TttAttentionWeights<T> inner{square,
                                     {m.view<T>(matrices), m.view<T>(matrices), m.view<T>(matrices)},
                                     m.view<T, 4>({width, 1, 3, 3}),
                                     m.view<T, 4>({width, 1, 3, 3}),
                                     m.view<T, 1>({width}),
                                     m.view<T, 1>({width})};
  const TttLayerOptions ttt{s.heads, grid};
  m.note("ttt_attention_layer",
         ttt_attention_layer(m.context(ttt_attention_layer_workspace(Cpu{}, x, inner, out, ttt)), x, inner,
                             out, ttt));
  m.note("joint_ttt_attention", joint_ttt_attention(m.context(joint_ttt_attention_workspace(
                                                        Cpu{}, x, text, inner, square, out, text_out, ttt)),
                                                    x, text, inner, square, out, text_out, ttt));
  TttAttentionWeights<T> mlp = inner;  // the model of the mixed layer has two matrices
  mlp.inner.w3 = {};
  const MixedAttentionWeights<T> mixed{mlp, m.view<T, 2>({width, 2}), m.view<T, 2>({width, 2})};
  MixedLayerOptions both{s.heads, grid};
  both.kernel = {1, 1};
  m.note("mixed_attention_layer",
         mixed_attention_layer(m.context(mixed_attention_layer_workspace(Cpu{}, x, mixed, out, both)), x,
                               mixed, out, both));
  const Index wide = (s.heads + 1) * s.channels;
  const VitttAttentionWeights<T> vittt{projection(3 * wide, width), projection(width, wide),
                                       m.view<T>(matrices), m.view<T>(matrices),
                                       m.view<T, 4>({s.channels, 1, 3, 3})};
  const VitttLayerOptions vit{s.heads, grid};
  m.note("vittt_attention_layer",
         vittt_attention_layer(m.context(vittt_attention_layer_workspace(Cpu{}, x, vittt, out, vit)), x,
                               vittt, out, vit));
}

// Slices at the end of an axis, of nothing and of no data.
void views(Memory& m, const Shape& s) {
  const auto v = m.view<float, 4>({s.batch, s.tokens, s.heads, s.channels});
  const auto none = slice<0>(v, s.batch, 0);
  const auto packed = m.view<float, 3>({s.batch, s.tokens, 3 * s.heads * s.channels});
  const auto parts = unpack_qkv(packed, s.heads);
  const auto heads = permute<0, 2, 1, 3>(v);
  const auto end = slice<3>(slice<2>(slice<1>(none, s.tokens, 0), s.heads, 0), s.channels, 0);
  const bool right = end.empty() && none.empty() && heads.extent(1) == s.heads &&
                     parts.v.extent(3) == s.channels && at(v, 0).extent(0) == s.tokens;
  m.note("slices", right ? Status{} : Status{Code::shape, "slices"});
}

template <class T>
int check(const Shape& s) {
  const TokenGrid grid{0, s.tokens == 1 ? 1 : 2, s.tokens == 1 ? 1 : s.tokens / 2};
  const bool some = s.batch * s.tokens * s.heads * s.channels != 0;
  Memory dense(false), stretched(true);
  for (Memory* m : {&dense, &stretched}) {
    ops<T>(*m, s, grid);
    if (some || s.batch != 0) layers<T>(*m, s, grid);
    if (some) views(*m, s);
  }
  const char* const failed = dense.failed(!some);
  const char* const differs = dense.differs(stretched);
  if (failed == nullptr && differs == nullptr) return 0;
  std::printf("FAIL (%td, %td, %td, %td) of %zu bytes: %s%s%s\n", s.batch, s.tokens, s.heads, s.channels,
              sizeof(T), failed != nullptr ? failed : "", failed != nullptr ? "; stretched: " : "",
              differs != nullptr ? differs : "as dense");
  return 1;
}

}  // namespace

int main() {
  int failures = 0, shapes = 0;
  for (unsigned mask = 0; mask < 16; ++mask) {
    const auto extent = [&](unsigned bit, Index small, Index large) {
      return (mask >> bit & 1u) != 0 ? small : large;
    };
    const Shape ones{extent(0, 1, 2), extent(1, 1, 6), extent(2, 1, 2), extent(3, 1, 5)};
    const Shape zeros{extent(0, 0, 1), extent(1, 0, 1), extent(2, 0, 1), extent(3, 0, 1)};
    for (const Shape& shape : {ones, zeros}) {
      failures += check<float>(shape) + check<half>(shape);
      ++shapes;
    }
  }
  std::printf("%d shapes, %d failures\n", shapes, failures);
  return failures != 0 ? 1 : 0;
}

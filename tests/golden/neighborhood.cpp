// Golden cases of neighborhood attention: the op, and DiT5's layer that mixes it with test-time training.
#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "host.hpp"
#include "layers.hpp"

namespace {

using namespace golden;

// ---- the op ----

template <class T>
Buffer<T, 4> local(const std::array<TensorView<const double, 4>, 3>& qkv,
                   const NeighborhoodAttentionOptions& options, Layout layout) {
  const auto q = in_layout<T>(qkv[0], layout), k = in_layout<T>(qkv[1], layout),
             v = in_layout<T>(qkv[2], layout);
  const auto [b, n, h, d] = qkv[0].extents;
  Buffer<T, 4> out = support::make<T>(layout, {b, n, h, qkv[2].extent(3)});
  const std::size_t bytes =
      neighborhood_attention_workspace(Cpu{}, q.view(), k.view(), v.view(), out.view(), options);
  require(neighborhood_attention(arena(bytes), q.view(), k.view(), v.view(), out.view(), options));
  return out;
}

// The weights of a window, row by row: (batch, head, token, key of the window). Values that are 1 at one token and 0
// at the others read them.
template <class T>
Buffer<T, 4> window_weights(const std::array<TensorView<const double, 4>, 3>& qkv,
                            const NeighborhoodAttentionOptions& options, Layout layout) {
  const auto [b, n, h, d] = qkv[0].extents;
  Buffer<double, 4> one_hot({b, n, h, n});
  support::for_each_index(one_hot.view().extents, [&](const auto& i) {
    support::element(one_hot.view(), i) = i[1] == i[3] ? 1.0 : 0.0;
  });
  const Buffer<T, 4> all = local<T>({qkv[0], qkv[1], one_hot.view()}, options, layout);
  const Window& kernel = options.kernel;
  const TokenGrid& grid = options.grid;
  Buffer<T, 4> weights({b, h, n, kernel.height * kernel.width});
  support::for_each_index(weights.view().extents, [&](const auto& i) {
    const auto start = [](Index position, Index size, Index extent) {
      return std::clamp(position - size / 2, Index{0}, extent - size);
    };
    const Index row = start(i[2] / grid.width, kernel.height, grid.height) + i[3] / kernel.width;
    const Index column = start(i[2] % grid.width, kernel.width, grid.width) + i[3] % kernel.width;
    support::element(weights.view(), i) = all.view()(i[0], i[2], i[1], row * grid.width + column);
  });
  return weights;
}

Window kernel_of(const Case& c) {
  const auto size = static_cast<Index>(c.number("kernel_size"));
  return {size, size};
}

void run_neighborhood(Case& c) {
  const Tensor q = c.read("q"), k = c.read("k"), v = c.read("v");
  const std::array<TensorView<const double, 4>, 3> qkv = {
      swap_tokens_heads(q.view<4>()), swap_tokens_heads(k.view<4>()), swap_tokens_heads(v.view<4>())};
  const NeighborhoodAttentionOptions options{grid_of(c), kernel_of(c), c.number("scale")};
  for_each_layout<Host>([&]<class T>(Layout layout) {
    const std::string run = run_name<T>(layout);
    c.check("output", run, swap_tokens_heads(local<T>(qkv, options, layout).view()), recorded<T>);
    c.check("mid.attn", run, window_weights<T>(qkv, options, layout).view(), recorded<T>);
  });
  const auto in_16_bit = [&]<class T>(T) {
    const auto qd = support::to_double(rounded<T>(qkv[0])), kd = support::to_double(rounded<T>(qkv[1]));
    const auto vd = support::to_double(rounded<T>(qkv[2]));
    const auto exact = local<double>({qd.view(), kd.view(), vd.view()}, options, Layout::dense);
    c.compare("output", support::type_name<T>, local<T>(qkv, options, Layout::dense).view(),
              to_golden<4>(exact.view()), stored<T>);
  };
  in_16_bit(half{});
  in_16_bit(bfloat16{});
}

// ---- the layer ----

// What the layer has beside that of a TTT layer.
struct Rescaling {
  Tensor scale, offset;  // [1, 1, C, 2]
  Window kernel;
};

template <class T>
struct MixedLayer {
  MixedLayer(const Recorded& r, const Rescaling& more)
      : ttt(r), scale(column_pairs(more.scale)), offset(column_pairs(more.offset)), kernel(more.kernel) {}
  template <class S>
  explicit MixedLayer(const MixedLayer<S>& o)
      : ttt(o.ttt),
        scale(support::to_double(o.scale)),
        offset(support::to_double(o.offset)),
        kernel(o.kernel) {}

  // Without the output projection: the core. `mix`: the share of the neighborhood attention.
  [[nodiscard]] Buffer<T, 3> run(bool project, double mix = 0.5) const {
    Buffer<T, 3> out = ttt.output(project);
    const MixedAttentionWeights<T> w{ttt.weights(Host{}, project), scale.view(), offset.view()};
    MixedLayerOptions options{.heads = ttt.heads, .grid = ttt.grid, .kernel = kernel};
    options.inner_lr = ttt.inner_lr, options.scale = ttt.scale, options.key_norm_eps = ttt.key_norm_eps;
    options.mix = mix;
    const std::size_t bytes =
        mixed_attention_layer_workspace(Cpu{}, ttt.input.view(), w, out.view(), options);
    require(mixed_attention_layer(arena(bytes), ttt.input.view(), w, out.view(), options));
    return out;
  }
  // One of q (0) and k (1), rescaled.
  [[nodiscard]] Buffer<T, 3> rescaled(const Buffer<T, 3>& x, Index which) const {
    Buffer<T, 3> out(x.view().extents);
    const auto column = [&](const Buffer<T, 2>& pairs) { return at(permute<1, 0>(pairs.view()), which); };
    const auto heads = [&](const Buffer<T, 3>& v) { return split_heads(v.view(), ttt.heads); };
    require(affine(Cpu{}, heads(x), column(scale), column(offset), heads(out)));
    return out;
  }

  Layer<T> ttt;
  Buffer<T, 2> scale, offset;
  Window kernel;

 private:
  [[nodiscard]] static Buffer<T, 2> column_pairs(const Tensor& from) {
    return rounded<T>(at(at(from.view<4>(), 0), 0));
  }
};

template <class T>
void check_mixed(Case& c, const Recorded& r, const Rescaling& more) {
  const MixedLayer<T> layer(r, more);
  const std::string run = support::type_name<T>;
  std::vector<Buffer<T, 3>> qkv = check_projections<Host>(c, layer.ttt);
  qkv[0] = layer.rescaled(qkv[0], 0);
  qkv[1] = layer.rescaled(qkv[1], 1);
  check_inner<Host, Mlp, SquaredError>(c, r, layer.ttt, qkv);
  c.check("mid.ttt_out", run, layer.run(false, 0.0).view(), recorded<T>);
  c.check("mid.na_out", run, layer.run(false, 1.0).view(), recorded<T>);
  c.check("mid.core_out", run, layer.run(false).view(), recorded<T>);
  c.check("output", run, layer.run(true).view(), recorded<T>);
}

template <class T>
void check_mixed_stored(Case& c, const Recorded& r, const Rescaling& more) {
  const MixedLayer<T> layer(r, more);
  const MixedLayer<double> exact(layer);
  c.compare("output", support::type_name<T>, layer.run(true).view(), to_golden<3>(exact.run(true).view()),
            stored<T>);
}

void run_mixed_layer(Case& c) {
  const Recorded r = read_layer(c, detail::matrices<Mlp>, true);
  const Rescaling more{c.read("param.qk_scale_ttt"), c.read("param.qk_offset_ttt"), kernel_of(c)};
  check_mixed<float>(c, r, more);
  check_mixed<double>(c, r, more);
  check_mixed_stored<half>(c, r, more);
  check_mixed_stored<bfloat16>(c, r, more);
}

const Registration registrations[] = {
    {Host::context, {"neighborhood_attention"}, run_neighborhood},
    {Host::context, {"layer_dit5_mixed"}, run_mixed_layer},
};

}  // namespace

// Golden cases of ViT3: its inner convolution, and its layer.
#include <algorithm>
#include <array>
#include <string>
#include <utility>
#include <vector>

#include "expect.hpp"
#include "host.hpp"

namespace {

using namespace golden;

// ---- the convolution ----

template <class T>
Buffer<T, 4> convolved(const std::array<TensorView<const double, 4>, 3>& qkv,
                       const TensorView<const double, 4>& weight, const TttConvOptions& options,
                       Layout layout) {
  const auto q = in_layout<T>(qkv[0], layout), k = in_layout<T>(qkv[1], layout),
             v = in_layout<T>(qkv[2], layout);
  const auto w = rounded<T>(weight);
  Buffer<T, 4> out = support::make<T>(layout, qkv[0].extents);
  const std::size_t bytes =
      ttt_conv_workspace(Cpu{}, q.view(), k.view(), v.view(), w.view(), out.view(), options);
  require(ttt_conv(arena(bytes), q.view(), k.view(), v.view(), w.view(), out.view(), options));
  return out;
}

// The updated kernels [b, channels, 3, 3] of one head: queries that are 1 at one token and 0 at the others read them.
// Tokens that the grid does not have leave a tap as it was.
template <class T>
Buffer<T, 4> learned(const TensorView<const double, 4>& k, const TensorView<const double, 4>& v,
                     const TensorView<const double, 4>& weight, const TttConvOptions& options,
                     Layout layout) {
  const TokenGrid& grid = options.grid;
  require(detail::check_whole_grid(grid, k.extent(1)));
  Buffer<T, 4> kernels({k.extent(0), k.extent(3), 3, 3});
  const auto before = rounded<T>(weight);
  for (Index row = 0; row < std::min(grid.height, Index{2}); ++row)
    for (Index column = 0; column < std::min(grid.width, Index{2}); ++column) {
      Buffer<double, 4> impulse(k.extents);
      support::fill(impulse.view(), 0.0);
      for (Index b = 0; b < k.extent(0); ++b)
        for (Index c = 0; c < k.extent(3); ++c) impulse.view()(b, row * grid.width + column, 0, c) = 1.0;
      const Buffer<T, 4> out = convolved<T>({impulse.view(), k, v}, weight, options, layout);
      support::for_each_index(kernels.view().extents, [&](const auto& i) {
        const auto [b, c, y, x] = i;
        const Index to_row = row + 1 - y,
                    to_column = column + 1 - x;  // what sees the impulse through this tap
        if (to_row >= 0 && to_row < grid.height && to_column >= 0 && to_column < grid.width)
          kernels.view()(b, c, y, x) = out.view()(b, to_row * grid.width + to_column, 0, c);
        else if (row == 0 && column == 0)
          kernels.view()(b, c, y, x) = before.view()(c, 0, y, x);
      });
    }
  return kernels;
}

// `suffix`: what follows mid.w and mid.g.
template <class T>
void check_learned(Case& c, const std::string& suffix, const std::string& run, const Tensor& weight,
                   const Buffer<T, 4>& kernels, double inner_lr) {
  const TensorView<const double, 3> initial(weight.values.data(), {weight.extent(0), 3, 3});
  c.check("mid.w" + suffix, run, kernels.view(), recorded<T>);
  check_gradient(c, "mid.g" + suffix, run, initial, kernels.view(), inner_lr);
}

void run_conv(Case& c) {
  const Tensor q = read(c, "q", {any, any, any}), k = read(c, "k", q.shape), v = read(c, "v", q.shape),
               weight = read(c, "w", {q.extent(2), 1, 3, 3});
  const std::array<TensorView<const double, 4>, 3> qkv = {one_head(q.view<3>()), one_head(k.view<3>()),
                                                          one_head(v.view<3>())};
  const TttConvOptions options{grid_of(c), c.number("scale"), c.number("inner_lr")};
  for_each_layout<Host>([&]<class T>(Layout layout) {
    const std::string run = run_name<T>(layout);
    c.check("output", run, convolved<T>(qkv, weight.view<4>(), options, layout).view(), recorded<T>);
    check_learned(c, "", run, weight, learned<T>(qkv[1], qkv[2], weight.view<4>(), options, layout),
                  options.inner_lr);
  });
  const auto in_16_bit = [&]<class T>(T) {
    const auto qd = support::to_double(rounded<T>(qkv[0])), kd = support::to_double(rounded<T>(qkv[1]));
    const auto vd = support::to_double(rounded<T>(qkv[2])),
               wd = support::to_double(rounded<T>(weight.view<4>()));
    const auto exact =
        convolved<double>({qd.view(), kd.view(), vd.view()}, wd.view(), options, Layout::dense);
    c.compare("output", support::type_name<T>,
              convolved<T>(qkv, weight.view<4>(), options, Layout::dense).view(), to_golden<4>(exact.view()),
              stored<T>);
  };
  in_16_bit(half{});
  in_16_bit(bfloat16{});
}

// ---- the layer ----

struct Parameters {
  Tensor input, qkv_weight, qkv_bias, proj_weight, proj_bias, w3;
  std::vector<Tensor> matrices;  // as Glu takes them: w2, w1
  VitttLayerOptions options;
};

Parameters read_parameters(Case& c) {
  const Index heads = integer(c, "heads", 1, 4096);
  const std::vector<Tensor> matrices = read_matrices(c, "param.", 2, "21");
  const Index d = matrices[0].extent(1), channels = heads * d, rows = 3 * channels + 3 * d;
  const Tensor input = read(c, "input", {any, any, any});
  return {input,
          read(c, "param.qkv.weight", {rows, input.extent(2)}),
          read(c, "param.qkv.bias", {rows}),
          read(c, "param.proj.weight", {any, channels + d}),
          read(c, "param.proj.bias", {any}),
          read(c, "param.w3", {d, 1, 3, 3}),
          matrices,
          {heads, grid_of(c), c.number("inner_lr"), c.number("scale")}};
}

// The parameters rounded to T.
template <class T>
struct VitttLayer {
  explicit VitttLayer(const Parameters& p)
      : input(rounded<T>(p.input.view<3>())),
        qkv_weight(rounded<T>(p.qkv_weight.view<2>())),
        proj_weight(rounded<T>(p.proj_weight.view<2>())),
        qkv_bias(rounded<T>(p.qkv_bias.view<1>())),
        proj_bias(rounded<T>(p.proj_bias.view<1>())),
        w3(rounded<T>(p.w3.view<4>())),
        matrices(p.matrices),
        options(p.options) {}
  template <class S>
  explicit VitttLayer(const VitttLayer<S>& o)
      : input(support::to_double(o.input)),
        qkv_weight(support::to_double(o.qkv_weight)),
        proj_weight(support::to_double(o.proj_weight)),
        qkv_bias(support::to_double(o.qkv_bias)),
        proj_bias(support::to_double(o.proj_bias)),
        w3(support::to_double(o.w3)),
        matrices(o.matrices),
        options(o.options) {}

  // Without the output projection: the core.
  [[nodiscard]] Buffer<T, 3> run(bool project) const {
    const Index channels = proj_weight.view().extent(project ? 0 : 1);
    Buffer<T, 3> out({input.view().extent(0), input.view().extent(1), channels});
    VitttAttentionWeights<T> w{{qkv_weight.view(), qkv_bias.view()}, {}, {}, {}, w3.view()};
    if (project) w.out = {proj_weight.view(), proj_bias.view()};
    w.w1 = matrices.memory[1].view(), w.w2 = matrices.memory[0].view();
    const std::size_t bytes = vittt_attention_layer_workspace(Cpu{}, input.view(), w, out.view(), options);
    require(vittt_attention_layer(arena(bytes), input.view(), w, out.view(), options));
    return out;
  }
  // Rows [first, first + count) of the qkv projection.
  [[nodiscard]] Buffer<T, 3> projected(Index first, Index count) const {
    Buffer<T, 3> out({input.view().extent(0), input.view().extent(1), count});
    const TensorView<const T, 2> weight = slice<0>(qkv_weight.view(), first, count);
    const TensorView<const T, 1> bias = slice<0>(qkv_bias.view(), first, count);
    const std::size_t bytes = linear_workspace(Cpu{}, input.view(), weight, bias, out.view());
    require(linear(arena(bytes), input.view(), weight, bias, out.view()));
    return out;
  }

  Buffer<T, 3> input;
  Buffer<T, 2> qkv_weight, proj_weight;
  Buffer<T, 1> qkv_bias, proj_bias;
  Buffer<T, 4> w3;
  Matrices<T> matrices;
  VitttLayerOptions options;
};

template <class T>
void check_vittt(Case& c, const Parameters& p) {
  const VitttLayer<T> layer(p);
  const std::string run = support::type_name<T>;
  const Index heads = p.options.heads, d = p.matrices[0].extent(1), channels = heads * d;
  std::vector<Buffer<T, 3>> parts;
  Index first = 0;
  for (const auto& [name, width] :
       {std::pair{"mid.q", channels}, std::pair{"mid.k", channels}, std::pair{"mid.v", channels},
        std::pair{"mid.q2", d}, std::pair{"mid.k2", d}, std::pair{"mid.v2", d}}) {
    c.check(name, run, parts.emplace_back(layer.projected(first, width)).view(), recorded<T>);
    first += width;
  }

  const TensorView<T, 4> k = split_heads(parts[1].view(), heads), v = split_heads(parts[2].view(), heads);
  const TttOptions<T> options{.inner_lr = p.options.inner_lr, .scale = p.options.scale};
  Updated<T> updated(k.extent(0), heads, d, 2);
  const auto w = layer.matrices.views(Host{});
  const std::size_t bytes =
      ttt_update_workspace<Glu, InnerProduct, ColumnClip>(Cpu{}, k, v, w, updated.views(Host{}), options);
  require(ttt_update<Glu, InnerProduct, ColumnClip>(arena(bytes), k, v, w, updated.views(Host{}), options));
  check_update<T>(c, run, p.matrices, updated, p.options.inner_lr, "21");

  const auto k2 = support::to_double(parts[4]), v2 = support::to_double(parts[5]);
  const TttConvOptions conv{p.options.grid, p.options.scale, p.options.inner_lr};
  check_learned(c, "3", run, p.w3,
                learned<T>(one_head(k2.view()), one_head(v2.view()), p.w3.view<4>(), conv, Layout::dense),
                conv.inner_lr);
  c.check("mid.core_out", run, layer.run(false).view(), recorded<T>);
  c.check("output", run, layer.run(true).view(), recorded<T>);
}

template <class T>
void check_vittt_stored(Case& c, const Parameters& p) {
  const VitttLayer<T> layer(p);
  const VitttLayer<double> exact(layer);
  c.compare("output", support::type_name<T>, layer.run(true).view(), to_golden<3>(exact.run(true).view()),
            stored<T>);
}

void run_vittt_layer(Case& c) {
  const Parameters p = read_parameters(c);
  check_vittt<float>(c, p);
  check_vittt<double>(c, p);
  check_vittt_stored<half>(c, p);
  check_vittt_stored<bfloat16>(c, p);
}

const Registration registrations[] = {
    {Host::context, {"vittt_dwc3x3"}, run_conv},
    {Host::context, {"layer_vittt"}, run_vittt_layer},
};

}  // namespace

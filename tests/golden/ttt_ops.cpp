// The test-time-training ops on the host.
#include "ttt_ops.hpp"

#include "host.hpp"

namespace golden {

template <class Model, class Loss, class Step>
Buffer<double, 4> Ttt<Model, Loss, Step>::exact(const Qkv& qkv, const Matrices<double>& weights,
                                                const TttOptions<double>& options) {
  return trained<Host, double>(qkv, weights, options, Layout::dense);
}

template struct Ttt<SwiGlu, InnerProduct, Plain>;
template struct Ttt<Mlp, InnerProduct, Plain>;
template struct Ttt<Mlp, SquaredError, Plain>;
template struct Ttt<Mlp3, InnerProduct, Plain>;
template struct Ttt<Glu, InnerProduct, Plain>;
template struct Ttt<Glu, InnerProduct, ColumnClip>;
template struct Ttt<Linear, InnerProduct, Plain>;
template struct Ttt<Linear, SquaredError, Plain>;

namespace {
const Registration registrations[] = {
    {Host::context, {"ttt_swiglu_ip"}, run_ttt<Host, SwiGlu, InnerProduct>},
    {Host::context, {"ttt_mlp2_ip"}, run_ttt<Host, Mlp, InnerProduct>},
    {Host::context, {"ttt_mlp2_l2"}, run_ttt<Host, Mlp, SquaredError>},
    {Host::context, {"ttt_mlp3_ip"}, run_ttt<Host, Mlp3, InnerProduct>},
    {Host::context, {"ttt_glu1_ip"}, run_ttt<Host, Glu, InnerProduct>},
    {Host::context, {"ttt_linear_ip"}, run_ttt<Host, Linear, InnerProduct>},
    {Host::context, {"ttt_linear_l2"}, run_ttt<Host, Linear, SquaredError>},
    {Host::context, {"vittt_swiglu_clip"}, run_vittt<Host>},
};
}  // namespace

}  // namespace golden

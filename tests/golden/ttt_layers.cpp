// The softmax and test-time-training layers on the host.
#include "ttt_layers.hpp"

#include "host.hpp"

namespace golden {

Buffer<double, 3> SoftmaxLayer::exact(const Layer<double>& layer) { return run<Host>(layer, true); }
template <class Model, class Loss>
Buffer<double, 3> TttLayer<Model, Loss>::exact(const Layer<double>& layer) {
  return run<Host>(layer, true);
}
template struct TttLayer<SwiGlu, InnerProduct>;
template struct TttLayer<Mlp, InnerProduct>;
template struct TttLayer<Mlp, SquaredError>;

namespace {
const Registration registrations[] = {
    {Host::context, {"layer_softmax"}, run_softmax_layer<Host>},
    {Host::context, {"layer_t5"}, run_ttt_layer<Host, SwiGlu, InnerProduct, true>},
    {Host::context, {"layer_tttv0"}, run_ttt_layer<Host, Mlp, InnerProduct, false>},
    {Host::context, {"layer_dit5_ttt"}, run_ttt_layer<Host, Mlp, SquaredError, true>},
};
}  // namespace

}  // namespace golden

// The softmax and test-time-training layers on a CUDA device.
#include "ttt_layers.hpp"

#include "device.hpp"

namespace {

using namespace golden;

const Registration registrations[] = {
    {Device::context, {"layer_softmax"}, run_softmax_layer<Device>},
    {Device::context, {"layer_t5"}, run_ttt_layer<Device, SwiGlu, InnerProduct, true>},
    {Device::context, {"layer_tttv0"}, run_ttt_layer<Device, Mlp, InnerProduct, false>},
    {Device::context, {"layer_dit5_ttt"}, run_ttt_layer<Device, Mlp, SquaredError, true>},
};

}  // namespace

// The test-time-training ops on a CUDA device.
#include "ttt_ops.hpp"

#include "device.hpp"

namespace {

using namespace golden;

const Registration registrations[] = {
    {Device::context, {"ttt_swiglu_ip"}, run_ttt<Device, SwiGlu, InnerProduct>},
    {Device::context, {"ttt_mlp2_ip"}, run_ttt<Device, Mlp, InnerProduct>},
    {Device::context, {"ttt_mlp2_l2"}, run_ttt<Device, Mlp, SquaredError>},
    {Device::context, {"ttt_mlp3_ip"}, run_ttt<Device, Mlp3, InnerProduct>},
    {Device::context, {"ttt_glu1_ip"}, run_ttt<Device, Glu, InnerProduct>},
    {Device::context, {"ttt_linear_ip"}, run_ttt<Device, Linear, InnerProduct>},
    {Device::context, {"ttt_linear_l2"}, run_ttt<Device, Linear, SquaredError>},
    {Device::context, {"vittt_swiglu_clip"}, run_vittt<Device>},
};

}  // namespace

// softmax_attention, the key norms and the depthwise convolution on a CUDA device.
#include "attention_ops.hpp"

#include "device.hpp"

namespace {

using namespace golden;

const Registration registrations[] = {
    {Device::context, {"softmax_attention"}, run_softmax<Device>},
    {Device::context, {"key_instance_norm", "key_mean_subtract"}, run_norm<Device>},
    {Device::context, {"dwconv_residual"}, run_conv<Device>},
};

}  // namespace

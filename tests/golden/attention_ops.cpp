// softmax_attention, the key norms and the depthwise convolution on the host.
#include "attention_ops.hpp"

#include "host.hpp"

namespace golden {

template Buffer<double, 4> softmax<Host, double>(const Qkv&, double, Layout, Buffer<double, 3>*);
template Buffer<double, 4> normalised<Host, double>(const TensorView<const double, 4>&,
                                                    const InstanceNormOptions&, Layout);
template Buffer<double, 4> convolved<Host, double>(const TensorView<const double, 4>&,
                                                   const TensorView<const double, 4>&,
                                                   const TensorView<const double, 1>&, const TokenGrid&,
                                                   Layout);

namespace {
const Registration registrations[] = {
    {Host::context, {"softmax_attention"}, run_softmax<Host>},
    {Host::context, {"key_instance_norm", "key_mean_subtract"}, run_norm<Host>},
    {Host::context, {"dwconv_residual"}, run_conv<Host>},
};
}  // namespace

}  // namespace golden

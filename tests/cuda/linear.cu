// The conv and the linear layer with the types that SD3.5-T5 and T5 have on a GPU; linear as cuBLASLt takes it, and as
// our own kernel does: weights in 8 bits.
#include <linattn/ops/depthwise_conv_cuda.cuh>
#include <linattn/ops/linear_cuda.cuh>

using namespace linattn;

using T = bfloat16;
template Status linattn::depthwise_conv<T, const T, const T>(const Cuda&, In<T, 4>,
                                                             const TensorView<const T, 4>&,
                                                             const TensorView<const T, 1>&,
                                                             const TensorView<T, 4>&,
                                                             const DepthwiseConvOptions&);
template Status linattn::linear<T, 3, const T, const T>(const Cuda&, const In<T, 3>&,
                                                        const TensorView<const T, 2>&,
                                                        const TensorView<const T, 1>&,
                                                        const TensorView<T, 3>&);
template Status linattn::linear<T, 3, const float8_e4m3, const T>(const Cuda&, const In<T, 3>&,
                                                                  const TensorView<const float8_e4m3, 2>&,
                                                                  const TensorView<const T, 1>&,
                                                                  const TensorView<T, 3>&);

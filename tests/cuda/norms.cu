// The norms with the types that SD3.5-T5 and T5 have on a GPU.
#include <linattn/ops/instance_norm_cuda.cuh>
#include <linattn/ops/rms_norm_cuda.cuh>

using namespace linattn;

using T = bfloat16;
template Status linattn::instance_norm<T>(const Cuda&, In<T, 4>, const TensorView<T, 4>&,
                                          const InstanceNormOptions&);
template Status linattn::rms_norm<T, const T>(const Cuda&, In<T, 4>, const TensorView<const T, 1>&,
                                              const TensorView<T, 4>&, const RmsNormOptions&);

// The kernels that take TTT in float, with the model of SD3.5-T5 and T5. What the tiles of a head of 64 channels need:
// ttt_plain_update_kernel keeps 43504 bytes more
// ttt_plain_apply_kernel keeps 17392 bytes more
#include <linattn/ops/ttt_cuda.cuh>

using namespace linattn;

template Status linattn::ttt<SwiGlu, InnerProduct, Plain, float, float>(const Cuda&, In<float, 4>,
                                                                        In<float, 4>, In<float, 4>,
                                                                        const TttWeights<float>&,
                                                                        const TensorView<float, 4>&,
                                                                        const TttOptions<float>&);

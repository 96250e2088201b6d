// The tensor-core kernels of TTT: the model of SD3.5-T5 and T5, and DiT5's gradients. What the ring of 64 channels takes of shared
// memory with a conv on a grid 64 tokens wide:
// ttt_mma_update_kernel keeps 28672 bytes more
// ttt_mma_apply_kernel keeps 28672 bytes more
#include <linattn/detail/ttt_mma.cuh>

namespace linattn::detail {

using T = bfloat16;
template Status ttt_mma_update<SwiGlu, InnerProduct, T, T>(const Cuda&, const TensorView<const T, 4>&,
                                                           const TensorView<const T, 4>&,
                                                           const TttWeights<T>&, const TokenStats<float>*,
                                                           Index, Index, float*, const TttOptions<T>&);
template Status ttt_mma_apply<SwiGlu, T, T>(const Cuda&, const TensorView<const T, 4>&,
                                            const FastWeights<const float>&, const TensorView<T, 4>&,
                                            const TttOptions<T>&);
template Status ttt_mma_update<Mlp, SquaredError, T, T>(const Cuda&, const TensorView<const T, 4>&,
                                                        const TensorView<const T, 4>&, const TttWeights<T>&,
                                                        const TokenStats<float>*, Index, Index, float*,
                                                        const TttOptions<T>&);

}  // namespace linattn::detail

// Both paths with the types that SD3.5's and T5's attention have on a GPU, the VAE's 512 channels among the plain ones.
#include <linattn/ops/softmax_attention_cuda.cuh>

using namespace linattn;

template Status linattn::softmax_attention<bfloat16>(const Cuda&, const In<bfloat16, 4>&,
                                                     const In<bfloat16, 4>&, const In<bfloat16, 4>&,
                                                     const TensorView<bfloat16, 4>&,
                                                     const SoftmaxAttentionOptions<float>&);
// With half, the one kernel that differs in its instructions.
template Status linattn::detail::run_flash<64>(const Cuda&, Index, const SoftmaxProblem<half>&);

// In float no tensor core is used.
#include <linattn/ops/softmax_attention_cuda.cuh>

using namespace linattn;

template Status linattn::softmax_attention<float>(const Cuda&, const In<float, 4>&, const In<float, 4>&,
                                                  const In<float, 4>&, const TensorView<float, 4>&,
                                                  const SoftmaxAttentionOptions<float>&);

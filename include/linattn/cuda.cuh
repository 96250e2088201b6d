// Everything on a CUDA device that there is: include this, and compile with nvcc. Needs no Eigen; include cpu.hpp beside it
// where the host computes too.
#pragma once

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/layers/joint_attention.hpp>
#include <linattn/layers/softmax_attention.hpp>
#include <linattn/layers/ttt_attention.hpp>
#include <linattn/ops/depthwise_conv_cuda.cuh>
#include <linattn/ops/instance_norm_cuda.cuh>
#include <linattn/ops/linear_cuda.cuh>
#include <linattn/ops/rms_norm_cuda.cuh>
#include <linattn/ops/softmax_attention_cuda.cuh>
#include <linattn/ops/ttt_cuda.cuh>
#include <linattn/version.hpp>

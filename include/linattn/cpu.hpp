// Everything on the host: include this. Needs Eigen.
#pragma once

#include <linattn/core/context.hpp>
#include <linattn/core/dtype.hpp>
#include <linattn/core/status.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/layers/joint_attention.hpp>
#include <linattn/layers/mixed_attention.hpp>
#include <linattn/layers/softmax_attention.hpp>
#include <linattn/layers/ttt_attention.hpp>
#include <linattn/layers/vittt_attention.hpp>
#include <linattn/ops/depthwise_conv_cpu.hpp>
#include <linattn/ops/elementwise_cpu.hpp>
#include <linattn/ops/instance_norm_cpu.hpp>
#include <linattn/ops/linear_cpu.hpp>
#include <linattn/ops/neighborhood_attention_cpu.hpp>
#include <linattn/ops/rms_norm_cpu.hpp>
#include <linattn/ops/softmax_attention_cpu.hpp>
#include <linattn/ops/ttt_conv_cpu.hpp>
#include <linattn/ops/ttt_cpu.hpp>
#include <linattn/version.hpp>

// A Test-Time-Training attention of a checkpoint: its parameters, and the inner model and loss that it names.
#pragma once

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include <linattn/layers/ttt_attention.hpp>
#include <linattn/weights/conversion.hpp>

#include "checkpoint.hpp"
#include "runtime.hpp"

namespace nn {

// What a checkpoint says of its modules, those below its prefix, by their names in the file. Throws
// std::runtime_error that names the file and the tensor.
[[nodiscard]] inline linattn::Conversion read_conversion(const Checkpoint& checkpoint) {
  std::filesystem::path json;
  if (!checkpoint.config().is_null()) json = checkpoint.path().parent_path() / "config.json";
  linattn::Conversion conversion;
  if (const linattn::FileStatus status = linattn::read_conversion(checkpoint.files(), conversion, json);
      !status.ok())
    throw std::runtime_error(message(status));
  std::erase_if(conversion,
                [&](const auto& module) { return !module.first.starts_with(checkpoint.full_name("")); });
  return conversion;
}

// The parameters, widened to T; what the module lacks is empty.
template <class T>
struct TttModule {
  linattn::ModuleConversion conversion;
  Index heads = 0, head_dim = 0;
  std::vector<T> w1, w2, w3;
  std::vector<T> q_conv, q_conv_bias, k_conv, k_conv_bias;

  // The tensors below `stem`. Throws std::runtime_error that names one which is missing or has another shape.
  [[nodiscard]] static TttModule load(const Checkpoint& checkpoint, const std::string& stem,
                                      const linattn::ModuleConversion& conversion, Index heads,
                                      Index head_dim) {
    TttModule m;
    m.conversion = conversion, m.heads = heads, m.head_dim = head_dim;
    const auto tensor = [&](const char* parameter, const std::vector<Index>& shape) {
      return widen<T>(checkpoint.get(stem + parameter, shape));
    };
    const std::size_t matrices = linattn::matrix_count(conversion.inner_model);
    const std::vector<Index> matrix{1, heads, head_dim, head_dim};
    m.w1 = tensor(".w1", matrix);
    if (matrices >= 2) m.w2 = tensor(".w2", matrix);
    if (matrices >= 3) m.w3 = tensor(".w3", matrix);
    if (conversion.conv) {
      const Index width = heads * head_dim;
      m.q_conv = tensor(".q_conv2d.weight", {width, 1, 3, 3});
      m.q_conv_bias = tensor(".q_conv2d.bias", {width});
      m.k_conv = tensor(".k_conv2d.weight", {width, 1, 3, 3});
      m.k_conv_bias = tensor(".k_conv2d.bias", {width});
    }
    return m;
  }

  // The module below `stem` as `conversion` has it, taken out of it, so that what is left belongs to no attention;
  // nothing where it is not converted. Throws where it sits beside neighborhood attention, unless the model is
  // `mixed` and runs that, too.
  [[nodiscard]] static std::optional<TttModule> take(const Checkpoint& checkpoint, const std::string& stem,
                                                     linattn::Conversion& conversion, Index heads,
                                                     Index head_dim, bool mixed = false) {
    const std::string tensor = checkpoint.full_name(stem + ".w1");
    const auto found = conversion.find(tensor.substr(0, tensor.rfind('.')));
    if (found == conversion.end()) return std::nullopt;
    if (found->second.neighborhood > 0 && !mixed)
      throw std::runtime_error(checkpoint.path().string() + ": module '" + found->first +
                               "' sits beside neighborhood attention, which this model does not run");
    TttModule m = load(checkpoint, stem, found->second, heads, head_dim);
    conversion.erase(found);
    return m;
  }

  // As a layer takes them, with the projections around them.
  template <class W>
  [[nodiscard]] linattn::TttAttentionWeights<W, T> weights(
      const linattn::AttentionWeights<W>& projections) const {
    const auto square = [&](const std::vector<T>& w) {
      return TensorView<const T, 3>(w.data(), {w.empty() ? 0 : heads, head_dim, head_dim});
    };
    const auto kernel = [](const std::vector<T>& w) {
      return TensorView<const T, 4>(w.data(), {static_cast<Index>(w.size()) / 9, 1, 3, 3});
    };
    return {projections,          {square(w1), square(w2), square(w3)},
            kernel(q_conv),       kernel(k_conv),
            as_view(q_conv_bias), as_view(k_conv_bias)};
  }

  // f(Model{}, Loss{}), the policies of ops/ttt_inner.hpp that the checkpoint names.
  template <class F>
  void visit(const F& f) const {
    const auto with_loss = [&](auto model) {
      if (conversion.inner_loss == linattn::InnerLossKind::inner_product)
        return f(model, linattn::InnerProduct{});
      f(model, linattn::SquaredError{});
    };
    switch (conversion.inner_model) {
      case linattn::InnerModelKind::linear:
        return with_loss(linattn::Linear{});
      case linattn::InnerModelKind::mlp:
        return with_loss(linattn::Mlp{});
      case linattn::InnerModelKind::swiglu:
        return with_loss(linattn::SwiGlu{});
    }
  }
};

}  // namespace nn

// Golden ops model_vit_t5 and model_vit_tttv0: a vision transformer whose blocks are T5 layers, or the first T5
// layers (two matrices, no convolution), with the intermediates of every block.
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "deit/vit.hpp"
#include "expect.hpp"
#include "golden.hpp"

namespace {

using golden::Case;
using golden::Norm;
using linattn::Index;
using linattn::TensorView;

constexpr const char* prefix = "param.";

template <class T>
void run_as(Case& c, const deit::Checkpoint& checkpoint) {
  const bool exact = std::is_same_v<T, double>;
  const char* const variant = exact ? "double" : "float";
  const golden::Tolerance tolerance{Norm::relative_l2, exact ? 1.5e-7 : 2e-6};
  const deit::Vit<T> model(checkpoint, golden::extent(c, "heads"));
  const deit::VitConfig& config = model.config();
  c.expect(config.depth == golden::extent(c, "depth") && config.width == golden::extent(c, "embed_dim") &&
               config.patch == golden::extent(c, "patch_size") &&
               config.grid == golden::extent(c, "grid_h") &&
               config.classes == golden::extent(c, "num_classes") && config.special == 0 &&
               model.converted_blocks() == config.depth,
           "sizes from the shapes");

  const golden::Tensor input = c.read("input");
  const std::vector<T> pictures(input.values.begin(), input.values.end());
  deit::Runtime rt;
  const deit::Tensor<T> logits =
      model.forward(rt, {pictures.data(), input.view<4>().extents},
                    [&](const std::string& name, const TensorView<const T, 3>& values) {
                      if (c.has("mid." + name)) c.check("mid." + name, variant, values, tolerance);
                    });
  c.check("output", variant, logits.template view<2>(), tolerance);
}

void run(Case& c) {
  deit::Checkpoint checkpoint = deit::Checkpoint::open(c.path(), prefix);
  checkpoint.on_load = [&](const std::string& tensor) { c.use(tensor); };
  const bool t5 = c.op() == "model_vit_t5";
  const linattn::ModuleConversion expected{
      .inner_model = t5 ? linattn::InnerModelKind::swiglu : linattn::InnerModelKind::mlp, .conv = t5};
  for (const auto& [stem, module] : deit::read_conversion(checkpoint))
    c.expect(module == expected, stem + " is the layer of the op");
  run_as<float>(c, checkpoint);
  run_as<double>(c, checkpoint);
}

const golden::Registration registration({"model_vit_t5", "model_vit_tttv0"}, run);

}  // namespace

// A small checkpoint of any family, more or less as it should be, is converted or refused. What is converted has every tensor
// inherited or reported, and opens again.
#include <fuzzer/FuzzedDataProvider.h>
#include <linattn/weights/inherit.hpp>

#include <algorithm>

#include "fuzz.hpp"

namespace {

using namespace linattn;

std::vector<TensorSpec> family_tensors(FuzzedDataProvider& in) {
  const auto small = [&](Index most) { return in.ConsumeIntegralInRange<Index>(1, most); };
  const Index heads = small(2), head_dim = small(3), width = heads * head_dim;
  switch (in.ConsumeIntegralInRange(0, 3)) {
    case 0: {
      VitModel model{.depth = small(3),
                     .width = width,
                     .channels = small(3),
                     .patch = small(2),
                     .grid = small(3),
                     .hidden = small(4),
                     .classes = small(4) - 1,
                     .qkv_bias = in.ConsumeBool()};
      std::vector<TensorSpec> specs = vit_tensors(model);
      const Index tokens = in.ConsumeIntegralInRange<Index>(0, 2);
      for (TensorSpec& spec : specs)
        if (spec.name == "pos_embed") spec.shape[1] += tokens;
      if (tokens > 0) specs.push_back({"cls_token", Dtype::f32, {1, 1, width}});
      if (tokens > 1) specs.push_back({"dist_token", Dtype::f32, {1, 1, width}});
      return specs;
    }
    case 1:
      return dit_tensors({.depth = small(3),
                          .width = width,
                          .channels = small(2),
                          .patch = small(2),
                          .positions = small(9),
                          .frequencies = small(4),
                          .hidden = small(4),
                          .labels = small(4),
                          .outputs = small(8)});
    default: {
      Sd35Model model{.layout = in.ConsumeBool() ? Sd35Layout::official : Sd35Layout::diffusers};
      if (model.layout == Sd35Layout::official && in.ConsumeBool()) model.prefix = "model.diffusion_model.";
      model.depth = small(3), model.width = width, model.heads = heads, model.head_dim = head_dim;
      model.channels = small(2), model.patch = small(2), model.positions = small(9),
      model.frequencies = small(4);
      model.pooled = small(3), model.context = small(3), model.hidden = small(4), model.outputs = small(8);
      model.qk_norm = in.ConsumeBool();
      for (Index block = 0; block < model.depth; ++block)
        if (in.ConsumeBool()) model.dual_blocks.insert(block);
      return sd35_tensors(model);
    }
  }
}

// One tensor in a few is not as the family has it.
void damage(FuzzedDataProvider& in, std::vector<TensorSpec>& specs) {
  for (int count = in.ConsumeIntegralInRange(0, 4); count > 0 && !specs.empty(); --count) {
    const auto which =
        in.ConsumeIntegralInRange<std::ptrdiff_t>(0, static_cast<std::ptrdiff_t>(specs.size()) - 1);
    TensorSpec& spec = specs[static_cast<std::size_t>(which)];
    switch (in.ConsumeIntegralInRange(0, 5)) {
      case 0:
        specs.erase(specs.begin() + which);
        break;
      case 1:
        spec.dtype = static_cast<Dtype>(in.ConsumeIntegralInRange(0, 14));
        break;
      case 2:
        if (!spec.shape.empty()) spec.shape[0] = in.ConsumeIntegralInRange<Index>(0, 9);
        break;
      case 3:
        spec.shape.push_back(in.ConsumeIntegralInRange<Index>(0, 2));
        break;
      case 4:
        spec.name += in.ConsumeRandomLengthString(6);
        break;
      default:
        specs.push_back(
            {in.PickValueInArray({"lora.", "first_stage_model.", "optimizer.", "ema.", "module."}) +
                 spec.name,
             spec.dtype, spec.shape});
    }
  }
  const char* const prefix = in.PickValueInArray({"", "", "module.", "ema.", "model.", "_orig_mod."});
  for (TensorSpec& spec : specs) spec.name.insert(0, prefix);
  const Dtype dtype = in.PickValueInArray({Dtype::f32, Dtype::f16, Dtype::bf16, Dtype::f64});
  for (TensorSpec& spec : specs)
    if (spec.dtype == Dtype::f32) spec.dtype = dtype;
}

bool write(const std::filesystem::path& path, const std::vector<TensorSpec>& specs) {
  std::vector<std::vector<std::byte>> data;
  std::vector<TensorInfo> tensors;
  for (const TensorSpec& spec : specs) {
    std::vector<std::byte>& bytes = data.emplace_back(spec.byte_size());
    for (std::size_t i = 0; i < bytes.size(); ++i)
      bytes[i] = static_cast<std::byte>((17 * data.size() + 5 * i) & 0x3f);
    tensors.push_back({spec, bytes, 0});
  }
  return write_safetensors(path, tensors, {{"format", "pt"}}).ok();
}

InheritOptions options_of(FuzzedDataProvider& in) {
  InheritOptions options;
  options.replace =
      in.PickValueInArray({"paper", "all", "none", "attn", "attn2", "0", "0-1", "attn:1", "attn2:0,2", ""});
  if (in.ConsumeIntegralInRange(0, 7) == 1) options.replace = in.ConsumeRandomLengthString(12);
  options.init = in.ConsumeBool() ? Initialisation::zero_conv : Initialisation::official;
  if (in.ConsumeBool()) options.inner_model = static_cast<InnerModelKind>(in.ConsumeIntegralInRange(0, 2));
  options.conv = in.ConsumeBool();
  if (in.ConsumeBool()) options.family.heads = in.ConsumeIntegralInRange<Index>(-1, 4);
  if (in.ConsumeIntegralInRange(0, 3) == 1) options.family.classes = in.ConsumeIntegralInRange<Index>(-1, 4);
  if (in.ConsumeIntegralInRange(0, 3) == 1)
    options.family.weights = in.ConsumeBool() ? WeightSet::raw : WeightSet::ema;
  options.family.drop_cls = in.ConsumeIntegralInRange(0, 3) == 1;
  return options;
}

void check(const Safetensors& before, const Plan& plan, const Safetensors& after) {
  std::size_t written = 0;
  std::vector<std::string> told;
  for (const PlanItem& item : plan.items) {
    if (item.from != Source::create) told.push_back(item.source.empty() ? item.target.name : item.source);
    if (item.from == Source::drop) continue;
    ++written;
    const TensorInfo* const made = after.find(item.target.name);
    fuzz::expect(made != nullptr && made->dtype == item.target.dtype && made->shape == item.target.shape,
                 "a planned tensor is written: " + item.target.name);
    if (item.from == Source::copy) {
      const auto source = before.find(item.source)->bytes.last(made->bytes.size());
      fuzz::expect(std::equal(source.begin(), source.end(), made->bytes.begin()),
                   "a tensor is inherited byte for byte");
    }
  }
  fuzz::expect(after.tensors().size() == written, "nothing is written that was not planned");
  std::sort(told.begin(), told.end());
  for (const TensorInfo& tensor : before.tensors())
    fuzz::expect(std::binary_search(told.begin(), told.end(), tensor.name),
                 "a tensor is inherited or reported: " + tensor.name);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  FuzzedDataProvider in(data, size);
  std::vector<TensorSpec> specs = family_tensors(in);
  damage(in, specs);
  const auto from = fuzz::fresh("in.safetensors"), to = fuzz::fresh("out.safetensors");
  if (!write(from, specs)) return 0;
  const InheritOptions options = options_of(in);

  Checkpoint checkpoint;
  Plan plan;
  FileStatus status = open_checkpoint(from, checkpoint);
  fuzz::expect(status.ok(), message(status));
  status = make_plan(checkpoint, options, plan);
  // The report tells the mismatches of a model that does not fit, too.
  fuzz::expect(!report_table(plan).empty() && !report_json(plan).dump().empty(), "every plan is reported");
  if (status.ok()) status = apply(checkpoint, plan, options, to, true);
  if (!fuzz::accepted(status)) return 0;
  Safetensors after;
  status = Safetensors::open(to, after);
  fuzz::expect(status.ok(), message(status));
  check(checkpoint.weights, plan, after);
  Conversion conversion;
  status = read_conversion(after, conversion);
  fuzz::expect(status.ok(), message(status));
  fuzz::expect(conversion == plan.conversion, "the output says what was converted");
  return 0;
}

// What a checkpoint says of its converted modules: any words and tensors are a conversion or an error, and a conversion
// that is written, as metadata or as config.json, is read back as it was.
#include <fuzzer/FuzzedDataProvider.h>
#include <linattn/weights/conversion.hpp>

#include "fuzz.hpp"
#include "json.hpp"

namespace {

using linattn::Conversion;
using linattn::Dtype;
using linattn::Index;
using linattn::Metadata;
using linattn::ModuleConversion;
using linattn::Safetensors;
using linattn::TensorInfo;
using linattn::TensorSpec;

constexpr std::array stems{"blocks.0.attn", "blocks.1.attn", "transformer_blocks.2.attn2", "attn", "a.b\"c"};

Conversion make_conversion(FuzzedDataProvider& in) {
  Conversion conversion;
  for (const char* stem : stems) {
    if (!in.ConsumeBool()) continue;
    ModuleConversion module;
    module.inner_model = static_cast<linattn::InnerModelKind>(in.ConsumeIntegralInRange(0, 2));
    module.inner_loss = static_cast<linattn::InnerLossKind>(in.ConsumeIntegralInRange(0, 1));
    module.inner_lr = in.ConsumeFloatingPoint<double>();
    module.key_norm_eps = in.ConsumeFloatingPoint<double>();
    module.conv = in.ConsumeBool();
    module.neighborhood = in.ConsumeBool() ? 2 * in.ConsumeIntegralInRange<Index>(0, 1 << 20) + 1 : 0;
    conversion[stem] = module;
  }
  return conversion;
}

// The tensors of the modules, now and then one of them gone, odd, or once too many.
Safetensors write_model(FuzzedDataProvider& in, const Conversion& conversion, const Metadata& metadata) {
  std::vector<TensorSpec> specs;
  for (const auto& [stem, module] : conversion)
    for (TensorSpec& spec : linattn::module_tensors(stem, module, 2, 1, Dtype::bf16)) {
      if (in.ConsumeIntegralInRange(0, 40) == 1) continue;
      if (in.ConsumeIntegralInRange(0, 40) == 1) spec.shape.back() = in.ConsumeIntegralInRange<Index>(0, 3);
      if (in.ConsumeIntegralInRange(0, 40) == 1)
        spec.dtype = static_cast<Dtype>(in.ConsumeIntegralInRange(0, 14));
      specs.push_back(std::move(spec));
    }
  if (in.ConsumeIntegralInRange(0, 10) == 1)
    specs.push_back(
        {in.PickValueInArray(stems) + std::string(in.PickValueInArray({".w1", ".w3", ".qk_scale_ttt"})),
         Dtype::f32,
         {1, 2, 1, 1}});
  const std::vector<std::byte> zeros(4096);
  std::vector<TensorInfo> tensors;
  for (const TensorSpec& spec : specs) tensors.push_back({spec, std::span(zeros).first(spec.byte_size()), 0});
  const auto path = fuzz::fresh("model.safetensors");
  Safetensors model;
  // A name that is there twice, or text that is not UTF-8, cannot be written.
  if (write_safetensors(path, tensors, metadata).ok())
    fuzz::expect(Safetensors::open(path, model).ok(), "what was written is read");
  return model;
}

Conversion read(const Safetensors& model, const std::filesystem::path& config, const char* what) {
  Conversion conversion;
  const linattn::FileStatus status = linattn::read_conversion(model, conversion, config);
  fuzz::expect(status.ok(), std::string(what) + ": " + message(status));
  return conversion;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  FuzzedDataProvider in(data, size);
  const Conversion meant = make_conversion(in);
  const std::optional<Index> heads = in.ConsumeBool() ? std::optional<Index>(2) : std::nullopt;
  Metadata metadata = conversion_metadata(meant, heads);
  nlohmann::json config{{"linattn", conversion_json<nlohmann::json>(meant, heads)}};
  // Other words than were meant.
  while (in.ConsumeIntegralInRange(0, 3) == 1) {
    if (in.ConsumeBool() && !metadata.empty()) {
      auto entry = metadata.begin();
      std::advance(entry, in.ConsumeIntegralInRange<std::size_t>(0, metadata.size() - 1));
      if (in.ConsumeBool())
        metadata[entry->first + in.ConsumeRandomLengthString(8)] = entry->second;
      else
        entry->second = in.ConsumeRandomLengthString(24);
    } else {
      fuzz::mutate(in, config["linattn"]);
    }
  }
  if (in.ConsumeBool()) metadata.clear();
  const Safetensors model = write_model(in, meant, metadata);
  if (model.shards().empty()) return 0;
  const auto path =
      in.ConsumeBool() ? fuzz::write("config.json", fuzz::text(config)) : std::filesystem::path();

  Conversion conversion;
  if (!fuzz::accepted(linattn::read_conversion(model, conversion, path))) return 0;
  const nlohmann::json again{{"linattn", conversion_json<nlohmann::json>(conversion, heads)}};
  const auto words = fuzz::write("again.json", again.dump());
  fuzz::expect(read(model, words, "config.json") == conversion, "config.json says what was read");

  const std::vector<TensorInfo>& tensors = model.tensors();
  const auto file = fuzz::fresh("again.safetensors");
  Safetensors rewritten;
  fuzz::expect(write_safetensors(file, tensors, conversion_metadata(conversion, heads)).ok() &&
                   Safetensors::open(file, rewritten).ok(),
               "metadata are written");
  fuzz::expect(read(rewritten, {}, "metadata") == conversion, "metadata say what was read");
  return 0;
}

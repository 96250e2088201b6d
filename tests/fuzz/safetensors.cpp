// Safetensors files and their indices: any bytes are a model or an error, and a model comes back as it was written.
#include <linattn/weights/safetensors.hpp>

#include <algorithm>
#include <cstring>

#include "fuzz.hpp"

namespace {

using linattn::Safetensors;
using linattn::TensorInfo;

// A file of this header and data.
std::string file_of(std::string_view header, std::string_view data) {
  const std::uint64_t length = header.size();
  std::string file(sizeof length, '\0');
  std::memcpy(file.data(), &length, sizeof length);
  return file.append(header).append(data);
}

// Every tensor in every type that it may be read as.
void read_all(const Safetensors& model) {
  std::size_t total = 0;
  for (const TensorInfo& info : model.tensors()) {
    fuzz::expect(model.find(info.name) == &info, "a tensor is found by its name");
    fuzz::expect(info.bytes.size() == info.byte_size(), "a tensor has the bytes of its shape");
    const auto file = model.file(info).bytes();
    fuzz::expect(info.bytes.empty() || (info.bytes.data() >= file.data() &&
                                        info.bytes.data() + info.bytes.size() <= file.data() + file.size()),
                 "a tensor lies in its file");
    total += info.bytes.size();
    std::vector<double> values(static_cast<std::size_t>(info.elements()));
    const bool typed = linattn::visit_dtype(info.dtype, [](auto) {});
    fuzz::expect(fuzz::accepted(read(info, std::span(values))) == typed, "what has a C++ type is read");
    linattn::TensorView<const float, 2> view;
    if (linattn::view(info, view).ok())
      for (linattn::Index i = 0; i < view.elements(); ++i)
        if (const float value = view.data[i], read = static_cast<float>(values[static_cast<std::size_t>(i)]);
            std::memcmp(&value, &read, sizeof value) != 0 && value == value)
          fuzz::fail("a view has the values that are read");
  }
  std::size_t bytes = 0;
  for (const linattn::MappedFile& file : model.shards()) bytes += file.bytes().size();
  fuzz::expect(total <= bytes, "tensors do not overlap");
}

void round_trip(const Safetensors& model) {
  std::vector<TensorInfo> tensors(model.tensors());
  linattn::SafetensorsWriter::align(tensors);
  const auto path = fuzz::fresh("again.safetensors");
  Safetensors again;
  linattn::FileStatus status = write_safetensors(path, tensors, model.metadata());
  if (status.ok()) status = Safetensors::open(path, again);
  fuzz::expect(status.ok(), message(status));
  fuzz::expect(again.metadata() == model.metadata(), "metadata come back");
  fuzz::expect(again.tensors().size() == tensors.size(), "every tensor comes back");
  for (const TensorInfo& info : tensors) {
    const TensorInfo* found = again.find(info.name);
    fuzz::expect(
        found != nullptr && found->dtype == info.dtype && found->shape == info.shape &&
            std::equal(found->bytes.begin(), found->bytes.end(), info.bytes.begin(), info.bytes.end()),
        "a tensor comes back as it was");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  // A file; a header and data; or an index, and the headers and data of two shards.
  const std::vector<std::string> parts = fuzz::parts(data, size);
  std::filesystem::path path =
      fuzz::write("a.safetensors", parts.size() == 1 ? parts[0] : file_of(parts[0], parts[1]));
  if (parts.size() >= 5) {
    fuzz::write("b.safetensors", file_of(parts[2], parts[3]));
    path = fuzz::write("model.safetensors.index.json", parts[4]);
  }

  Safetensors model;
  if (!fuzz::accepted(Safetensors::open(path, model))) {
    fuzz::expect(model.tensors().empty() && model.shards().empty(), "what failed leaves nothing");
    return 0;
  }
  read_all(model);
  round_trip(model);
  return 0;
}

// Safetensors files: named tensors, mapped for reading, written atomically.
//
// Layout of a file: u64 little-endian length of the header, the header (JSON), the data. The header maps each
// name to {"dtype", "shape", "data_offsets": [begin, end)}, offsets count from the end of the header, and the
// tensors cover the data without gap or overlap. "__metadata__" maps strings to strings.
// https://huggingface.co/docs/safetensors
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <linattn/core/dtype.hpp>
#include <linattn/core/tensor.hpp>
#include <linattn/version.hpp>
#include <linattn/weights/atomic_file.hpp>
#include <linattn/weights/file_kind.hpp>
#include <linattn/weights/file_status.hpp>
#include <linattn/weights/json.hpp>
#include <linattn/weights/mapped_file.hpp>
#include <linattn/weights/model_files.hpp>

LINATTN_BEGIN

static_assert(std::endian::native == std::endian::little, "safetensors data is little-endian");

// All element types that fill whole bytes. Those with a C++ type (see view and read) are F64, F32, F16, BF16,
// I64, I32, U8 and BOOL; the others can be found and copied.
enum class Dtype : std::uint8_t {
  f64,
  f32,
  f16,
  bf16,
  i64,
  i32,
  i16,
  i8,
  u64,
  u32,
  u16,
  u8,
  boolean,
  f8_e4m3,
  f8_e5m2
};

struct DtypeTraits {
  Dtype dtype;
  std::string_view name;
  std::size_t size;  // bytes an element
};

// In the order of the enumeration.
inline constexpr std::array<DtypeTraits, 15> dtype_table{{{Dtype::f64, "F64", 8},
                                                          {Dtype::f32, "F32", 4},
                                                          {Dtype::f16, "F16", 2},
                                                          {Dtype::bf16, "BF16", 2},
                                                          {Dtype::i64, "I64", 8},
                                                          {Dtype::i32, "I32", 4},
                                                          {Dtype::i16, "I16", 2},
                                                          {Dtype::i8, "I8", 1},
                                                          {Dtype::u64, "U64", 8},
                                                          {Dtype::u32, "U32", 4},
                                                          {Dtype::u16, "U16", 2},
                                                          {Dtype::u8, "U8", 1},
                                                          {Dtype::boolean, "BOOL", 1},
                                                          {Dtype::f8_e4m3, "F8_E4M3", 1},
                                                          {Dtype::f8_e5m2, "F8_E5M2", 1}}};

[[nodiscard]] constexpr std::string_view name(Dtype dtype) {
  return dtype_table[static_cast<std::size_t>(dtype)].name;
}
[[nodiscard]] constexpr std::size_t size_of(Dtype dtype) {
  return dtype_table[static_cast<std::size_t>(dtype)].size;
}

// Whether elements of this type may be read as T. BOOL is a byte: other values than 0 and 1 are no bool.
template <class T>
[[nodiscard]] constexpr bool holds(Dtype dtype) {
  if constexpr (std::is_same_v<T, double>) return dtype == Dtype::f64;
  if constexpr (std::is_same_v<T, float>) return dtype == Dtype::f32;
  if constexpr (std::is_same_v<T, half>) return dtype == Dtype::f16;
  if constexpr (std::is_same_v<T, bfloat16>) return dtype == Dtype::bf16;
  if constexpr (std::is_same_v<T, std::int64_t>) return dtype == Dtype::i64;
  if constexpr (std::is_same_v<T, std::int32_t>) return dtype == Dtype::i32;
  if constexpr (std::is_same_v<T, std::uint8_t>) return dtype == Dtype::u8 || dtype == Dtype::boolean;
  return false;
}

// Calls visit(T{}) with the C++ type of a dtype. False if there is none.
template <class Visitor>
bool visit_dtype(Dtype dtype, Visitor&& visit) {
  switch (dtype) {
    case Dtype::f64:
      return visit(double{}), true;
    case Dtype::f32:
      return visit(float{}), true;
    case Dtype::f16:
      return visit(half{}), true;
    case Dtype::bf16:
      return visit(bfloat16{}), true;
    case Dtype::i64:
      return visit(std::int64_t{}), true;
    case Dtype::i32:
      return visit(std::int32_t{}), true;
    case Dtype::u8:
    case Dtype::boolean:
      return visit(std::uint8_t{}), true;
    case Dtype::i16:
    case Dtype::i8:
    case Dtype::u64:
    case Dtype::u32:
    case Dtype::u16:
    case Dtype::f8_e4m3:
    case Dtype::f8_e5m2:
      break;
  }
  return false;
}

// What a header says of a tensor. No axis: a scalar, one element.
struct TensorSpec {
  std::string name;
  Dtype dtype = Dtype::f32;
  std::vector<Index> shape;

  [[nodiscard]] Index elements() const {
    Index n = 1;
    for (const Index extent : shape) n *= extent;
    return n;
  }
  [[nodiscard]] std::size_t byte_size() const {
    return static_cast<std::size_t>(elements()) * size_of(dtype);
  }
};

// A tensor of an open file: shape x dtype is the size of `bytes`, which are mapped.
struct TensorInfo : TensorSpec {
  std::span<const std::byte> bytes;
  std::size_t shard = 0;  // index into Safetensors::shards()
};

// "F16 [24, 64, 64]"
[[nodiscard]] inline std::string describe(Dtype dtype, const std::vector<Index>& shape) {
  std::string text = std::string(name(dtype)) + " [";
  for (std::size_t axis = 0; axis < shape.size(); ++axis)
    text += (axis > 0 ? ", " : "") + std::to_string(shape[axis]);
  return text + "]";
}
[[nodiscard]] inline std::string describe(const TensorSpec& spec) { return describe(spec.dtype, spec.shape); }

using Metadata = std::map<std::string, std::string, std::less<>>;

namespace detail {

inline constexpr std::size_t largest_rank = 64;

// Bytes of shape x dtype, or why not: extents must not be negative, and neither the elements nor a stride
// may overflow (which an empty axis beside huge ones would hide).
[[nodiscard]] inline std::string checked_byte_size(const TensorSpec& spec, std::size_t& bytes) {
  Index span = static_cast<Index>(size_of(spec.dtype));
  bool empty = false;
  for (const Index extent : spec.shape) {
    if (extent < 0) return "negative extent " + std::to_string(extent);
    empty = empty || extent == 0;
    if (__builtin_mul_overflow(span, std::max<Index>(extent, 1), &span))
      return "shape is too large: the size overflows";
  }
  bytes = empty ? 0 : static_cast<std::size_t>(span);
  return {};
}

// One entry of the header. `data` is the data section.
[[nodiscard]] inline std::string parse_entry(const nlohmann::json& entry, std::span<const std::byte> data,
                                             TensorInfo& out) {
  if (!entry.is_object()) return "entry is not an object";
  for (const auto& item : entry.items())
    if (item.key() != "dtype" && item.key() != "shape" && item.key() != "data_offsets")
      return "unknown key '" + printable(item.key()) + "'";

  const auto dtype = entry.find("dtype");
  if (dtype == entry.end()) return "no dtype";
  if (!dtype->is_string()) return "dtype is not a string";
  const auto& dtype_name = dtype->get_ref<const std::string&>();
  const auto known = std::find_if(dtype_table.begin(), dtype_table.end(),
                                  [&](const DtypeTraits& traits) { return traits.name == dtype_name; });
  if (known == dtype_table.end()) return "unknown dtype '" + printable(dtype_name) + "'";
  out.dtype = known->dtype;

  const auto shape = entry.find("shape");
  if (shape == entry.end()) return "no shape";
  if (!shape->is_array()) return "shape is not an array";
  out.shape.clear();
  for (const nlohmann::json& extent : *shape) {
    if (!extent.is_number_unsigned() ||
        extent.get<std::uint64_t>() > static_cast<std::uint64_t>(std::numeric_limits<Index>::max()))
      return "shape holds " + printable(extent.dump(-1, ' ', true)) + ", which is no extent";
    out.shape.push_back(static_cast<Index>(extent.get<std::uint64_t>()));
  }
  std::size_t size = 0;
  if (std::string error = checked_byte_size(out, size); !error.empty()) return error;

  const auto offsets = entry.find("data_offsets");
  if (offsets == entry.end()) return "no data_offsets";
  if (!offsets->is_array() || offsets->size() != 2 || !(*offsets)[0].is_number_unsigned() ||
      !(*offsets)[1].is_number_unsigned())
    return "data_offsets is not a pair of unsigned integers";
  const auto begin = (*offsets)[0].get<std::uint64_t>(), end = (*offsets)[1].get<std::uint64_t>();
  const std::string range = "[" + std::to_string(begin) + ", " + std::to_string(end) + "]";
  if (begin > end) return "data_offsets " + range + " are reversed";
  if (end > data.size())
    return "data_offsets " + range + " reach beyond the " + std::to_string(data.size()) +
           " bytes of data: the file is cut short or broken, fetch it again";
  if (end - begin != size)
    return std::to_string(end - begin) + " bytes, but " + describe(out) + " takes " + std::to_string(size);
  out.bytes = data.subspan(begin, size);
  return {};
}

[[nodiscard]] inline FileStatus parse_metadata(const std::filesystem::path& path, const nlohmann::json& entry,
                                               Metadata& out) {
  if (!entry.is_object()) return file_error(path, "__metadata__ is not an object");
  for (const auto& item : entry.items()) {
    if (!item.value().is_string())
      return file_error(path, "__metadata__ '" + printable(item.key()) + "' is not a string");
    out.emplace(item.key(), item.value().get_ref<const std::string&>());
  }
  return {};
}

// Appends the tensors of one mapped file, in the order of their data. Metadata that is there already stays.
[[nodiscard]] inline FileStatus parse_safetensors(const MappedFile& file, std::size_t shard,
                                                  std::vector<TensorInfo>& tensors, Metadata& metadata) {
  const std::span<const std::byte> bytes = file.bytes();
  const auto error = [&](std::string detail, std::string_view tensor = {}) {
    return file_error(file.path(), std::move(detail), tensor);
  };
  // What is no safetensors file at all is named as what it is.
  const auto not_one = [&](std::string detail) {
    const std::string foreign = foreign_kind(bytes);
    return error(foreign.empty() ? std::move(detail) : foreign);
  };
  std::uint64_t length = 0;
  if (bytes.size() < sizeof length)
    return not_one("not a safetensors file: " + std::to_string(bytes.size()) +
                   " bytes, shorter than a header");
  std::memcpy(&length, bytes.data(), sizeof length);
  if (length == 0) return not_one("empty header");
  if (length > largest_header)
    return not_one("not a safetensors file: a header of " + std::to_string(length) +
                   " bytes is over the limit");
  if (length > bytes.size() - sizeof length)
    return not_one("truncated: a header of " + std::to_string(length) + " bytes in a file of " +
                   std::to_string(bytes.size()) + ", which was not fetched to the end: fetch it again");
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + sizeof length, length);
  const std::span<const std::byte> data = bytes.subspan(sizeof length + length);

  nlohmann::json header;
  if (const std::string why = parse_json(text, header, {.depth = 3, .array = largest_rank}); !why.empty())
    return not_one("header: " + why);
  if (!header.is_object()) return not_one("header is not an object");

  const std::size_t first = tensors.size();
  for (const auto& item : header.items()) {
    if (item.key() == "__metadata__") {
      if (FileStatus status = parse_metadata(file.path(), item.value(), metadata); !status.ok())
        return status;
      continue;
    }
    TensorInfo info;
    info.name = item.key();
    info.shard = shard;
    if (std::string why = parse_entry(item.value(), data, info); !why.empty())
      return error(std::move(why), info.name);
    tensors.push_back(std::move(info));
  }

  std::sort(tensors.begin() + static_cast<Index>(first), tensors.end(),
            [](const TensorInfo& a, const TensorInfo& b) {
              return std::pair(a.bytes.data(), a.bytes.size()) < std::pair(b.bytes.data(), b.bytes.size());
            });
  const std::byte* reached = data.data();
  for (std::size_t i = first; i < tensors.size(); ++i) {
    if (tensors[i].bytes.data() < reached) return error("overlaps another tensor", tensors[i].name);
    if (tensors[i].bytes.data() > reached)
      return error("a gap of " + std::to_string(tensors[i].bytes.data() - reached) + " bytes lies before it",
                   tensors[i].name);
    reached += tensors[i].bytes.size();
  }
  if (reached != data.data() + data.size())
    return error(std::to_string(data.data() + data.size() - reached) +
                 " bytes of data belong to no tensor: the file is not what its header says");
  return {};
}

}  // namespace detail

// The tensors of one safetensors file, or of several shards that an index lists. Owns the mappings; views of
// the tensors live as long as it does, also when it is moved. Reading it from several threads is safe.
class Safetensors {
 public:
  Safetensors() = default;
  Safetensors(Safetensors&&) = default;
  Safetensors& operator=(Safetensors&&) = default;

  // Opens a file or an index, whatever its name is, or the model in a folder (see ModelFiles). A file that breaks the
  // format in any way is refused, and `out` stays as it was.
  [[nodiscard]] static FileStatus open(const std::filesystem::path& path, Safetensors& out) {
    std::error_code ignored;
    if (!std::filesystem::is_directory(path, ignored)) return open_file(path, out);
    ModelFiles files;
    std::filesystem::path file;
    std::string note;
    if (FileStatus status = ModelFiles::list(path, files); !status.ok()) return status;
    if (FileStatus status = files.choose(file, note); !status.ok()) return status;
    FileStatus status = open_file(file, out);
    if (status.ok()) out.note_ = std::move(note);
    return status;
  }

  // Opens the shards of an index: {"weight_map": {tensor name: file name in the same folder}}. The index and
  // the shards must agree on every tensor.
  [[nodiscard]] static FileStatus open_index(const std::filesystem::path& path, Safetensors& out) {
    nlohmann::json weight_map;
    std::set<std::string, std::less<>> shards;
    if (FileStatus status = detail::read_index(path, weight_map, shards); !status.ok()) return status;
    Safetensors made;
    made.index_ = path;
    for (const std::string& shard : shards) {
      MappedFile file;
      FileStatus status = MappedFile::open(path.parent_path() / shard, file);
      if (status.status.native == ENOENT) return ModelFiles::lists_absent(path, shard);
      if (!status.ok()) return status;
      if (status = made.add(std::move(file)); !status.ok()) return status;
    }
    if (FileStatus status = made.sort_names(); !status.ok()) return status;
    for (const TensorInfo& info : made.tensors_) {
      const std::filesystem::path& shard = made.shards_[info.shard].path();
      const auto entry = weight_map.find(info.name);
      if (entry == weight_map.end() || entry->get_ref<const std::string&>() != shard.filename().string())
        return detail::file_error(path, "is in " + shard.filename().string() + ", but not in the index",
                                  info.name);
    }
    for (const auto& item : weight_map.items())
      if (made.find(item.key()) == nullptr)
        return detail::file_error(path, "is not in " + item.value().get_ref<const std::string&>(),
                                  item.key());
    out = std::move(made);
    return {};
  }

  // The tensor of a name, or null.
  [[nodiscard]] const TensorInfo* find(std::string_view tensor) const {
    const TensorInfo* const found = first_not_before(tensor);
    return found != nullptr && found->name == tensor ? found : nullptr;
  }

  // Whether the name of any tensor begins so.
  [[nodiscard]] bool holds_below(std::string_view beginning) const {
    const TensorInfo* const found = first_not_before(beginning);
    return found != nullptr && found->name.starts_with(beginning);
  }

  // Shard by shard, in the order of the data.
  [[nodiscard]] const std::vector<TensorInfo>& tensors() const { return tensors_; }
  // "__metadata__" of the file. Of several shards all entries together, the first one where they differ.
  [[nodiscard]] const Metadata& metadata() const { return metadata_; }
  [[nodiscard]] const std::vector<MappedFile>& shards() const { return shards_; }
  // The file that holds a tensor.
  [[nodiscard]] const MappedFile& file(const TensorInfo& info) const { return shards_[info.shard]; }
  // What was opened: the index, or the file.
  [[nodiscard]] const std::filesystem::path& path() const {
    return index_.empty() && !shards_.empty() ? shards_[0].path() : index_;
  }
  [[nodiscard]] bool sharded() const { return !index_.empty(); }
  // What a user should know of how a folder was read: the variant that was chosen, shards that were passed over.
  [[nodiscard]] const std::string& note() const { return note_; }

 private:
  // In the order of the names.
  [[nodiscard]] const TensorInfo* first_not_before(std::string_view name) const {
    const auto found = std::lower_bound(
        by_name_.begin(), by_name_.end(), name,
        [&](std::size_t position, std::string_view wanted) { return tensors_[position].name < wanted; });
    return found != by_name_.end() ? &tensors_[*found] : nullptr;
  }

  static FileStatus open_file(const std::filesystem::path& path, Safetensors& out) {
    MappedFile file;
    if (FileStatus status = MappedFile::open(path, file); !status.ok()) return status;
    if (looks_like_json(file.bytes())) return open_index(path, out);
    Safetensors made;
    if (FileStatus status = made.add(std::move(file)); !status.ok()) return status;
    if (FileStatus status = made.sort_names(); !status.ok()) return status;
    out = std::move(made);
    return {};
  }

  FileStatus add(MappedFile&& file) {
    if (!detail::is_utf8(file.path().filename().string()))
      return detail::file_error(file.path(), "has a name that is not UTF-8");
    FileStatus status = detail::parse_safetensors(file, shards_.size(), tensors_, metadata_);
    shards_.push_back(std::move(file));
    return status;
  }

  FileStatus sort_names() {
    by_name_.resize(tensors_.size());
    for (std::size_t i = 0; i < by_name_.size(); ++i) by_name_[i] = i;
    std::sort(by_name_.begin(), by_name_.end(),
              [&](std::size_t a, std::size_t b) { return tensors_[a].name < tensors_[b].name; });
    for (std::size_t i = 1; i < by_name_.size(); ++i)
      if (tensors_[by_name_[i - 1]].name == tensors_[by_name_[i]].name)
        return detail::file_error(path(), "is in more than one shard", tensors_[by_name_[i]].name);
    return {};
  }

  std::filesystem::path index_;
  std::string note_;
  std::vector<MappedFile> shards_;
  std::vector<TensorInfo> tensors_;
  std::vector<std::size_t> by_name_;
  Metadata metadata_;
};

// Whether the elements lie on multiples of their size, so that they may be viewed where they are.
template <class T>
[[nodiscard]] bool aligned(const TensorInfo& info) {
  return reinterpret_cast<std::uintptr_t>(info.bytes.data()) % alignof(T) == 0;
}

// Views the mapped elements of a tensor, row-major, without a copy. A tensor of another dtype or rank, or one
// that is misaligned for T, is refused (read() takes it). A scalar is viewed as [1].
template <class T, int Rank>
[[nodiscard]] FileStatus view(const TensorInfo& info, TensorView<const T, Rank>& out) {
  const auto refuse = [&](Code code, std::string detail) {
    return detail::file_error({}, std::move(detail), info.name, code);
  };
  if (!holds<T>(info.dtype))
    return refuse(Code::option, "is " + describe(info) + ", not of the type asked for");
  const bool scalar = info.shape.empty() && Rank == 1;
  if (info.shape.size() != Rank && !scalar)
    return refuse(Code::shape, "is " + describe(info) + ", but " + std::to_string(Rank) + " axes are needed");
  if (!aligned<T>(info)) return refuse(Code::stride, "is misaligned in its file and must be copied");
  typename TensorView<T, Rank>::Axes extents{};
  extents.fill(1);
  std::copy(info.shape.begin(), info.shape.end(), extents.begin());
  out = TensorView<const T, Rank>(reinterpret_cast<const T*>(info.bytes.data()), extents);
  return {};
}

// Copies the elements of a tensor, aligned or not. To a floating-point T from any dtype with a C++ type, to
// nearest where T is narrower; to an integer T from its own dtype alone. out.size() must be its elements.
template <class T>
[[nodiscard]] FileStatus read(const TensorInfo& info, std::span<T> out) {
  if (out.size() != static_cast<std::size_t>(info.elements()))
    return detail::file_error(
        {}, "is " + describe(info) + ", but " + std::to_string(out.size()) + " elements are asked for",
        info.name, Code::shape);
  const bool known = (Storage<T> || holds<T>(info.dtype)) && visit_dtype(info.dtype, [&](auto type) {
                       using Stored = decltype(type);
                       for (std::size_t i = 0; i < out.size(); ++i) {
                         Stored value;
                         std::memcpy(&value, info.bytes.data() + i * sizeof value, sizeof value);
                         out[i] = convert<T>(value);
                       }
                     });
  if (!known)
    return detail::file_error({}, "is " + describe(info) + ", which has no conversion to the type asked for",
                              info.name, Code::option);
  return {};
}

// Writes a safetensors file front to back in constant memory: all names, dtypes and shapes first, then the
// data, in the same order, in pieces of any size. The file appears when finish() succeeds, and not before.
// Every tensor lies on a multiple of its element size if the specs are ordered by element size, largest
// first, as align() does.
class SafetensorsWriter {
 public:
  // Orders specs so that no tensor is misaligned. Stable: tensors of one size stay as they are.
  template <class Specs>
  static void align(Specs& specs) {
    std::stable_sort(specs.begin(), specs.end(),
                     [](const auto& a, const auto& b) { return size_of(a.dtype) > size_of(b.dtype); });
  }

  [[nodiscard]] static FileStatus create(const std::filesystem::path& path, std::span<const TensorSpec> specs,
                                         const Metadata& metadata, SafetensorsWriter& out) {
    nlohmann::json header = nlohmann::json::object();
    if (!metadata.empty()) header["__metadata__"] = metadata;
    std::size_t offset = 0;
    for (const TensorSpec& spec : specs) {
      std::size_t size = 0;
      std::string why = detail::checked_byte_size(spec, size);
      if (why.empty() && spec.shape.size() > detail::largest_rank) why = "too many axes";
      if (why.empty() && (spec.name == "__metadata__" || header.contains(spec.name))) why = "name is taken";
      if (why.empty() && __builtin_add_overflow(offset, size, &size)) why = "the size of the file overflows";
      if (!why.empty()) return detail::file_error(path, std::move(why), spec.name, Code::option);
      header[spec.name] = {
          {"dtype", name(spec.dtype)}, {"shape", spec.shape}, {"data_offsets", {offset, size}}};
      offset = size;
    }
    // Bad UTF-8 would make dump() throw, or another file than was asked for.
    std::string text = header.dump(-1, ' ', false, nlohmann::json::error_handler_t::ignore);
    nlohmann::json again;
    if (!parse_json(text, again).empty() || again != header)
      return detail::file_error(path, "a name or the metadata is not UTF-8", {}, Code::option);
    text.append((8 - text.size() % 8) % 8, ' ');
    if (text.size() > detail::largest_header)
      return detail::file_error(path, "the header is over the limit", {}, Code::option);

    SafetensorsWriter made;
    const std::uint64_t length = text.size();
    if (FileStatus status = AtomicFile::create(path, made.file_); !status.ok()) return status;
    if (FileStatus status = made.file_.write(std::as_bytes(std::span(&length, 1))); !status.ok())
      return status;
    if (FileStatus status = made.file_.write(text); !status.ok()) return status;
    made.path_ = path;
    made.remaining_ = offset;
    out = std::move(made);
    return {};
  }

  // The next bytes of the data section; with `from`, bytes that lie in that mapped file.
  [[nodiscard]] FileStatus write(std::span<const std::byte> bytes) {
    FileStatus status = take(bytes.size());
    return status.ok() ? file_.write(bytes) : status;
  }
  [[nodiscard]] FileStatus write(const MappedFile& from, std::span<const std::byte> bytes) {
    FileStatus status = take(bytes.size());
    return status.ok() ? file_.write(from, bytes) : status;
  }

  [[nodiscard]] FileStatus finish() {
    if (remaining_ != 0)
      return detail::file_error(path_, std::to_string(remaining_) + " bytes of data are missing", {},
                                Code::option);
    return file_.commit();
  }

 private:
  [[nodiscard]] FileStatus take(std::size_t bytes) {
    if (bytes > remaining_)
      return detail::file_error(path_, "more data than its tensors take", {}, Code::option);
    remaining_ -= bytes;
    return {};
  }

  AtomicFile file_;
  std::filesystem::path path_;
  std::size_t remaining_ = 0;
};

// Writes tensors that are in memory. The order is kept, see SafetensorsWriter::align.
[[nodiscard]] inline FileStatus write_safetensors(const std::filesystem::path& path,
                                                  std::span<const TensorInfo> tensors,
                                                  const Metadata& metadata = {}) {
  SafetensorsWriter writer;
  const std::vector<TensorSpec> specs(tensors.begin(), tensors.end());
  if (FileStatus status = SafetensorsWriter::create(path, specs, metadata, writer); !status.ok())
    return status;
  for (const TensorInfo& tensor : tensors) {
    if (tensor.bytes.size() != tensor.byte_size())
      return detail::file_error(path,
                                std::to_string(tensor.bytes.size()) + " bytes, but " + describe(tensor) +
                                    " takes " + std::to_string(tensor.byte_size()),
                                tensor.name, Code::option);
    if (FileStatus status = writer.write(tensor.bytes); !status.ok()) return status;
  }
  return writer.finish();
}

LINATTN_END

#include "kvshrink/client/safetensors.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "kvshrink/client/status.h"
#include "nlohmann/json.hpp"
#include "strict_json.h"

namespace kvshrink::client {
namespace {

constexpr uint64_t kLengthBytes = 8;
constexpr std::string_view kMetadataKey = "__metadata__";

template <typename Value>
absl::Status BadFile(std::string_view field, const Value& value, std::string_view rule) {
  return absl::DataLossError(StrCat("safetensors field '", field, "' is ", value, ": ", rule));
}

uint64_t ReadLength(std::string_view bytes) {
  uint64_t value = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) {
    value |= uint64_t{static_cast<unsigned char>(bytes[i])} << (8 * i);
  }
  return value;
}

std::string LengthBytes(uint64_t value) {
  std::string bytes(kLengthBytes, '\0');
  for (size_t i = 0; i < kLengthBytes; ++i) {
    bytes[i] = static_cast<char>(value >> (8 * i));
  }
  return bytes;
}

std::optional<uint64_t> Product(uint64_t a, uint64_t b) {
  if (b != 0 && a > std::numeric_limits<uint64_t>::max() / b) {
    return std::nullopt;
  }
  return a * b;
}

// Bytes of a tensor of this shape; nullopt on overflow.
std::optional<uint64_t> ShapeBytes(const std::vector<uint64_t>& shape, uint64_t element_bytes) {
  std::optional<uint64_t> bytes = element_bytes;
  for (const uint64_t size : shape) {
    bytes = Product(*bytes, size);
    if (!bytes) {
      return std::nullopt;
    }
  }
  return bytes;
}

struct Range {
  uint64_t begin = 0;
  uint64_t end = 0;
  std::string_view name;

  auto operator<=>(const Range&) const = default;
};

absl::StatusOr<std::vector<uint64_t>> ReadNumbers(const nlohmann::json& entry,
                                                  const std::string& name, const char* key,
                                                  size_t max_count) {
  const std::string field = StrCat(name, ".", key);
  const auto found = entry.find(key);
  if (found == entry.end() || !found->is_array()) {
    return BadFile(field, "missing or no array", "must be an array of numbers");
  }
  if (found->size() > max_count) {
    return BadFile(field, StrCat("of ", found->size(), " numbers"),
                   StrCat("must have at most ", max_count));
  }
  std::vector<uint64_t> numbers;
  for (const nlohmann::json& number : *found) {
    if (!number.is_number_unsigned()) {
      return BadFile(field, number.type_name(), "must hold non-negative integers");
    }
    numbers.push_back(number.get<uint64_t>());
  }
  return numbers;
}

absl::StatusOr<SafeTensor> ReadEntry(const std::string& name, const nlohmann::json& entry,
                                     std::string_view data, Range* range) {
  if (!entry.is_object()) {
    return BadFile(name, entry.type_name(), "must be an object");
  }
  const auto dtype = entry.find("dtype");
  if (dtype == entry.end() || !dtype->is_string()) {
    return BadFile(StrCat(name, ".dtype"), "missing or no string", "must name a dtype");
  }
  SafeTensor tensor;
  tensor.dtype = dtype->get<std::string>();
  const uint64_t element_bytes = SafetensorsDtypeBytes(tensor.dtype);
  if (element_bytes == 0) {
    return BadFile(StrCat(name, ".dtype"), tensor.dtype.substr(0, 32), "must be a known dtype");
  }
  auto shape = ReadNumbers(entry, name, "shape", kMaxSafetensorsDims);
  if (!shape.ok()) {
    return shape.status();
  }
  tensor.shape = *std::move(shape);
  const auto offsets = ReadNumbers(entry, name, "data_offsets", 2);
  if (!offsets.ok()) {
    return offsets.status();
  }
  const std::string field = StrCat(name, ".data_offsets");
  if (offsets->size() != 2) {
    return BadFile(field, StrCat("of ", offsets->size(), " numbers"), "must be [begin, end]");
  }
  const auto [begin, end] = std::pair((*offsets)[0], (*offsets)[1]);
  if (begin > end || end > data.size()) {
    return BadFile(field, StrCat("[", begin, ", ", end, "]"),
                   StrCat("must be ascending and within the ", data.size(), " bytes of data"));
  }
  const auto bytes = ShapeBytes(tensor.shape, element_bytes);
  if (!bytes || *bytes != end - begin) {
    return BadFile(field, StrCat("[", begin, ", ", end, "]"),
                   "must span exactly what shape and dtype need");
  }
  tensor.bytes = data.substr(begin, end - begin);
  *range = {begin, end, name};
  return tensor;
}

// The format wants the data covered once.
absl::Status CheckCoverage(std::vector<Range> ranges, uint64_t data_bytes) {
  std::sort(ranges.begin(), ranges.end());
  uint64_t position = 0;
  for (const Range& range : ranges) {
    if (range.begin != position) {
      return BadFile(StrCat(range.name, ".data_offsets"),
                     StrCat("[", range.begin, ", ", range.end, "]"),
                     StrCat("must begin at ", position, ", without overlap or gap"));
    }
    position = range.end;
  }
  if (position != data_bytes) {
    return BadFile("size", data_bytes,
                   StrCat("must end with the last tensor's data, at ", position));
  }
  return absl::OkStatus();
}

}  // namespace

uint64_t SafetensorsDtypeBytes(std::string_view dtype) {
  static constexpr std::pair<std::string_view, uint64_t> kDtypes[] = {
      {"F64", 8},  {"I64", 8},     {"U64", 8},     {"F32", 4}, {"I32", 4},
      {"U32", 4},  {"F16", 2},     {"BF16", 2},    {"I16", 2}, {"U16", 2},
      {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"I8", 1},  {"U8", 1}};
  for (const auto& [name, bytes] : kDtypes) {
    if (name == dtype) {
      return bytes;
    }
  }
  return 0;
}

absl::StatusOr<Safetensors> Safetensors::Parse(std::string_view bytes) {
  if (bytes.size() < kLengthBytes) {
    return BadFile("size", bytes.size(), "must be at least 8");
  }
  const uint64_t header_bytes = ReadLength(bytes);
  if (header_bytes > kMaxSafetensorsHeaderBytes) {
    return BadFile("header_length", header_bytes,
                   StrCat("must be at most ", kMaxSafetensorsHeaderBytes));
  }
  if (header_bytes > bytes.size() - kLengthBytes) {
    return BadFile("header_length", header_bytes,
                   StrCat("must fit the file of ", bytes.size(), " bytes"));
  }
  const std::string_view header = bytes.substr(kLengthBytes, header_bytes);
  if (header.empty() || header[0] != '{') {
    return BadFile("header", "no object", "must start with '{'");
  }
  // Depth 3: the object, a tensor's entry, its arrays.
  const auto json = ParseStrictJson(header, "header", 3);
  if (!json.ok()) {
    return json.status();
  }
  const std::string_view data = bytes.substr(kLengthBytes + header_bytes);

  Safetensors result;
  std::vector<Range> ranges;
  for (const auto& [name, entry] : json->items()) {
    if (name == kMetadataKey) {
      auto metadata = MetadataFromJson(entry, kMetadataKey);
      if (!metadata.ok()) {
        return metadata.status();
      }
      result.metadata_ = *std::move(metadata);
      continue;
    }
    Range range;
    auto tensor = ReadEntry(name, entry, data, &range);
    if (!tensor.ok()) {
      return tensor.status();
    }
    const auto [place, inserted] = result.tensors_.emplace(name, *std::move(tensor));
    range.name = place->first;
    ranges.push_back(range);
  }
  KVSHRINK_RETURN_IF_ERROR(CheckCoverage(std::move(ranges), data.size()));
  return result;
}

absl::StatusOr<SafetensorsWriter> SafetensorsWriter::Create(const std::string& path,
                                                            const Metadata& metadata,
                                                            std::vector<Tensor> tensors) {
  nlohmann::json header = nlohmann::json::object();
  if (!metadata.empty()) {
    header[std::string(kMetadataKey)] = metadata;
  }
  std::vector<Place> places;
  uint64_t position = 0;
  for (Tensor& tensor : tensors) {
    const uint64_t element_bytes = SafetensorsDtypeBytes(tensor.dtype);
    if (element_bytes == 0) {
      return BadArgument("dtype", tensor.dtype, "must be a known dtype");
    }
    const auto bytes = ShapeBytes(tensor.shape, element_bytes);
    if (!bytes || *bytes > std::numeric_limits<int64_t>::max() - position) {
      return BadArgument("shape", StrCat("of '", tensor.name, "'"), "must not overflow");
    }
    if (header.contains(tensor.name)) {
      return BadArgument("name", tensor.name, "must be there once");
    }
    header[tensor.name] = {{"dtype", tensor.dtype},
                           {"shape", tensor.shape},
                           {"data_offsets", {position, position + *bytes}}};
    places.push_back({std::move(tensor.name), position, *bytes, 0});
    position += *bytes;
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const nlohmann::json::exception& error) {
    return BadArgument("metadata", "no UTF-8", error.what());
  }
  text.append((kLengthBytes - text.size() % kLengthBytes) % kLengthBytes, ' ');  // aligns the data
  if (text.size() > kMaxSafetensorsHeaderBytes) {
    return BadArgument("header_length", text.size(),
                       StrCat("must be at most ", kMaxSafetensorsHeaderBytes));
  }
  for (Place& place : places) {
    place.offset += kLengthBytes + text.size();
  }
  auto file = AtomicFile::Create(path);
  if (!file.ok()) {
    return file.status();
  }
  KVSHRINK_RETURN_IF_ERROR(file->WriteAt(0, LengthBytes(text.size())));
  KVSHRINK_RETURN_IF_ERROR(file->WriteAt(kLengthBytes, text));
  return SafetensorsWriter(*std::move(file), std::move(places));
}

SafetensorsWriter::SafetensorsWriter(AtomicFile file, std::vector<Place> places)
    : file_(std::move(file)), places_(std::move(places)) {}

absl::Status SafetensorsWriter::Write(size_t index, uint64_t offset, std::string_view bytes) {
  if (index >= places_.size()) {
    return absl::OutOfRangeError(StrCat("tensor ", index, " of ", places_.size()));
  }
  Place& place = places_[index];
  if (offset > place.bytes || bytes.size() > place.bytes - offset) {
    return absl::OutOfRangeError(StrCat("tensor '", place.name, "' has ", place.bytes,
                                        " bytes: cannot write ", bytes.size(), " at ", offset));
  }
  place.written_bytes += bytes.size();
  return file_.WriteAt(place.offset + offset, bytes);
}

absl::Status SafetensorsWriter::Finish() {
  for (const Place& place : places_) {
    if (place.written_bytes < place.bytes) {
      return absl::FailedPreconditionError(StrCat("tensor '", place.name, "' has ",
                                                  place.written_bytes, " of its ", place.bytes,
                                                  " bytes"));
    }
  }
  return file_.Commit();
}

}  // namespace kvshrink::client

#include "kvshrink/client/trace.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <utility>

#include "absl/strings/numbers.h"
#include "kvshrink/client/status.h"

namespace kvshrink::client {
namespace {

constexpr uint32_t kMaxTraceTokens = std::numeric_limits<int32_t>::max();
constexpr uint32_t kMaxTraceQHeads = 1024;

template <typename Value>
absl::Status BadTrace(std::string_view field, const Value& value, std::string_view rule) {
  return absl::DataLossError(StrCat("trace field '", field, "' is ", value, ": ", rule));
}

// layer.{i}.k -> (i, 'k'); nullopt for another name.
std::optional<std::pair<uint32_t, char>> ParseName(std::string_view name) {
  constexpr std::string_view kPrefix = "layer.";
  if (name.size() < kPrefix.size() + 3 || name.substr(0, kPrefix.size()) != kPrefix) {
    return std::nullopt;
  }
  const char part = name.back();
  const std::string_view number = name.substr(kPrefix.size(), name.size() - kPrefix.size() - 2);
  uint32_t layer = 0;
  const bool canonical = !number.empty() && number[0] >= '0' && number[0] <= '9' &&
                         (number.size() == 1 || number[0] != '0');
  if (name[name.size() - 2] != '.' || (part != 'k' && part != 'v' && part != 'q') || !canonical ||
      !absl::SimpleAtoi(ToAbsl(number), &layer)) {
    return std::nullopt;
  }
  return std::pair(layer, part);
}

struct Tensor3 {
  const std::byte* data = nullptr;
  DType dtype = DType::kFp16;
  uint32_t sizes[3] = {};
};

absl::StatusOr<Tensor3> ReadTensor(const std::string& name, const SafeTensor& tensor,
                                   const uint32_t (&limits)[3]) {
  const auto dtype = DTypeFromSafetensors(tensor.dtype);
  if (!dtype) {
    return BadTrace(StrCat(name, ".dtype"), tensor.dtype, "must be F16, BF16, F32 or F8_E4M3");
  }
  if (tensor.shape.size() != 3) {
    return BadTrace(StrCat(name, ".shape"), StrCat("of ", tensor.shape.size(), " sizes"),
                    "must be [tokens, heads, head_dim]");
  }
  Tensor3 result{reinterpret_cast<const std::byte*>(tensor.bytes.data()), *dtype, {}};
  for (size_t i = 0; i < 3; ++i) {
    if (tensor.shape[i] < 1 || tensor.shape[i] > limits[i]) {
      return BadTrace(StrCat(name, ".shape[", i, "]"), tensor.shape[i],
                      StrCat("must be 1..", limits[i]));
    }
    result.sizes[i] = static_cast<uint32_t>(tensor.shape[i]);
  }
  return result;
}

absl::StatusOr<ConstTensor> ReadKv(const std::string& name, const SafeTensor& tensor) {
  const auto read = ReadTensor(name, tensor, {kMaxTraceTokens, kMaxKvHeads, kMaxHeadDim});
  if (!read.ok()) {
    return read.status();
  }
  const TensorShape shape{read->sizes[0], read->sizes[1], read->sizes[2]};
  return ConstTensor{read->data, read->dtype, shape, LayoutThd(shape)};
}

absl::StatusOr<TraceQueries> ReadQueries(const std::string& name, const SafeTensor& tensor,
                                         const TensorShape& kv) {
  const auto read = ReadTensor(name, tensor, {kv.tokens, kMaxTraceQHeads, kMaxHeadDim});
  if (!read.ok()) {
    return read.status();
  }
  if (read->sizes[1] % kv.kv_heads != 0) {
    return BadTrace(StrCat(name, ".shape[1]"), read->sizes[1],
                    StrCat("must be a multiple of the ", kv.kv_heads, " kv heads"));
  }
  if (read->sizes[2] != kv.head_dim) {
    return BadTrace(StrCat(name, ".shape[2]"), read->sizes[2],
                    StrCat("must be the keys' head_dim ", kv.head_dim));
  }
  return TraceQueries{read->data, read->dtype, read->sizes[0], read->sizes[1]};
}

struct Parts {
  const SafeTensor* k = nullptr;
  const SafeTensor* v = nullptr;
  const SafeTensor* q = nullptr;
};

absl::StatusOr<TraceLayer> ReadLayer(uint32_t number, const Parts& parts) {
  const std::string name = StrCat("layer.", number);
  if (parts.k == nullptr) {
    return BadTrace(StrCat(name, ".k"), "missing", "a layer needs k");
  }
  const auto k = ReadKv(StrCat(name, ".k"), *parts.k);
  if (!k.ok()) {
    return k.status();
  }
  TraceLayer layer{number, *k, std::nullopt, std::nullopt};
  if (parts.v != nullptr) {
    const auto v = ReadKv(StrCat(name, ".v"), *parts.v);
    if (!v.ok()) {
      return v.status();
    }
    if (k->shape != v->shape || k->dtype != v->dtype) {
      return BadTrace(StrCat(name, ".v"), "of another shape or dtype than k", "they must agree");
    }
    layer.v = *v;
  }
  if (parts.q != nullptr) {
    const auto q = ReadQueries(StrCat(name, ".q"), *parts.q, k->shape);
    if (!q.ok()) {
      return q.status();
    }
    layer.q = *q;
  }
  return layer;
}

}  // namespace

absl::StatusOr<Trace> Trace::Open(const std::string& path) {
  auto file = MappedFile::Open(path);
  if (!file.ok()) {
    return file.status();
  }
  auto trace = Parse(file->bytes());
  if (!trace.ok()) {
    return InContext(path, trace.status());
  }
  trace->file_ = *std::move(file);
  return trace;
}

absl::StatusOr<Trace> Trace::Parse(std::string_view bytes) {
  const auto file = Safetensors::Parse(bytes);
  if (!file.ok()) {
    return file.status();
  }
  Trace trace;
  KVSHRINK_RETURN_IF_ERROR(trace.Read(*file));
  return trace;
}

absl::Status Trace::Read(const Safetensors& file) {
  metadata_ = file.metadata();
  std::map<uint32_t, Parts> parts;
  for (const auto& [name, tensor] : file.tensors()) {
    const auto parsed = ParseName(name);
    if (!parsed) {
      continue;  // a trace may carry more than we need
    }
    if (parsed->first > kMaxLayer) {
      return BadTrace(name, parsed->first, StrCat("layers must be 0..", kMaxLayer));
    }
    Parts& layer = parts[parsed->first];
    (parsed->second == 'k' ? layer.k : parsed->second == 'v' ? layer.v : layer.q) = &tensor;
  }
  if (parts.empty()) {
    return BadTrace("layer.{i}.k", "missing", "a trace needs at least one layer");
  }
  for (const auto& [number, tensors] : parts) {
    const auto layer = ReadLayer(number, tensors);
    if (!layer.ok()) {
      return layer.status();
    }
    if (!layers_.empty() && layer->k.shape.tokens != tokens()) {
      return BadTrace(StrCat("layer.", number, ".k.shape[0]"), layer->k.shape.tokens,
                      StrCat("must be ", tokens(), " as in the first layer"));
    }
    layers_.push_back(*layer);
  }
  if (const auto found = metadata_.find("scale"); found != metadata_.end()) {
    double value = 0;
    if (!absl::SimpleAtod(found->second, &value) || !std::isfinite(value) || value <= 0) {
      return BadTrace("scale", StrCat("'", found->second.substr(0, 64), "'"),
                      "must be a positive number");
    }
    scale_ = value;
  }
  if (const auto found = metadata_.find("raw_tokens"); found != metadata_.end()) {
    uint32_t value = 0;
    if (!absl::SimpleAtoi(found->second, &value)) {
      return BadTrace("raw_tokens", StrCat("'", found->second.substr(0, 64), "'"),
                      "must be a number of tokens");
    }
    raw_tokens_ = value;
  }
  auto ropes = LayerRopes::FromMetadata(metadata_);
  if (!ropes.ok()) {
    return absl::DataLossError(StrCat("trace metadata rope_*: ", ropes.status().message()));
  }
  ropes_ = *std::move(ropes);
  return absl::OkStatus();
}

const TraceLayer* Trace::layer(uint32_t number) const {
  const auto found = std::lower_bound(
      layers_.begin(), layers_.end(), number,
      [](const TraceLayer& layer, uint32_t wanted) { return layer.layer < wanted; });
  return found != layers_.end() && found->layer == number ? &*found : nullptr;
}

uint64_t Trace::entries() const {
  uint64_t entries = 0;
  for (const TraceLayer& layer : layers_) {
    entries += layer.entries();
  }
  return entries;
}

uint64_t Trace::raw_bytes() const {
  uint64_t bytes = 0;
  for (const TraceLayer& layer : layers_) {
    bytes += layer.entries() * DTypeBytes(layer.k.dtype);
  }
  return bytes;
}

ConstTensor TokenRange(const ConstTensor& tensor, uint32_t first, uint32_t count) {
  ConstTensor range = tensor;
  range.data += tensor.layout.Offset(first, 0) * DTypeBytes(tensor.dtype);
  range.shape.tokens = count;
  return range;
}

std::optional<ConstTensor> TokenRange(const std::optional<ConstTensor>& tensor, uint32_t first,
                                      uint32_t count) {
  return tensor ? std::optional(TokenRange(*tensor, first, count)) : std::nullopt;
}

std::string_view SafetensorsDtype(DType dtype) {
  switch (dtype) {
    case DType::kFp32:
      return "F32";
    case DType::kFp16:
      return "F16";
    case DType::kBf16:
      return "BF16";
    case DType::kFp8E4m3:
      return "F8_E4M3";
  }
  return "F16";
}

std::optional<DType> DTypeFromSafetensors(std::string_view name) {
  for (const DType dtype : {DType::kFp32, DType::kFp16, DType::kBf16, DType::kFp8E4m3}) {
    if (SafetensorsDtype(dtype) == name) {
      return dtype;
    }
  }
  return std::nullopt;
}

Metadata WithoutQueries(Metadata metadata) {
  metadata.erase("q_tokens");
  return metadata;
}

absl::StatusOr<TraceWriter> TraceWriter::Create(const std::string& path, const Metadata& metadata,
                                                std::span<const Layer> layers) {
  std::vector<SafetensorsWriter::Tensor> tensors;
  for (const Layer& layer : layers) {
    const std::vector<uint64_t> shape = {layer.shape.tokens, layer.shape.kv_heads,
                                         layer.shape.head_dim};
    const std::string dtype(SafetensorsDtype(layer.dtype));
    tensors.push_back({StrCat("layer.", layer.layer, ".k"), dtype, shape});
    if (!layer.keys_only) {
      tensors.push_back({StrCat("layer.", layer.layer, ".v"), dtype, shape});
    }
  }
  auto writer = SafetensorsWriter::Create(path, metadata, std::move(tensors));
  if (!writer.ok()) {
    return writer.status();
  }
  return TraceWriter(*std::move(writer), {layers.begin(), layers.end()});
}

TraceWriter::TraceWriter(SafetensorsWriter writer, std::vector<Layer> layers)
    : writer_(std::move(writer)), layers_(std::move(layers)) {
  size_t tensors = 0;
  for (const Layer& layer : layers_) {
    first_tensor_.push_back(tensors);
    tensors += layer.keys_only ? 1 : 2;
  }
}

absl::Status TraceWriter::Write(size_t index, uint32_t first_token, std::string_view values) {
  if (index >= layers_.size()) {
    return absl::OutOfRangeError(StrCat("layer ", index, " of ", layers_.size()));
  }
  const Layer& layer = layers_[index];
  const uint64_t offset =
      uint64_t{first_token} * layer.shape.kv_heads * layer.shape.head_dim * DTypeBytes(layer.dtype);
  if (layer.keys_only) {
    return writer_.Write(first_tensor_[index], offset, values);
  }
  const size_t half = values.size() / 2;
  KVSHRINK_RETURN_IF_ERROR(writer_.Write(first_tensor_[index], offset, values.substr(0, half)));
  return writer_.Write(first_tensor_[index] + 1, offset, values.substr(half));
}

}  // namespace kvshrink::client

// Traces: keys, values and queries of a model run, in a safetensors file.
//   layer.{i}.k, layer.{i}.v  [tokens, kv_heads, head_dim]        F16, BF16, F32 or F8_E4M3; a
//   layer may have keys only (MLA)
//   layer.{i}.q               [tail tokens, q_heads, head_dim]    optional: queries of the last
//   tokens
// Layer numbers may be sparse. Metadata `scale`, `raw_tokens` and `rope_*` (layer_ropes.h) are
// honoured; everything is kept as it is.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kvshrink/block.h"
#include "kvshrink/client/file_io.h"
#include "kvshrink/client/layer_ropes.h"
#include "kvshrink/client/safetensors.h"

namespace kvshrink::client {

// Queries of the last `tokens` tokens of the trace: the position of query i is trace tokens -
// tokens + i.
struct TraceQueries {
  const std::byte* data = nullptr;  // [tokens, q_heads, head_dim], packed
  DType dtype = DType::kFp16;
  uint32_t tokens = 0;
  uint32_t q_heads = 0;
};

struct TraceLayer {
  uint32_t layer = 0;
  ConstTensor k;  // [T,H,D], a view of the file
  std::optional<ConstTensor> v;
  std::optional<TraceQueries> q;

  uint64_t entries() const { return (v ? 2 : 1) * uint64_t{k.shape.entries()}; }  // of K and V
};

class Trace {
 public:
  // Maps the file; nothing is copied. Errors: those of MappedFile, DATA_LOSS naming the field.
  static absl::StatusOr<Trace> Open(const std::string& path);
  // A view of bytes that outlive the trace.
  static absl::StatusOr<Trace> Parse(std::string_view bytes);

  const Metadata& metadata() const { return metadata_; }
  std::span<const TraceLayer> layers() const { return layers_; }  // ascending, at least one
  uint32_t tokens() const { return layers_[0].k.shape.tokens; }   // the same in all layers
  // Null when the trace has no such layer.
  const TraceLayer* layer(uint32_t number) const;
  // Of q.k; absent: 1 / sqrt(head_dim).
  std::optional<double> scale() const { return scale_; }
  std::optional<uint32_t> raw_tokens() const { return raw_tokens_; }
  // What the keys carry; empty when the trace doesn't say.
  const LayerRopes& ropes() const { return ropes_; }
  uint64_t entries() const;    // of K and V of all layers
  uint64_t raw_bytes() const;  // in the trace's dtypes

 private:
  absl::Status Read(const Safetensors& file);

  MappedFile file_;
  Metadata metadata_;
  std::vector<TraceLayer> layers_;
  std::optional<double> scale_;
  std::optional<uint32_t> raw_tokens_;
  LayerRopes ropes_;
};

// Rows [first, first + count) of a [T,H,D] tensor, as a tensor of its own.
ConstTensor TokenRange(const ConstTensor& tensor, uint32_t first, uint32_t count);
std::optional<ConstTensor> TokenRange(const std::optional<ConstTensor>& tensor, uint32_t first,
                                      uint32_t count);

// "F16", "BF16", "F32", "F8_E4M3".
std::string_view SafetensorsDtype(DType dtype);
std::optional<DType> DTypeFromSafetensors(std::string_view name);

// Metadata of a trace of which only K and V are left: without what describes its queries' tensors.
Metadata WithoutQueries(Metadata metadata);

// Writes K and V of a run of tokens, layer by layer in parts, as a trace.
class TraceWriter {
 public:
  struct Layer {
    uint32_t layer = 0;
    DType dtype = DType::kFp16;
    TensorShape shape;  // tokens of the whole run
    bool keys_only = false;

    uint64_t entries() const { return (keys_only ? 1 : 2) * uint64_t{shape.entries()}; }
  };

  static absl::StatusOr<TraceWriter> Create(const std::string& path, const Metadata& metadata,
                                            std::span<const Layer> layers);
  // `values`: packed [T,H,D] rows of K from token `first_token` of the run on, then as many of V
  // where the layer has it; `index` counts the layers as given.
  absl::Status Write(size_t index, uint32_t first_token, std::string_view values);
  absl::Status Finish() { return writer_.Finish(); }

 private:
  TraceWriter(SafetensorsWriter writer, std::vector<Layer> layers);

  SafetensorsWriter writer_;
  std::vector<Layer> layers_;
  std::vector<size_t> first_tensor_;  // K of each layer
};

}  // namespace kvshrink::client

// Traces to shards and back: a run of tokens is cut into chunks, each layer of a chunk is one
// shard.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kvshrink/client/kvs_file.h"
#include "kvshrink/client/trace.h"
#include "kvshrink/codec.h"

namespace kvshrink::client {

inline constexpr uint32_t kDefaultChunkTokens = 256;

struct CodingSettings {
  Profile profile = kDefaultProfile;
  uint32_t chunk_tokens = kDefaultChunkTokens;
  // Absent: what the trace says, else kDefaultRawTokens.
  std::optional<uint32_t> raw_tokens;
  double max_relative_error = 0;  // 0 = no bound
  double bits_per_entry = 0;      // rate target of every shard; 0 = the profile's own rate
  bool fixed_size = false;        // shards padded to the target's size
  // What K carries, by the trace's layer numbers. Absent: what the trace says.
  std::optional<LayerRopes> ropes;
  // So many first and so many last layers of the trace take the profile `raw`, and no rate target.
  uint32_t raw_layers = 0;
  // That profile kvs2c codes with; may be null for others.
  std::shared_ptr<const Basis> basis;
};

uint32_t RawTokens(const CodingSettings& settings, const Trace& trace);
const LayerRopes& RopesOf(const CodingSettings& settings, const Trace& trace);

// Whether a layer, by its place among `layers`, is one of settings.raw_layers.
bool IsRawLayer(const CodingSettings& settings, size_t place, size_t layers);

struct TokenSpan {
  uint32_t first_token = 0;
  uint32_t tokens = 0;
};

// Chunks of `chunk_tokens` (at least 1); the last may be shorter.
std::vector<TokenSpan> ChunksOf(uint32_t tokens, uint32_t chunk_tokens);

// A coded shard and where it belongs.
struct CodedShard {
  uint32_t chunk = 0;
  size_t place = 0;  // of the layer in the trace
  TokenSpan span;
  std::string bytes;
  ShardReport report;
  double seconds = 0;  // spent in the encoder
};

// What becomes of a layer's number in its shards.
enum class LayerNumbers {
  kOfTrace,  // as in the trace, which may be sparse
  kByPlace,  // 0, 1, ... as the service wants them
};

// All shards of a trace, by chunk, then layer. Stops at the first error, of the encoder
// (INVALID_ARGUMENT naming the field) or of `visit`.
absl::Status EncodeTrace(const Backend& backend, const Trace& trace, const CodingSettings& settings,
                         LayerNumbers numbers,
                         const std::function<absl::Status(CodedShard)>& visit);

// Codes a trace into a .kvs file with the trace's metadata and the `raw_tokens` it was coded with.
// The sum of the shards' reports. `progress`, may be null, gets the raw bytes done after each
// shard.
using ProgressFn = std::function<void(uint64_t raw_bytes)>;
struct EncodedFile {
  ShardReport report;
  uint64_t file_bytes = 0;
  uint32_t shards = 0;
  double seconds = 0;  // spent in the encoder
};
absl::StatusOr<EncodedFile> EncodeFile(const Backend& backend, const Trace& trace,
                                       const CodingSettings& settings, const std::string& path,
                                       const ProgressFn& progress);

// Decodes a .kvs file into a trace of keys and values, with the file's metadata; positions start at
// the file's first token. `dtype`: absent = each layer's own. `basis`: that of kvs2c shards, may be
// null for others.
struct DecodedFile {
  uint64_t raw_bytes = 0;  // in the dtype written
  uint64_t entries = 0;
  uint32_t tokens = 0;
  double seconds = 0;  // spent in the decoder
};
absl::StatusOr<DecodedFile> DecodeFile(const Backend& backend, const KvsFile& file,
                                       std::optional<DType> dtype, const std::string& path,
                                       const ProgressFn& progress, const Basis* basis = nullptr);

// K, then V where there is V, of a shard, packed [T,H,D] each.
absl::StatusOr<std::string> DecodeToBytes(const Backend& backend, const Shard& shard,
                                          DecodeForm form, DType dtype,
                                          const Basis* basis = nullptr);

// Adds up reports, for totals of a run.
void AddReport(const ShardReport& report, ShardReport* total);

}  // namespace kvshrink::client

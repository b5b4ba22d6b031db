// Answers of Get, checked against each other and written to a file.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kvshrink/client/kvs_file.h"
#include "kvshrink/client/remote.h"
#include "kvshrink/client/trace.h"
#include "kvshrink/codec.h"

namespace kvshrink::cli {

// What a run of chunks looks like, by place of the layer.
struct RunShape {
  uint32_t chunks = 0;
  uint32_t tokens = 0;
  std::vector<client::TraceWriter::Layer> layers;  // in the stored dtype, numbered by place
};

// From a server's description of the first chunk. Errors: DATA_LOSS naming the field.
absl::StatusOr<RunShape> ReadRunShape(const v1::StatResponse& first_chunk, uint32_t chunks,
                                      uint64_t tokens);

// Where fetched shards go; none, a .kvs file or a trace.
class FetchOutput {
 public:
  virtual ~FetchOutput() = default;
  virtual bool wants_values() const { return false; }  // else the shard's bytes
  // `body`: the shard, or K then V (where there is V) as `wants_values`; `first_token` counts from
  // the run's start.
  virtual absl::Status Add(size_t place, uint32_t first_token, std::string_view body) = 0;
  virtual absl::Status Finish() = 0;
};

std::unique_ptr<FetchOutput> MakeNoOutput();
absl::StatusOr<std::unique_ptr<FetchOutput>> MakeKvsOutput(const std::string& path,
                                                           const RunShape& shape,
                                                           const client::Metadata& metadata,
                                                           bool previews);
// `numbers` are the layers' numbers in the file, by place.
absl::StatusOr<std::unique_ptr<FetchOutput>> MakeTraceOutput(const std::string& path,
                                                             const RunShape& shape,
                                                             const client::Metadata& metadata,
                                                             const std::vector<uint32_t>& numbers);

// Sum of squared error and of squares of values against a trace.
struct Comparison {
  double k_error_energy = 0, k_energy = 0;
  double v_error_energy = 0, v_energy = 0;

  // `values`: K then V (where the layer has it) of `dtype`, packed, of the layer's tokens from
  // `first_token` on.
  void Add(const client::TraceLayer& layer, uint32_t first_token, uint32_t tokens, DType dtype,
           std::string_view values);
};

}  // namespace kvshrink::cli

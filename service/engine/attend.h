// One attention request over the shards of a layer, shard by shard, with what its answer holds.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "kvshrink/attention.h"

namespace kvshrink::service {

struct AttendTask {
  AttentionParams params;
  uint32_t head_dim = 0;
  bool output = false;            // partial attention; else scores
  uint32_t top_k = 0;             // scores: 0 = all, else at most `tokens`
  uint64_t tokens = 0;            // of all shards together
  uint32_t max_shard_tokens = 0;  // of the largest shard

  uint64_t rows() const { return uint64_t{params.queries} * params.q_heads; }
  uint64_t query_values() const { return rows() * head_dim; }
  // Bytes of the answer's body.
  uint64_t answer_bytes() const;
  // Bytes that the work holds beside queries, answer and the shard.
  uint64_t scratch_bytes() const;
};

// Collects an answer. Not thread-safe.
class AttendSink {
 public:
  virtual ~AttendSink() = default;

  // Adds the next shard, in sequence order. `q` is fp32 [queries, q_heads, head_dim], finite;
  // `basis` that of the shard, or null.
  virtual absl::Status Add(const Backend& backend, const Shard& shard, const float* q,
                           const Basis* basis) = 0;
  // The answer's body as AttendAnswer describes it; the sink is spent.
  virtual std::string Take() = 0;
};

std::unique_ptr<AttendSink> MakeAttendSink(const AttendTask& task);

}  // namespace kvshrink::service

// What a profile costs and what it keeps, on a captured trace.
#pragma once

#include <cstdint>
#include <optional>

#include "absl/status/statusor.h"
#include "kvshrink/client/attention_metrics.h"
#include "kvshrink/client/trace.h"
#include "kvshrink/client/trace_codec.h"
#include "kvshrink/codec.h"

namespace kvshrink::client {

// K or V of all blocks of a trace; no entries for the V of a trace of keys only.
struct KindEvaluation {
  uint64_t bytes = 0;  // of its sections, and half of what both kinds share
  uint64_t entries = 0;
  double error_energy = 0;  // sum of squared error of what a decoder gives, raw rows included
  double energy = 0;        // sum of squares of the original
  double max_block_rel_error = 0;
  uint32_t raw_blocks = 0;  // kept exactly
  double mean_rank = 0;     // of the blocks that are not

  double bits_per_entry() const;
  double rel_mse() const;
};

struct Evaluation {
  KindEvaluation k, v;
  uint64_t shard_bytes = 0;                  // all of them: headers, index, checksums, raw rows
  std::optional<AttentionErrors> attention;  // absent when the trace has no queries
  double encode_seconds = 0;
  double decode_seconds = 0;

  double bits_per_entry() const;
  // 2 bytes per entry, whatever the dtype, so that traces compare.
  double encode_mb_per_s() const;
  double decode_mb_per_s() const;
};

// Codes and decodes the trace in chunks and compares. Errors are measured on decoded values alone.
// Blocks with values that aren't finite are kept exactly and left out of the energies. Errors:
// INVALID_ARGUMENT naming the field; DATA_LOSS when a shard just made doesn't decode.
absl::StatusOr<Evaluation> Evaluate(const Backend& backend, const Trace& trace,
                                    const CodingSettings& settings, int threads,
                                    const ProgressFn& progress);

// Of q.k: the trace's, else 1 / sqrt(head_dim).
double SoftmaxScale(const Trace& trace, const TraceLayer& layer);

// The layer's queries, at the end of the trace. `floats` holds their values and must outlive the
// result. `layer.q` must be there.
Queries QueriesOf(const TraceLayer& layer, std::vector<float>* floats);

}  // namespace kvshrink::client

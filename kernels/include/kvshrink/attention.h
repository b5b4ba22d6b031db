// Attention of a layer's queries against shards, computed on the compressed form: queries are
// projected on each block's channel factors and rotated once, keys and values are never expanded to
// their own basis.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "kvshrink/codec.h"
#include "kvshrink/shard.h"

namespace kvshrink {

inline constexpr uint32_t kMaxQueries = 4096;
inline constexpr uint32_t kMaxQHeads = 1024;

struct AttentionParams {
  uint32_t queries = 0;  // Q: query tokens
  uint32_t q_heads =
      0;              // a multiple of kv_heads; query head h reads kv head h / (q_heads / kv_heads)
  float scale = 0;    // of q.k; 0 = 1 / sqrt(head_dim)
  float softcap = 0;  // logit = softcap * tanh(logit / softcap); 0 = none
  // Position of the first query in the sequence; query i sees keys at positions <= first_query + i.
  // Negative: sees all.
  int64_t first_query = -1;
  // Sliding window: sees only the last `window` positions up to and with its own. 0 = all. Needs
  // first_query >= 0.
  uint32_t window = 0;
};

// Errors: INVALID_ARGUMENT naming the field.
absl::Status ValidateAttention(const AttentionParams& params, const ShardHeader& header);

// `basis` of what follows: that of a kvs2c shard; others take null as well. Errors as of
// DecodeShard.

// logits[query][q_head][token of the shard], fp32, row-major; -inf where the query doesn't see the
// key. `q` is fp32 [Q, q_heads, d].
absl::Status AttentionScores(const Backend& backend, const Shard& shard,
                             const AttentionParams& params, const float* q, float* logits,
                             const Basis* basis = nullptr);

// Partial attention over one or more shards of a layer, mergeable exactly: output and log-sum-exp
// per query and head.
class AttentionAccumulator {
 public:
  // Shape of the outputs; params and head_dim as validated.
  AttentionAccumulator(const AttentionParams& params, uint32_t head_dim);

  // Adds the tokens of a shard. `q` as above. FAILED_PRECONDITION when the shard has keys only.
  absl::Status Add(const Backend& backend, const Shard& shard, const float* q,
                   const Basis* basis = nullptr);

  // output [Q, q_heads, d] = softmax-weighted values over what was added; 0 where no key was seen.
  std::span<const float> output() const { return output_; }
  // lse [Q, q_heads]: log of the sum of exp(logit), natural; -inf where no key was seen.
  std::span<const float> lse() const { return lse_; }

 private:
  AttentionParams params_;
  uint32_t head_dim_;
  std::vector<float> output_;
  std::vector<float> lse_;
};

// Merges (output_b, lse_b) into (output_a, lse_a): attention over the union of two disjoint sets of
// keys. rows = Q * q_heads.
void MergeAttention(size_t rows, size_t head_dim, const float* output_b, const float* lse_b,
                    float* output_a, float* lse_a);

}  // namespace kvshrink

// What coding does to attention: exact causal attention over a layer's keys and values, and the
// change when coded ones take their place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kvshrink/block.h"

namespace kvshrink::client {

// Queries of a layer and where they stand. Query head h reads kv head h / (q_heads / kv_heads).
struct Queries {
  std::span<const float> values;  // [tokens, q_heads, head_dim]
  uint32_t tokens = 0;
  uint32_t q_heads = 0;
  // Position of the first one among the keys: query i sees the keys 0 .. first_position + i.
  uint32_t first_position = 0;
};

// Keys and values of a layer, [tokens, kv_heads, head_dim] each; no values where the layer has
// none.
struct KeysValues {
  TensorShape shape;
  std::span<const float> k;
  std::span<const float> v;
};

// Sums over queries, heads and keys, so that layers can be added up.
struct AttentionErrors {
  double logit_error_energy = 0;  // of the change of q.k x scale, over all queries and keys
  uint64_t logits = 0;
  double output_error_energy = 0;  // of the change of the attention outputs
  double output_energy = 0;        // of the exact ones
  uint64_t outputs = 0;            // queries x heads of layers that have values
  double kl_nats = 0;              // sum of KL(p, p^) of the attention weights
  uint64_t rows = 0;               // queries x heads

  void Add(const AttentionErrors& other);
  double logit_rmse() const;
  double attention_rel_error() const;
  double attention_kl() const;  // mean over queries and heads
};

// Compares attention over `exact` with attention over `coded`, whose shapes are equal. In double
// precision; values that aren't finite make the sums NaN. threads = 0: one per core; the result
// doesn't depend on it. Errors: INVALID_ARGUMENT naming the field.
absl::StatusOr<AttentionErrors> MeasureAttention(const KeysValues& exact, const KeysValues& coded,
                                                 const Queries& queries, double scale, int threads);

// Exact attention, row-major.
struct ExactAttention {
  // [queries, q_heads, tokens]; -inf where the query doesn't see the key.
  std::vector<double> logits;
  std::vector<double> output;  // [queries, q_heads, head_dim]; empty without values
};
absl::StatusOr<ExactAttention> ComputeAttention(const KeysValues& exact, const Queries& queries,
                                                double scale, int threads);

}  // namespace kvshrink::client

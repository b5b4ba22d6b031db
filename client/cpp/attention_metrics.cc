#include "kvshrink/client/attention_metrics.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kvshrink/client/parallel.h"
#include "kvshrink/client/status.h"

namespace kvshrink::client {
namespace {

// Keys and values of one kv head. Keys lie channel by channel, so that the loop over tokens is the
// inner one.
struct Head {
  size_t tokens = 0;
  size_t head_dim = 0;
  std::vector<double> keys;    // [head_dim, tokens]
  std::vector<double> values;  // [tokens, head_dim]; empty when the layer has none
};

Head ReadHead(const KeysValues& kv, size_t head) {
  const size_t tokens = kv.shape.tokens;
  const size_t head_dim = kv.shape.head_dim;
  Head result{tokens, head_dim, std::vector<double>(tokens * head_dim),
              std::vector<double>(kv.v.empty() ? 0 : tokens * head_dim)};
  for (size_t token = 0; token < tokens; ++token) {
    const size_t row = (token * kv.shape.kv_heads + head) * head_dim;
    for (size_t channel = 0; channel < head_dim; ++channel) {
      result.keys[channel * tokens + token] = static_cast<double>(kv.k[row + channel]);
    }
    if (!kv.v.empty()) {
      std::copy_n(kv.v.begin() + static_cast<std::ptrdiff_t>(row), head_dim,
                  result.values.begin() + static_cast<std::ptrdiff_t>(token * head_dim));
    }
  }
  return result;
}

// One query: its logits with all keys of a head, its attention over the visible first ones. Buffers
// are kept from query to query.
struct Row {
  std::vector<double> logits;   // of all tokens
  std::vector<double> weights;  // of the visible ones
  std::vector<double> output;
  double log_sum = 0;  // log of the sum of exp(logit)

  void Compute(const Head& head, const float* query, double scale, size_t visible) {
    logits.assign(head.tokens, 0);
    for (size_t channel = 0; channel < head.head_dim; ++channel) {
      const double factor = static_cast<double>(query[channel]) * scale;
      const double* keys = head.keys.data() + channel * head.tokens;
      for (size_t token = 0; token < head.tokens; ++token) {
        logits[token] += factor * keys[token];
      }
    }
    const double top =
        *std::max_element(logits.begin(), logits.begin() + static_cast<std::ptrdiff_t>(visible));
    weights.resize(visible);
    double sum = 0;
    for (size_t token = 0; token < visible; ++token) {
      weights[token] = std::exp(logits[token] - top);
      sum += weights[token];
    }
    log_sum = top + std::log(sum);
    for (double& weight : weights) {
      weight /= sum;
    }
    output.assign(head.values.empty() ? 0 : head.head_dim, 0);
    for (size_t token = 0; token < visible && !head.values.empty(); ++token) {
      const double* values = head.values.data() + token * head.head_dim;
      for (size_t channel = 0; channel < head.head_dim; ++channel) {
        output[channel] += weights[token] * values[channel];
      }
    }
  }
};

void AddRow(const Row& exact, const Row& coded, AttentionErrors* errors) {
  for (size_t token = 0; token < exact.logits.size(); ++token) {
    const double change = coded.logits[token] - exact.logits[token];
    errors->logit_error_energy += change * change;
  }
  for (size_t token = 0; token < exact.weights.size(); ++token) {
    const double log_ratio =
        (exact.logits[token] - exact.log_sum) - (coded.logits[token] - coded.log_sum);
    errors->kl_nats += exact.weights[token] * log_ratio;
  }
  for (size_t channel = 0; channel < exact.output.size(); ++channel) {
    const double change = coded.output[channel] - exact.output[channel];
    errors->output_error_energy += change * change;
    errors->output_energy += exact.output[channel] * exact.output[channel];
  }
  errors->logits += exact.logits.size();
  errors->rows += 1;
  errors->outputs += exact.output.empty() ? 0 : 1;
}

absl::Status CheckKeysValues(const KeysValues& kv) {
  KVSHRINK_RETURN_IF_ERROR(ValidateShape({1, kv.shape.kv_heads, kv.shape.head_dim}));
  if (kv.shape.tokens < 1) {
    return BadArgument("tokens", kv.shape.tokens, "must be at least 1");
  }
  for (const size_t size : {kv.k.size(), kv.v.empty() ? kv.k.size() : kv.v.size()}) {
    if (size != kv.shape.entries()) {
      return BadArgument("values", size, StrCat("the shape has ", kv.shape.entries()));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckQueries(const Queries& queries, const TensorShape& shape) {
  if (queries.q_heads < 1 || queries.q_heads % shape.kv_heads != 0) {
    return BadArgument("q_heads", queries.q_heads,
                       StrCat("must be a multiple of the ", shape.kv_heads, " kv heads"));
  }
  if (queries.tokens < 1 || queries.tokens > shape.tokens ||
      queries.first_position > shape.tokens - queries.tokens) {
    return BadArgument(
        "first_position", queries.first_position,
        StrCat("with ", queries.tokens, " queries must stay within the ", shape.tokens, " tokens"));
  }
  const size_t values = size_t{queries.tokens} * queries.q_heads * shape.head_dim;
  if (queries.values.size() != values) {
    return BadArgument("queries", queries.values.size(), StrCat("their shape has ", values));
  }
  return absl::OkStatus();
}

}  // namespace

void AttentionErrors::Add(const AttentionErrors& other) {
  logit_error_energy += other.logit_error_energy;
  logits += other.logits;
  output_error_energy += other.output_error_energy;
  output_energy += other.output_energy;
  outputs += other.outputs;
  kl_nats += other.kl_nats;
  rows += other.rows;
}

double AttentionErrors::logit_rmse() const {
  return logits == 0 ? 0 : std::sqrt(logit_error_energy / static_cast<double>(logits));
}

double AttentionErrors::attention_rel_error() const {
  // Kept as it is for NaN.
  return output_energy == 0 ? output_error_energy : output_error_energy / output_energy;
}

double AttentionErrors::attention_kl() const {
  return rows == 0 ? 0 : kl_nats / static_cast<double>(rows);
}

absl::StatusOr<AttentionErrors> MeasureAttention(const KeysValues& exact, const KeysValues& coded,
                                                 const Queries& queries, double scale,
                                                 int threads) {
  KVSHRINK_RETURN_IF_ERROR(CheckKeysValues(exact));
  KVSHRINK_RETURN_IF_ERROR(CheckKeysValues(coded));
  KVSHRINK_RETURN_IF_ERROR(CheckQueries(queries, exact.shape));
  if (exact.shape != coded.shape || exact.v.size() != coded.v.size()) {
    return BadArgument("shape", "another one than that of the exact tensors", "must be the same");
  }
  const size_t group = queries.q_heads / exact.shape.kv_heads;
  std::vector<AttentionErrors> of_head(exact.shape.kv_heads);
  ParallelFor(of_head.size(), threads, [&](size_t head) {
    const Head exact_head = ReadHead(exact, head);
    const Head coded_head = ReadHead(coded, head);
    Row exact_row;
    Row coded_row;
    for (size_t query = 0; query < queries.tokens; ++query) {
      for (size_t q_head = head * group; q_head < (head + 1) * group; ++q_head) {
        const float* values =
            queries.values.data() + (query * queries.q_heads + q_head) * exact.shape.head_dim;
        const size_t visible = queries.first_position + query + 1;
        exact_row.Compute(exact_head, values, scale, visible);
        coded_row.Compute(coded_head, values, scale, visible);
        AddRow(exact_row, coded_row, &of_head[head]);
      }
    }
  });
  AttentionErrors errors;
  for (const AttentionErrors& head : of_head) {
    errors.Add(head);
  }
  return errors;
}

absl::StatusOr<ExactAttention> ComputeAttention(const KeysValues& exact, const Queries& queries,
                                                double scale, int threads) {
  KVSHRINK_RETURN_IF_ERROR(CheckKeysValues(exact));
  KVSHRINK_RETURN_IF_ERROR(CheckQueries(queries, exact.shape));
  const size_t tokens = exact.shape.tokens;
  const size_t head_dim = exact.shape.head_dim;
  const size_t rows = size_t{queries.tokens} * queries.q_heads;
  const size_t group = queries.q_heads / exact.shape.kv_heads;
  ExactAttention result;
  result.logits.assign(rows * tokens, -std::numeric_limits<double>::infinity());
  result.output.resize(exact.v.empty() ? 0 : rows * head_dim);
  ParallelFor(exact.shape.kv_heads, threads, [&](size_t head) {
    const Head keys_values = ReadHead(exact, head);
    Row row;
    for (size_t query = 0; query < queries.tokens; ++query) {
      for (size_t q_head = head * group; q_head < (head + 1) * group; ++q_head) {
        const size_t place = query * queries.q_heads + q_head;
        row.Compute(keys_values, queries.values.data() + place * head_dim, scale,
                    queries.first_position + query + 1);
        std::copy_n(row.logits.begin(), row.weights.size(), result.logits.data() + place * tokens);
        std::copy(row.output.begin(), row.output.end(),
                  result.output.begin() + static_cast<std::ptrdiff_t>(place * row.output.size()));
      }
    }
  });
  return result;
}

}  // namespace kvshrink::client

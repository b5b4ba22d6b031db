#include "kvshrink/client/evaluate.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <utility>
#include <vector>

#include "kvshrink/client/status.h"
#include "kvshrink/client/values.h"

namespace kvshrink::client {
namespace {

constexpr double kRawBytesPerEntry = 2;
constexpr double kBytesPerMb = 1e6;

double MbPerSecond(uint64_t entries, double seconds) {
  return seconds > 0 ? static_cast<double>(entries) * kRawBytesPerEntry / kBytesPerMb / seconds : 0;
}

// A layer as it was and as a decoder gives it; without V where it has keys only.
struct LayerValues {
  std::vector<float> k, v, coded_k, coded_v;
};

// Adds the error of one block, given by its place in [tokens, kv_heads, head_dim] arrays.
void AddBlock(const TensorShape& shape, const BlockView& block, uint32_t first_token,
              const std::vector<float>& exact, const std::vector<float>& coded,
              KindEvaluation* result) {
  double error_energy = 0;
  double energy = 0;
  for (uint32_t row = 0; row < block.rows; ++row) {
    const size_t token = size_t{first_token} + block.first_row + row;
    const size_t offset = (token * shape.kv_heads + block.head) * shape.head_dim;
    for (size_t channel = 0; channel < shape.head_dim; ++channel) {
      const auto value = static_cast<double>(exact[offset + channel]);
      const double change = static_cast<double>(coded[offset + channel]) - value;
      error_energy += change * change;
      energy += value * value;
    }
  }
  if (block.code == BlockCode::kRaw) {
    ++result->raw_blocks;
  }
  // A block with a NaN or an infinity is kept as it is; it has no energy to compare with.
  if (!std::isfinite(energy)) {
    return;
  }
  result->error_energy += error_energy;
  result->energy += energy;
  if (energy > 0) {
    result->max_block_rel_error = std::max(result->max_block_rel_error, error_energy / energy);
  }
}

// Sizes of the parts of a shard, K and V apart.
void AddBytes(const Shard& shard, Evaluation* result) {
  uint64_t of_kind[2] = {};
  for (const BlockView& block : shard.blocks()) {
    of_kind[block.kind == Kind::kKey ? 0 : 1] += block.bytes();
  }
  // Header and index have an even number of bytes.
  const bool keys_only = shard.header().keys_only;
  const uint64_t of_values = keys_only ? 0 : shard.shared_bytes() / 2;
  result->k.bytes += of_kind[0] + shard.shared_bytes() - of_values;
  result->v.bytes += of_kind[1] + of_values;
  result->shard_bytes += shard.bytes();
  result->k.entries += shard.header().shape.entries();
  result->v.entries += keys_only ? 0 : shard.header().shape.entries();
}

class Evaluator {
 public:
  Evaluator(const Backend& backend, const Trace& trace, const Basis* basis)
      : backend_(backend), basis_(basis) {
    for (const TraceLayer& layer : trace.layers()) {
      LayerValues values{ToFloats(layer.k), {}, {}, {}};
      if (layer.v) {
        values.v = ToFloats(*layer.v);
      }
      values.coded_k.resize(values.k.size());
      values.coded_v.resize(values.v.size());
      layers_.push_back(std::move(values));
    }
  }

  absl::Status AddShard(const CodedShard& coded) {
    auto shard = Shard::Parse(coded.bytes);
    if (!shard.ok()) {
      return InContext("a shard just made", shard.status());
    }
    const TensorShape& shape = shard->header().shape;
    LayerValues& layer = layers_[coded.place];
    const size_t offset = size_t{coded.span.first_token} * shape.kv_heads * shape.head_dim;
    const auto out = [&](std::vector<float>* values) {
      return MutableTensor{reinterpret_cast<std::byte*>(values->data() + offset), DType::kFp32,
                           shape, LayoutThd(shape)};
    };
    const auto start = std::chrono::steady_clock::now();
    KVSHRINK_RETURN_IF_ERROR(
        DecodeShard(backend_, *shard, DecodeForm::kFull, out(&layer.coded_k),
                    layer.v.empty() ? std::nullopt : std::optional(out(&layer.coded_v)), basis_));
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    result_.decode_seconds += elapsed.count();
    result_.encode_seconds += coded.seconds;
    AddBytes(*shard, &result_);
    for (const BlockView& block : shard->blocks()) {
      const bool key = block.kind == Kind::kKey;
      AddBlock(shape, block, coded.span.first_token, key ? layer.k : layer.v,
               key ? layer.coded_k : layer.coded_v, key ? &result_.k : &result_.v);
      if (block.code != BlockCode::kRaw) {
        (key ? rank_sum_k_ : rank_sum_v_) += block.rank;
        ++(key ? ranked_k_ : ranked_v_);
      }
    }
    return absl::OkStatus();
  }

  absl::Status AddAttention(const Trace& trace, int threads) {
    for (size_t place = 0; place < layers_.size(); ++place) {
      const TraceLayer& layer = trace.layers()[place];
      if (!layer.q) {
        continue;
      }
      std::vector<float> floats;
      const Queries queries = QueriesOf(layer, &floats);
      const LayerValues& values = layers_[place];
      KVSHRINK_ASSIGN_OR_RETURN(const AttentionErrors errors,
                                MeasureAttention({layer.k.shape, values.k, values.v},
                                                 {layer.k.shape, values.coded_k, values.coded_v},
                                                 queries, SoftmaxScale(trace, layer), threads));
      if (!result_.attention) {
        result_.attention.emplace();
      }
      result_.attention->Add(errors);
    }
    return absl::OkStatus();
  }

  Evaluation Finish() {
    result_.k.mean_rank = ranked_k_ > 0 ? static_cast<double>(rank_sum_k_) / ranked_k_ : 0;
    result_.v.mean_rank = ranked_v_ > 0 ? static_cast<double>(rank_sum_v_) / ranked_v_ : 0;
    return result_;
  }

 private:
  const Backend& backend_;
  const Basis* basis_;
  std::vector<LayerValues> layers_;
  uint64_t rank_sum_k_ = 0, rank_sum_v_ = 0;
  uint32_t ranked_k_ = 0, ranked_v_ = 0;
  Evaluation result_;
};

}  // namespace

double KindEvaluation::bits_per_entry() const {
  return entries > 0 ? 8 * static_cast<double>(bytes) / static_cast<double>(entries) : 0;
}

double KindEvaluation::rel_mse() const { return energy > 0 ? error_energy / energy : 0; }

double Evaluation::bits_per_entry() const {
  const uint64_t entries = k.entries + v.entries;
  return entries > 0 ? 8 * static_cast<double>(shard_bytes) / static_cast<double>(entries) : 0;
}

double Evaluation::encode_mb_per_s() const {
  return MbPerSecond(k.entries + v.entries, encode_seconds);
}

double Evaluation::decode_mb_per_s() const {
  return MbPerSecond(k.entries + v.entries, decode_seconds);
}

double SoftmaxScale(const Trace& trace, const TraceLayer& layer) {
  return trace.scale().value_or(1 / std::sqrt(static_cast<double>(layer.k.shape.head_dim)));
}

Queries QueriesOf(const TraceLayer& layer, std::vector<float>* floats) {
  const TraceQueries& q = *layer.q;
  floats->resize(size_t{q.tokens} * q.q_heads * layer.k.shape.head_dim);
  ToFloats(q.dtype, q.data, floats->size(), floats->data());
  return {*floats, q.tokens, q.q_heads, layer.k.shape.tokens - q.tokens};
}

absl::StatusOr<Evaluation> Evaluate(const Backend& backend, const Trace& trace,
                                    const CodingSettings& settings, int threads,
                                    const ProgressFn& progress) {
  Evaluator evaluator(backend, trace, settings.basis.get());
  uint64_t raw_bytes = 0;
  KVSHRINK_RETURN_IF_ERROR(EncodeTrace(backend, trace, settings, LayerNumbers::kOfTrace,
                                       [&](const CodedShard& coded) -> absl::Status {
                                         KVSHRINK_RETURN_IF_ERROR(evaluator.AddShard(coded));
                                         raw_bytes += coded.report.raw_bytes;
                                         if (progress) {
                                           progress(raw_bytes);
                                         }
                                         return absl::OkStatus();
                                       }));
  KVSHRINK_RETURN_IF_ERROR(evaluator.AddAttention(trace, threads));
  return evaluator.Finish();
}

}  // namespace kvshrink::client

// Attention on the compressed form.
#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <limits>

#include "format/layout.h"
#include "gather.h"
#include "key_space.h"
#include "kvshrink/attention.h"
#include "kvshrink/error.h"
#include "stages/rotate.h"

namespace kvshrink {
namespace {

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Map = Eigen::Map<const Matrix>;

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// The queries of one kv head: row i * group + g is query i of the group's query head g.
// Keys that are raw meet them as they are, coded ones in the space where keys are coded.
struct HeadQueries {
  Matrix plain;
  Matrix coded;
  Matrix rotated;
};

uint32_t GroupSize(const AttentionParams& params, uint32_t kv_heads) {
  return params.q_heads / kv_heads;
}

HeadQueries QueriesOf(const AttentionParams& params, const ShardHeader& header,
                      const KeySpace& key_space, uint32_t head, const float* q) {
  const uint32_t group = GroupSize(params, header.shape.kv_heads);
  const uint32_t d = header.shape.head_dim;
  HeadQueries queries;
  queries.plain.resize(Eigen::Index{params.queries} * group, d);
  for (uint32_t i = 0; i < params.queries; ++i) {
    const float* rows = q + (size_t{i} * params.q_heads + size_t{head} * group) * d;
    std::copy(rows, rows + size_t{group} * d, queries.plain.row(Eigen::Index{i} * group).data());
  }
  queries.coded = queries.plain;
  if (key_space.weighs() && !key_space.has_rope()) {
    key_space.Unweigh(head, static_cast<uint32_t>(queries.coded.rows()), queries.coded.data());
  }
  queries.rotated = queries.coded;
  const stages::Rotation<float> rotation(stages::kRowSeed, d);
  for (Eigen::Index i = 0; i < queries.rotated.rows(); ++i) {
    rotation.Apply(queries.rotated.row(i).data());
  }
  return queries;
}

// A block ready for products: its first rows exact, the others as token_factors channel_factors +
// residual.
struct OpenBlock {
  Matrix raw;
  Matrix token, channel, residual;
  bool rotated = false;
  bool decoded = false;  // the residual is the rows themselves
};

// Keys of a basis alone stay as coded: a metric is the same for all tokens, so queries take it
// once. Keys under a rotary embedding are turned in their own basis, so they are decoded: once for
// all queries, where turning each query back token by token would take as long for every one of
// them.
absl::StatusOr<OpenBlock> Open(const Backend& backend, const Shard& shard, const BlockView& block,
                               const KeySpace& key_space) {
  const ShardHeader& header = shard.header();
  const uint32_t d = header.shape.head_dim;
  OpenBlock open;
  open.raw.resize(block.raw_rows, d);
  ToFloats(block.raw.data(), header.dtype, static_cast<size_t>(open.raw.size()), open.raw.data());
  if (block.code == BlockCode::kRaw) {
    open.residual.resize(block.coded_rows(), d);
    ToFloats(block.codes.data(), header.dtype, static_cast<size_t>(open.residual.size()),
             open.residual.data());
    open.token.resize(block.coded_rows(), 0);
    open.channel.resize(0, d);
    open.decoded = true;
    return open;
  }
  const Family family = GetProfileInfo(header.profile).family;
  if (block.kind == Kind::kKey && key_space.has_rope()) {
    open.residual.resize(block.coded_rows(), d);
    KVSHRINK_RETURN_IF_ERROR(
        backend.DecodeBlock(family, block, d, DecodeForm::kFull, open.residual.data()));
    key_space.Leave(block, open.residual.data());
    open.decoded = true;
    open.token.resize(block.coded_rows(), 0);
    open.channel.resize(0, d);
    return open;
  }
  Backend::UnpackedBlock unpacked;
  KVSHRINK_RETURN_IF_ERROR(backend.UnpackBlock(family, block, d, DecodeForm::kFull, &unpacked));
  open.token = Map(unpacked.token_factors.data(), block.coded_rows(), unpacked.rank);
  open.channel = Map(unpacked.channel_factors.data(), unpacked.rank, d);
  open.residual = Map(unpacked.residual.data(), block.coded_rows(), d);
  open.rotated = unpacked.rotated;
  return open;
}

// q k for all rows of the block: queries x rows.
Matrix Products(const OpenBlock& keys, const HeadQueries& queries) {
  Matrix products(queries.plain.rows(), keys.raw.rows() + keys.residual.rows());
  products.leftCols(keys.raw.rows()) = queries.plain * keys.raw.transpose();
  auto coded = products.rightCols(keys.residual.rows());
  const Matrix& own = keys.decoded ? queries.plain : keys.rotated ? queries.rotated : queries.coded;
  coded = own * keys.residual.transpose();
  if (keys.token.cols() > 0) {
    coded += (queries.coded * keys.channel.transpose()) * keys.token.transpose();
  }
  return products;
}

bool Sees(const AttentionParams& params, uint32_t query, int64_t position) {
  if (params.first_query < 0) {
    return true;
  }
  const int64_t own = params.first_query + query;
  return position <= own && (params.window == 0 || position > own - int64_t{params.window});
}

// Scale, soft-cap and mask, in place.
void ToLogits(const AttentionParams& params, uint32_t group, uint32_t d, int64_t first_position,
              Matrix* products) {
  const float scale = params.scale != 0 ? params.scale : 1 / std::sqrt(static_cast<float>(d));
  *products *= scale;
  if (params.softcap > 0) {
    *products = params.softcap * (products->array() / params.softcap).tanh();
  }
  for (Eigen::Index i = 0; i < products->rows(); ++i) {
    for (Eigen::Index t = 0; t < products->cols(); ++t) {
      if (!Sees(params, static_cast<uint32_t>(i) / group, first_position + t)) {
        (*products)(i, t) = kMinusInfinity;
      }
    }
  }
}

absl::StatusOr<Matrix> BlockLogits(const Backend& backend, const Shard& shard,
                                   const AttentionParams& params, const HeadQueries& queries,
                                   const KeySpace& key_space, const BlockView& block) {
  absl::StatusOr<OpenBlock> keys = Open(backend, shard, block, key_space);
  KVSHRINK_RETURN_IF_ERROR(keys.status());
  Matrix logits = Products(*keys, queries);
  const ShardHeader& header = shard.header();
  ToLogits(params, GroupSize(params, header.shape.kv_heads), header.shape.head_dim,
           int64_t{header.first_token} + block.first_row, &logits);
  return logits;
}

// Running softmax of one kv head's queries over blocks.
struct HeadState {
  Eigen::VectorXf largest, sum;
  Matrix plain, rotated;  // weighted values, in their own and in the rotated basis

  HeadState(Eigen::Index rows, uint32_t d)
      : largest(Eigen::VectorXf::Constant(rows, kMinusInfinity)),
        sum(Eigen::VectorXf::Zero(rows)),
        plain(Matrix::Zero(rows, d)),
        rotated(Matrix::Zero(rows, d)) {}

  // Turns logits into weights relative to the new running maximum; rescales what is there.
  void Advance(Matrix* logits) {
    for (Eigen::Index i = 0; i < logits->rows(); ++i) {
      const float next = std::max(largest(i), logits->row(i).maxCoeff());
      if (next == kMinusInfinity) {
        logits->row(i).setZero();
        continue;
      }
      const float shrink = std::exp(largest(i) - next);
      largest(i) = next;
      sum(i) *= shrink;
      plain.row(i) *= shrink;
      rotated.row(i) *= shrink;
      logits->row(i) = (logits->row(i).array() - next).exp();
      sum(i) += logits->row(i).sum();
    }
  }

  void AddValues(const OpenBlock& values, const Matrix& weights) {
    const auto coded = weights.rightCols(values.residual.rows());
    plain += weights.leftCols(values.raw.rows()) * values.raw;
    (values.rotated ? rotated : plain) += coded * values.residual;
    if (values.token.cols() > 0) {
      plain += (coded * values.token) * values.channel;
    }
  }
};

}  // namespace

absl::Status ValidateAttention(const AttentionParams& params, const ShardHeader& header) {
  if (params.queries < 1 || params.queries > kMaxQueries) {
    return BadArgument("queries", params.queries, StrCat("must be 1..", kMaxQueries));
  }
  if (params.q_heads < 1 || params.q_heads > kMaxQHeads ||
      params.q_heads % header.shape.kv_heads != 0) {
    return BadArgument("q_heads", params.q_heads,
                       StrCat("must be a multiple of kv_heads (", header.shape.kv_heads,
                              "), at most ", kMaxQHeads));
  }
  if (!std::isfinite(params.scale)) {
    return BadArgument("scale", params.scale, "must be finite");
  }
  if (!(params.softcap >= 0) || !std::isfinite(params.softcap)) {
    return BadArgument("softcap", params.softcap, "must be finite and not negative");
  }
  if (params.first_query > int64_t{kMaxPosition}) {
    return BadArgument("first_query", params.first_query, StrCat("must be at most ", kMaxPosition));
  }
  if (params.window > 0 && params.first_query < 0) {
    return BadArgument("window", params.window, "needs first_query");
  }
  return absl::OkStatus();
}

absl::Status AttentionScores(const Backend& backend, const Shard& shard,
                             const AttentionParams& params, const float* q, float* logits,
                             const Basis* basis) {
  const ShardHeader& header = shard.header();
  KVSHRINK_RETURN_IF_ERROR(ValidateAttention(params, header));
  if (shard.preview()) {
    return BadArgument("shard", "preview", "attention needs the whole shard");
  }
  const uint32_t group = GroupSize(params, header.shape.kv_heads);
  KVSHRINK_RETURN_IF_ERROR(CheckBasisOf(header, basis));
  const KeySpace key_space(header, basis);
  for (uint32_t head = 0; head < header.shape.kv_heads; ++head) {
    const HeadQueries queries = QueriesOf(params, header, key_space, head, q);
    for (uint32_t b = 0; b < header.blocks_per_head(); ++b) {
      const BlockView& block = shard.block(Kind::kKey, head, b);
      const absl::StatusOr<Matrix> part =
          BlockLogits(backend, shard, params, queries, key_space, block);
      KVSHRINK_RETURN_IF_ERROR(part.status());
      for (Eigen::Index i = 0; i < part->rows(); ++i) {
        const size_t query = static_cast<size_t>(i) / group;
        const size_t q_head = size_t{head} * group + static_cast<size_t>(i) % group;
        float* row =
            logits + (query * params.q_heads + q_head) * header.shape.tokens + block.first_row;
        std::copy(part->row(i).data(), part->row(i).data() + part->cols(), row);
      }
    }
  }
  return absl::OkStatus();
}

AttentionAccumulator::AttentionAccumulator(const AttentionParams& params, uint32_t head_dim)
    : params_(params),
      head_dim_(head_dim),
      output_(size_t{params.queries} * params.q_heads * head_dim),
      lse_(size_t{params.queries} * params.q_heads, kMinusInfinity) {}

absl::Status AttentionAccumulator::Add(const Backend& backend, const Shard& shard, const float* q,
                                       const Basis* basis) {
  const ShardHeader& header = shard.header();
  KVSHRINK_RETURN_IF_ERROR(ValidateAttention(params_, header));
  if (header.shape.head_dim != head_dim_) {
    return BadArgument("head_dim", head_dim_, StrCat("the shard's is ", header.shape.head_dim));
  }
  if (header.keys_only) {
    return absl::FailedPreconditionError(
        "the shard has keys only: it gives attention scores, no output");
  }
  if (shard.preview()) {
    return BadArgument("shard", "preview", "attention needs the whole shard");
  }
  std::vector<float> output(output_.size());
  std::vector<float> lse(lse_.size());
  const uint32_t group = GroupSize(params_, header.shape.kv_heads);
  const stages::Rotation<float> rotation(stages::kRowSeed, head_dim_);
  KVSHRINK_RETURN_IF_ERROR(CheckBasisOf(header, basis));
  const KeySpace key_space(header, basis);
  for (uint32_t head = 0; head < header.shape.kv_heads; ++head) {
    const HeadQueries queries = QueriesOf(params_, header, key_space, head, q);
    HeadState state(queries.plain.rows(), head_dim_);
    for (uint32_t b = 0; b < header.blocks_per_head(); ++b) {
      absl::StatusOr<Matrix> weights = BlockLogits(backend, shard, params_, queries, key_space,
                                                   shard.block(Kind::kKey, head, b));
      KVSHRINK_RETURN_IF_ERROR(weights.status());
      const absl::StatusOr<OpenBlock> values =
          Open(backend, shard, shard.block(Kind::kValue, head, b), key_space);
      KVSHRINK_RETURN_IF_ERROR(values.status());
      state.Advance(&*weights);
      state.AddValues(*values, *weights);
    }
    for (Eigen::Index i = 0; i < state.plain.rows(); ++i) {
      const size_t row = static_cast<size_t>(i) / group * params_.q_heads + size_t{head} * group +
                         static_cast<size_t>(i) % group;
      rotation.ApplyInverse(state.rotated.row(i).data());
      const bool any = state.sum(i) > 0;
      lse[row] = any ? state.largest(i) + std::log(state.sum(i)) : kMinusInfinity;
      Eigen::Map<Eigen::RowVectorXf> out(output.data() + row * head_dim_, head_dim_);
      out = any ? Eigen::RowVectorXf((state.plain.row(i) + state.rotated.row(i)) / state.sum(i))
                : Eigen::RowVectorXf(Eigen::RowVectorXf::Zero(head_dim_));
    }
  }
  MergeAttention(lse_.size(), head_dim_, output.data(), lse.data(), output_.data(), lse_.data());
  return absl::OkStatus();
}

void MergeAttention(size_t rows, size_t head_dim, const float* output_b, const float* lse_b,
                    float* output_a, float* lse_a) {
  for (size_t row = 0; row < rows; ++row) {
    const float largest = std::max(lse_a[row], lse_b[row]);
    if (lse_b[row] == kMinusInfinity) {
      continue;
    }
    const float weight_a = std::exp(lse_a[row] - largest);
    const float weight_b = std::exp(lse_b[row] - largest);
    const float sum = weight_a + weight_b;
    for (size_t c = row * head_dim; c < (row + 1) * head_dim; ++c) {
      output_a[c] = (weight_a * output_a[c] + weight_b * output_b[c]) / sum;
    }
    lse_a[row] = largest + std::log(sum);
  }
}

}  // namespace kvshrink

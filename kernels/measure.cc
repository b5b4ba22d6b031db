// A decoder's own view of a shard's error.
#include <algorithm>
#include <cmath>

#include "gather.h"
#include "kvshrink/codec.h"
#include "kvshrink/error.h"

namespace kvshrink {
namespace {

struct BlockError {
  double error_energy = 0;
  double energy = 0;
};

// `decoded` holds all tokens of the block's tensor, fp32 [T, H, D].
BlockError Compare(const ConstTensor& source, const ConstTensor& decoded, const BlockView& block) {
  const size_t d = source.shape.head_dim;
  std::vector<float> original(block.rows * d);
  std::vector<float> after(block.rows * d);
  const RowRange range{block.head, block.first_row, block.rows};
  GatherRows(source, range, original.data());
  GatherRows(decoded, range, after.data());
  BlockError result;
  for (size_t i = 0; i < original.size(); ++i) {
    const double value = static_cast<double>(original[i]);
    const double difference = value - static_cast<double>(after[i]);
    result.energy += value * value;
    result.error_energy += difference * difference;
  }
  return std::isfinite(result.energy) ? result : BlockError{};
}

void AddBlock(const BlockView& block, const BlockError& error, KindReport* kind) {
  kind->bytes += block.bytes();
  ++kind->blocks;
  if (block.code == BlockCode::kRaw) {
    ++kind->raw_blocks;
  } else {
    ++kind->rank_histogram[block.rank];
  }
  kind->energy += error.energy;
  kind->error_energy += error.error_energy;
  if (error.energy > 0) {
    kind->max_block_relative_error =
        std::max(kind->max_block_relative_error, error.error_energy / error.energy);
  }
}

}  // namespace

absl::StatusOr<ShardReport> MeasureShard(const Backend& backend, const Shard& shard,
                                         const ConstTensor& k, const ConstTensor& v) {
  const TensorShape& shape = shard.header().shape;
  for (const ConstTensor* tensor : {&k, &v}) {
    if (tensor->shape != shape) {
      return BadArgument("tokens * kv_heads * head_dim", tensor->shape.entries(),
                         "the source must have the shard's shape");
    }
  }
  std::vector<float> decoded(2 * shape.entries());
  const TensorLayout layout = LayoutThd(shape);
  auto* bytes = reinterpret_cast<std::byte*>(decoded.data());
  const size_t half = shape.entries() * sizeof(float);
  KVSHRINK_RETURN_IF_ERROR(DecodeShard(backend, shard, DecodeForm::kFull,
                                       {bytes, DType::kFp32, shape, layout},
                                       {bytes + half, DType::kFp32, shape, layout}));
  std::vector<BlockError> errors(shard.blocks().size());
  backend.ForEach(errors.size(), [&](size_t i) {
    const BlockView& block = shard.blocks()[i];
    const bool key = block.kind == Kind::kKey;
    errors[i] =
        Compare(key ? k : v, {key ? bytes : bytes + half, DType::kFp32, shape, layout}, block);
  });
  ShardReport report;
  report.raw_bytes = shard.header().raw_bytes();
  report.encoded_bytes = shard.bytes();
  report.entries = 2 * shape.entries();
  report.k.bytes = shard.shared_bytes() - shard.shared_bytes() / 2;
  report.v.bytes = shard.shared_bytes() / 2;
  for (size_t i = 0; i < errors.size(); ++i) {
    const BlockView& block = shard.blocks()[i];
    AddBlock(block, errors[i], block.kind == Kind::kKey ? &report.k : &report.v);
  }
  return report;
}

}  // namespace kvshrink

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
                                         const ConstTensor& k, const std::optional<ConstTensor>& v,
                                         const Basis* basis) {
  const ShardHeader& header = shard.header();
  const TensorShape& shape = header.shape;
  if (v.has_value() == header.keys_only) {
    return BadArgument("v", v.has_value() ? "given" : "absent",
                       v.has_value() ? "the shard has keys only" : "the shard has values");
  }
  for (const ConstTensor* tensor : {&k, v.has_value() ? &*v : &k}) {
    if (tensor->shape != shape) {
      return BadArgument("tokens * kv_heads * head_dim", tensor->shape.entries(),
                         "the source must have the shard's shape");
    }
  }
  std::vector<float> decoded(header.entries());
  const auto half_of = [&](Kind kind) {
    float* first = decoded.data() + (kind == Kind::kKey ? 0 : shape.entries());
    return MutableTensor{reinterpret_cast<std::byte*>(first), DType::kFp32, shape,
                         LayoutThd(shape)};
  };
  KVSHRINK_RETURN_IF_ERROR(
      DecodeShard(backend, shard, DecodeForm::kFull, half_of(Kind::kKey),
                  v.has_value() ? std::optional(half_of(Kind::kValue)) : std::nullopt, basis));
  std::vector<BlockError> errors(shard.blocks().size());
  backend.ForEach(errors.size(), [&](size_t i) {
    const BlockView& block = shard.blocks()[i];
    const MutableTensor half = half_of(block.kind);
    errors[i] = Compare(block.kind == Kind::kKey ? k : *v,
                        {half.data, half.dtype, half.shape, half.layout}, block);
  });
  ShardReport report;
  report.raw_bytes = shard.header().raw_bytes();
  report.encoded_bytes = shard.bytes();
  report.k.entries = shape.entries();
  report.v.entries = header.entries() - shape.entries();
  report.AddShared(shard.shared_bytes());
  for (size_t i = 0; i < errors.size(); ++i) {
    const BlockView& block = shard.blocks()[i];
    AddBlock(block, errors[i], block.kind == Kind::kKey ? &report.k : &report.v);
  }
  return report;
}

}  // namespace kvshrink

// Shards to tensors.
#include <mutex>

#include "gather.h"
#include "key_space.h"
#include "kvshrink/codec.h"
#include "kvshrink/error.h"

namespace kvshrink {
namespace {

absl::Status CheckOutput(std::string_view name, const MutableTensor& tensor,
                         const TensorShape& shape) {
  if (tensor.shape != shape) {
    return BadArgument(StrCat(name, ".shape"),
                       StrCat("[", tensor.shape.tokens, ",", tensor.shape.kv_heads, ",",
                              tensor.shape.head_dim, "]"),
                       "must be the shape of the shard");
  }
  if (!LayoutExtent(tensor.shape, tensor.layout).has_value()) {
    return BadArgument(StrCat(name, ".layout"), tensor.layout.token_stride,
                       "its strides reach too far");
  }
  if (tensor.data == nullptr) {
    return BadArgument(StrCat(name, ".data"), "null", "must point at the tensor");
  }
  return absl::OkStatus();
}

// Runs status = body(i) for all blocks of a shard; gives the first error in block order.
absl::Status ForEachBlock(const Backend& backend, const Shard& shard,
                          absl::FunctionRef<absl::Status(const BlockView&)> body) {
  std::mutex mutex;
  absl::Status first;
  uint32_t first_index = shard.header().blocks();
  backend.ForEach(shard.blocks().size(), [&](size_t i) {
    absl::Status status = body(shard.blocks()[i]);
    if (!status.ok()) {
      const std::lock_guard lock(mutex);
      if (i < first_index) {
        first_index = static_cast<uint32_t>(i);
        first = std::move(status);
      }
    }
  });
  return first;
}

absl::Status DecodeInto(const Backend& backend, const Shard& shard, const KeySpace& key_space,
                        DecodeForm form, const BlockView& block, const MutableTensor& tensor) {
  const ShardHeader& header = shard.header();
  const RowRange coded{block.head, block.first_row + block.raw_rows, block.coded_rows()};
  ScatterRowBytes(block.raw, header.dtype, {block.head, block.first_row, block.raw_rows}, tensor);
  if (block.code == BlockCode::kRaw && form == DecodeForm::kFull) {
    ScatterRowBytes(block.codes, header.dtype, coded, tensor);
    return absl::OkStatus();
  }
  static thread_local std::vector<float> rows;
  rows.assign(size_t{coded.count} * header.shape.head_dim, 0.0F);
  if (block.code != BlockCode::kRaw) {
    const Family family = GetProfileInfo(header.profile).family;
    KVSHRINK_RETURN_IF_ERROR(
        backend.DecodeBlock(family, block, header.shape.head_dim, form, rows.data()));
    if (block.kind == Kind::kKey) {
      key_space.Leave(block, rows.data());
    }
  }
  ScatterRows(rows.data(), coded, tensor);
  return absl::OkStatus();
}

}  // namespace

absl::Status DecodeShard(const Backend& backend, const Shard& shard, DecodeForm form,
                         const MutableTensor& k, const std::optional<MutableTensor>& v,
                         const Basis* basis) {
  KVSHRINK_RETURN_IF_ERROR(CheckOutput("k", k, shard.header().shape));
  if (v.has_value() == shard.header().keys_only) {
    return BadArgument("v", v.has_value() ? "given" : "absent",
                       v.has_value() ? "the shard has keys only" : "the shard has values");
  }
  if (v.has_value()) {
    KVSHRINK_RETURN_IF_ERROR(CheckOutput("v", *v, shard.header().shape));
  }
  if (form == DecodeForm::kFull && shard.preview()) {
    return BadArgument("form", "full", "the shard is a preview: only its low-rank part is there");
  }
  KVSHRINK_RETURN_IF_ERROR(CheckBasisOf(shard.header(), basis));
  const KeySpace key_space(shard.header(), basis);
  return ForEachBlock(backend, shard, [&](const BlockView& block) {
    return DecodeInto(backend, shard, key_space, form, block, block.kind == Kind::kKey ? k : *v);
  });
}

}  // namespace kvshrink

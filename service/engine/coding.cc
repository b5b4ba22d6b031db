#include "service/engine/coding.h"

#include <cstring>

#include "absl/strings/str_cat.h"
#include "kvshrink/error.h"

namespace kvshrink::service {
namespace {

void CopyHeads(const ConstTensor& from, std::span<const uint32_t> heads, const MutableTensor& to) {
  const size_t size = DTypeBytes(from.dtype);
  const size_t row_bytes = size * from.shape.head_dim;
  for (uint32_t token = 0; token < from.shape.tokens; ++token) {
    for (uint32_t i = 0; i < heads.size(); ++i) {
      std::memcpy(to.data + to.layout.Offset(token, i) * size,
                  from.data + from.layout.Offset(token, heads[i]) * size, row_bytes);
    }
  }
}

}  // namespace

ShardReport ReportOf(const Shard& shard) {
  ShardReport report;
  report.raw_bytes = shard.header().raw_bytes();
  report.encoded_bytes = shard.bytes();
  report.k.entries = shard.header().shape.entries();
  report.v.entries = shard.header().entries() - report.k.entries;
  for (const BlockView& block : shard.blocks()) {
    KindReport& kind = block.kind == Kind::kKey ? report.k : report.v;
    kind.bytes += block.bytes();
    ++kind.blocks;
    if (block.code == BlockCode::kRaw) {
      ++kind.raw_blocks;
    } else {
      ++kind.rank_histogram[block.rank];
    }
  }
  report.AddShared(shard.shared_bytes());
  return report;
}

absl::Status CheckBlocks(const Backend& backend, const Shard& shard) {
  const ShardHeader& header = shard.header();
  const Family family = GetProfileInfo(header.profile).family;
  Backend::UnpackedBlock unpacked;
  for (size_t i = 0; i < shard.blocks().size(); ++i) {
    const BlockView& block = shard.blocks()[i];
    if (block.code == BlockCode::kRaw) {
      continue;  // exact values; any bits are legal
    }
    absl::Status status =
        backend.UnpackBlock(family, block, header.shape.head_dim, DecodeForm::kFull, &unpacked);
    if (!status.ok()) {
      return absl::Status(status.code(), absl::StrCat("block ", i, ": ", status.message()));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> DecodeToBytes(const Backend& backend, const Shard& shard,
                                          DecodeForm form, const TensorPlan& plan,
                                          std::span<const uint32_t> kv_heads, const Basis* basis) {
  const TensorShape& shape = shard.header().shape;
  std::string body(plan.bytes, '\0');
  std::byte* data = reinterpret_cast<std::byte*>(body.data());
  if (kv_heads.empty()) {
    KVSHRINK_RETURN_IF_ERROR(DecodeShard(backend, shard, form, plan.K(data), plan.V(data), basis));
    return body;
  }
  if (kv_heads.back() >= shape.kv_heads) {
    return BadArgument("kv_heads", kv_heads.back(),
                       absl::StrCat("the shard has ", shape.kv_heads, " kv heads"));
  }
  std::string all(PackedBytes(shape, plan.dtype, plan.keys_only), '\0');
  std::byte* k = reinterpret_cast<std::byte*>(all.data());
  std::byte* v = k + shape.entries() * DTypeBytes(plan.dtype);
  const TensorLayout packed = LayoutThd(shape);
  const MutableTensor v_out{v, plan.dtype, shape, packed};
  KVSHRINK_RETURN_IF_ERROR(DecodeShard(backend, shard, form, {k, plan.dtype, shape, packed},
                                       plan.keys_only ? std::nullopt : std::optional(v_out),
                                       basis));
  CopyHeads({k, plan.dtype, shape, packed}, kv_heads, plan.K(data));
  if (!plan.keys_only) {
    CopyHeads({v, plan.dtype, shape, packed}, kv_heads, *plan.V(data));
  }
  return body;
}

}  // namespace kvshrink::service

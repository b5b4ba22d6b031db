#include "service/engine/coding.h"

#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "Eigen/Core"
#include "absl/strings/str_cat.h"
#include "kvshrink/error.h"

namespace kvshrink::service {
namespace {

// The values of fp8 e4m3 (OCP: no infinity, 7F and FF are NaN).
std::array<float, 256> MakeFp8Table() {
  std::array<float, 256> table{};
  for (int byte = 0; byte < 256; ++byte) {
    const int exponent = (byte >> 3) & 15;
    const int mantissa = byte & 7;
    float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
    if ((byte & 0x7F) == 0x7F) {
      value = std::numeric_limits<float>::quiet_NaN();
    }
    table[static_cast<size_t>(byte)] = (byte & 0x80) != 0 ? -value : value;
  }
  return table;
}

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
  report.entries = 2 * uint64_t{shard.header().shape.entries()};
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
  report.k.bytes += shard.shared_bytes() / 2;
  report.v.bytes += shard.shared_bytes() - shard.shared_bytes() / 2;
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
                                          std::span<const uint32_t> kv_heads) {
  const TensorShape& shape = shard.header().shape;
  std::string body(plan.bytes, '\0');
  std::byte* data = reinterpret_cast<std::byte*>(body.data());
  if (kv_heads.empty()) {
    KVSHRINK_RETURN_IF_ERROR(DecodeShard(backend, shard, form, plan.K(data), plan.V(data)));
    return body;
  }
  if (kv_heads.back() >= shape.kv_heads) {
    return BadArgument("kv_heads", kv_heads.back(),
                       absl::StrCat("the shard has ", shape.kv_heads, " kv heads"));
  }
  std::string all(PackedBytes(shape, plan.dtype), '\0');
  std::byte* k = reinterpret_cast<std::byte*>(all.data());
  std::byte* v = k + all.size() / 2;
  const TensorLayout packed = LayoutThd(shape);
  KVSHRINK_RETURN_IF_ERROR(DecodeShard(backend, shard, form, {k, plan.dtype, shape, packed},
                                       {v, plan.dtype, shape, packed}));
  CopyHeads({k, plan.dtype, shape, packed}, kv_heads, plan.K(data));
  CopyHeads({v, plan.dtype, shape, packed}, kv_heads, plan.V(data));
  return body;
}

void ToFloats(DType dtype, std::string_view bytes, size_t count, float* out) {
  switch (dtype) {
    case DType::kFp32:
      std::memcpy(out, bytes.data(), count * sizeof(float));
      return;
    case DType::kFp8E4m3: {
      static const std::array<float, 256> table = MakeFp8Table();
      for (size_t i = 0; i < count; ++i) {
        out[i] = table[static_cast<uint8_t>(bytes[i])];
      }
      return;
    }
    case DType::kFp16:
    case DType::kBf16:
      for (size_t i = 0; i < count; ++i) {
        uint16_t bits = 0;
        std::memcpy(&bits, bytes.data() + i * sizeof(bits), sizeof(bits));
        out[i] = dtype == DType::kBf16
                     ? std::bit_cast<float>(uint32_t{bits} << 16)
                     : Eigen::half_impl::half_to_float(Eigen::half_impl::raw_uint16_to_half(bits));
      }
      return;
  }
}

}  // namespace kvshrink::service

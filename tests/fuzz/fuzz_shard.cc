// Any bytes as a shard: parsed, decoded and attended, as they are and with checksums made right, so
// that damage reaches the decoders.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "format/layout.h"
#include "kvshrink/attention.h"
#include "kvshrink/codec.h"

namespace {

using namespace kvshrink;

constexpr size_t kMostEntries = size_t{1}
                                << 16;  // keeps a run fast; the checks before don't depend on it

void Require(bool holds) {
  if (!holds) {
    std::abort();
  }
}

void DecodeAndAttend(const Backend& backend, const Shard& shard) {
  const TensorShape& shape = shard.header().shape;
  if (shape.entries() > kMostEntries) {
    return;
  }
  const bool keys_only = shard.header().keys_only;
  std::vector<float> k(shape.entries());
  std::vector<float> v(keys_only ? 0 : shape.entries());
  const MutableTensor k_out{reinterpret_cast<std::byte*>(k.data()), DType::kFp32, shape,
                            LayoutThd(shape)};
  const MutableTensor v_out{reinterpret_cast<std::byte*>(v.data()), DType::kFp32, shape,
                            LayoutThd(shape)};
  const DecodeForm form = shard.preview() ? DecodeForm::kLowRank : DecodeForm::kFull;
  const absl::Status status =
      DecodeShard(backend, shard, form, k_out, keys_only ? std::nullopt : std::optional(v_out));
  if (shard.header().extensions.basis.has_value()) {  // there is none to give
    Require(status.code() == absl::StatusCode::kFailedPrecondition);
    return;
  }
  Require(status.ok() || status.code() == absl::StatusCode::kDataLoss);
  if (!status.ok() || shard.preview()) {
    return;
  }
  const AttentionParams params{1, shape.kv_heads, 0, 0, -1, 0};
  const std::vector<float> q(size_t{shape.kv_heads} * shape.head_dim, 0.5F);
  if (keys_only) {
    std::vector<float> logits(size_t{shape.kv_heads} * shape.tokens);
    Require(AttentionScores(backend, shard, params, q.data(), logits.data()).ok());
    return;
  }
  AttentionAccumulator accumulator(params, shape.head_dim);
  Require(accumulator.Add(backend, shard, q.data()).ok());
}

// Checksums as they should be, as far as the header's sizes stay inside the bytes.
void Sign(std::string* bytes) {
  namespace at = format::offset;
  auto* data = reinterpret_cast<uint8_t*>(bytes->data());
  const size_t size = bytes->size();
  if (size < format::kHeaderBytes) {
    return;
  }
  const uint64_t heads = format::LoadLittle<uint16_t>(data + at::kKvHeads);
  const uint64_t kinds =
      format::LoadLittle<uint16_t>(data + at::kFlags) == format::kFlagKeysOnly ? 1 : 2;
  const uint64_t blocks =
      kinds * heads * ((uint64_t{format::LoadLittle<uint32_t>(data + at::kTokens)} + 127) / 128);
  size_t begin = format::kHeaderBytes;
  const auto sign = [&](uint64_t length, size_t field) {
    if (length <= size - begin) {
      format::StoreLittle(format::SectionChecksum(data + begin, length), data + field);
      begin += length;
    }
  };
  sign(format::LoadLittle<uint32_t>(data + at::kExtBytes) + blocks * format::kIndexEntryBytes,
       at::kIndexChecksum);
  sign(format::LoadLittle<uint64_t>(data + at::kLowBytes), at::kLowChecksum);
  sign(format::LoadLittle<uint64_t>(data + at::kScalesBytes), at::kScalesChecksum);
  sign(format::LoadLittle<uint64_t>(data + at::kCodesBytes), at::kCodesChecksum);
  format::StoreLittle(format::HeaderChecksum(data, at::kHeaderChecksum),
                      data + at::kHeaderChecksum);
}

void Read(const std::string& bytes) {
  static const auto* backend = MakeCpuBackend(1).release();
  for (const Extent extent : {Extent::kWhole, Extent::kAllowPreview}) {
    const auto shard = Shard::Parse(bytes, extent);
    if (shard.ok()) {
      DecodeAndAttend(*backend, *shard);
    } else {
      Require(shard.status().code() == absl::StatusCode::kDataLoss);
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string bytes(reinterpret_cast<const char*>(data), size);
  Read(bytes);
  Sign(&bytes);
  Read(bytes);
  return 0;
}

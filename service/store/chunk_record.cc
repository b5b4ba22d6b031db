#include "chunk_record.h"

#include <xxhash.h>

#include "byte_code.h"
#include "errors.h"
#include "limits.h"

namespace kvshrink::store {
namespace {

constexpr std::string_view kMagic = "KVC1";
constexpr size_t kHeaderBytes = 24;
constexpr size_t kShardBytes = 48;
constexpr size_t kSealBytes = 8;
constexpr uint16_t kFlagKeysOnly = 1;

// The seal depends on the key through the seed.
uint64_t Seal(std::string_view chunk_key, std::string_view bytes) {
  return XXH64(bytes.data(), bytes.size(), Checksum(chunk_key));
}

void AppendShard(std::string* out, const ShardRecord& shard) {
  const ShardMeta& meta = shard.meta;
  AppendLittleEndian(out, meta.profile);
  AppendLittleEndian(out, meta.dtype);
  AppendLittleEndian(out, meta.keys_only ? kFlagKeysOnly : uint16_t{0});
  AppendLittleEndian(out, meta.tokens);
  AppendLittleEndian(out, meta.kv_heads);
  AppendLittleEndian(out, meta.head_dim);
  AppendLittleEndian(out, meta.first_token);
  AppendLittleEndian(out, uint32_t{0});
  AppendLittleEndian(out, meta.raw_bytes);
  AppendLittleEndian(out, meta.bytes);
  AppendLittleEndian(out, shard.checksum);
}

absl::Status TakeShard(std::string_view* in, uint32_t layer, ShardRecord* shard) {
  ShardMeta& meta = shard->meta;
  meta.layer = layer;
  uint16_t flags = 0;
  uint32_t zero32 = 0;
  const bool complete = TakeLittleEndian(in, &meta.profile) && TakeLittleEndian(in, &meta.dtype) &&
                        TakeLittleEndian(in, &flags) && TakeLittleEndian(in, &meta.tokens) &&
                        TakeLittleEndian(in, &meta.kv_heads) &&
                        TakeLittleEndian(in, &meta.head_dim) &&
                        TakeLittleEndian(in, &meta.first_token) && TakeLittleEndian(in, &zero32) &&
                        TakeLittleEndian(in, &meta.raw_bytes) &&
                        TakeLittleEndian(in, &meta.bytes) && TakeLittleEndian(in, &shard->checksum);
  if (!complete) return BadStored("size", in->size(), "the shard's entry is cut");
  if (flags > kFlagKeysOnly) return BadStored("flags", flags, "must be 0 or 1");
  meta.keys_only = flags == kFlagKeysOnly;
  if (zero32 != 0) return BadStored("reserved", zero32, "must be 0");
  if (meta.raw_bytes > kMaxRawBytes) return BadStored("raw_bytes", meta.raw_bytes, "is too large");
  if (meta.bytes == 0 || meta.bytes > kMaxShardBytes) {
    return BadStored("bytes", meta.bytes, absl::StrCat("must be 1..", kMaxShardBytes));
  }
  return absl::OkStatus();
}

// Magic, size and seal: after this the bytes are what EncodeRecord wrote, or made to look so.
absl::Status CheckEnvelope(std::string_view chunk_key, std::string_view bytes, uint32_t* layers) {
  if (bytes.size() < kHeaderBytes + kSealBytes) {
    return BadStored("size", bytes.size(), "too short for a chunk record");
  }
  if (!bytes.starts_with(kMagic)) {
    return BadStored("magic", Printable(bytes.substr(0, 4)), "must be KVC1");
  }
  std::string_view rest = bytes.substr(kMagic.size());
  TakeLittleEndian(&rest, layers);
  if (*layers == 0 || *layers > kMaxLayers) {
    return BadStored("layers", *layers, absl::StrCat("must be 1..", kMaxLayers));
  }
  const size_t expected = kHeaderBytes + *layers * kShardBytes + kSealBytes;
  if (bytes.size() != expected) {
    return BadStored("size", bytes.size(), absl::StrCat("must be ", expected));
  }
  std::string_view seal_bytes = bytes.substr(bytes.size() - kSealBytes);
  uint64_t seal = 0;
  TakeLittleEndian(&seal_bytes, &seal);
  if (seal != Seal(chunk_key, bytes.substr(0, bytes.size() - kSealBytes))) {
    return BadStored("checksum", seal, "doesn't match the record and its key");
  }
  return absl::OkStatus();
}

}  // namespace

uint64_t ChunkRecord::charged_bytes() const {
  uint64_t sum = 0;
  for (const ShardRecord& shard : shards) sum += ChargedBytes(shard.meta.bytes);
  return sum;
}

uint64_t Checksum(std::string_view bytes) { return XXH64(bytes.data(), bytes.size(), 0); }

std::string EncodeRecord(std::string_view chunk_key, const ChunkRecord& record) {
  std::string out(kMagic);
  out.reserve(kHeaderBytes + record.shards.size() * kShardBytes + kSealBytes);
  AppendLittleEndian(&out, record.layers());
  AppendLittleEndian(&out, record.serial);
  AppendLittleEndian(&out, record.created_unix_ms);
  for (const ShardRecord& shard : record.shards) AppendShard(&out, shard);
  AppendLittleEndian(&out, Seal(chunk_key, out));
  return out;
}

absl::StatusOr<ChunkRecord> DecodeRecord(std::string_view chunk_key, std::string_view bytes) {
  uint32_t layers = 0;
  if (absl::Status status = CheckEnvelope(chunk_key, bytes, &layers); !status.ok()) return status;
  bytes.remove_prefix(kMagic.size() + sizeof(layers));
  ChunkRecord record;
  TakeLittleEndian(&bytes, &record.serial);
  TakeLittleEndian(&bytes, &record.created_unix_ms);
  record.shards.resize(layers);
  for (uint32_t layer = 0; layer < layers; ++layer) {
    absl::Status status = TakeShard(&bytes, layer, &record.shards[layer]);
    if (!status.ok()) return status;
  }
  return record;
}

}  // namespace kvshrink::store

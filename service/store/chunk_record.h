// What the store remembers of a committed chunk, in memory and, as bytes, in the chunk's record on
// disk.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "store.h"

namespace kvshrink::store {

struct ShardRecord {
  ShardMeta meta;
  uint64_t checksum = 0;  // XXH64 of the shard's bytes

  bool operator==(const ShardRecord&) const = default;
};

struct ChunkRecord {
  uint64_t serial = 0;
  int64_t created_unix_ms = 0;
  std::vector<ShardRecord> shards;  // shards[i] is layer i

  bool operator==(const ChunkRecord&) const = default;

  uint32_t layers() const { return static_cast<uint32_t>(shards.size()); }
  // What the chunk counts against a budget.
  uint64_t charged_bytes() const;
};

// XXH64, seed 0.
uint64_t Checksum(std::string_view bytes);

// Bytes of a record, sealed by a checksum over them and `chunk_key` (any encoding of the chunk's
// identity): a record found under another key is not taken for that key's. Little-endian:
//   "KVC1"; u32 layers; u64 serial; i64 created_unix_ms;
//   per layer 48 bytes: u8 profile, u8 dtype, u16 flags (bit 0: keys only), u32 tokens, u32
//   kv_heads, u32 head_dim, u32 first_token, u32 zero,
//                       u64 raw_bytes, u64 bytes, u64 checksum;
//   u64 checksum of all before.
std::string EncodeRecord(std::string_view chunk_key, const ChunkRecord& record);

// DATA_LOSS naming the field when the bytes are not such a record.
absl::StatusOr<ChunkRecord> DecodeRecord(std::string_view chunk_key, std::string_view bytes);

}  // namespace kvshrink::store

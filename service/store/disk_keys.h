// Keys of the disk tier. Every part of a chunk's key is preceded by its length, so that no two
// chunks can share a record.
//
//   column family  key                                      value
//   default        "m"                                      marker: format version and epoch of the
//   store default        "c" chunk-key serial                     record of a committed chunk
//   default        "q" chunk-key serial                     record of a quarantined chunk
//   shards         serial layer                             bytes of a shard
//
// chunk-key: tenant, namespace, key, each as u16 length and bytes. serial: u64, new for every
// commit, so that a chunk that is written again never meets the leftovers of its predecessor.
// layer: u32. All integers big-endian.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "store.h"

namespace kvshrink::store {

inline constexpr std::string_view kMarkerKey = "m";
inline constexpr char kCommittedTag = 'c';
inline constexpr char kQuarantinedTag = 'q';

// Appends the parts of `key`; they must be within the limits of limits.h.
void AppendChunkKey(std::string* out, const ChunkKey& key);
// Takes a chunk key off the front of `in`; false when the bytes are none.
bool TakeChunkKey(std::string_view* in, ChunkKey* key);

std::string RecordKey(char tag, const ChunkKey& key, uint64_t serial);
// The shard key of layer 0 is also the lower bound of the chunk's shards, that of serial + 1 the
// upper.
std::string ShardKey(uint64_t serial, uint32_t layer);

struct ParsedRecordKey {
  ChunkKey key;
  uint64_t serial = 0;
};
// Empty when the bytes are not exactly a tag, a chunk key within the limits and a serial.
std::optional<ParsedRecordKey> ParseRecordKey(std::string_view record_key);

}  // namespace kvshrink::store

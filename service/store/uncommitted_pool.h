// Chunks whose shards are still coming in.
#pragma once

#include <cstdint>
#include <list>
#include <map>

#include "absl/status/status.h"
#include "chunk_record.h"
#include "store.h"

namespace kvshrink::store {

struct PooledShard {
  ShardRecord record;
  Bytes bytes;
};

struct PooledChunk {
  ChunkKey key;
  uint32_t layers = 0;
  std::map<uint32_t, PooledShard> shards;  // by layer
  int64_t last_put_steady_ms = 0;
  int64_t created_unix_ms = 0;
  // A commit is writing it: it must stay as it is until that ends.
  bool committing = false;

  // FAILED_PRECONDITION that names the missing layers, if any is.
  absl::Status CheckComplete() const;
};

// Not thread-safe. Pointers to chunks stay valid until the chunk is erased or expires.
class UncommittedPool {
 public:
  UncommittedPool(uint64_t capacity_bytes, int64_t ttl_ms)
      : capacity_bytes_(capacity_bytes), ttl_ms_(ttl_ms) {}

  // Null when there is none.
  PooledChunk* Find(const ChunkKey& key);

  // Adds a shard that isn't there yet to its chunk, made when absent, and renews the chunk's time.
  // INVALID_ARGUMENT when `layers`, the tokens or the first token aren't those of the chunk's other
  // shards; RESOURCE_EXHAUSTED when it doesn't fit the capacity. Nothing is kept of a shard that
  // isn't taken.
  absl::Status Add(const ChunkKey& key, uint32_t layers, PooledShard shard, int64_t now_steady_ms,
                   int64_t now_unix_ms);

  void Erase(const ChunkKey& key);
  // Erases chunks without a new shard for the time to live; returns how many.
  uint64_t Expire(int64_t now_steady_ms);

  // Of all shards, as they count against the capacity.
  uint64_t used_bytes() const { return used_bytes_; }

 private:
  using Order = std::list<PooledChunk>;  // by last_put_steady_ms, oldest first

  const uint64_t capacity_bytes_;
  const int64_t ttl_ms_;
  uint64_t used_bytes_ = 0;
  Order order_;
  std::map<ChunkKey, Order::iterator> chunks_;
};

}  // namespace kvshrink::store

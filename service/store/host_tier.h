// Shards in memory, least recently used out first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>

#include "absl/container/flat_hash_map.h"
#include "store.h"

namespace kvshrink::store {

// Not thread-safe. Shards are named by the serial of their chunk's commit and their layer.
class HostTier {
 public:
  // Keeps shards of at most `capacity_bytes` (charged, limits.h) in all; the others are let go by
  // age of use.
  explicit HostTier(uint64_t capacity_bytes) : capacity_bytes_(capacity_bytes) {}

  // Shares the shard's bytes; one that is larger than the tier is not kept. A shard that is there
  // stays as it is.
  void Insert(uint64_t serial, uint32_t layer, Bytes bytes);
  // Null when it isn't there; counts as a use.
  Bytes Find(uint64_t serial, uint32_t layer);
  // Lets go of all shards of a chunk.
  void Erase(uint64_t serial);

  // How many shards of a chunk are here.
  size_t Count(uint64_t serial) const;
  uint64_t used_bytes() const { return used_bytes_; }

 private:
  struct Shard {
    uint64_t serial;
    uint32_t layer;
    Bytes bytes;
  };
  using Order = std::list<Shard>;  // front: used last

  void DropOldest();

  const uint64_t capacity_bytes_;
  uint64_t used_bytes_ = 0;
  Order order_;
  absl::flat_hash_map<uint64_t, absl::flat_hash_map<uint32_t, Order::iterator>> chunks_;
};

}  // namespace kvshrink::store

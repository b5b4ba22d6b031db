// The committed chunks: found by key, kept in order of use, counted against the space of the tier
// that holds them for good.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "chunk_record.h"
#include "store.h"

namespace kvshrink::store {

struct IndexedChunk {
  ChunkRecord record;
  uint64_t charged_bytes = 0;
  uint32_t leases = 0;  // a leased chunk is neither evicted nor deleted
  std::list<const ChunkKey*>::iterator use;
};

// Not thread-safe. Pointers to chunks stay valid until the chunk is taken out.
class ChunkIndex {
 public:
  using Map = std::map<ChunkKey, IndexedChunk>;
  // A chunk taken out, which can be put back.
  using Node = Map::node_type;

  // Null when there is none.
  IndexedChunk* Find(const ChunkKey& key);
  IndexedChunk* FindSerial(uint64_t serial);
  // The first chunk after `key`, or end().
  Map::const_iterator After(const ChunkKey& key) const { return chunks_.upper_bound(key); }
  Map::const_iterator end() const { return chunks_.end(); }

  // Adds a chunk as the one used last. `key` must not be there.
  void Insert(const ChunkKey& key, ChunkRecord record);
  void Touch(IndexedChunk* chunk);
  // `key` must be there.
  Node Take(const ChunkKey& key);
  // Puts a chunk back as the first to be evicted, unless its key was taken meanwhile.
  void PutBack(Node node);

  // Takes out unleased chunks, least recently used first, until `bytes` are free; none, and
  // RESOURCE_EXHAUSTED, when leases leave less.
  absl::StatusOr<std::vector<Node>> Evict(uint64_t bytes);

  size_t size() const { return chunks_.size(); }
  uint64_t used_bytes() const { return used_bytes_; }

 private:
  Map chunks_;
  std::list<const ChunkKey*> uses_;  // front: used longest ago
  absl::flat_hash_map<uint64_t, Map::iterator> by_serial_;
  uint64_t used_bytes_ = 0;
};

}  // namespace kvshrink::store

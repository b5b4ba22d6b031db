// Chunks of shards by namespace and key, over tiers. Knows bytes and keys, never tensors.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace kvshrink::store {

class Clock;

// Immutable bytes of a shard, shared by readers and the host tier without copies.
using Bytes = std::shared_ptr<const std::string>;

enum class TierName { kDevice, kHost, kDisk, kCluster };

struct ChunkKey {
  std::string tenant;
  std::string name_space;
  std::string key;

  auto operator<=>(const ChunkKey&) const = default;
};

// What the store remembers of a shard beside its bytes; enough to answer Stat without reading them.
struct ShardMeta {
  uint32_t layer = 0;
  uint8_t profile = 0;  // id of the shard header
  uint8_t dtype = 0;
  uint32_t tokens = 0;
  uint32_t kv_heads = 0;
  uint32_t head_dim = 0;
  uint32_t first_token = 0;
  bool keys_only = false;
  uint64_t raw_bytes = 0;
  uint64_t bytes = 0;

  bool operator==(const ShardMeta&) const = default;
};

struct ChunkStat {
  ChunkKey key;
  bool committed = false;
  uint32_t layers = 0;
  uint32_t tokens = 0;
  uint64_t raw_bytes = 0;
  uint64_t bytes = 0;
  bool leased = false;
  int64_t created_unix_ms = 0;
  std::vector<ShardMeta> shards;  // present ones, by layer
  std::vector<TierName> tiers;    // that hold all of its shards
};

// Budgets count 256 bytes per shard beside its bytes, for what the store keeps about it in memory.
struct StoreOptions {
  std::string data_dir;                            // "" = no disk tier
  uint64_t host_bytes = uint64_t{1} << 30;         // host tier: shards kept in memory
  uint64_t disk_bytes = uint64_t{16} << 30;        // disk tier
  uint64_t uncommitted_bytes = uint64_t{1} << 30;  // shards of chunks that aren't committed
  int64_t uncommitted_ttl_ms = 10 * 60 * 1000;     // since the chunk's last new shard
  const Clock* clock = nullptr;  // outlives the store; null = this machine's (clock.h)
};

struct PutResult {
  bool already_present = false;
  TierName tier = TierName::kHost;
};

struct FoundShard {
  Bytes bytes;
  ShardMeta meta;
  TierName tier = TierName::kHost;
};

struct LookupResult {
  uint32_t present = 0;
  uint64_t tokens = 0;
  uint64_t lease_id = 0;
};

struct ListPage {
  std::vector<ChunkStat> chunks;
  std::string next_page_token;
};

struct TierUsage {
  TierName tier = TierName::kHost;
  uint64_t capacity_bytes = 0;
  uint64_t used_bytes = 0;
};

// Since the store was opened. Hits and misses are of Get; a quarantined shard is one found damaged,
// which took its chunk out.
struct StoreCounters {
  uint64_t host_hits = 0, disk_hits = 0, misses = 0, evicted_chunks = 0, quarantined_shards = 0,
           expired_uncommitted = 0;
};

// Thread-safe. No call blocks on anything but the disk of this machine.
class Store {
 public:
  // Opens or creates the disk tier and loads the index of committed chunks. Errors:
  // FAILED_PRECONDITION when another process holds the directory, DATA_LOSS when its version isn't
  // ours.
  static absl::StatusOr<std::unique_ptr<Store>> Open(const StoreOptions& options);
  virtual ~Store() = default;

  // Adds a shard to an uncommitted chunk (made when absent; `layers` must agree with its other
  // shards, else INVALID_ARGUMENT). The same bytes again, committed or not: OK with
  // already_present. Different bytes: ALREADY_EXISTS. RESOURCE_EXHAUSTED when the budget of
  // uncommitted bytes is spent.
  virtual absl::StatusOr<PutResult> Put(const ChunkKey& key, uint32_t layers, const ShardMeta& meta,
                                        Bytes bytes) = 0;

  // Writes all shards of the chunk to disk in one synced atomic step, then makes it visible. OK
  // when it was committed before. NOT_FOUND; FAILED_PRECONDITION naming the missing layers;
  // RESOURCE_EXHAUSTED when leases leave no room.
  virtual absl::Status Commit(const ChunkKey& key) = 0;

  // A shard of a committed chunk, from the nearest tier; a disk hit is kept in the host tier.
  // NOT_FOUND; DATA_LOSS when its stored checksum doesn't match (the chunk is then quarantined: a
  // miss from now on, kept on disk aside, counted).
  virtual absl::StatusOr<FoundShard> Get(const ChunkKey& key, uint32_t layer) = 0;

  // Reports that a shard's content failed its own checks: quarantines its chunk as above.
  virtual void ReportDamaged(const ChunkKey& key) = 0;

  // Longest run of leading keys that are committed; leased together until lease_ms from now unless
  // none is present.
  virtual LookupResult Lookup(std::string_view tenant, std::string_view name_space,
                              const std::vector<std::string>& keys, int64_t lease_ms) = 0;
  virtual bool Release(std::string_view tenant, uint64_t lease_id) = 0;

  // NOT_FOUND, or FAILED_PRECONDITION while leased. Durable when it returns. Also removes
  // uncommitted chunks.
  virtual absl::Status Delete(const ChunkKey& key) = 0;
  virtual absl::StatusOr<ChunkStat> Stat(const ChunkKey& key) = 0;
  // Committed chunks in key order; `name_space` "" = all. INVALID_ARGUMENT for a page token that
  // isn't ours.
  virtual absl::StatusOr<ListPage> List(std::string_view tenant, std::string_view name_space,
                                        uint32_t page_size, std::string_view page_token) = 0;

  // Drops expired uncommitted chunks and leases; call about once a second.
  virtual void Tick() = 0;

  virtual std::vector<TierUsage> Usage() const = 0;
  virtual StoreCounters Counters() const = 0;
  virtual uint64_t chunks() const = 0;
  virtual uint64_t uncommitted_bytes() const = 0;
};

}  // namespace kvshrink::store

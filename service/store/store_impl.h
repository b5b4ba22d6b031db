// The store: one lock over what is in memory, none while the disk works. README.md has the scheme.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "chunk_index.h"
#include "clock.h"
#include "disk_tier.h"
#include "host_tier.h"
#include "lease_table.h"
#include "store.h"
#include "uncommitted_pool.h"

namespace kvshrink::store {

class StoreImpl : public Store {
 public:
  // As Store::Open. `env` is RocksDB's view of the system, null for the machine's; it outlives the
  // store.
  static absl::StatusOr<std::unique_ptr<Store>> Open(const StoreOptions& options,
                                                     rocksdb::Env* env);

  absl::StatusOr<PutResult> Put(const ChunkKey& key, uint32_t layers, const ShardMeta& meta,
                                Bytes bytes) override;
  absl::Status Commit(const ChunkKey& key) override;
  absl::StatusOr<FoundShard> Get(const ChunkKey& key, uint32_t layer) override;
  void ReportDamaged(const ChunkKey& key) override;
  LookupResult Lookup(std::string_view tenant, std::string_view name_space,
                      const std::vector<std::string>& keys, int64_t lease_ms) override;
  bool Release(std::string_view tenant, uint64_t lease_id) override;
  absl::Status Delete(const ChunkKey& key) override;
  absl::StatusOr<ChunkStat> Stat(const ChunkKey& key) override;
  absl::StatusOr<ListPage> List(std::string_view tenant, std::string_view name_space,
                                uint32_t page_size, std::string_view page_token) override;
  void Tick() override;
  std::vector<TierUsage> Usage() const override;
  StoreCounters Counters() const override;
  uint64_t chunks() const override;
  uint64_t uncommitted_bytes() const override;

 private:
  // A commit between its two steps under the lock: what to write, and what goes to make room for
  // it.
  struct CommitPlan {
    DiskTier::StoredChunk chunk;
    std::vector<Bytes> shards;
    uint64_t charged_bytes = 0;
    std::vector<ChunkIndex::Node> evicted;
    std::vector<Quarantined> cleared;
  };
  // A shard that is there already, to compare another with.
  struct Present {
    uint64_t serial = 0;  // of a committed chunk
    ShardRecord record;
    Bytes bytes;  // null: on disk only
  };

  StoreImpl(const StoreOptions& options, std::unique_ptr<DiskTier> disk);
  absl::Status LoadFromDisk();

  // The tier that holds chunks for good: the disk where there is one.
  uint64_t home_capacity_bytes() const {
    return disk_ != nullptr ? options_.disk_bytes : options_.host_bytes;
  }

  // Under mu_ (names end in Locked).
  void WaitForCommitLocked(const ChunkKey& key, std::unique_lock<std::mutex>* lock);
  void ExpireLeasesLocked();
  void LowerLeasesLocked(const std::vector<uint64_t>& serials);
  uint64_t HomeUsedLocked() const;
  absl::Status MakeRoomLocked(CommitPlan* plan);
  absl::StatusOr<std::optional<Present>> FindOrAddLocked(const ChunkKey& key, uint32_t layers,
                                                         const PooledShard& shard);
  ChunkStat DescribeLocked(const ChunkKey& key, const IndexedChunk& chunk) const;
  uint32_t LookupSliceLocked(ChunkKey* probe, const std::string* keys, size_t count,
                             LookupResult* result);
  // False at the end of the list or the page; `last` moves on.
  bool ListSliceLocked(std::string_view name_space, uint32_t page_size, ChunkKey* last,
                       size_t* shards, ListPage* page) const;

  // Without mu_.
  absl::StatusOr<std::optional<CommitPlan>> BeginCommit(const ChunkKey& key);
  absl::Status WriteCommit(const CommitPlan& plan);
  void EndCommit(CommitPlan plan, bool written);
  // NOT_FOUND when the chunk went meanwhile. A damaged shard takes its chunk into quarantine.
  absl::StatusOr<Bytes> ReadFromDisk(const ChunkKey& key, uint64_t serial,
                                     const ShardRecord& record);
  // `serial`: the commit that is meant; empty = whichever is there. False when it is gone.
  bool Quarantine(const ChunkKey& key, std::optional<uint64_t> serial);

  const StoreOptions options_;
  const Clock& clock_;
  const std::unique_ptr<DiskTier> disk_;  // null without a disk tier; thread-safe

  mutable std::mutex mu_;  // over all below; never held while the disk works
  std::condition_variable commit_ended_;
  UncommittedPool pool_;
  ChunkIndex index_;
  HostTier host_;
  LeaseTable leases_;
  std::deque<Quarantined> quarantined_;  // oldest first
  uint64_t quarantined_bytes_ = 0;
  uint64_t reserved_bytes_ = 0;    // of the home tier, for writes under way
  uint64_t next_host_serial_ = 0;  // without a disk tier
  StoreCounters counters_;
};

}  // namespace kvshrink::store

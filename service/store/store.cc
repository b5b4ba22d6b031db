// Opening the store, and what brings chunks into it.
#include "store.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "errors.h"
#include "limits.h"
#include "spdlog/spdlog.h"
#include "store_impl.h"

namespace kvshrink::store {
namespace {

// Chunks held by leases at one time, over all leases: 8 bytes each.
constexpr size_t kMaxLeasedChunks = size_t{4} << 20;

absl::Status CheckLength(absl::string_view field, std::string_view value, size_t max_bytes) {
  if (!value.empty() && value.size() <= max_bytes) return absl::OkStatus();
  return BadField(field, absl::StrCat(value.size(), " bytes long"),
                  absl::StrCat("must be 1..", max_bytes, " bytes"));
}

absl::Status CheckKey(const ChunkKey& key) {
  absl::Status status = CheckLength("tenant", key.tenant, kMaxTenantBytes);
  if (status.ok()) status = CheckLength("namespace", key.name_space, kMaxNamespaceBytes);
  if (status.ok()) status = CheckLength("key", key.key, kMaxKeyBytes);
  return status;
}

absl::Status CheckShard(uint32_t layers, const ShardMeta& meta, const Bytes& bytes) {
  if (layers == 0 || layers > kMaxLayers) {
    return BadField("layers", layers, absl::StrCat("must be 1..", kMaxLayers));
  }
  if (meta.layer >= layers) {
    return BadField("layer", meta.layer, absl::StrCat("must be below layers, ", layers));
  }
  if (meta.raw_bytes > kMaxRawBytes) {
    return BadField("raw_bytes", meta.raw_bytes, absl::StrCat("must be at most ", kMaxRawBytes));
  }
  if (meta.bytes == 0 || meta.bytes > kMaxShardBytes) {
    return BadField("bytes", meta.bytes, absl::StrCat("must be 1..", kMaxShardBytes));
  }
  if (bytes == nullptr || bytes->size() != meta.bytes) {
    return BadField("bytes", meta.bytes,
                    absl::StrCat("the shard has ", bytes == nullptr ? 0 : bytes->size()));
  }
  return absl::OkStatus();
}

absl::Status Differs(const ChunkKey& key, uint32_t layer) {
  return absl::AlreadyExistsError(absl::StrCat("field 'key' is ", Printable(key.key), ": layer ",
                                               layer, " is there with different bytes"));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Store>> Store::Open(const StoreOptions& options) {
  return StoreImpl::Open(options, nullptr);
}

absl::StatusOr<std::unique_ptr<Store>> StoreImpl::Open(const StoreOptions& options,
                                                       rocksdb::Env* env) {
  if (options.uncommitted_ttl_ms < 0) {
    return BadField("uncommitted_ttl_ms", options.uncommitted_ttl_ms, "must be 0 or more");
  }
  std::unique_ptr<DiskTier> disk;
  if (!options.data_dir.empty()) {
    absl::StatusOr<std::unique_ptr<DiskTier>> opened =
        DiskTier::Open({options.data_dir, options.disk_bytes, env});
    if (!opened.ok()) return opened.status();
    disk = *std::move(opened);
  }
  std::unique_ptr<StoreImpl> store(new StoreImpl(options, std::move(disk)));
  if (absl::Status loaded = store->LoadFromDisk(); !loaded.ok()) return loaded;
  return store;
}

StoreImpl::StoreImpl(const StoreOptions& options, std::unique_ptr<DiskTier> disk)
    : options_(options),
      clock_(options.clock != nullptr ? *options.clock : SystemClock()),
      disk_(std::move(disk)),
      pool_(options.uncommitted_bytes, options.uncommitted_ttl_ms),
      // Without a disk the index keeps the chunks within this very budget, so that no shard of one
      // is ever let go alone.
      host_(options.host_bytes),
      leases_(kMaxLeasedChunks) {}

absl::Status StoreImpl::LoadFromDisk() {
  if (disk_ == nullptr) return absl::OkStatus();
  absl::StatusOr<DiskTier::Contents> contents = disk_->Load();
  if (!contents.ok()) return contents.status();
  const std::unique_lock lock(mu_);  // no one else is here yet, but the helpers are called under it
  for (DiskTier::StoredChunk& chunk : contents->chunks) {
    index_.Insert(chunk.key, std::move(chunk.record));
  }
  for (Quarantined& aside : contents->quarantined) {
    quarantined_bytes_ += aside.charged_bytes;
    quarantined_.push_back(std::move(aside));
  }
  counters_.quarantined_shards = contents->damaged_records;
  // The capacity may be less than when the store was last open.
  CommitPlan room;
  if (absl::Status status = MakeRoomLocked(&room); !status.ok()) return status;
  DiskTier::Batch batch = disk_->NewBatch();
  for (const ChunkIndex::Node& node : room.evicted) batch.Remove(node.key(), node.mapped().record);
  for (const Quarantined& aside : room.cleared) batch.Remove(aside);
  counters_.evicted_chunks += room.evicted.size();
  return disk_->Write(&batch);
}

absl::StatusOr<PutResult> StoreImpl::Put(const ChunkKey& key, uint32_t layers,
                                         const ShardMeta& meta, Bytes bytes) {
  absl::Status valid = CheckKey(key);
  if (valid.ok()) valid = CheckShard(layers, meta, bytes);
  if (!valid.ok()) return valid;
  const PooledShard shard{{meta, Checksum(*bytes)}, std::move(bytes)};
  while (true) {
    absl::StatusOr<std::optional<Present>> found;
    {
      const std::unique_lock lock(mu_);
      found = FindOrAddLocked(key, layers, shard);
    }
    if (!found.ok()) return found.status();
    if (!found->has_value()) return PutResult{false, TierName::kHost};
    Present& present = **found;
    if (present.record.checksum != shard.record.checksum ||
        present.record.meta.bytes != meta.bytes) {
      return Differs(key, meta.layer);
    }
    // Equal checksums are a hint, not a proof: the bytes decide.
    TierName tier = TierName::kHost;
    if (present.bytes == nullptr) {
      absl::StatusOr<Bytes> stored = ReadFromDisk(key, present.serial, present.record);
      if (absl::IsNotFound(stored.status()) || absl::IsDataLoss(stored.status())) {
        continue;  // the chunk is gone; what was sent takes its place
      }
      if (!stored.ok()) return stored.status();
      present.bytes = *std::move(stored);
      tier = TierName::kDisk;
    }
    if (*present.bytes != *shard.bytes) return Differs(key, meta.layer);
    return PutResult{true, tier};
  }
}

absl::StatusOr<std::optional<StoreImpl::Present>> StoreImpl::FindOrAddLocked(
    const ChunkKey& key, uint32_t layers, const PooledShard& shard) {
  const uint32_t layer = shard.record.meta.layer;
  if (IndexedChunk* chunk = index_.Find(key); chunk != nullptr) {
    if (layers != chunk->record.layers()) {
      return BadField("layers", layers,
                      absl::StrCat("the chunk was committed with ", chunk->record.layers()));
    }
    index_.Touch(chunk);
    const uint64_t serial = chunk->record.serial;
    return Present{serial, chunk->record.shards[layer], host_.Find(serial, layer)};
  }
  if (const PooledChunk* chunk = pool_.Find(key); chunk != nullptr) {
    if (layers != chunk->layers) {
      return BadField("layers", layers,
                      absl::StrCat("the chunk's other shards say ", chunk->layers));
    }
    const auto there = chunk->shards.find(layer);
    if (there != chunk->shards.end()) {
      return Present{0, there->second.record, there->second.bytes};
    }
  }
  const int64_t now_ms = clock_.SteadyMs();
  counters_.expired_uncommitted += pool_.Expire(now_ms);
  absl::Status added = pool_.Add(key, layers, shard, now_ms, clock_.UnixMs());
  if (!added.ok()) return added;
  return std::optional<Present>();
}

absl::Status StoreImpl::Commit(const ChunkKey& key) {
  absl::StatusOr<std::optional<CommitPlan>> plan = BeginCommit(key);
  if (!plan.ok()) return plan.status();
  if (!plan->has_value()) return absl::OkStatus();
  absl::Status written = WriteCommit(**plan);
  EndCommit(**std::move(plan), written.ok());
  return written;
}

absl::StatusOr<std::optional<StoreImpl::CommitPlan>> StoreImpl::BeginCommit(const ChunkKey& key) {
  std::unique_lock lock(mu_);
  WaitForCommitLocked(key, &lock);
  if (index_.Find(key) != nullptr) return std::optional<CommitPlan>();
  PooledChunk* chunk = pool_.Find(key);
  if (chunk == nullptr) {
    return absl::NotFoundError(
        absl::StrCat("field 'key' is ", Printable(key.key), ": no such chunk"));
  }
  if (absl::Status complete = chunk->CheckComplete(); !complete.ok()) return complete;
  CommitPlan plan;
  plan.chunk.key = key;
  plan.chunk.record.created_unix_ms = chunk->created_unix_ms;
  for (const auto& [layer, shard] : chunk->shards) {
    plan.chunk.record.shards.push_back(shard.record);
    plan.shards.push_back(shard.bytes);
  }
  plan.charged_bytes = plan.chunk.record.charged_bytes();
  ExpireLeasesLocked();
  if (absl::Status room = MakeRoomLocked(&plan); !room.ok()) return room;
  plan.chunk.record.serial = disk_ != nullptr ? disk_->NextSerial() : ++next_host_serial_;
  reserved_bytes_ += plan.charged_bytes;
  chunk->committing = true;
  return plan;
}

// What stands in quarantine goes first: no one will ask for it.
absl::Status StoreImpl::MakeRoomLocked(CommitPlan* plan) {
  const uint64_t capacity_bytes = home_capacity_bytes();
  if (plan->charged_bytes > capacity_bytes) {
    return absl::ResourceExhaustedError(absl::StrCat("the chunk takes ", plan->charged_bytes,
                                                     " bytes: the tier has ", capacity_bytes));
  }
  const uint64_t wanted_bytes = HomeUsedLocked() + plan->charged_bytes;
  if (wanted_bytes <= capacity_bytes) return absl::OkStatus();
  const uint64_t excess_bytes = wanted_bytes - capacity_bytes;
  uint64_t cleared_bytes = 0;
  size_t cleared = 0;
  while (cleared < quarantined_.size() && cleared_bytes < excess_bytes) {
    cleared_bytes += quarantined_[cleared++].charged_bytes;
  }
  absl::StatusOr<std::vector<ChunkIndex::Node>> evicted =
      index_.Evict(excess_bytes - std::min(cleared_bytes, excess_bytes));
  if (!evicted.ok()) return evicted.status();
  plan->evicted = *std::move(evicted);
  for (const ChunkIndex::Node& node : plan->evicted) host_.Erase(node.mapped().record.serial);
  for (; cleared > 0; --cleared) {
    quarantined_bytes_ -= quarantined_.front().charged_bytes;
    plan->cleared.push_back(std::move(quarantined_.front()));
    quarantined_.pop_front();
  }
  return absl::OkStatus();
}

absl::Status StoreImpl::WriteCommit(const CommitPlan& plan) {
  if (disk_ == nullptr) return absl::OkStatus();
  DiskTier::Batch batch = disk_->NewBatch();
  for (const ChunkIndex::Node& node : plan.evicted) batch.Remove(node.key(), node.mapped().record);
  for (const Quarantined& aside : plan.cleared) batch.Remove(aside);
  batch.Add(plan.chunk, plan.shards);
  return disk_->Write(&batch);
}

void StoreImpl::EndCommit(CommitPlan plan, bool written) {
  const ChunkKey& key = plan.chunk.key;
  const std::unique_lock lock(mu_);
  reserved_bytes_ -= plan.charged_bytes;
  if (written) {
    counters_.evicted_chunks += plan.evicted.size();
    pool_.Erase(key);
    const uint64_t serial = plan.chunk.record.serial;
    index_.Insert(key, std::move(plan.chunk.record));
    for (uint32_t layer = 0; layer < plan.shards.size(); ++layer) {
      host_.Insert(serial, layer, std::move(plan.shards[layer]));
    }
  } else {
    pool_.Find(key)->committing = false;
    for (ChunkIndex::Node& node : plan.evicted) index_.PutBack(std::move(node));
    for (Quarantined& aside : plan.cleared) {
      quarantined_bytes_ += aside.charged_bytes;
      quarantined_.push_front(std::move(aside));
    }
  }
  commit_ended_.notify_all();
}

void StoreImpl::WaitForCommitLocked(const ChunkKey& key, std::unique_lock<std::mutex>* lock) {
  commit_ended_.wait(*lock, [&] {
    const PooledChunk* chunk = pool_.Find(key);
    return chunk == nullptr || !chunk->committing;
  });
}

uint64_t StoreImpl::HomeUsedLocked() const {
  return index_.used_bytes() + quarantined_bytes_ + reserved_bytes_;
}

}  // namespace kvshrink::store

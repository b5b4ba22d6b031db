// What asks the store, and what takes chunks out of it.
#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "errors.h"
#include "limits.h"
#include "page_token.h"
#include "spdlog/spdlog.h"
#include "store_impl.h"

namespace kvshrink::store {
namespace {

// Work on many chunks lets others in after so many.
constexpr size_t kSliceChunks = 256;
constexpr uint32_t kDefaultPageSize = 1000;
constexpr uint32_t kMaxPageSize = 10000;
// A page ends early when its chunks have so many shards: bounds its memory, whatever the number of
// layers.
constexpr size_t kMaxPageShards = size_t{1} << 18;

absl::Status NotFound(const ChunkKey& key) {
  return absl::NotFoundError(
      absl::StrCat("field 'key' is ", Printable(key.key), ": no such chunk"));
}

void AddTotals(ChunkStat* stat) {
  for (const ShardMeta& meta : stat->shards) {
    stat->raw_bytes += meta.raw_bytes;
    stat->bytes += meta.bytes;
  }
  if (!stat->shards.empty()) stat->tokens = stat->shards.front().tokens;
}

ChunkStat Describe(const PooledChunk& chunk) {
  ChunkStat stat;
  stat.key = chunk.key;
  stat.layers = chunk.layers;
  stat.created_unix_ms = chunk.created_unix_ms;
  for (const auto& [layer, shard] : chunk.shards) stat.shards.push_back(shard.record.meta);
  stat.tiers = {TierName::kHost};
  AddTotals(&stat);
  return stat;
}

}  // namespace

absl::StatusOr<FoundShard> StoreImpl::Get(const ChunkKey& key, uint32_t layer) {
  ShardRecord record;
  uint64_t serial = 0;
  {
    const std::unique_lock lock(mu_);
    IndexedChunk* chunk = index_.Find(key);
    if (chunk == nullptr) {
      ++counters_.misses;
      return NotFound(key);
    }
    if (layer >= chunk->record.layers()) {
      ++counters_.misses;
      return absl::NotFoundError(absl::StrCat("field 'layer' is ", layer, ": the chunk has ",
                                              chunk->record.layers(), " layers"));
    }
    index_.Touch(chunk);
    record = chunk->record.shards[layer];
    serial = chunk->record.serial;
    if (Bytes bytes = host_.Find(serial, layer); bytes != nullptr) {
      ++counters_.host_hits;
      return FoundShard{std::move(bytes), record.meta, TierName::kHost};
    }
  }
  absl::StatusOr<Bytes> bytes = ReadFromDisk(key, serial, record);
  const std::unique_lock lock(mu_);
  if (!bytes.ok()) {
    if (absl::IsNotFound(bytes.status())) ++counters_.misses;
    return bytes.status();
  }
  ++counters_.disk_hits;
  return FoundShard{*std::move(bytes), record.meta, TierName::kDisk};
}

absl::StatusOr<Bytes> StoreImpl::ReadFromDisk(const ChunkKey& key, uint64_t serial,
                                              const ShardRecord& record) {
  absl::StatusOr<Bytes> bytes = disk_ != nullptr
                                    ? disk_->Read(serial, record)
                                    : absl::DataLossError("the shard is missing in the host tier");
  if (absl::IsDataLoss(bytes.status())) {
    // Bytes that went with their chunk, deleted or evicted since, are no loss.
    if (!Quarantine(key, serial)) return NotFound(key);
    spdlog::error("store: layer {} of chunk {} is damaged, chunk quarantined: {}",
                  record.meta.layer, Printable(key.key), bytes.status().ToString());
  }
  if (!bytes.ok()) return bytes.status();
  const std::unique_lock lock(mu_);
  if (index_.FindSerial(serial) != nullptr) host_.Insert(serial, record.meta.layer, *bytes);
  return bytes;
}

void StoreImpl::ReportDamaged(const ChunkKey& key) {
  if (!Quarantine(key, std::nullopt)) return;
  spdlog::error("store: chunk {} is reported damaged, quarantined", Printable(key.key));
}

bool StoreImpl::Quarantine(const ChunkKey& key, std::optional<uint64_t> serial) {
  ChunkIndex::Node node;
  {
    const std::unique_lock lock(mu_);
    const IndexedChunk* chunk = index_.Find(key);
    if (chunk == nullptr || (serial && chunk->record.serial != *serial)) return false;
    ++counters_.quarantined_shards;
    node = index_.Take(key);
    host_.Erase(node.mapped().record.serial);
    if (disk_ == nullptr) return true;
    reserved_bytes_ += node.mapped().charged_bytes;
  }
  const IndexedChunk& chunk = node.mapped();
  DiskTier::Batch batch = disk_->NewBatch();
  batch.Quarantine(key, chunk.record);
  if (const absl::Status status = disk_->Write(&batch); !status.ok()) {
    // A miss for this process all the same; after a restart the damage is found again.
    spdlog::error("store: quarantine isn't on disk: {}", status.ToString());
  }
  // Only now may a commit clear it away: before, its removal could have come first.
  const std::unique_lock lock(mu_);
  reserved_bytes_ -= chunk.charged_bytes;
  quarantined_bytes_ += chunk.charged_bytes;
  quarantined_.push_back({RecordKey(kQuarantinedTag, key, chunk.record.serial), chunk.record.serial,
                          chunk.charged_bytes});
  return true;
}

LookupResult StoreImpl::Lookup(std::string_view tenant, std::string_view name_space,
                               const std::vector<std::string>& keys, int64_t lease_ms) {
  LookupResult result;
  ChunkKey probe{std::string(tenant), std::string(name_space), {}};
  const int64_t now_ms = clock_.SteadyMs();
  const int64_t longest_ms = std::numeric_limits<int64_t>::max() - std::max<int64_t>(now_ms, 0);
  {
    const std::unique_lock lock(mu_);
    result.lease_id = leases_.Open(tenant, now_ms + std::clamp<int64_t>(lease_ms, 0, longest_ms));
  }
  for (size_t first = 0; first < keys.size(); first += kSliceChunks) {
    const size_t count = std::min(kSliceChunks, keys.size() - first);
    const std::unique_lock lock(mu_);
    if (LookupSliceLocked(&probe, &keys[first], count, &result) < count) break;
  }
  if (result.present == 0) {
    Release(tenant, result.lease_id);
    result.lease_id = 0;
  }
  return result;
}

// Returns how many of the keys are present and held.
uint32_t StoreImpl::LookupSliceLocked(ChunkKey* probe, const std::string* keys, size_t count,
                                      LookupResult* result) {
  uint32_t held = 0;
  while (held < count) {
    probe->key = keys[held];
    IndexedChunk* chunk = index_.Find(*probe);
    // A full lease table ends the run: present means held.
    if (chunk == nullptr || !leases_.Hold(result->lease_id, chunk->record.serial)) break;
    ++chunk->leases;
    index_.Touch(chunk);
    result->tokens += chunk->record.shards.front().meta.tokens;
    ++result->present;
    ++held;
  }
  return held;
}

bool StoreImpl::Release(std::string_view tenant, uint64_t lease_id) {
  const std::unique_lock lock(mu_);
  ExpireLeasesLocked();
  const std::optional<std::vector<uint64_t>> serials = leases_.Release(tenant, lease_id);
  if (!serials) return false;
  LowerLeasesLocked(*serials);
  return true;
}

void StoreImpl::ExpireLeasesLocked() { LowerLeasesLocked(leases_.Expire(clock_.SteadyMs())); }

void StoreImpl::LowerLeasesLocked(const std::vector<uint64_t>& serials) {
  for (const uint64_t serial : serials) {
    // A quarantined chunk is gone in spite of its leases.
    if (IndexedChunk* chunk = index_.FindSerial(serial); chunk != nullptr) --chunk->leases;
  }
}

absl::Status StoreImpl::Delete(const ChunkKey& key) {
  ChunkIndex::Node node;
  {
    std::unique_lock lock(mu_);
    WaitForCommitLocked(key, &lock);
    ExpireLeasesLocked();
    const IndexedChunk* chunk = index_.Find(key);
    if (chunk == nullptr) {
      if (pool_.Find(key) == nullptr) return NotFound(key);
      pool_.Erase(key);
      return absl::OkStatus();
    }
    if (chunk->leases > 0) {
      return absl::FailedPreconditionError(
          absl::StrCat("field 'key' is ", Printable(key.key), ": the chunk is leased"));
    }
    node = index_.Take(key);
    host_.Erase(node.mapped().record.serial);
  }
  if (disk_ == nullptr) return absl::OkStatus();
  DiskTier::Batch batch = disk_->NewBatch();
  batch.Remove(key, node.mapped().record);
  absl::Status status = disk_->Write(&batch);
  if (!status.ok()) {
    const std::unique_lock lock(mu_);
    index_.PutBack(std::move(node));
  }
  return status;
}

absl::StatusOr<ChunkStat> StoreImpl::Stat(const ChunkKey& key) {
  const std::unique_lock lock(mu_);
  ExpireLeasesLocked();
  if (const IndexedChunk* chunk = index_.Find(key); chunk != nullptr) {
    return DescribeLocked(key, *chunk);
  }
  if (const PooledChunk* chunk = pool_.Find(key); chunk != nullptr) return Describe(*chunk);
  return NotFound(key);
}

ChunkStat StoreImpl::DescribeLocked(const ChunkKey& key, const IndexedChunk& chunk) const {
  ChunkStat stat;
  stat.key = key;
  stat.committed = true;
  stat.layers = chunk.record.layers();
  stat.leased = chunk.leases > 0;
  stat.created_unix_ms = chunk.record.created_unix_ms;
  stat.shards.reserve(stat.layers);
  for (const ShardRecord& shard : chunk.record.shards) stat.shards.push_back(shard.meta);
  if (host_.Count(chunk.record.serial) == stat.layers) stat.tiers.push_back(TierName::kHost);
  if (disk_ != nullptr) stat.tiers.push_back(TierName::kDisk);
  AddTotals(&stat);
  return stat;
}

absl::StatusOr<ListPage> StoreImpl::List(std::string_view tenant, std::string_view name_space,
                                         uint32_t page_size, std::string_view page_token) {
  // Before every chunk of the tenant and namespace: no stored part of a key is empty.
  ChunkKey last{std::string(tenant), std::string(name_space), {}};
  if (!page_token.empty()) {
    absl::StatusOr<ChunkKey> position = DecodePageToken(tenant, name_space, page_token);
    if (!position.ok()) return position.status();
    last = *std::move(position);
  }
  if (page_size == 0) page_size = kDefaultPageSize;
  page_size = std::min(page_size, kMaxPageSize);
  ListPage page;
  size_t shards = 0;
  bool more = true;
  while (more) {
    const std::unique_lock lock(mu_);
    ExpireLeasesLocked();
    more = ListSliceLocked(name_space, page_size, &last, &shards, &page);
  }
  return page;
}

bool StoreImpl::ListSliceLocked(std::string_view name_space, uint32_t page_size, ChunkKey* last,
                                size_t* shards, ListPage* page) const {
  auto next = index_.After(*last);
  const auto ended = [&] {
    return next == index_.end() || next->first.tenant != last->tenant ||
           (!name_space.empty() && next->first.name_space != name_space);
  };
  size_t taken = 0;
  for (; !ended() && taken < kSliceChunks; ++taken, ++next) {
    if (page->chunks.size() == page_size || *shards >= kMaxPageShards) {
      page->next_page_token = EncodePageToken(name_space, page->chunks.back().key);
      return false;
    }
    page->chunks.push_back(DescribeLocked(next->first, next->second));
    *shards += page->chunks.back().shards.size();
  }
  if (taken > 0) *last = page->chunks.back().key;
  return !ended();
}

void StoreImpl::Tick() {
  const std::unique_lock lock(mu_);
  ExpireLeasesLocked();
  counters_.expired_uncommitted += pool_.Expire(clock_.SteadyMs());
}

std::vector<TierUsage> StoreImpl::Usage() const {
  const std::unique_lock lock(mu_);
  std::vector<TierUsage> usage = {{TierName::kHost, options_.host_bytes, host_.used_bytes()}};
  if (disk_ != nullptr) {
    usage.push_back({TierName::kDisk, options_.disk_bytes, HomeUsedLocked()});
  }
  return usage;
}

StoreCounters StoreImpl::Counters() const {
  const std::unique_lock lock(mu_);
  return counters_;
}

uint64_t StoreImpl::chunks() const {
  const std::unique_lock lock(mu_);
  return index_.size();
}

uint64_t StoreImpl::uncommitted_bytes() const {
  const std::unique_lock lock(mu_);
  return pool_.used_bytes();
}

}  // namespace kvshrink::store

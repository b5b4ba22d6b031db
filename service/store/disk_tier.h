// Chunks on disk, in RocksDB: records in one column family, shard bytes in another with blob files.
// Layout: disk_keys.h.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "chunk_record.h"
#include "data_dir.h"
#include "disk_keys.h"
#include "rocksdb/db.h"
#include "store.h"

namespace kvshrink::store {

struct DiskOptions {
  std::string data_dir;
  uint64_t capacity_bytes = 0;  // sizes buffers; the caller keeps the budget
  rocksdb::Env* env = nullptr;  // null: the machine's
};

// What stands aside: the record of a chunk found damaged and, where they can be told, its shards.
struct Quarantined {
  std::string record_key;
  std::optional<uint64_t> serial;
  uint64_t charged_bytes = 0;
};

// Thread-safe: no member but the serial changes after Open, and RocksDB is.
class DiskTier {
 public:
  // Opens the store under options.data_dir, or makes it. FAILED_PRECONDITION when another holds the
  // directory; DATA_LOSS when what is there isn't a store of this version, or its files are damaged
  // beyond single chunks.
  static absl::StatusOr<std::unique_ptr<DiskTier>> Open(const DiskOptions& options);
  ~DiskTier();

  struct StoredChunk {
    ChunkKey key;
    ChunkRecord record;
  };
  struct Contents {
    std::vector<StoredChunk> chunks;  // oldest first
    std::vector<Quarantined> quarantined;
    uint64_t damaged_records = 0;  // quarantined by this very call
  };
  // All chunks, from their records alone. Damaged records are quarantined. Call once, before any
  // other.
  absl::StatusOr<Contents> Load();

  // For the next chunk; never given out before, by this process or an earlier one.
  uint64_t NextSerial() { return next_serial_.fetch_add(1); }

  // Collects changes that become durable together or not at all.
  class Batch {
   public:
    // `shards[i]` is layer i's bytes, as record.shards[i] describes them.
    void Add(const StoredChunk& chunk, absl::Span<const Bytes> shards);
    void Remove(const ChunkKey& key, const ChunkRecord& record);
    void Remove(const Quarantined& quarantined);
    // Keeps the chunk's record and shards, but aside.
    void Quarantine(const ChunkKey& key, const ChunkRecord& record);

   private:
    friend class DiskTier;
    explicit Batch(rocksdb::ColumnFamilyHandle* shards) : shards_(shards) {}
    // The same for a record that can't be read.
    void QuarantineRaw(const rocksdb::Slice& record_key, const rocksdb::Slice& value);
    void Note(rocksdb::Status status) {
      if (status_.ok()) status_ = std::move(status);
    }

    rocksdb::ColumnFamilyHandle* const shards_;
    rocksdb::WriteBatch writes_;
    rocksdb::Status status_;  // the first error of building it
  };
  Batch NewBatch() { return Batch(shards_); }
  // On disk, synced, when it returns OK. UNAVAILABLE when the disk fails.
  absl::Status Write(Batch* batch);

  // A shard's bytes, checked against `shard`. DATA_LOSS when they're missing or others; UNAVAILABLE
  // when the disk fails.
  absl::StatusOr<Bytes> Read(uint64_t serial, const ShardRecord& shard) const;

 private:
  DiskTier(DataDir data_dir, std::unique_ptr<rocksdb::DB> db)
      : data_dir_(std::move(data_dir)), db_(std::move(db)) {}

  absl::Status ReadMarker();
  absl::Status CheckEmpty();
  absl::Status OpenShards(uint64_t buffer_bytes);
  absl::Status LoadCommitted(Contents* contents, Batch* repairs);
  absl::Status LoadQuarantined(Contents* contents);

  DataDir data_dir_;  // outlives db_
  std::unique_ptr<rocksdb::DB> db_;
  rocksdb::ColumnFamilyHandle* shards_ = nullptr;
  std::vector<rocksdb::ColumnFamilyHandle*> handles_;
  std::atomic<uint64_t> next_serial_{0};
};

}  // namespace kvshrink::store

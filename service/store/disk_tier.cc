#include "disk_tier.h"

#include <string_view>
#include <utility>

#include "absl/base/attributes.h"
#include "absl/strings/str_cat.h"
#include "errors.h"

namespace kvshrink::store {
namespace {

rocksdb::Slice AsSlice(std::string_view bytes) { return {bytes.data(), bytes.size()}; }

std::string EncodedKey(const ChunkKey& key) {
  std::string out;
  AppendChunkKey(&out, key);
  return out;
}

// What a failed read says of the bytes: gone or broken, or only out of reach for now.
absl::Status ReadError(const rocksdb::Status& status) {
  const bool damaged = status.IsNotFound() || status.IsCorruption() || status.IsPathNotFound();
  if (damaged) return BadStored("shard", status.ToString(), "must be readable");
  return absl::UnavailableError(absl::StrCat("disk tier: ", status.ToString()));
}

// RocksDB joins the writes of several threads in one of them. A frame of its own, so that
// ThreadSanitizer, which can't see how RocksDB hands them over, can be told of it without looking
// away from the rest of the store.
ABSL_ATTRIBUTE_NOINLINE rocksdb::Status JoinedWrite(rocksdb::DB* db, rocksdb::WriteBatch* writes) {
  rocksdb::WriteOptions options;
  options.sync = true;
  rocksdb::Status status = db->Write(options, writes);
  return status;
}

}  // namespace

DiskTier::~DiskTier() {
  for (rocksdb::ColumnFamilyHandle* handle : handles_) db_->DestroyColumnFamilyHandle(handle);
}

void DiskTier::Batch::Add(const StoredChunk& chunk, absl::Span<const Bytes> shards) {
  const uint64_t serial = chunk.record.serial;
  for (uint32_t layer = 0; layer < shards.size(); ++layer) {
    Note(writes_.Put(shards_, ShardKey(serial, layer), AsSlice(*shards[layer])));
  }
  Note(writes_.Put(RecordKey(kCommittedTag, chunk.key, serial),
                   EncodeRecord(EncodedKey(chunk.key), chunk.record)));
}

void DiskTier::Batch::Remove(const ChunkKey& key, const ChunkRecord& record) {
  Note(writes_.Delete(RecordKey(kCommittedTag, key, record.serial)));
  for (uint32_t layer = 0; layer < record.layers(); ++layer) {
    Note(writes_.Delete(shards_, ShardKey(record.serial, layer)));
  }
}

void DiskTier::Batch::Remove(const Quarantined& quarantined) {
  Note(writes_.Delete(quarantined.record_key));
  if (!quarantined.serial) return;
  // How many shards there are isn't known where the record is unreadable, hence the range.
  Note(writes_.DeleteRange(shards_, ShardKey(*quarantined.serial, 0),
                           ShardKey(*quarantined.serial + 1, 0)));
}

void DiskTier::Batch::Quarantine(const ChunkKey& key, const ChunkRecord& record) {
  Note(writes_.Delete(RecordKey(kCommittedTag, key, record.serial)));
  Note(writes_.Put(RecordKey(kQuarantinedTag, key, record.serial),
                   EncodeRecord(EncodedKey(key), record)));
}

void DiskTier::Batch::QuarantineRaw(const rocksdb::Slice& record_key, const rocksdb::Slice& value) {
  std::string aside = record_key.ToString();
  aside[0] = kQuarantinedTag;
  Note(writes_.Delete(record_key));
  Note(writes_.Put(aside, value));
}

absl::Status DiskTier::Write(Batch* batch) {
  rocksdb::Status status = std::exchange(batch->status_, rocksdb::Status::OK());
  if (status.ok()) status = JoinedWrite(db_.get(), &batch->writes_);
  if (status.ok()) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("disk tier: ", status.ToString()));
}

absl::StatusOr<Bytes> DiskTier::Read(uint64_t serial, const ShardRecord& shard) const {
  rocksdb::ReadOptions options;
  options.fill_cache = false;  // the host tier is the cache
  rocksdb::PinnableSlice value;
  const rocksdb::Status status =
      db_->Get(options, shards_, ShardKey(serial, shard.meta.layer), &value);
  if (!status.ok()) return ReadError(status);
  if (value.size() != shard.meta.bytes) {
    return BadStored("bytes", value.size(), absl::StrCat("must be ", shard.meta.bytes));
  }
  const uint64_t checksum = Checksum({value.data(), value.size()});
  if (checksum != shard.checksum) {
    return BadStored("checksum", checksum, absl::StrCat("must be ", shard.checksum));
  }
  return std::make_shared<const std::string>(value.data(), value.size());
}

}  // namespace kvshrink::store

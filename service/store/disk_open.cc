// Opening the disk tier: is this database ours, and which chunks are in it.
#include <algorithm>
#include <memory>
#include <set>
#include <string_view>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "byte_code.h"
#include "disk_tier.h"
#include "errors.h"
#include "limits.h"
#include "spdlog/spdlog.h"

namespace kvshrink::store {
namespace {

constexpr char kShardsFamily[] = "shards";
constexpr std::string_view kMarkerMagic = "KVST";
constexpr uint32_t kVersion = 1;

// A serial is the epoch, one more at each opening, and a counter. So no serial is given twice,
// whatever became of the records.
constexpr int kCounterBits = 40;
constexpr uint64_t kMaxEpoch = (uint64_t{1} << (64 - kCounterBits)) - 1;

std::string_view AsView(const rocksdb::Slice& slice) { return {slice.data(), slice.size()}; }

absl::Status OpenError(const rocksdb::Status& status) {
  const std::string text = absl::StrCat("disk tier: ", status.ToString());
  if (status.IsIOError() && !status.IsPathNotFound()) return absl::UnavailableError(text);
  return absl::DataLossError(text);
}

rocksdb::DBOptions DatabaseOptions(const DiskOptions& options, uint64_t buffer_bytes) {
  rocksdb::DBOptions db;
  db.create_if_missing = true;
  if (options.env != nullptr) db.env = options.env;
  // Both families reach their files together, so that a record never outlives the log without its
  // shards.
  db.atomic_flush = true;
  db.max_total_wal_size = 4 * buffer_bytes;
  db.max_open_files = 512;  // below the usual limit of 1024 per process
  db.max_background_jobs = 2;
  db.info_log_level = rocksdb::WARN_LEVEL;
  db.max_log_file_size = 1 << 20;
  db.keep_log_file_num = 2;
  return db;
}

rocksdb::ColumnFamilyOptions RecordOptions() {
  rocksdb::ColumnFamilyOptions family;
  family.compression = rocksdb::kNoCompression;
  family.write_buffer_size = 8 << 20;
  return family;
}

rocksdb::ColumnFamilyOptions ShardOptions(uint64_t buffer_bytes) {
  rocksdb::ColumnFamilyOptions family;
  family.compression = rocksdb::kNoCompression;  // shards are entropy already
  family.write_buffer_size = buffer_bytes;
  family.enable_blob_files = true;
  family.blob_compression_type = rocksdb::kNoCompression;
  // Compactions move keys only; blob files that are mostly garbage are rewritten, so that evicted
  // shards give their space back.
  family.enable_blob_garbage_collection = true;
  family.blob_garbage_collection_age_cutoff = 0.5;
  family.blob_garbage_collection_force_threshold = 0.5;
  return family;
}

// Memory for writes not yet in files, and with it the size of blob files: a small part of a small
// tier.
uint64_t BufferBytes(uint64_t capacity_bytes) {
  return std::clamp<uint64_t>(capacity_bytes / 16, 1 << 20, 64 << 20);
}

// Families of the database at `path`; none when there is no database. A database with others isn't
// ours, and is left alone.
absl::StatusOr<std::vector<std::string>> FamiliesAt(const rocksdb::DBOptions& options,
                                                    const std::string& path) {
  const absl::StatusOr<bool> exists = DatabaseExists(path);
  if (!exists.ok()) return exists.status();
  std::vector<std::string> names;
  if (!*exists) return names;
  const rocksdb::Status status = rocksdb::DB::ListColumnFamilies(options, path, &names);
  if (!status.ok()) return OpenError(status);
  for (const std::string& name : names) {
    if (name != rocksdb::kDefaultColumnFamilyName && name != kShardsFamily) {
      return BadStored("column family", name, "isn't kvshrink's");
    }
  }
  return names;
}

std::string EncodeMarker(uint64_t epoch) {
  std::string out(kMarkerMagic);
  AppendLittleEndian(&out, kVersion);
  AppendLittleEndian(&out, epoch);
  AppendLittleEndian(&out, Checksum(out));
  return out;
}

absl::StatusOr<uint64_t> DecodeMarker(std::string_view bytes) {
  if (!bytes.starts_with(kMarkerMagic)) {
    return BadStored("marker", Printable(bytes.substr(0, 16)), "must begin with KVST");
  }
  std::string_view rest = bytes.substr(kMarkerMagic.size());
  uint32_t version = 0;
  if (!TakeLittleEndian(&rest, &version) || version != kVersion) {
    return BadStored("version", version, absl::StrCat("must be ", kVersion));
  }
  uint64_t epoch = 0;
  uint64_t checksum = 0;
  if (!TakeLittleEndian(&rest, &epoch) || !TakeLittleEndian(&rest, &checksum) || !rest.empty()) {
    return BadStored("marker", bytes.size(), "must be 24 bytes");
  }
  if (checksum != Checksum(bytes.substr(0, bytes.size() - sizeof(checksum)))) {
    return BadStored("marker", checksum, "must be the marker's checksum");
  }
  if (epoch >= kMaxEpoch) return BadStored("epoch", epoch, "is used up");
  return epoch;
}

}  // namespace

absl::StatusOr<std::unique_ptr<DiskTier>> DiskTier::Open(const DiskOptions& options) {
  absl::StatusOr<DataDir> data_dir = DataDir::Hold(options.data_dir);
  if (!data_dir.ok()) return data_dir.status();
  const std::string path = data_dir->database_path();
  const uint64_t buffer_bytes = BufferBytes(options.capacity_bytes);
  const rocksdb::DBOptions db_options = DatabaseOptions(options, buffer_bytes);
  absl::StatusOr<std::vector<std::string>> names = FamiliesAt(db_options, path);
  if (!names.ok()) return names.status();
  if (names->empty()) names->push_back(rocksdb::kDefaultColumnFamilyName);

  std::vector<rocksdb::ColumnFamilyDescriptor> families;
  for (const std::string& name : *names) {
    families.emplace_back(name,
                          name == kShardsFamily ? ShardOptions(buffer_bytes) : RecordOptions());
  }
  rocksdb::DB* db = nullptr;
  std::vector<rocksdb::ColumnFamilyHandle*> handles;
  const rocksdb::Status status = rocksdb::DB::Open(db_options, path, families, &handles, &db);
  if (!status.ok()) return OpenError(status);
  std::unique_ptr<DiskTier> tier(
      new DiskTier(*std::move(data_dir), std::unique_ptr<rocksdb::DB>(db)));
  tier->handles_ = std::move(handles);
  absl::Status ready = tier->ReadMarker();
  if (ready.ok()) ready = tier->OpenShards(buffer_bytes);
  if (!ready.ok()) return ready;
  return tier;
}

absl::Status DiskTier::ReadMarker() {
  std::string marker;
  const rocksdb::Status status = db_->Get(
      rocksdb::ReadOptions(), rocksdb::Slice(kMarkerKey.data(), kMarkerKey.size()), &marker);
  if (!status.ok() && !status.IsNotFound()) return OpenError(status);
  uint64_t epoch = 0;
  if (status.ok()) {
    absl::StatusOr<uint64_t> last = DecodeMarker(marker);
    if (!last.ok()) return last.status();
    epoch = *last + 1;
  } else if (absl::Status empty = CheckEmpty(); !empty.ok()) {
    return empty;
  }
  next_serial_ = epoch << kCounterBits;
  rocksdb::WriteOptions options;
  options.sync = true;
  const rocksdb::Status written =
      db_->Put(options, rocksdb::Slice(kMarkerKey.data(), kMarkerKey.size()), EncodeMarker(epoch));
  return written.ok() ? absl::OkStatus() : OpenError(written);
}

// A database without a marker is ours only when it was made and the process died before it wrote
// the marker.
absl::Status DiskTier::CheckEmpty() {
  for (rocksdb::ColumnFamilyHandle* handle : handles_) {
    const std::unique_ptr<rocksdb::Iterator> entry(
        db_->NewIterator(rocksdb::ReadOptions(), handle));
    entry->SeekToFirst();
    if (!entry->status().ok()) return OpenError(entry->status());
    if (entry->Valid()) return BadStored("marker", "absent", "the database isn't kvshrink's");
  }
  return absl::OkStatus();
}

absl::Status DiskTier::OpenShards(uint64_t buffer_bytes) {
  for (rocksdb::ColumnFamilyHandle* handle : handles_) {
    if (handle->GetName() == kShardsFamily) shards_ = handle;
  }
  if (shards_ != nullptr) return absl::OkStatus();
  const rocksdb::Status status =
      db_->CreateColumnFamily(ShardOptions(buffer_bytes), kShardsFamily, &shards_);
  if (!status.ok()) return OpenError(status);
  handles_.push_back(shards_);
  return absl::OkStatus();
}

namespace {

// A record of the index, or why it is none.
absl::StatusOr<DiskTier::StoredChunk> ParseRecord(const rocksdb::Iterator& entry,
                                                  uint64_t serial_end) {
  const std::string_view record_key = AsView(entry.key());
  std::optional<ParsedRecordKey> parsed = ParseRecordKey(record_key);
  if (!parsed) return BadStored("key", Printable(record_key), "isn't a record key");
  const std::string_view chunk_key =
      record_key.substr(1, record_key.size() - 1 - sizeof(parsed->serial));
  absl::StatusOr<ChunkRecord> record = DecodeRecord(chunk_key, AsView(entry.value()));
  if (!record.ok()) return record.status();
  if (record->serial != parsed->serial || record->serial >= serial_end) {
    return BadStored("serial", record->serial, "isn't the key's, or wasn't given yet");
  }
  return DiskTier::StoredChunk{std::move(parsed->key), *std::move(record)};
}

}  // namespace

absl::StatusOr<DiskTier::Contents> DiskTier::Load() {
  Contents contents;
  Batch repairs = NewBatch();
  absl::Status status = LoadCommitted(&contents, &repairs);
  if (status.ok()) status = Write(&repairs);
  if (status.ok()) status = LoadQuarantined(&contents);
  if (!status.ok()) return status;
  std::sort(contents.chunks.begin(), contents.chunks.end(),
            [](const StoredChunk& a, const StoredChunk& b) {
              return std::pair(a.record.created_unix_ms, a.record.serial) <
                     std::pair(b.record.created_unix_ms, b.record.serial);
            });
  return contents;
}

absl::Status DiskTier::LoadCommitted(Contents* contents, Batch* repairs) {
  const uint64_t serial_end = next_serial_;
  absl::flat_hash_set<uint64_t> serials;
  const std::unique_ptr<rocksdb::Iterator> entry(db_->NewIterator(rocksdb::ReadOptions()));
  for (entry->Seek(rocksdb::Slice(&kCommittedTag, 1));
       entry->Valid() && entry->key().starts_with(rocksdb::Slice(&kCommittedTag, 1));
       entry->Next()) {
    absl::StatusOr<StoredChunk> chunk = ParseRecord(*entry, serial_end);
    if (chunk.ok() && !serials.insert(chunk->record.serial).second) {
      chunk = BadStored("serial", chunk->record.serial, "is another chunk's");
    }
    if (!chunk.ok()) {
      spdlog::error("disk tier: record quarantined: {}", chunk.status().ToString());
      repairs->QuarantineRaw(entry->key(), entry->value());
      ++contents->damaged_records;
      continue;
    }
    // Two records of one key: the later commit counts, the other's removal was cut short. They are
    // neighbours, in order of serials.
    if (!contents->chunks.empty() && contents->chunks.back().key == chunk->key) {
      repairs->Remove(chunk->key, contents->chunks.back().record);
      contents->chunks.pop_back();
    }
    contents->chunks.push_back(*std::move(chunk));
  }
  return entry->status().ok() ? absl::OkStatus() : OpenError(entry->status());
}

absl::Status DiskTier::LoadQuarantined(Contents* contents) {
  absl::flat_hash_set<uint64_t> used;
  for (const StoredChunk& chunk : contents->chunks) used.insert(chunk.record.serial);
  const uint64_t serial_end = next_serial_;
  const std::unique_ptr<rocksdb::Iterator> entry(db_->NewIterator(rocksdb::ReadOptions()));
  for (entry->Seek(rocksdb::Slice(&kQuarantinedTag, 1));
       entry->Valid() && entry->key().starts_with(rocksdb::Slice(&kQuarantinedTag, 1));
       entry->Next()) {
    Quarantined& aside = contents->quarantined.emplace_back();
    aside.record_key = entry->key().ToString();
    aside.charged_bytes = ChargedBytes(entry->value().size());
    const absl::StatusOr<StoredChunk> chunk = ParseRecord(*entry, serial_end);
    if (chunk.ok()) aside.charged_bytes = chunk->record.charged_bytes();
    // A damaged key may name a good chunk's serial: its shards are not ours to remove.
    const std::optional<ParsedRecordKey> parsed = ParseRecordKey(AsView(entry->key()));
    if (parsed && parsed->serial < serial_end && !used.contains(parsed->serial)) {
      aside.serial = parsed->serial;
    }
  }
  return entry->status().ok() ? absl::OkStatus() : OpenError(entry->status());
}

}  // namespace kvshrink::store

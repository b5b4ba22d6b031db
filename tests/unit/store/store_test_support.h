// What the tests of the store share: a clock that stands still, a directory that goes away, shards
// of known bytes, RocksDB from below.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rocksdb/db.h>

#include <atomic>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "store/clock.h"
#include "store/limits.h"
#include "store/store.h"

#if defined(__SANITIZE_THREAD__)
// The system's RocksDB is built without ThreadSanitizer, which so can't see how it keeps its
// threads apart: neither in its own calls of the C library nor in templates of its headers, which
// it takes from the test's binary. Races of our own have no frame of it. DiskTier::Write is where
// the threads' writes are joined.
extern "C" const char* __tsan_default_suppressions();
extern "C" const char* __tsan_default_suppressions() {
  return "called_from_lib:librocksdb\nrace:librocksdb\nrace:DiskTier::Write\n";
}
#endif

namespace kvshrink::store {

class FakeClock : public Clock {
 public:
  int64_t SteadyMs() const override { return now_ms_; }
  int64_t UnixMs() const override { return kStartUnixMs + now_ms_; }
  void Advance(int64_t ms) { now_ms_ += ms; }

  static constexpr int64_t kStartUnixMs = 1'700'000'000'000;

 private:
  std::atomic<int64_t> now_ms_{1000};
};

class TempDir {
 public:
  TempDir() {
    std::string name = (std::filesystem::temp_directory_path() / "kvshrink-store-XXXXXX").string();
    EXPECT_NE(mkdtemp(name.data()), nullptr);
    path_ = name;
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

inline ChunkKey Key(std::string key, std::string name_space = "model", std::string tenant = "t") {
  return {std::move(tenant), std::move(name_space), std::move(key)};
}

// Bytes that depend on every argument.
inline std::string ShardBytes(std::string_view seed, uint32_t layer, size_t size) {
  uint64_t state = 0x9E3779B97F4A7C15 * (layer + 1);
  for (const char c : seed) state = (state ^ static_cast<uint8_t>(c)) * 0x100000001B3;
  std::string bytes(size, '\0');
  for (char& byte : bytes) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    byte = static_cast<char>(state >> 56);
  }
  return bytes;
}

inline ShardMeta Meta(uint32_t layer, size_t size, uint32_t tokens = 256) {
  ShardMeta meta;
  meta.layer = layer;
  meta.profile = 7;
  meta.dtype = 2;
  meta.tokens = tokens;
  meta.kv_heads = 8;
  meta.head_dim = 128;
  meta.first_token = 512;
  meta.raw_bytes = 7 * size;
  meta.bytes = size;
  return meta;
}

inline absl::StatusOr<PutResult> PutShard(Store* store, const ChunkKey& key, uint32_t layers,
                                          uint32_t layer, std::string bytes) {
  const ShardMeta meta = Meta(layer, bytes.size());
  return store->Put(key, layers, meta, std::make_shared<const std::string>(std::move(bytes)));
}

// Puts all layers of a chunk whose bytes follow from its key; doesn't commit.
inline absl::Status PutChunk(Store* store, const ChunkKey& key, uint32_t layers, size_t size) {
  for (uint32_t layer = 0; layer < layers; ++layer) {
    const auto put = PutShard(store, key, layers, layer, ShardBytes(key.key, layer, size));
    if (!put.ok()) return put.status();
  }
  return absl::OkStatus();
}

inline absl::Status CommitChunk(Store* store, const ChunkKey& key, uint32_t layers, size_t size) {
  absl::Status status = PutChunk(store, key, layers, size);
  return status.ok() ? store->Commit(key) : status;
}

// Whether all layers of a chunk can be read and have the bytes of PutChunk.
inline testing::AssertionResult IsWhole(Store* store, const ChunkKey& key, uint32_t layers,
                                        size_t size) {
  for (uint32_t layer = 0; layer < layers; ++layer) {
    const absl::StatusOr<FoundShard> shard = store->Get(key, layer);
    if (!shard.ok()) {
      return testing::AssertionFailure() << key.key << " layer " << layer << ": " << shard.status();
    }
    if (*shard->bytes != ShardBytes(key.key, layer, size)) {
      return testing::AssertionFailure() << key.key << " layer " << layer << ": other bytes";
    }
    if (shard->meta != Meta(layer, size)) {
      return testing::AssertionFailure() << key.key << " layer " << layer << ": other meta";
    }
  }
  return testing::AssertionSuccess();
}

// What a chunk takes of a budget.
constexpr uint64_t ChunkCost(uint32_t layers, size_t size) { return layers * ChargedBytes(size); }

inline uint64_t Used(const Store& store, TierName tier) {
  for (const TierUsage& usage : store.Usage()) {
    if (usage.tier == tier) return usage.used_bytes;
  }
  ADD_FAILURE() << "no such tier";
  return 0;
}

// The store's database, opened without the store.
class RawDatabase {
 public:
  explicit RawDatabase(const std::string& data_dir) {
    rocksdb::DBOptions options;
    options.create_if_missing = true;
    options.create_missing_column_families = true;
    rocksdb::ColumnFamilyOptions family;
    rocksdb::DB* db = nullptr;
    const rocksdb::Status status = rocksdb::DB::Open(
        options, data_dir + "/store", {{"default", family}, {"shards", family}}, &handles_, &db);
    EXPECT_TRUE(status.ok()) << status.ToString();
    db_.reset(db);
  }
  ~RawDatabase() {
    for (rocksdb::ColumnFamilyHandle* handle : handles_) db_->DestroyColumnFamilyHandle(handle);
  }

  // The entries whose key begins with `prefix`.
  using Entries = std::vector<std::pair<std::string, std::string>>;
  Entries Records(std::string_view prefix) const { return Read(handles_[0], prefix); }
  Entries Shards() const { return Read(handles_[1], ""); }
  void PutRecord(const std::string& key, const std::string& value) {
    Expect(db_->Put(rocksdb::WriteOptions(), handles_[0], key, value));
  }
  void DeleteRecord(const std::string& key) {
    Expect(db_->Delete(rocksdb::WriteOptions(), handles_[0], key));
  }
  void PutShard(const std::string& key, const std::string& value) {
    Expect(db_->Put(rocksdb::WriteOptions(), handles_[1], key, value));
  }
  void DeleteShard(const std::string& key) {
    Expect(db_->Delete(rocksdb::WriteOptions(), handles_[1], key));
  }

 private:
  static void Expect(const rocksdb::Status& status) {
    EXPECT_TRUE(status.ok()) << status.ToString();
  }

  Entries Read(rocksdb::ColumnFamilyHandle* handle, std::string_view prefix) const {
    Entries entries;
    const std::unique_ptr<rocksdb::Iterator> entry(db_->NewIterator({}, handle));
    const rocksdb::Slice start(prefix.data(), prefix.size());
    for (entry->Seek(start); entry->Valid() && entry->key().starts_with(start); entry->Next()) {
      entries.emplace_back(entry->key().ToString(), entry->value().ToString());
    }
    return entries;
  }

  std::unique_ptr<rocksdb::DB> db_;
  std::vector<rocksdb::ColumnFamilyHandle*> handles_;
};

// Opens a store that must open.
inline std::unique_ptr<Store> OpenStore(const StoreOptions& options) {
  absl::StatusOr<std::unique_ptr<Store>> store = Store::Open(options);
  EXPECT_TRUE(store.ok()) << store.status();
  return store.ok() ? *std::move(store) : nullptr;
}

inline testing::AssertionResult HasCode(const absl::Status& status, absl::StatusCode code) {
  if (status.code() == code) return testing::AssertionSuccess();
  return testing::AssertionFailure() << status;
}

}  // namespace kvshrink::store

// Damage on disk: found, said once, set aside, and never served.
#include "store/byte_code.h"
#include "store/chunk_record.h"
#include "store/disk_keys.h"
#include "store_test_support.h"

namespace kvshrink::store {
namespace {

using absl::StatusCode;

constexpr size_t kSize = 6000;

class Damage : public testing::Test {
 protected:
  void SetUp() override {
    options_.data_dir = dir_.path();
    options_.clock = &clock_;
    options_.host_bytes = 0;  // every Get reads the disk
    Reopen();
    for (const char* key : {"bad", "good"}) {
      ASSERT_TRUE(CommitChunk(store_.get(), Key(key), 2, kSize).ok());
      clock_.Advance(1);
    }
    Close();
  }
  void Close() { store_.reset(); }
  void Reopen() {
    store_.reset();
    store_ = OpenStore(options_);
    ASSERT_NE(store_, nullptr);
  }
  // Key of shard 1 of chunk "bad": its serial is the first.
  static std::string BadShard(const RawDatabase& raw) { return raw.Shards()[1].first; }
  static std::string BadRecord(const RawDatabase& raw) { return raw.Records("c")[0].first; }

  void ExpectAMiss() {
    EXPECT_TRUE(HasCode(store_->Get(Key("bad"), 0).status(), StatusCode::kNotFound));
    EXPECT_TRUE(HasCode(store_->Get(Key("bad"), 1).status(), StatusCode::kNotFound));
    EXPECT_TRUE(HasCode(store_->Stat(Key("bad")).status(), StatusCode::kNotFound));
    EXPECT_EQ(store_->Lookup("t", "model", {"bad"}, 0).present, 0u);
    EXPECT_EQ(store_->List("t", "", 0, "")->chunks.size(), 1u);
    EXPECT_TRUE(IsWhole(store_.get(), Key("good"), 2, kSize));
  }
  // DATA_LOSS, then a miss, over a restart too; the key can be written anew; what was damaged stays
  // on disk aside.
  void ExpectFoundOnce() {
    Reopen();
    EXPECT_TRUE(store_->Get(Key("bad"), 0).ok());
    EXPECT_TRUE(HasCode(store_->Get(Key("bad"), 1).status(), StatusCode::kDataLoss));
    EXPECT_EQ(store_->Counters().quarantined_shards, 1u);
    ExpectAMiss();
    EXPECT_EQ(Used(*store_, TierName::kDisk), ChunkCost(4, kSize));
    Reopen();
    ExpectAMiss();
    EXPECT_EQ(Used(*store_, TierName::kDisk), ChunkCost(4, kSize));
    ASSERT_TRUE(CommitChunk(store_.get(), Key("bad"), 2, kSize).ok());
    EXPECT_TRUE(IsWhole(store_.get(), Key("bad"), 2, kSize));
    Reopen();
    EXPECT_TRUE(IsWhole(store_.get(), Key("bad"), 2, kSize));
    Close();
    EXPECT_EQ(RawDatabase(dir_.path()).Records("q").size(), 1u);
  }

  TempDir dir_;
  FakeClock clock_;
  StoreOptions options_;
  std::unique_ptr<Store> store_;
};

TEST_F(Damage, FlippedBit) {
  {
    RawDatabase raw(dir_.path());
    std::string bytes = ShardBytes("bad", 1, kSize);
    bytes[kSize / 2] = static_cast<char>(bytes[kSize / 2] ^ 4);
    raw.PutShard(BadShard(raw), bytes);
  }
  ExpectFoundOnce();
}

TEST_F(Damage, CutShard) {
  {
    RawDatabase raw(dir_.path());
    raw.PutShard(BadShard(raw), ShardBytes("bad", 1, kSize).substr(0, kSize - 1));
  }
  ExpectFoundOnce();
}

TEST_F(Damage, MissingShard) {
  {
    RawDatabase raw(dir_.path());
    raw.DeleteShard(BadShard(raw));
  }
  ExpectFoundOnce();
}

TEST_F(Damage, ShardOfAnotherChunk) {
  {
    RawDatabase raw(dir_.path());
    raw.PutShard(BadShard(raw), ShardBytes("good", 1, kSize));
  }
  ExpectFoundOnce();
}

TEST_F(Damage, PutFindsTheDamageAndTakesItsPlace) {
  {
    RawDatabase raw(dir_.path());
    raw.PutShard(BadShard(raw), "damaged");
  }
  Reopen();
  const absl::StatusOr<PutResult> put =
      PutShard(store_.get(), Key("bad"), 2, 1, ShardBytes("bad", 1, kSize));
  ASSERT_TRUE(put.ok()) << put.status();
  EXPECT_FALSE(put->already_present);
  EXPECT_EQ(store_->Counters().quarantined_shards, 1u);
  EXPECT_FALSE(store_->Stat(Key("bad"))->committed);
  ASSERT_TRUE(CommitChunk(store_.get(), Key("bad"), 2, kSize).ok());
  EXPECT_TRUE(IsWhole(store_.get(), Key("bad"), 2, kSize));
}

// Different bytes with the same checksum and size, as a collision would be: the record is made to
// say so.
TEST_F(Damage, EqualChecksumsAreNoProof) {
  const std::string other = ShardBytes("other", 1, kSize);
  {
    RawDatabase raw(dir_.path());
    const std::string record_key = BadRecord(raw);
    const std::string chunk_key = record_key.substr(1, record_key.size() - 9);
    ChunkRecord record = *DecodeRecord(chunk_key, raw.Records("c")[0].second);
    record.shards[1].checksum = Checksum(other);
    raw.PutRecord(record_key, EncodeRecord(chunk_key, record));
  }
  Reopen();
  const absl::StatusOr<PutResult> put = PutShard(store_.get(), Key("bad"), 2, 1, other);
  ASSERT_TRUE(put.ok()) << put.status();
  EXPECT_FALSE(put->already_present);  // the stored bytes were looked at, and found damaged
}

TEST_F(Damage, ReportDamagedOutlivesRestarts) {
  Reopen();
  store_->ReportDamaged(Key("bad"));
  ExpectAMiss();
  Reopen();
  ExpectAMiss();
  EXPECT_EQ(store_->Counters().quarantined_shards, 0u);
}

TEST_F(Damage, LeasesDoNotKeepADamagedChunk) {
  {
    RawDatabase raw(dir_.path());
    raw.DeleteShard(BadShard(raw));
  }
  Reopen();
  const uint64_t lease = store_->Lookup("t", "model", {"bad", "good"}, 1000).lease_id;
  ASSERT_NE(lease, 0u);
  EXPECT_TRUE(HasCode(store_->Get(Key("bad"), 1).status(), StatusCode::kDataLoss));
  EXPECT_TRUE(HasCode(store_->Get(Key("bad"), 0).status(), StatusCode::kNotFound));
  EXPECT_TRUE(store_->Release("t", lease));
  EXPECT_TRUE(store_->Delete(Key("good")).ok());
}

TEST_F(Damage, BadRecordIsSetAsideAtOpen) {
  {
    RawDatabase raw(dir_.path());
    std::string value = raw.Records("c")[0].second;
    value[30] = static_cast<char>(value[30] ^ 1);
    raw.PutRecord(BadRecord(raw), value);
  }
  Reopen();
  EXPECT_EQ(store_->Counters().quarantined_shards, 1u);
  ExpectAMiss();
  Reopen();
  EXPECT_EQ(store_->Counters().quarantined_shards, 0u);
  ExpectAMiss();
  Close();
  EXPECT_EQ(RawDatabase(dir_.path()).Records("q").size(), 1u);
}

TEST_F(Damage, HostileRecordsAreSetAsideAndHarmNoOther) {
  {
    RawDatabase raw(dir_.path());
    const RawDatabase::Entries records = raw.Records("c");
    const std::string good_serial = records[1].first.substr(records[1].first.size() - 8);
    raw.PutRecord("c", "");
    raw.PutRecord("c\xFF\xFF", "short key");
    raw.PutRecord("c" + std::string(2000, '\xFF'), std::string(1 << 20, 'x'));
    // A sealed record of another chunk that claims the good chunk's shards.
    ParsedRecordKey good = *ParseRecordKey(records[1].first);
    const std::string good_key = records[1].first.substr(1, records[1].first.size() - 9);
    ChunkRecord record = *DecodeRecord(good_key, records[1].second);
    std::string thief;
    AppendChunkKey(&thief, Key("thief"));
    raw.PutRecord("c" + thief + good_serial, EncodeRecord(thief, record));
    // A sealed record with a serial from the future.
    record.serial = ~uint64_t{0};
    std::string future;
    AppendChunkKey(&future, Key("future"));
    raw.PutRecord(RecordKey('c', Key("future"), ~uint64_t{0}), EncodeRecord(future, record));
    // The good record's value under another serial.
    raw.PutRecord(RecordKey('c', Key("good"), good.serial - 1), records[1].second);
  }
  Reopen();
  EXPECT_EQ(store_->Counters().quarantined_shards, 6u);
  EXPECT_EQ(store_->chunks(), 2u);
  EXPECT_TRUE(IsWhole(store_.get(), Key("good"), 2, kSize));
  EXPECT_FALSE(store_->Stat(Key("thief")).ok());
  // Clearing all of quarantine away takes nothing of the good chunk.
  options_.disk_bytes = ChunkCost(4, kSize);
  Reopen();
  EXPECT_TRUE(IsWhole(store_.get(), Key("good"), 2, kSize));
  EXPECT_EQ(Used(*store_, TierName::kDisk), ChunkCost(4, kSize));
  Close();
  EXPECT_EQ(RawDatabase(dir_.path()).Records("q").size(), 0u);
}

TEST_F(Damage, QuarantineGoesFirstWhenRoomIsShort) {
  options_.disk_bytes = ChunkCost(4, kSize);
  Reopen();
  store_->ReportDamaged(Key("good"));
  EXPECT_EQ(Used(*store_, TierName::kDisk), ChunkCost(4, kSize));
  ASSERT_TRUE(CommitChunk(store_.get(), Key("new"), 2, kSize).ok());
  EXPECT_TRUE(IsWhole(store_.get(), Key("bad"), 2, kSize));
  EXPECT_EQ(store_->Counters().evicted_chunks, 0u);
  Reopen();
  EXPECT_EQ(store_->chunks(), 2u);
  Close();
  const RawDatabase raw(dir_.path());
  EXPECT_EQ(raw.Records("q").size(), 0u);
  EXPECT_EQ(raw.Shards().size(), 4u);
}

TEST_F(Damage, MissingBlobFileCostsItsChunksOnly) {
  Reopen();  // the log's contents are in files now
  Close();
  int removed = 0;
  for (const auto& file : std::filesystem::directory_iterator(dir_.path() + "/store")) {
    if (file.path().extension() == ".blob") removed += std::filesystem::remove(file.path());
  }
  ASSERT_GT(removed, 0);
  const absl::StatusOr<std::unique_ptr<Store>> opened = Store::Open(options_);
  if (!opened.ok()) {  // RocksDB may see it at once
    EXPECT_TRUE(HasCode(opened.status(), StatusCode::kDataLoss));
    return;
  }
  EXPECT_TRUE(HasCode((*opened)->Get(Key("bad"), 0).status(), StatusCode::kDataLoss));
  EXPECT_TRUE(HasCode((*opened)->Get(Key("bad"), 0).status(), StatusCode::kNotFound));
  EXPECT_TRUE(HasCode((*opened)->Get(Key("good"), 0).status(), StatusCode::kDataLoss));
  EXPECT_EQ((*opened)->chunks(), 0u);
}

}  // namespace
}  // namespace kvshrink::store

// The disk tier over restarts: what stays, in which order it goes, whose directory it is.
#include <fstream>

#include "store/disk_keys.h"
#include "store_test_support.h"

namespace kvshrink::store {
namespace {

using absl::StatusCode;
using testing::HasSubstr;

constexpr size_t kSize = 6000;

class Restart : public testing::Test {
 protected:
  Restart() {
    options_.data_dir = dir_.path();
    options_.clock = &clock_;
  }
  void Reopen() {
    store_.reset();
    store_ = OpenStore(options_);
    ASSERT_NE(store_, nullptr);
  }
  absl::Status OpenError() {
    store_.reset();
    return Store::Open(options_).status();
  }

  // Of all files; closes the store.
  uint64_t BytesOnDisk() {
    store_.reset();
    uint64_t bytes = 0;
    for (const auto& file : std::filesystem::recursive_directory_iterator(dir_.path())) {
      if (file.is_regular_file()) bytes += file.file_size();
    }
    ::testing::Test::RecordProperty("bytes_on_disk", std::to_string(bytes));
    return bytes;
  }

  TempDir dir_;
  FakeClock clock_;
  StoreOptions options_;
  std::unique_ptr<Store> store_;
};

TEST_F(Restart, CommittedChunksStayUncommittedGo) {
  Reopen();
  const ChunkKey odd{"t", "model", std::string("\0\xFF\n", 3)};
  ASSERT_TRUE(CommitChunk(store_.get(), Key("a"), 3, kSize).ok());
  ASSERT_TRUE(CommitChunk(store_.get(), odd, 1, kSize).ok());
  ASSERT_TRUE(PutChunk(store_.get(), Key("b"), 1, kSize).ok());
  ASSERT_TRUE(CommitChunk(store_.get(), Key("gone"), 2, kSize).ok());
  ASSERT_TRUE(store_->Delete(Key("gone")).ok());
  const ChunkStat before = *store_->Stat(Key("a"));

  clock_.Advance(5000);
  Reopen();
  EXPECT_EQ(store_->chunks(), 2u);
  EXPECT_EQ(Used(*store_, TierName::kDisk), ChunkCost(4, kSize));
  ChunkStat after = *store_->Stat(Key("a"));
  EXPECT_EQ(after.shards, before.shards);
  EXPECT_EQ(after.created_unix_ms, before.created_unix_ms);
  EXPECT_THAT(after.tiers, testing::ElementsAre(TierName::kDisk));
  EXPECT_TRUE(IsWhole(store_.get(), Key("a"), 3, kSize));
  EXPECT_TRUE(IsWhole(store_.get(), odd, 1, kSize));
  EXPECT_TRUE(HasCode(store_->Stat(Key("b")).status(), StatusCode::kNotFound));
  EXPECT_TRUE(HasCode(store_->Stat(Key("gone")).status(), StatusCode::kNotFound));
  EXPECT_EQ(store_->Counters().quarantined_shards, 0u);
}

TEST_F(Restart, DiskHitsArePromoted) {
  Reopen();
  ASSERT_TRUE(CommitChunk(store_.get(), Key("a"), 2, kSize).ok());
  Reopen();
  EXPECT_EQ(store_->Get(Key("a"), 0)->tier, TierName::kDisk);
  EXPECT_EQ(store_->Get(Key("a"), 0)->tier, TierName::kHost);
  EXPECT_THAT(store_->Stat(Key("a"))->tiers, testing::ElementsAre(TierName::kDisk));
  EXPECT_EQ(store_->Get(Key("a"), 1)->tier, TierName::kDisk);
  EXPECT_THAT(store_->Stat(Key("a"))->tiers,
              testing::ElementsAre(TierName::kHost, TierName::kDisk));
  EXPECT_EQ(store_->Counters().disk_hits, 2u);
  EXPECT_EQ(store_->Counters().host_hits, 1u);
}

TEST_F(Restart, HostTierIsACacheAboveTheDisk) {
  options_.host_bytes = ChunkCost(2, kSize);
  Reopen();
  for (const char* key : {"a", "b", "c"}) {
    ASSERT_TRUE(CommitChunk(store_.get(), Key(key), 2, kSize).ok());
    EXPECT_LE(Used(*store_, TierName::kHost), options_.host_bytes);
  }
  for (const char* key : {"a", "b", "c"}) {
    EXPECT_TRUE(IsWhole(store_.get(), Key(key), 2, kSize));
    EXPECT_LE(Used(*store_, TierName::kHost), options_.host_bytes);
  }
  EXPECT_GT(store_->Counters().disk_hits, 0u);
  EXPECT_EQ(store_->Counters().evicted_chunks, 0u);
}

TEST_F(Restart, SameBytesAreComparedWithTheDisk) {
  options_.host_bytes = 0;
  Reopen();
  ASSERT_TRUE(CommitChunk(store_.get(), Key("a"), 1, kSize).ok());
  Reopen();
  const absl::StatusOr<PutResult> same =
      PutShard(store_.get(), Key("a"), 1, 0, ShardBytes("a", 0, kSize));
  ASSERT_TRUE(same.ok()) << same.status();
  EXPECT_TRUE(same->already_present);
  EXPECT_EQ(same->tier, TierName::kDisk);
  EXPECT_TRUE(HasCode(PutShard(store_.get(), Key("a"), 1, 0, ShardBytes("b", 0, kSize)).status(),
                      StatusCode::kAlreadyExists));
}

TEST_F(Restart, EvictionGoesByAge) {
  options_.disk_bytes = ChunkCost(3, kSize);
  Reopen();
  for (const char* key : {"c", "a", "b"}) {
    ASSERT_TRUE(CommitChunk(store_.get(), Key(key), 1, kSize).ok());
    clock_.Advance(10);
  }
  Reopen();
  ASSERT_TRUE(CommitChunk(store_.get(), Key("d"), 1, kSize).ok());
  EXPECT_FALSE(store_->Stat(Key("c")).ok());
  Reopen();  // the eviction itself is durable
  EXPECT_FALSE(store_->Stat(Key("c")).ok());
  for (const char* key : {"a", "b", "d"}) EXPECT_TRUE(IsWhole(store_.get(), Key(key), 1, kSize));
}

TEST_F(Restart, ASmallerCapacityEvictsAtOnce) {
  Reopen();
  for (const char* key : {"a", "b", "c"}) {
    ASSERT_TRUE(CommitChunk(store_.get(), Key(key), 1, kSize).ok());
    clock_.Advance(10);
  }
  options_.disk_bytes = ChunkCost(1, kSize);
  Reopen();
  EXPECT_EQ(store_->chunks(), 1u);
  EXPECT_TRUE(IsWhole(store_.get(), Key("c"), 1, kSize));
  options_.disk_bytes = ChunkCost(100, kSize);
  Reopen();
  EXPECT_EQ(store_->chunks(), 1u);
  store_.reset();
  EXPECT_EQ(RawDatabase(dir_.path()).Shards().size(), 1u);
}

TEST_F(Restart, EvictedAndDeletedShardsLeaveTheDatabase) {
  options_.disk_bytes = ChunkCost(4, kSize);
  Reopen();
  for (const char* key : {"a", "b", "c"}) {
    ASSERT_TRUE(CommitChunk(store_.get(), Key(key), 2, kSize).ok());
  }
  ASSERT_TRUE(store_->Delete(Key("b")).ok());
  store_.reset();
  const RawDatabase raw(dir_.path());
  EXPECT_EQ(raw.Shards().size(), 2u);
  EXPECT_EQ(raw.Records("c").size(), 1u);
  EXPECT_EQ(raw.Records("q").size(), 0u);
}

// Evicted shards must give their space back to the file system, not only to the budget.
TEST_F(Restart, DiskUseStaysNearTheCapacity) {
  options_.disk_bytes = 16 << 20;
  options_.host_bytes = 0;
  Reopen();
  for (int i = 0; i < 200; ++i) {  // 100 MiB through 16
    ASSERT_TRUE(CommitChunk(store_.get(), Key("key" + std::to_string(i)), 4, 128 << 10).ok());
  }
  store_.reset();
  EXPECT_LT(BytesOnDisk(), 3 * options_.disk_bytes);
  Reopen();
  EXPECT_TRUE(IsWhole(store_.get(), Key("key199"), 4, 128 << 10));
}

// The same where every file keeps a few shards that stay: those must be moved, or their files would
// stay whole.
TEST_F(Restart, ShardsThatStayDoNotHoldTheSpaceOfOthers) {
  constexpr size_t kSmall = 16 << 10;
  options_.disk_bytes = 16 << 20;
  options_.host_bytes = 0;
  Reopen();
  for (int i = 0; i < 1600; ++i) {  // 100 MiB; one chunk of 16 stays
    const std::string key = "key" + std::to_string(i);
    ASSERT_TRUE(CommitChunk(store_.get(), Key(key), 4, kSmall).ok());
    if (i % 16 == 0) {
      ASSERT_EQ(store_->Lookup("t", "model", {key}, 1'000'000).present, 1u);
    }
  }
  EXPECT_LT(BytesOnDisk(), 3 * options_.disk_bytes);
  Reopen();
  EXPECT_TRUE(IsWhole(store_.get(), Key("key0"), 4, kSmall));
  EXPECT_TRUE(IsWhole(store_.get(), Key("key1584"), 4, kSmall));
}

TEST_F(Restart, TheDirectoryHasOneHolder) {
  Reopen();
  const absl::Status status = Store::Open(options_).status();
  EXPECT_TRUE(HasCode(status, StatusCode::kFailedPrecondition));
  EXPECT_THAT(std::string(status.message()), HasSubstr("another process holds it"));
  store_.reset();
  EXPECT_TRUE(Store::Open(options_).ok());
}

TEST_F(Restart, DirectoryIsMadeForItsOwnerAlone) {
  options_.data_dir = dir_.path() + "/new/dir";
  Reopen();
  EXPECT_EQ(std::filesystem::status(options_.data_dir).permissions(),
            std::filesystem::perms::owner_all);
}

TEST_F(Restart, OtherVersionsAreRefused) {
  Reopen();
  store_.reset();
  std::string marker;
  {
    RawDatabase raw(dir_.path());
    marker = raw.Records(kMarkerKey)[0].second;
    std::string later = marker;
    later[4] = 2;
    raw.PutRecord("m", later);
  }
  absl::Status status = OpenError();
  EXPECT_TRUE(HasCode(status, StatusCode::kDataLoss));
  EXPECT_THAT(std::string(status.message()), HasSubstr("'version' is 2: must be 1"));
  std::string damaged = marker;
  damaged[9] = static_cast<char>(damaged[9] ^ 1);
  for (const std::string& bad :
       {std::string(), std::string("other magic"), damaged, marker + "x", marker.substr(0, 10)}) {
    RawDatabase(dir_.path()).PutRecord("m", bad);
    EXPECT_TRUE(HasCode(OpenError(), StatusCode::kDataLoss)) << bad;
  }
  RawDatabase(dir_.path()).PutRecord("m", marker);
  EXPECT_TRUE(OpenError().ok());
}

TEST_F(Restart, ForeignDatabasesAreRefusedAndLeftAlone) {
  RawDatabase(dir_.path()).PutRecord("someone", "else's");
  EXPECT_TRUE(HasCode(OpenError(), StatusCode::kDataLoss));
  EXPECT_EQ(RawDatabase(dir_.path()).Records("").size(), 1u);
}

TEST_F(Restart, ForeignColumnFamiliesAreRefused) {
  {
    rocksdb::Options options;
    options.create_if_missing = true;
    rocksdb::DB* db = nullptr;
    ASSERT_TRUE(rocksdb::DB::Open(options, dir_.path() + "/store", &db).ok());
    rocksdb::ColumnFamilyHandle* family = nullptr;
    ASSERT_TRUE(db->CreateColumnFamily({}, "theirs", &family).ok());
    db->DestroyColumnFamilyHandle(family);
    delete db;
  }
  const absl::Status status = OpenError();
  EXPECT_TRUE(HasCode(status, StatusCode::kDataLoss));
  EXPECT_THAT(std::string(status.message()), HasSubstr("'column family' is theirs"));
}

TEST_F(Restart, ACrashBeforeTheMarkerIsNoLoss) {
  { RawDatabase empty(dir_.path()); }
  Reopen();
  EXPECT_EQ(store_->chunks(), 0u);
}

TEST_F(Restart, APartOfADatabaseIsRefused) {
  Reopen();
  ASSERT_TRUE(CommitChunk(store_.get(), Key("a"), 1, kSize).ok());
  Reopen();  // writes files
  store_.reset();
  std::filesystem::remove(dir_.path() + "/store/CURRENT");
  const absl::Status status = OpenError();
  EXPECT_TRUE(HasCode(status, StatusCode::kDataLoss));
  EXPECT_THAT(std::string(status.message()), HasSubstr("'CURRENT' is absent"));
}

TEST_F(Restart, AManifestOfNonsenseIsRefused) {
  Reopen();
  store_.reset();
  for (const auto& file : std::filesystem::directory_iterator(dir_.path() + "/store")) {
    if (file.path().filename().string().starts_with("MANIFEST")) {
      std::ofstream(file.path(), std::ios::binary) << "nonsense";
    }
  }
  EXPECT_TRUE(HasCode(OpenError(), StatusCode::kDataLoss));
}

// A crash between an eviction and the write that makes it durable can leave two commits of one key.
TEST_F(Restart, OfTwoCommitsOfAKeyTheLaterCounts) {
  Reopen();
  ASSERT_TRUE(PutShard(store_.get(), Key("a"), 1, 0, "first").ok());
  ASSERT_TRUE(store_->Commit(Key("a")).ok());
  store_.reset();
  RawDatabase::Entries old_records, old_shards;
  {
    RawDatabase raw(dir_.path());
    old_records = raw.Records("c");
    old_shards = raw.Shards();
  }
  Reopen();
  ASSERT_TRUE(store_->Delete(Key("a")).ok());
  ASSERT_TRUE(PutShard(store_.get(), Key("a"), 1, 0, "second").ok());
  ASSERT_TRUE(store_->Commit(Key("a")).ok());
  store_.reset();
  {
    RawDatabase raw(dir_.path());
    raw.PutRecord(old_records[0].first, old_records[0].second);
    raw.PutShard(old_shards[0].first, old_shards[0].second);
  }
  Reopen();
  EXPECT_EQ(*store_->Get(Key("a"), 0)->bytes, "second");
  EXPECT_EQ(store_->chunks(), 1u);
  store_.reset();
  EXPECT_EQ(RawDatabase(dir_.path()).Shards().size(), 1u);
}

}  // namespace
}  // namespace kvshrink::store

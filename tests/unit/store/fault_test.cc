// The disk stalls, fails, or loses power.
#include <future>
#include <thread>

#include "fault_file_system.h"
#include "store/store_impl.h"
#include "store_test_support.h"

namespace kvshrink::store {
namespace {

using absl::StatusCode;

constexpr size_t kSize = 6000;

class Fault : public testing::Test {
 protected:
  void SetUp() override {
    files_ = std::make_shared<FaultFileSystem>();
    env_ = rocksdb::NewCompositeEnv(files_);
    options_.data_dir = dir_.path() + "/data";
    options_.disk_bytes = ChunkCost(6, kSize);
    Reopen();
  }
  void Reopen() {
    store_.reset();
    absl::StatusOr<std::unique_ptr<Store>> store = StoreImpl::Open(options_, env_.get());
    ASSERT_TRUE(store.ok()) << store.status();
    store_ = *std::move(store);
  }
  // The store as it is after a power cut now.
  std::unique_ptr<Store> AfterPowerCut() {
    StoreOptions options = options_;
    options.data_dir = dir_.path() + "/copy" + std::to_string(++copies_);
    files_->CopySynced(options_.data_dir, options.data_dir);
    return OpenStore(options);
  }

  TempDir dir_;
  std::shared_ptr<FaultFileSystem> files_;
  std::unique_ptr<rocksdb::Env> env_;
  StoreOptions options_;
  int copies_ = 0;
  std::unique_ptr<Store> store_;
};

TEST_F(Fault, PowerCutKeepsWhatWasAcknowledged) {
  ASSERT_TRUE(CommitChunk(store_.get(), Key("a"), 2, kSize).ok());
  ASSERT_TRUE(CommitChunk(store_.get(), Key("b"), 2, kSize).ok());
  ASSERT_TRUE(store_->Delete(Key("a")).ok());
  const std::unique_ptr<Store> after = AfterPowerCut();
  ASSERT_NE(after, nullptr);
  EXPECT_EQ(after->chunks(), 1u);
  EXPECT_TRUE(IsWhole(after.get(), Key("b"), 2, kSize));
}

TEST_F(Fault, PowerCutDuringACommitLeavesNoPartOfIt) {
  ASSERT_TRUE(CommitChunk(store_.get(), Key("a"), 2, kSize).ok());
  ASSERT_TRUE(PutChunk(store_.get(), Key("b"), 2, kSize).ok());
  files_->StallSyncs();
  std::future<absl::Status> commit =
      std::async(std::launch::async, [&] { return store_->Commit(Key("b")); });
  files_->AwaitStalledSync();
  const std::unique_ptr<Store> after = AfterPowerCut();
  files_->Resume();
  EXPECT_TRUE(commit.get().ok());
  ASSERT_NE(after, nullptr);
  EXPECT_TRUE(IsWhole(after.get(), Key("a"), 2, kSize));
  EXPECT_FALSE(after->Stat(Key("b")).ok());
  EXPECT_EQ(Used(*after, TierName::kDisk), ChunkCost(2, kSize));
  EXPECT_TRUE(IsWhole(store_.get(), Key("b"), 2, kSize));
}

TEST_F(Fault, PowerCutKeepsTheQuarantine) {
  ASSERT_TRUE(CommitChunk(store_.get(), Key("a"), 2, kSize).ok());
  store_->ReportDamaged(Key("a"));
  EXPECT_EQ(AfterPowerCut()->chunks(), 0u);
}

// While a commit waits for the disk, all else goes on; what it is about stays as it was.
TEST_F(Fault, NothingWaitsForACommitsSync) {
  options_.host_bytes = 0;
  Reopen();
  ASSERT_TRUE(CommitChunk(store_.get(), Key("a"), 2, kSize).ok());
  ASSERT_TRUE(PutChunk(store_.get(), Key("b"), 2, kSize).ok());
  files_->StallSyncs();
  std::future<absl::Status> commit =
      std::async(std::launch::async, [&] { return store_->Commit(Key("b")); });
  files_->AwaitStalledSync();

  EXPECT_TRUE(IsWhole(store_.get(), Key("a"), 2, kSize));  // from disk
  EXPECT_TRUE(PutChunk(store_.get(), Key("c"), 1, kSize).ok());
  EXPECT_EQ(store_->Lookup("t", "model", {"a", "b"}, 0).present, 1u);
  EXPECT_EQ(store_->List("t", "", 0, "")->chunks.size(), 1u);
  EXPECT_FALSE(store_->Stat(Key("b"))->committed);
  EXPECT_TRUE(HasCode(store_->Get(Key("b"), 0).status(), StatusCode::kNotFound));
  EXPECT_TRUE(PutShard(store_.get(), Key("b"), 2, 0, ShardBytes("b", 0, kSize))->already_present);
  EXPECT_EQ(Used(*store_, TierName::kDisk), ChunkCost(4, kSize));
  store_->Tick();
  EXPECT_EQ(commit.wait_for(std::chrono::seconds(0)), std::future_status::timeout);

  // A second commit and a deletion of the chunk wait for the first, then find it done.
  std::future<absl::Status> again =
      std::async(std::launch::async, [&] { return store_->Commit(Key("b")); });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_EQ(again.wait_for(std::chrono::seconds(0)), std::future_status::timeout);
  files_->Resume();
  EXPECT_TRUE(commit.get().ok());
  EXPECT_TRUE(again.get().ok());
  EXPECT_TRUE(IsWhole(store_.get(), Key("b"), 2, kSize));
  // It was written once.
  EXPECT_EQ(Used(*store_, TierName::kDisk), ChunkCost(4, kSize));
  store_.reset();
  EXPECT_EQ(RawDatabase(options_.data_dir).Shards().size(), 4u);
}

TEST_F(Fault, AChunkBeingCommittedDoesNotExpire) {
  FakeClock clock;
  options_.clock = &clock;
  options_.uncommitted_ttl_ms = 10;
  Reopen();
  ASSERT_TRUE(PutChunk(store_.get(), Key("b"), 2, kSize).ok());
  files_->StallSyncs();
  std::future<absl::Status> commit =
      std::async(std::launch::async, [&] { return store_->Commit(Key("b")); });
  files_->AwaitStalledSync();
  clock.Advance(1000);
  store_->Tick();
  EXPECT_TRUE(store_->Stat(Key("b")).ok());
  files_->Resume();
  EXPECT_TRUE(commit.get().ok());
  EXPECT_TRUE(IsWhole(store_.get(), Key("b"), 2, kSize));
}

TEST_F(Fault, DeletionWaitsForTheCommit) {
  ASSERT_TRUE(PutChunk(store_.get(), Key("b"), 2, kSize).ok());
  files_->StallSyncs();
  std::future<absl::Status> commit =
      std::async(std::launch::async, [&] { return store_->Commit(Key("b")); });
  files_->AwaitStalledSync();
  std::future<absl::Status> deletion =
      std::async(std::launch::async, [&] { return store_->Delete(Key("b")); });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_EQ(deletion.wait_for(std::chrono::seconds(0)), std::future_status::timeout);
  files_->Resume();
  EXPECT_TRUE(commit.get().ok());
  EXPECT_TRUE(deletion.get().ok());
  EXPECT_EQ(store_->chunks(), 0u);
  EXPECT_EQ(store_->uncommitted_bytes(), 0u);
  EXPECT_EQ(AfterPowerCut()->chunks(), 0u);
}

TEST_F(Fault, AFailedCommitChangesNothing) {
  for (const char* key : {"a", "b", "c"}) {
    ASSERT_TRUE(CommitChunk(store_.get(), Key(key), 2, kSize).ok());
  }
  ASSERT_TRUE(PutChunk(store_.get(), Key("d"), 2, kSize).ok());
  files_->FailSyncs();
  EXPECT_TRUE(HasCode(store_->Commit(Key("d")), StatusCode::kUnavailable));  // would evict "a"
  EXPECT_EQ(store_->chunks(), 3u);
  EXPECT_EQ(store_->Counters().evicted_chunks, 0u);
  EXPECT_EQ(Used(*store_, TierName::kDisk), ChunkCost(6, kSize));
  EXPECT_FALSE(store_->Stat(Key("d"))->committed);
  EXPECT_EQ(store_->uncommitted_bytes(), ChunkCost(2, kSize));
  for (const char* key : {"a", "b", "c"}) EXPECT_TRUE(IsWhole(store_.get(), Key(key), 2, kSize));
  EXPECT_TRUE(HasCode(store_->Commit(Key("d")), StatusCode::kUnavailable));  // again: no deadlock
  EXPECT_TRUE(HasCode(store_->Delete(Key("b")), StatusCode::kUnavailable));
  EXPECT_TRUE(IsWhole(store_.get(), Key("b"), 2, kSize));
}

TEST_F(Fault, ReadErrorsOfTheDiskAreNoDamage) {
  options_.host_bytes = 0;
  options_.disk_bytes = 1 << 30;
  Reopen();
  ASSERT_TRUE(CommitChunk(store_.get(), Key("a"), 1, kSize).ok());
  Reopen();  // into a blob file
  files_->FailReads(true);
  EXPECT_TRUE(HasCode(store_->Get(Key("a"), 0).status(), StatusCode::kUnavailable));
  EXPECT_EQ(store_->Counters().quarantined_shards, 0u);
  files_->FailReads(false);
  EXPECT_TRUE(IsWhole(store_.get(), Key("a"), 1, kSize));
}

// What a slow reader brings from a chunk that went meanwhile is still the answer, but isn't kept:
// nothing would ever let go of it.
TEST_F(Fault, AReadThatOutlivesItsChunkIsNotKept) {
  options_.disk_bytes = 1 << 30;
  Reopen();
  ASSERT_TRUE(CommitChunk(store_.get(), Key("a"), 1, kSize).ok());
  Reopen();  // into a blob file, and out of the host tier
  files_->StallReads();
  std::future<absl::StatusOr<FoundShard>> get =
      std::async(std::launch::async, [&] { return store_->Get(Key("a"), 0); });
  files_->AwaitStalledRead();
  EXPECT_TRUE(store_->Delete(Key("a")).ok());  // doesn't wait for the reader
  files_->Resume();
  const absl::StatusOr<FoundShard> shard = get.get();
  ASSERT_TRUE(shard.ok()) << shard.status();
  EXPECT_EQ(*shard->bytes, ShardBytes("a", 0, kSize));
  EXPECT_EQ(Used(*store_, TierName::kHost), 0u);
  EXPECT_TRUE(HasCode(store_->Get(Key("a"), 0).status(), StatusCode::kNotFound));
}

}  // namespace
}  // namespace kvshrink::store

// Threads that do everything at once; what each of them sees must be a state the store may be in.
#include <random>
#include <thread>

#include "store_test_support.h"

namespace kvshrink::store {
namespace {

using absl::StatusCode;

constexpr size_t kSize = 2000;
constexpr uint32_t kLayers = 2;
constexpr int kKeys = 12;
constexpr int kRounds = 400;

std::string RandomKey(std::mt19937* random) { return "key" + std::to_string((*random)() % kKeys); }

class Concurrency : public testing::TestWithParam<bool> {
 public:
  void SetUp() override {
    // Room for half of the keys: eviction never rests.
    (GetParam() ? options_.disk_bytes : options_.host_bytes) =
        ChunkCost(kLayers * kKeys / 2, kSize);
    if (GetParam()) {
      options_.data_dir = dir_.path();
      options_.host_bytes = ChunkCost(kLayers * 3, kSize);
    }
    store_ = OpenStore(options_);
    ASSERT_NE(store_, nullptr);
  }

  // Every answer is one that the contract allows, and all bytes are the key's.
  void Write(std::mt19937* random) {
    const ChunkKey key = Key(RandomKey(random));
    EXPECT_TRUE(PutChunk(store_.get(), key, kLayers, kSize).ok());
    const absl::StatusCode code = store_->Commit(key).code();
    // Another thread may have deleted it, or hold leases on all else.
    EXPECT_TRUE(code == StatusCode::kOk || code == StatusCode::kNotFound ||
                code == StatusCode::kFailedPrecondition || code == StatusCode::kResourceExhausted)
        << static_cast<int>(code);
  }
  void Read(std::mt19937* random) {
    const std::string key = RandomKey(random);
    const uint32_t layer = static_cast<uint32_t>((*random)() % kLayers);
    const absl::StatusOr<FoundShard> shard = store_->Get(Key(key), layer);
    if (shard.ok()) {
      EXPECT_EQ(*shard->bytes, ShardBytes(key, layer, kSize));
    } else {
      EXPECT_TRUE(HasCode(shard.status(), StatusCode::kNotFound));
    }
  }
  // What is leased stays readable.
  void ReadUnderLease(std::mt19937* random) {
    const std::string key = RandomKey(random);
    const LookupResult found = store_->Lookup("t", "model", {key}, 60'000);
    if (found.present == 0) return;
    EXPECT_TRUE(IsWhole(store_.get(), Key(key), kLayers, kSize));
    EXPECT_TRUE(HasCode(store_->Delete(Key(key)), StatusCode::kFailedPrecondition));
    EXPECT_TRUE(store_->Release("t", found.lease_id));
  }
  void Inspect(std::mt19937* random) {
    const absl::StatusOr<ListPage> page = store_->List("t", "", 5, "");
    ASSERT_TRUE(page.ok());
    for (const ChunkStat& chunk : page->chunks) EXPECT_EQ(chunk.shards.size(), kLayers);
    const absl::StatusOr<ChunkStat> stat = store_->Stat(Key(RandomKey(random)));
    if (stat.ok() && stat->committed) {
      EXPECT_EQ(stat->shards.size(), kLayers);
    }
    store_->Tick();
    for (const TierUsage& usage : store_->Usage()) {
      EXPECT_LE(usage.used_bytes, usage.capacity_bytes);
    }
  }
  void Delete(std::mt19937* random) {
    const absl::StatusCode code = store_->Delete(Key(RandomKey(random))).code();
    EXPECT_TRUE(code == StatusCode::kOk || code == StatusCode::kNotFound ||
                code == StatusCode::kFailedPrecondition);
  }

 protected:
  TempDir dir_;
  StoreOptions options_;
  std::unique_ptr<Store> store_;
};

INSTANTIATE_TEST_SUITE_P(Tiers, Concurrency, testing::Values(false, true),
                         [](const auto& info) { return info.param ? "Disk" : "HostOnly"; });

TEST_P(Concurrency, EverythingAtOnce) {
  std::vector<std::thread> threads;
  using Act = void (Concurrency::*)(std::mt19937*);
  for (const Act act :
       {&Concurrency::Write, &Concurrency::Write, &Concurrency::Write, &Concurrency::Read,
        &Concurrency::ReadUnderLease, &Concurrency::ReadUnderLease, &Concurrency::Inspect,
        &Concurrency::Delete}) {
    threads.emplace_back([this, act, seed = threads.size()] {
      std::mt19937 random(static_cast<uint32_t>(seed));
      for (int round = 0; round < kRounds; ++round) (this->*act)(&random);
    });
  }
  for (std::thread& thread : threads) thread.join();

  EXPECT_GT(store_->Counters().evicted_chunks, 0u);
  EXPECT_EQ(store_->Counters().quarantined_shards, 0u);
  // Nothing leaked: once all chunks are gone, so are their bytes.
  for (int i = 0; i < kKeys; ++i) {
    const absl::StatusCode code = store_->Delete(Key("key" + std::to_string(i))).code();
    EXPECT_TRUE(code == StatusCode::kOk || code == StatusCode::kNotFound);
  }
  for (const TierUsage& usage : store_->Usage()) EXPECT_EQ(usage.used_bytes, 0u);
  EXPECT_EQ(store_->uncommitted_bytes(), 0u);
  if (!GetParam()) return;
  store_.reset();
  const RawDatabase raw(dir_.path());
  EXPECT_EQ(raw.Records("c").size(), 0u);
  EXPECT_EQ(raw.Shards().size(), 0u);
}

TEST_P(Concurrency, OneOfManyWritersOfAKeyWins) {
  for (int round = 0; round < 20; ++round) {
    const ChunkKey key = Key("round" + std::to_string(round));
    std::atomic<int> taken{0}, present{0}, refused{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < 6; ++i) {
      threads.emplace_back([&, i] {
        const auto put = PutShard(store_.get(), key, 1, 0, i % 2 == 0 ? "even" : "odd");
        if (!put.ok()) {
          EXPECT_TRUE(HasCode(put.status(), StatusCode::kAlreadyExists));
          ++refused;
        } else {
          ++(put->already_present ? present : taken);
        }
        EXPECT_TRUE(store_->Commit(key).ok());
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(taken, 1);
    EXPECT_EQ(present, 2);
    EXPECT_EQ(refused, 3);
  }
}

// A chunk that goes while it is read is there or not there: never damaged, and not kept in memory
// by the reader.
TEST(ConcurrencyOnDisk, ReadersMeetDeletion) {
  const TempDir dir;
  StoreOptions options;
  options.data_dir = dir.path();
  options.host_bytes = ChunkCost(1, kSize);  // one shard of the two: readers go to disk and promote
  const std::unique_ptr<Store> store = OpenStore(options);
  ASSERT_NE(store, nullptr);
  std::atomic<bool> ended{false};
  std::vector<std::thread> readers;
  for (uint32_t reader = 0; reader < 4; ++reader) {
    readers.emplace_back([&, reader] {
      while (!ended) {
        const absl::StatusOr<FoundShard> shard = store->Get(Key("a"), reader % kLayers);
        if (shard.ok()) {
          EXPECT_EQ(*shard->bytes, ShardBytes("a", reader % kLayers, kSize));
        } else {
          EXPECT_TRUE(HasCode(shard.status(), StatusCode::kNotFound));
        }
      }
    });
  }
  for (int round = 0; round < 2 * kRounds; ++round) {
    EXPECT_TRUE(CommitChunk(store.get(), Key("a"), kLayers, kSize).ok());
    EXPECT_TRUE(store->Delete(Key("a")).ok());
  }
  ended = true;
  for (std::thread& reader : readers) reader.join();
  EXPECT_EQ(Used(*store, TierName::kHost), 0u);
  EXPECT_EQ(store->Counters().quarantined_shards, 0u);
  EXPECT_GT(store->Counters().disk_hits, 0u);
}

}  // namespace
}  // namespace kvshrink::store

// Put, Commit, Get, Stat, Delete: the rules that hold with and without a disk tier.
#include <bit>
#include <limits>
#include <utility>

#include "store/byte_code.h"
#include "store/chunk_record.h"
#include "store_test_support.h"

namespace kvshrink::store {
namespace {

using absl::StatusCode;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr size_t kSize = 5000;

class LifeCycle : public testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    if (GetParam()) options_.data_dir = dir_.path();
    options_.clock = &clock_;
    store_ = OpenStore(options_);
    ASSERT_NE(store_, nullptr);
  }
  std::vector<TierName> CommittedTiers() const {
    if (GetParam()) return {TierName::kHost, TierName::kDisk};
    return {TierName::kHost};
  }

  TempDir dir_;
  FakeClock clock_;
  StoreOptions options_;
  std::unique_ptr<Store> store_;
};

INSTANTIATE_TEST_SUITE_P(Tiers, LifeCycle, testing::Values(false, true),
                         [](const auto& info) { return info.param ? "Disk" : "HostOnly"; });

TEST_P(LifeCycle, CommittedChunkComesBack) {
  ASSERT_TRUE(CommitChunk(store_.get(), Key("a"), 3, kSize).ok());
  EXPECT_TRUE(IsWhole(store_.get(), Key("a"), 3, kSize));
  EXPECT_EQ(store_->chunks(), 1u);
  EXPECT_EQ(store_->uncommitted_bytes(), 0u);
  EXPECT_EQ(Used(*store_, CommittedTiers().back()), ChunkCost(3, kSize));
  EXPECT_EQ(store_->Counters().host_hits, 3u);
}

TEST_P(LifeCycle, UncommittedChunkIsSeenByStatAndPutOnly) {
  ASSERT_TRUE(PutChunk(store_.get(), Key("a"), 2, kSize).ok());
  EXPECT_TRUE(HasCode(store_->Get(Key("a"), 0).status(), StatusCode::kNotFound));
  EXPECT_EQ(store_->Lookup("t", "model", {"a"}, 1000).present, 0u);
  EXPECT_EQ(store_->Lookup("t", "model", {"a"}, 1000).lease_id, 0u);
  EXPECT_TRUE(store_->List("t", "", 0, "")->chunks.empty());
  EXPECT_EQ(store_->chunks(), 0u);
  EXPECT_EQ(store_->uncommitted_bytes(), ChunkCost(2, kSize));
  EXPECT_EQ(store_->Counters().misses, 1u);

  const absl::StatusOr<ChunkStat> stat = store_->Stat(Key("a"));
  ASSERT_TRUE(stat.ok());
  EXPECT_FALSE(stat->committed);
  EXPECT_EQ(stat->layers, 2u);
  EXPECT_EQ(stat->bytes, 2 * kSize);
  EXPECT_THAT(stat->shards, ElementsAre(Meta(0, kSize), Meta(1, kSize)));
}

TEST_P(LifeCycle, StatOfACommittedChunk) {
  ASSERT_TRUE(CommitChunk(store_.get(), Key("a"), 2, kSize).ok());
  const absl::StatusOr<ChunkStat> stat = store_->Stat(Key("a"));
  ASSERT_TRUE(stat.ok());
  EXPECT_EQ(stat->key, Key("a"));
  EXPECT_TRUE(stat->committed);
  EXPECT_EQ(stat->layers, 2u);
  EXPECT_EQ(stat->tokens, 256u);
  EXPECT_EQ(stat->bytes, 2 * kSize);
  EXPECT_EQ(stat->raw_bytes, 14 * kSize);
  EXPECT_FALSE(stat->leased);
  EXPECT_EQ(stat->created_unix_ms, clock_.UnixMs());
  EXPECT_THAT(stat->shards, ElementsAre(Meta(0, kSize), Meta(1, kSize)));
  EXPECT_EQ(stat->tiers, CommittedTiers());
}

TEST_P(LifeCycle, LayersComeInAnyOrder) {
  for (const uint32_t layer : {2u, 0u, 1u}) {
    ASSERT_TRUE(PutShard(store_.get(), Key("a"), 3, layer, ShardBytes("a", layer, kSize)).ok());
  }
  ASSERT_TRUE(store_->Commit(Key("a")).ok());
  EXPECT_TRUE(IsWhole(store_.get(), Key("a"), 3, kSize));
}

TEST_P(LifeCycle, CommitNamesMissingLayers) {
  EXPECT_TRUE(HasCode(store_->Commit(Key("a")), StatusCode::kNotFound));
  for (const uint32_t layer : {0u, 2u}) {
    ASSERT_TRUE(PutShard(store_.get(), Key("a"), 5, layer, "bytes").ok());
  }
  const absl::Status status = store_->Commit(Key("a"));
  EXPECT_TRUE(HasCode(status, StatusCode::kFailedPrecondition));
  EXPECT_THAT(std::string(status.message()), HasSubstr("3 missing, layers 1, 3, 4"));
  EXPECT_EQ(store_->chunks(), 0u);
}

TEST_P(LifeCycle, TheListOfMissingLayersIsShort) {
  ASSERT_TRUE(PutShard(store_.get(), Key("a"), 4096, 0, "bytes").ok());
  const absl::Status status = store_->Commit(Key("a"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("4095 missing, layers 1, 2"));
  EXPECT_LT(status.message().size(), 200u);
}

TEST_P(LifeCycle, CommitAgainIsOk) {
  ASSERT_TRUE(CommitChunk(store_.get(), Key("a"), 1, kSize).ok());
  EXPECT_TRUE(store_->Commit(Key("a")).ok());
  EXPECT_EQ(store_->chunks(), 1u);
}

TEST_P(LifeCycle, SameBytesAgainAreNotStoredTwice) {
  const std::string bytes = ShardBytes("a", 0, kSize);
  EXPECT_FALSE(PutShard(store_.get(), Key("a"), 2, 0, bytes)->already_present);
  EXPECT_TRUE(PutShard(store_.get(), Key("a"), 2, 0, bytes)->already_present);
  EXPECT_EQ(store_->uncommitted_bytes(), ChunkCost(1, kSize));
  ASSERT_TRUE(CommitChunk(store_.get(), Key("a"), 2, kSize).ok());
  EXPECT_TRUE(PutShard(store_.get(), Key("a"), 2, 0, bytes)->already_present);
  EXPECT_EQ(store_->uncommitted_bytes(), 0u);
}

TEST_P(LifeCycle, OtherBytesUnderAKeyAreRefused) {
  ASSERT_TRUE(PutChunk(store_.get(), Key("a"), 2, kSize).ok());
  std::string other = ShardBytes("a", 0, kSize);
  other.back() = static_cast<char>(other.back() ^ 1);
  for (const bool committed : {false, true}) {
    SCOPED_TRACE(committed);
    if (committed) {
      ASSERT_TRUE(store_->Commit(Key("a")).ok());
    }
    EXPECT_TRUE(HasCode(PutShard(store_.get(), Key("a"), 2, 0, other).status(),
                        StatusCode::kAlreadyExists));
    EXPECT_TRUE(HasCode(PutShard(store_.get(), Key("a"), 2, 0, "short").status(),
                        StatusCode::kAlreadyExists));
  }
  EXPECT_TRUE(IsWhole(store_.get(), Key("a"), 2, kSize));
}

// Two shards of 16 bytes with one XXH64: the second half is chosen so that it undoes what the other
// first half did.
std::pair<std::string, std::string> CollidingShards() {
  constexpr uint64_t kP1 = 0x9E3779B185EBCA87, kP2 = 0xC2B2AE3D27D4EB4F;
  constexpr uint64_t kP4 = 0x85EBCA77C2B2AE63, kP5 = 0x27D4EB2F165667C5;
  const auto inverse = [](uint64_t odd) {
    uint64_t x = odd;
    for (int i = 0; i < 6; ++i) x *= 2 - odd * x;
    return x;
  };
  const auto mix = [](uint64_t lane) { return std::rotl(lane * kP2, 31) * kP1; };
  const auto unmix = [&](uint64_t x) { return std::rotr(x * inverse(kP1), 31) * inverse(kP2); };
  const auto after = [&](uint64_t first) {
    return std::rotl((kP5 + 16) ^ mix(first), 27) * kP1 + kP4;
  };
  const uint64_t first = 1, second = 2, other = 3;
  const uint64_t balance = unmix(after(other) ^ after(first) ^ mix(second));
  std::pair<std::string, std::string> shards;
  AppendLittleEndian(&shards.first, first);
  AppendLittleEndian(&shards.first, second);
  AppendLittleEndian(&shards.second, other);
  AppendLittleEndian(&shards.second, balance);
  return shards;
}

TEST_P(LifeCycle, EqualChecksumsAreNoProof) {
  const auto [one, other] = CollidingShards();
  ASSERT_NE(one, other);
  ASSERT_EQ(Checksum(one), Checksum(other));
  ASSERT_TRUE(PutShard(store_.get(), Key("a"), 1, 0, one).ok());
  EXPECT_TRUE(
      HasCode(PutShard(store_.get(), Key("a"), 1, 0, other).status(), StatusCode::kAlreadyExists));
  ASSERT_TRUE(store_->Commit(Key("a")).ok());
  EXPECT_TRUE(
      HasCode(PutShard(store_.get(), Key("a"), 1, 0, other).status(), StatusCode::kAlreadyExists));
  if (GetParam()) {  // and when the bytes to compare with must come from disk
    store_.reset();
    store_ = OpenStore(options_);
    EXPECT_TRUE(HasCode(PutShard(store_.get(), Key("a"), 1, 0, other).status(),
                        StatusCode::kAlreadyExists));
  }
  EXPECT_EQ(*store_->Get(Key("a"), 0)->bytes, one);
}

TEST_P(LifeCycle, LayersMustAgree) {
  ASSERT_TRUE(PutShard(store_.get(), Key("a"), 2, 0, "zero").ok());
  for (const bool committed : {false, true}) {
    SCOPED_TRACE(committed);
    if (committed) {
      ASSERT_TRUE(PutShard(store_.get(), Key("a"), 2, 1, "one").ok());
      ASSERT_TRUE(store_->Commit(Key("a")).ok());
    }
    for (const uint32_t layer : {0u, 1u, 2u}) {
      const absl::Status status = PutShard(store_.get(), Key("a"), 3, layer, "zero").status();
      EXPECT_TRUE(HasCode(status, StatusCode::kInvalidArgument));
      EXPECT_THAT(std::string(status.message()), HasSubstr("field 'layers' is 3"));
    }
  }
}

TEST_P(LifeCycle, TokensMustAgree) {
  ASSERT_TRUE(PutShard(store_.get(), Key("a"), 2, 0, "zero").ok());
  ShardMeta meta = Meta(1, 3);
  meta.tokens = 255;
  const auto bytes = std::make_shared<const std::string>("one");
  EXPECT_THAT(std::string(store_->Put(Key("a"), 2, meta, bytes).status().message()),
              HasSubstr("field 'tokens' is 255"));
  meta = Meta(1, 3);
  meta.first_token = 0;
  EXPECT_THAT(std::string(store_->Put(Key("a"), 2, meta, bytes).status().message()),
              HasSubstr("field 'first_token' is 0"));
}

TEST_P(LifeCycle, BadArgumentsAreNamed) {
  const auto message = [&](const ChunkKey& key, uint32_t layers, const ShardMeta& meta,
                           const Bytes& bytes) {
    const absl::Status status = store_->Put(key, layers, meta, bytes).status();
    EXPECT_TRUE(HasCode(status, StatusCode::kInvalidArgument));
    return std::string(status.message());
  };
  const auto bytes = std::make_shared<const std::string>("bytes");
  const ShardMeta meta = Meta(0, 5);
  EXPECT_THAT(message(Key(""), 1, meta, bytes), HasSubstr("'key' is 0 bytes long"));
  EXPECT_THAT(message(Key(std::string(129, 'k')), 1, meta, bytes), HasSubstr("'key' is 129"));
  EXPECT_THAT(message(Key("k", ""), 1, meta, bytes), HasSubstr("'namespace'"));
  EXPECT_THAT(message(Key("k", std::string(257, 'n')), 1, meta, bytes), HasSubstr("'namespace'"));
  EXPECT_THAT(message(Key("k", "n", ""), 1, meta, bytes), HasSubstr("'tenant'"));
  EXPECT_THAT(message(Key("k"), 0, meta, bytes), HasSubstr("'layers' is 0"));
  EXPECT_THAT(message(Key("k"), 4097, meta, bytes), HasSubstr("'layers' is 4097"));
  EXPECT_THAT(message(Key("k"), 4, Meta(4, 5), bytes), HasSubstr("'layer' is 4"));
  EXPECT_THAT(message(Key("k"), 1, Meta(0, 6), bytes), HasSubstr("'bytes' is 6"));
  EXPECT_THAT(message(Key("k"), 1, Meta(0, 0), bytes), HasSubstr("'bytes' is 0"));
  EXPECT_THAT(message(Key("k"), 1, meta, nullptr), HasSubstr("'bytes' is 5"));
  ShardMeta huge = meta;
  huge.raw_bytes = std::numeric_limits<uint64_t>::max();
  EXPECT_THAT(message(Key("k"), 1, huge, bytes), HasSubstr("'raw_bytes'"));
  EXPECT_EQ(store_->uncommitted_bytes(), 0u);
}

TEST_P(LifeCycle, TenantsAndNamespacesAreApart) {
  ASSERT_TRUE(CommitChunk(store_.get(), Key("a"), 1, kSize).ok());
  for (const ChunkKey& other : {Key("a", "model2"), Key("a", "model", "u"), Key("b")}) {
    EXPECT_TRUE(HasCode(store_->Get(other, 0).status(), StatusCode::kNotFound));
    EXPECT_TRUE(HasCode(store_->Stat(other).status(), StatusCode::kNotFound));
    EXPECT_TRUE(HasCode(store_->Delete(other), StatusCode::kNotFound));
  }
  ASSERT_TRUE(PutShard(store_.get(), Key("a", "model", "u"), 1, 0, "theirs").ok());
  ASSERT_TRUE(store_->Commit(Key("a", "model", "u")).ok());
  EXPECT_EQ(*store_->Get(Key("a", "model", "u"), 0)->bytes, "theirs");
  EXPECT_TRUE(IsWhole(store_.get(), Key("a"), 1, kSize));
}

TEST_P(LifeCycle, GetOfALayerBeyondTheChunk) {
  ASSERT_TRUE(CommitChunk(store_.get(), Key("a"), 2, kSize).ok());
  const absl::Status status = store_->Get(Key("a"), 2).status();
  EXPECT_TRUE(HasCode(status, StatusCode::kNotFound));
  EXPECT_THAT(std::string(status.message()), HasSubstr("field 'layer' is 2"));
}

TEST_P(LifeCycle, Delete) {
  EXPECT_TRUE(HasCode(store_->Delete(Key("a")), StatusCode::kNotFound));
  ASSERT_TRUE(PutChunk(store_.get(), Key("a"), 2, kSize).ok());
  EXPECT_TRUE(store_->Delete(Key("a")).ok());  // uncommitted
  EXPECT_EQ(store_->uncommitted_bytes(), 0u);
  EXPECT_TRUE(HasCode(store_->Stat(Key("a")).status(), StatusCode::kNotFound));

  ASSERT_TRUE(CommitChunk(store_.get(), Key("a"), 2, kSize).ok());
  EXPECT_TRUE(store_->Delete(Key("a")).ok());
  EXPECT_TRUE(HasCode(store_->Get(Key("a"), 0).status(), StatusCode::kNotFound));
  EXPECT_EQ(Used(*store_, TierName::kHost), 0u);
  EXPECT_EQ(Used(*store_, CommittedTiers().back()), 0u);

  // The key is free for other bytes.
  ASSERT_TRUE(PutShard(store_.get(), Key("a"), 1, 0, "other").ok());
  ASSERT_TRUE(store_->Commit(Key("a")).ok());
  EXPECT_EQ(*store_->Get(Key("a"), 0)->bytes, "other");
}

TEST_P(LifeCycle, UncommittedBudget) {
  options_.uncommitted_bytes = ChunkCost(2, kSize);
  store_.reset();
  store_ = OpenStore(options_);
  ASSERT_TRUE(PutChunk(store_.get(), Key("a"), 2, kSize).ok());
  const absl::Status status = PutShard(store_.get(), Key("b"), 1, 0, "b").status();
  EXPECT_TRUE(HasCode(status, StatusCode::kResourceExhausted));
  EXPECT_TRUE(HasCode(store_->Stat(Key("b")).status(), StatusCode::kNotFound));
  EXPECT_TRUE(PutShard(store_.get(), Key("a"), 2, 0, ShardBytes("a", 0, kSize))->already_present);
  ASSERT_TRUE(store_->Commit(Key("a")).ok());
  EXPECT_TRUE(PutShard(store_.get(), Key("b"), 1, 0, "b").ok());
}

TEST_P(LifeCycle, UncommittedChunksExpire) {
  options_.uncommitted_ttl_ms = 1000;
  options_.uncommitted_bytes = ChunkCost(3, kSize);
  store_.reset();
  store_ = OpenStore(options_);
  ASSERT_TRUE(PutShard(store_.get(), Key("old"), 2, 0, ShardBytes("old", 0, kSize)).ok());
  ASSERT_TRUE(PutShard(store_.get(), Key("kept"), 2, 0, ShardBytes("kept", 0, kSize)).ok());
  clock_.Advance(600);
  ASSERT_TRUE(PutShard(store_.get(), Key("kept"), 2, 1, ShardBytes("kept", 1, kSize)).ok());
  clock_.Advance(600);
  // No tick yet: a Put that needs the room takes it from what has expired.
  ASSERT_TRUE(PutShard(store_.get(), Key("new"), 1, 0, ShardBytes("new", 0, kSize)).ok());
  EXPECT_TRUE(HasCode(store_->Stat(Key("old")).status(), StatusCode::kNotFound));
  EXPECT_TRUE(store_->Commit(Key("kept")).ok());
  clock_.Advance(1000);
  store_->Tick();
  EXPECT_EQ(store_->uncommitted_bytes(), 0u);
  EXPECT_EQ(store_->Counters().expired_uncommitted, 2u);
  EXPECT_TRUE(IsWhole(store_.get(), Key("kept"), 2, kSize));
}

TEST_P(LifeCycle, ReportDamagedTakesTheChunkOut) {
  ASSERT_TRUE(CommitChunk(store_.get(), Key("a"), 2, kSize).ok());
  store_->ReportDamaged(Key("a"));
  store_->ReportDamaged(Key("a"));
  store_->ReportDamaged(Key("never there"));
  EXPECT_TRUE(HasCode(store_->Get(Key("a"), 0).status(), StatusCode::kNotFound));
  EXPECT_TRUE(HasCode(store_->Stat(Key("a")).status(), StatusCode::kNotFound));
  EXPECT_EQ(store_->Lookup("t", "model", {"a"}, 1000).present, 0u);
  EXPECT_EQ(store_->chunks(), 0u);
  EXPECT_EQ(store_->Counters().quarantined_shards, 1u);
  ASSERT_TRUE(CommitChunk(store_.get(), Key("a"), 2, kSize).ok());
  EXPECT_TRUE(IsWhole(store_.get(), Key("a"), 2, kSize));
}

TEST(StoreOptions, BadOnesAreNamed) {
  StoreOptions options;
  options.uncommitted_ttl_ms = -1;
  EXPECT_THAT(std::string(Store::Open(options).status().message()),
              HasSubstr("'uncommitted_ttl_ms' is -1"));
  options = {};
  options.data_dir = "/proc/no/such";
  const absl::Status status = Store::Open(options).status();
  EXPECT_TRUE(HasCode(status, StatusCode::kInvalidArgument));
  EXPECT_THAT(std::string(status.message()), HasSubstr("'data_dir' is /proc/no/such"));
}

}  // namespace
}  // namespace kvshrink::store

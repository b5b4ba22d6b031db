// Lookup, leases, eviction: what goes when room is short, and what may not.
#include <limits>

#include "store_test_support.h"

namespace kvshrink::store {
namespace {

using absl::StatusCode;

constexpr size_t kSize = 4000;

class Leases : public testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    // Room for three chunks of two layers.
    (GetParam() ? options_.disk_bytes : options_.host_bytes) = ChunkCost(6, kSize);
    if (GetParam()) options_.data_dir = dir_.path();
    options_.clock = &clock_;
    store_ = OpenStore(options_);
    ASSERT_NE(store_, nullptr);
  }
  void Fill() {
    for (const char* key : {"a", "b", "c"}) {
      ASSERT_TRUE(CommitChunk(store_.get(), Key(key), 2, kSize).ok());
      clock_.Advance(1);
    }
  }
  bool Present(const std::string& key) { return store_->Stat(Key(key)).ok(); }
  LookupResult Lookup(const std::vector<std::string>& keys, int64_t lease_ms = 1000) {
    return store_->Lookup("t", "model", keys, lease_ms);
  }

  TempDir dir_;
  FakeClock clock_;
  StoreOptions options_;
  std::unique_ptr<Store> store_;
};

INSTANTIATE_TEST_SUITE_P(Tiers, Leases, testing::Values(false, true),
                         [](const auto& info) { return info.param ? "Disk" : "HostOnly"; });

TEST_P(Leases, LookupCountsLeadingKeys) {
  Fill();
  const LookupResult all = Lookup({"a", "b", "c"});
  EXPECT_EQ(all.present, 3u);
  EXPECT_EQ(all.tokens, 3 * 256u);
  EXPECT_NE(all.lease_id, 0u);
  EXPECT_EQ(Lookup({"a", "x", "c"}).present, 1u);
  EXPECT_EQ(Lookup({"a", "x", "c"}).tokens, 256u);
  EXPECT_EQ(Lookup({"x", "a"}).present, 0u);
  EXPECT_EQ(Lookup({"x", "a"}).lease_id, 0u);
  EXPECT_EQ(Lookup({}).lease_id, 0u);
  EXPECT_EQ(store_->Lookup("u", "model", {"a"}, 1000).present, 0u);
  EXPECT_EQ(store_->Lookup("t", "other", {"a"}, 1000).present, 0u);
}

TEST_P(Leases, LongLookupCrossesSlices) {
  options_.host_bytes = options_.disk_bytes = 1 << 30;
  store_.reset();
  store_ = OpenStore(options_);
  std::vector<std::string> keys;
  for (int i = 0; i < 600; ++i) {
    keys.push_back("key" + std::to_string(i));
    ASSERT_TRUE(CommitChunk(store_.get(), Key(keys.back()), 1, 100).ok());
  }
  keys.push_back("absent");
  const LookupResult result = Lookup(keys);
  EXPECT_EQ(result.present, 600u);
  EXPECT_EQ(result.tokens, 600u * 256u);
  EXPECT_TRUE(HasCode(store_->Delete(Key("key599")), StatusCode::kFailedPrecondition));
  EXPECT_TRUE(store_->Release("t", result.lease_id));
  EXPECT_TRUE(store_->Delete(Key("key599")).ok());
}

TEST_P(Leases, EvictsTheChunkUsedLongestAgo) {
  Fill();
  ASSERT_TRUE(store_->Get(Key("a"), 1).ok());
  ASSERT_TRUE(CommitChunk(store_.get(), Key("d"), 2, kSize).ok());
  EXPECT_FALSE(Present("b"));
  EXPECT_TRUE(IsWhole(store_.get(), Key("a"), 2, kSize));
  EXPECT_TRUE(IsWhole(store_.get(), Key("c"), 2, kSize));
  EXPECT_TRUE(IsWhole(store_.get(), Key("d"), 2, kSize));
  EXPECT_EQ(store_->Counters().evicted_chunks, 1u);
  EXPECT_EQ(store_->chunks(), 3u);
  for (const TierUsage& usage : store_->Usage()) EXPECT_LE(usage.used_bytes, usage.capacity_bytes);
}

TEST_P(Leases, EvictsOnlyAsMuchAsNeeded) {
  Fill();
  ASSERT_TRUE(CommitChunk(store_.get(), Key("small"), 1, 10).ok());
  EXPECT_EQ(store_->Counters().evicted_chunks, 1u);
  ASSERT_TRUE(CommitChunk(store_.get(), Key("small2"), 1, 10).ok());
  EXPECT_EQ(store_->Counters().evicted_chunks, 1u);
}

TEST_P(Leases, LeasedChunksAreNotEvicted) {
  Fill();
  const uint64_t lease = Lookup({"a", "b"}).lease_id;
  ASSERT_TRUE(CommitChunk(store_.get(), Key("d"), 2, kSize).ok());
  EXPECT_FALSE(Present("c"));
  EXPECT_TRUE(store_->Stat(Key("a"))->leased);
  EXPECT_FALSE(store_->Stat(Key("d"))->leased);
  ASSERT_NE(Lookup({"d"}).lease_id, 0u);

  ASSERT_TRUE(PutChunk(store_.get(), Key("e"), 2, kSize).ok());
  EXPECT_TRUE(HasCode(store_->Commit(Key("e")), StatusCode::kResourceExhausted));
  for (const char* key : {"a", "b", "d"}) EXPECT_TRUE(IsWhole(store_.get(), Key(key), 2, kSize));

  EXPECT_TRUE(store_->Release("t", lease));
  EXPECT_FALSE(store_->Stat(Key("a"))->leased);
  EXPECT_TRUE(store_->Commit(Key("e")).ok());
  EXPECT_TRUE(IsWhole(store_.get(), Key("e"), 2, kSize));
}

TEST_P(Leases, NothingIsEvictedForAChunkThatCannotFit) {
  Fill();
  ASSERT_NE(Lookup({"a"}).lease_id, 0u);
  ASSERT_TRUE(PutChunk(store_.get(), Key("three"), 6, kSize).ok());
  EXPECT_TRUE(HasCode(store_->Commit(Key("three")), StatusCode::kResourceExhausted));
  ASSERT_TRUE(PutChunk(store_.get(), Key("huge"), 7, kSize).ok());
  EXPECT_TRUE(HasCode(store_->Commit(Key("huge")), StatusCode::kResourceExhausted));
  for (const char* key : {"a", "b", "c"}) EXPECT_TRUE(IsWhole(store_.get(), Key(key), 2, kSize));
}

TEST_P(Leases, LeasedChunksAreNotDeleted) {
  Fill();
  const uint64_t first = Lookup({"a"}).lease_id;
  const uint64_t second = Lookup({"a", "b"}).lease_id;
  EXPECT_TRUE(HasCode(store_->Delete(Key("a")), StatusCode::kFailedPrecondition));
  EXPECT_TRUE(store_->Release("t", first));
  EXPECT_TRUE(HasCode(store_->Delete(Key("a")), StatusCode::kFailedPrecondition));
  EXPECT_TRUE(store_->Release("t", second));
  EXPECT_TRUE(store_->Delete(Key("a")).ok());
}

TEST_P(Leases, ReleaseIsTheTenantsOwnAndOnce) {
  Fill();
  const uint64_t lease = Lookup({"a"}).lease_id;
  EXPECT_FALSE(store_->Release("u", lease));
  EXPECT_TRUE(store_->Stat(Key("a"))->leased);
  EXPECT_TRUE(store_->Release("t", lease));
  EXPECT_FALSE(store_->Release("t", lease));
  EXPECT_FALSE(store_->Release("t", 0));
}

TEST_P(Leases, LeasesExpire) {
  Fill();
  const uint64_t lease = Lookup({"a", "b", "c"}, 500).lease_id;
  clock_.Advance(499);
  EXPECT_TRUE(store_->Stat(Key("a"))->leased);
  ASSERT_TRUE(PutChunk(store_.get(), Key("d"), 2, kSize).ok());
  EXPECT_TRUE(HasCode(store_->Commit(Key("d")), StatusCode::kResourceExhausted));
  clock_.Advance(1);  // no tick: the commit itself sees that the lease is over
  EXPECT_TRUE(store_->Commit(Key("d")).ok());
  EXPECT_FALSE(store_->Release("t", lease));
  EXPECT_TRUE(store_->Delete(Key("b")).ok());
}

TEST_P(Leases, LeaseTimesOutOfRange) {
  Fill();
  Lookup({"a"}, -5);
  EXPECT_TRUE(store_->Delete(Key("a")).ok());
  ASSERT_NE(Lookup({"b"}, std::numeric_limits<int64_t>::max()).lease_id, 0u);
  clock_.Advance(1'000'000'000);
  EXPECT_TRUE(HasCode(store_->Delete(Key("b")), StatusCode::kFailedPrecondition));
}

TEST_P(Leases, ALeaseDoesNotPassToALaterChunkOfTheKey) {
  Fill();
  const uint64_t lease = Lookup({"a"}).lease_id;
  store_->ReportDamaged(Key("a"));
  ASSERT_TRUE(CommitChunk(store_.get(), Key("a"), 2, kSize).ok());
  EXPECT_FALSE(store_->Stat(Key("a"))->leased);
  EXPECT_TRUE(store_->Release("t", lease));
  EXPECT_FALSE(store_->Stat(Key("a"))->leased);
  EXPECT_TRUE(store_->Delete(Key("a")).ok());
}

}  // namespace
}  // namespace kvshrink::store

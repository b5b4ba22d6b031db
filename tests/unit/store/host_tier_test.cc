#include "store/host_tier.h"

#include "store_test_support.h"

namespace kvshrink::store {
namespace {

Bytes Make(size_t size) { return std::make_shared<const std::string>(size, 'x'); }

TEST(HostTier, KeepsTheBudgetByAgeOfUse) {
  HostTier tier(3 * ChargedBytes(1000));
  tier.Insert(1, 0, Make(1000));
  tier.Insert(1, 1, Make(1000));
  tier.Insert(2, 0, Make(1000));
  EXPECT_EQ(tier.used_bytes(), 3 * ChargedBytes(1000));
  EXPECT_NE(tier.Find(1, 0), nullptr);  // now 1/1 is the oldest
  tier.Insert(3, 0, Make(1000));
  EXPECT_EQ(tier.Find(1, 1), nullptr);
  EXPECT_NE(tier.Find(1, 0), nullptr);
  EXPECT_NE(tier.Find(2, 0), nullptr);
  EXPECT_NE(tier.Find(3, 0), nullptr);
  EXPECT_EQ(tier.used_bytes(), 3 * ChargedBytes(1000));
}

TEST(HostTier, ALargeShardTakesThePlaceOfSeveral) {
  HostTier tier(3 * ChargedBytes(1000));
  for (uint64_t serial = 1; serial <= 3; ++serial) tier.Insert(serial, 0, Make(1000));
  tier.Insert(4, 0, Make(1900));
  EXPECT_EQ(tier.Find(1, 0), nullptr);
  EXPECT_EQ(tier.Find(2, 0), nullptr);
  EXPECT_NE(tier.Find(3, 0), nullptr);
  EXPECT_NE(tier.Find(4, 0), nullptr);
}

TEST(HostTier, ShardLargerThanTheTierIsNotKeptAndPushesNothingOut) {
  HostTier tier(ChargedBytes(1000));
  tier.Insert(1, 0, Make(1000));
  tier.Insert(2, 0, Make(1001));
  EXPECT_NE(tier.Find(1, 0), nullptr);
  EXPECT_EQ(tier.Find(2, 0), nullptr);
}

TEST(HostTier, EraseTakesTheChunkOnly) {
  HostTier tier(1 << 20);
  tier.Insert(1, 0, Make(10));
  tier.Insert(1, 7, Make(10));
  tier.Insert(2, 0, Make(10));
  EXPECT_EQ(tier.Count(1), 2u);
  tier.Erase(1);
  tier.Erase(99);
  EXPECT_EQ(tier.Count(1), 0u);
  EXPECT_EQ(tier.Find(1, 7), nullptr);
  EXPECT_EQ(tier.Count(2), 1u);
  EXPECT_EQ(tier.used_bytes(), ChargedBytes(10));
}

TEST(HostTier, InsertAgainCountsOnce) {
  HostTier tier(1 << 20);
  tier.Insert(1, 0, Make(10));
  tier.Insert(1, 0, Make(10));
  EXPECT_EQ(tier.used_bytes(), ChargedBytes(10));
}

TEST(HostTier, ReadersKeepBytesThatWereLetGo) {
  HostTier tier(ChargedBytes(1000));
  tier.Insert(1, 0, Make(1000));
  const Bytes held = tier.Find(1, 0);
  tier.Insert(2, 0, Make(1000));
  EXPECT_EQ(tier.Find(1, 0), nullptr);
  EXPECT_EQ(held->size(), 1000u);
}

}  // namespace
}  // namespace kvshrink::store

#include "store/lease_table.h"

#include "store_test_support.h"

namespace kvshrink::store {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;
using testing::UnorderedElementsAre;

TEST(LeaseTable, ReleaseReturnsWhatWasHeldOnce) {
  LeaseTable table(100);
  const uint64_t id = table.Open("t", 1000);
  EXPECT_NE(id, 0u);
  EXPECT_TRUE(table.Hold(id, 5));
  EXPECT_TRUE(table.Hold(id, 6));
  const auto serials = table.Release("t", id);
  ASSERT_TRUE(serials.has_value());
  EXPECT_THAT(*serials, ElementsAre(5, 6));
  EXPECT_FALSE(table.Release("t", id).has_value());
  EXPECT_THAT(table.Expire(2000), IsEmpty());
}

TEST(LeaseTable, AnotherTenantCannotRelease) {
  LeaseTable table(100);
  const uint64_t id = table.Open("t", 1000);
  EXPECT_FALSE(table.Release("u", id).has_value());
  EXPECT_TRUE(table.Release("t", id).has_value());
}

TEST(LeaseTable, ExpiresInOrderOfTime) {
  LeaseTable table(100);
  const uint64_t late = table.Open("t", 3000);
  const uint64_t soon = table.Open("t", 1000);
  const uint64_t next = table.Open("t", 2000);
  ASSERT_TRUE(table.Hold(late, 1) && table.Hold(soon, 2) && table.Hold(next, 3));
  EXPECT_THAT(table.Expire(999), IsEmpty());
  EXPECT_THAT(table.Expire(2000), UnorderedElementsAre(2, 3));
  EXPECT_FALSE(table.Hold(soon, 4));
  EXPECT_FALSE(table.Release("t", soon).has_value());
  EXPECT_THAT(table.Expire(3000), ElementsAre(1));
  EXPECT_EQ(table.size(), 0u);
}

TEST(LeaseTable, IsBounded) {
  LeaseTable table(2);
  const uint64_t a = table.Open("t", 1000);
  const uint64_t b = table.Open("t", 2000);
  EXPECT_TRUE(table.Hold(a, 1));
  EXPECT_TRUE(table.Hold(b, 1));
  EXPECT_FALSE(table.Hold(b, 2));
  table.Expire(1000);
  EXPECT_TRUE(table.Hold(b, 2));
  EXPECT_FALSE(table.Hold(b, 3));
  table.Release("t", b);
  EXPECT_TRUE(table.Hold(table.Open("t", 3000), 4));
}

}  // namespace
}  // namespace kvshrink::store

#include "store/disk_keys.h"

#include <set>

#include "store_test_support.h"

namespace kvshrink::store {
namespace {

TEST(DiskKeys, RoundTrip) {
  const ChunkKey key{"tenant", std::string(256, 'n'), std::string("\0\xFFkey", 5)};
  const std::string record_key = RecordKey(kCommittedTag, key, 0x0102030405060708);
  const auto parsed = ParseRecordKey(record_key);
  ASSERT_TRUE(parsed.has_value());
  EXPECT_EQ(parsed->key, key);
  EXPECT_EQ(parsed->serial, 0x0102030405060708u);
}

TEST(DiskKeys, PartsThatJoinToTheSameTextDoNotCollide) {
  const std::vector<ChunkKey> keys = {
      {"a", "b", "c"},   {"ab", "c", "d"},
      {"a", "bc", "d"},  {"a", "b", "cd"},
      {"ab", "cd", "e"}, {"a", "bcd", "e"},
      {"a", "b", "cde"}, {"a/b", "c", "d"},
      {"a", "b/c", "d"}, {std::string("a\0\1b", 4), "c", "d"},
  };
  std::set<std::string> encoded;
  for (const ChunkKey& key : keys) encoded.insert(RecordKey(kCommittedTag, key, 1));
  EXPECT_EQ(encoded.size(), keys.size());
}

TEST(DiskKeys, CommitsOfAKeyAreNeighboursInOrder) {
  const std::string first = RecordKey(kCommittedTag, Key("k"), 255);
  const std::string second = RecordKey(kCommittedTag, Key("k"), 256);
  EXPECT_LT(first, second);
  EXPECT_LT(ShardKey(255, 4095), ShardKey(256, 0));
}

TEST(DiskKeys, RefusesWhatIsNoRecordKey) {
  const std::string good = RecordKey(kCommittedTag, Key("k"), 7);
  for (size_t size = 0; size < good.size(); ++size) {
    EXPECT_FALSE(ParseRecordKey(good.substr(0, size)).has_value()) << size;
  }
  EXPECT_FALSE(ParseRecordKey(good + "x").has_value());
  std::string huge_part = good;
  huge_part[1] = '\xFF';  // the tenant's length
  EXPECT_FALSE(ParseRecordKey(huge_part).has_value());
  EXPECT_FALSE(ParseRecordKey(RecordKey('c', Key(std::string(129, 'k')), 7)).has_value());
  EXPECT_FALSE(ParseRecordKey(RecordKey('c', Key(""), 7)).has_value());
}

}  // namespace
}  // namespace kvshrink::store

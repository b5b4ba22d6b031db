#include "kvshrink/client/chunk_keys.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace kvshrink::client {
namespace {

TEST(ChunkKeys, AreThePrefixAndTheIndex) {
  EXPECT_EQ(ChunkKey("doc", 0), "doc/0");
  EXPECT_EQ(ChunkKey("a/b", 4294967295), "a/b/4294967295");
  EXPECT_EQ(ChunkKeys("x", 3), (std::vector<std::string>{"x/0", "x/1", "x/2"}));
  EXPECT_TRUE(ChunkKeys("x", 0).empty());
}

TEST(ChunkKeys, OnlyAPrefixsOwnKeysAreRecognised) {
  EXPECT_EQ(ChunkIndex("doc", "doc/0"), 0U);
  EXPECT_EQ(ChunkIndex("doc", "doc/17"), 17U);
  for (const char* key : {"doc", "doc/", "doc/01", "doc/+1", "doc/ 1", "doc/1 ", "doc/-1", "doc/x",
                          "doc/4294967296", "docs/1", "doc2/1", "do/1", "doc/1/2", ""}) {
    EXPECT_FALSE(ChunkIndex("doc", key)) << key;
  }
}

TEST(ChunkKeys, ALegalPrefixMakesLegalKeys) {
  EXPECT_TRUE(CheckPrefix(std::string(kMaxPrefixBytes, 'p')).ok());
  EXPECT_EQ(ChunkKey(std::string(kMaxPrefixBytes, 'p'), ~uint32_t{0}).size(), kMaxKeyBytes);
  EXPECT_FALSE(CheckPrefix(std::string(kMaxPrefixBytes + 1, 'p')).ok());
  EXPECT_FALSE(CheckPrefix("").ok());
  EXPECT_TRUE(CheckNamespace(std::string(256, 'n')).ok());
  EXPECT_FALSE(CheckNamespace(std::string(257, 'n')).ok());
  EXPECT_FALSE(CheckNamespace("").ok());
}

}  // namespace
}  // namespace kvshrink::client

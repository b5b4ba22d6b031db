// List: order, filter, pages, and page tokens that a peer made up.
#include <algorithm>

#include "store/page_token.h"
#include "store_test_support.h"

namespace kvshrink::store {
namespace {

using absl::StatusCode;

class List : public testing::Test {
 protected:
  void SetUp() override {
    store_ = OpenStore(StoreOptions());
    for (const auto& [tenant, name_space] :
         {std::pair("t", "m1"), std::pair("t", "m2"), std::pair("u", "m1")}) {
      for (int i = 9; i >= 0; --i) {
        const ChunkKey key = Key("k" + std::to_string(i), name_space, tenant);
        ASSERT_TRUE(CommitChunk(store_.get(), key, 1, 100).ok());
        all_.push_back(key);
      }
    }
    std::sort(all_.begin(), all_.end());
  }

  std::vector<ChunkKey> Expected(std::string_view tenant, std::string_view name_space) const {
    std::vector<ChunkKey> keys;
    for (const ChunkKey& key : all_) {
      if (key.tenant == tenant && (name_space.empty() || key.name_space == name_space)) {
        keys.push_back(key);
      }
    }
    return keys;
  }
  // All pages joined; each but the last must be full.
  std::vector<ChunkKey> Pages(std::string_view tenant, std::string_view name_space,
                              uint32_t page_size) {
    std::vector<ChunkKey> keys;
    std::string token;
    do {
      const absl::StatusOr<ListPage> page = store_->List(tenant, name_space, page_size, token);
      EXPECT_TRUE(page.ok()) << page.status();
      if (!page.ok()) break;
      token = page->next_page_token;
      if (!token.empty()) {
        EXPECT_EQ(page->chunks.size(), page_size);
      }
      for (const ChunkStat& chunk : page->chunks) keys.push_back(chunk.key);
    } while (!token.empty());
    return keys;
  }

  std::unique_ptr<Store> store_;
  std::vector<ChunkKey> all_;
};

TEST_F(List, PagesJoinToTheWholeInOrder) {
  for (const uint32_t page_size : {1u, 3u, 10u, 19u, 20u, 21u, 5000u}) {
    SCOPED_TRACE(page_size);
    EXPECT_EQ(Pages("t", "", page_size), Expected("t", ""));
    EXPECT_EQ(Pages("t", "m1", page_size), Expected("t", "m1"));
    EXPECT_EQ(Pages("t", "m2", page_size), Expected("t", "m2"));
    EXPECT_EQ(Pages("u", "", page_size), Expected("u", ""));
  }
  EXPECT_TRUE(Pages("nobody", "", 5).empty());
  EXPECT_TRUE(Pages("t", "m", 5).empty());
  EXPECT_EQ(store_->List("t", "", 0, "")->chunks.size(), 20u);
}

TEST_F(List, EntriesAreWholeStats) {
  const absl::StatusOr<ListPage> page = store_->List("t", "m1", 1, "");
  ASSERT_TRUE(page.ok());
  const ChunkStat& listed = page->chunks[0];
  EXPECT_TRUE(listed.committed);
  EXPECT_EQ(listed.bytes, 100u);
  EXPECT_THAT(listed.shards, testing::ElementsAre(Meta(0, 100)));
  EXPECT_THAT(listed.tiers, testing::ElementsAre(TierName::kHost));
}

TEST_F(List, GoesOnAfterThePositionWasDeleted) {
  const absl::StatusOr<ListPage> first = store_->List("t", "m1", 4, "");
  ASSERT_TRUE(first.ok());
  for (const ChunkStat& chunk : first->chunks) ASSERT_TRUE(store_->Delete(chunk.key).ok());
  const absl::StatusOr<ListPage> second = store_->List("t", "m1", 4, first->next_page_token);
  ASSERT_TRUE(second.ok());
  EXPECT_EQ(second->chunks[0].key, Expected("t", "m1")[4]);
}

TEST_F(List, ManySlicesAndPageSizesAboveTheLimit) {
  for (int i = 0; i < 1000; ++i) {
    ASSERT_TRUE(CommitChunk(store_.get(), Key(std::to_string(i), "big", "b"), 1, 10).ok());
  }
  EXPECT_EQ(store_->List("b", "", 4'000'000'000, "")->chunks.size(), 1000u);
  EXPECT_EQ(Pages("b", "", 300).size(), 1000u);
}

TEST_F(List, PagesOfManyLayersEndEarly) {
  for (int i = 0; i < 70; ++i) {
    ASSERT_TRUE(CommitChunk(store_.get(), Key(std::to_string(i), "deep", "d"), 4096, 1).ok());
  }
  const absl::StatusOr<ListPage> page = store_->List("d", "", 1000, "");
  ASSERT_TRUE(page.ok());
  EXPECT_EQ(page->chunks.size(), 64u);
  EXPECT_EQ(store_->List("d", "", 1000, page->next_page_token)->chunks.size(), 6u);
}

TEST_F(List, TokensOfOtherListsAreRefused) {
  const std::string token = store_->List("t", "m1", 4, "")->next_page_token;
  ASSERT_FALSE(token.empty());
  EXPECT_TRUE(store_->List("t", "m1", 7, token).ok());
  const auto code = [&](std::string_view tenant, std::string_view name_space) {
    return store_->List(tenant, name_space, 4, token).status().code();
  };
  EXPECT_EQ(code("u", "m1"), StatusCode::kInvalidArgument);
  EXPECT_EQ(code("t", "m2"), StatusCode::kInvalidArgument);
  EXPECT_EQ(code("t", ""), StatusCode::kInvalidArgument);
}

TEST_F(List, DamagedTokensAreRefused) {
  const std::string token = store_->List("t", "m1", 4, "")->next_page_token;
  ASSERT_FALSE(token.empty());
  std::vector<std::string> hostile = {
      "x", "====", "AAAA", std::string(1 << 20, 'A'), std::string("\0\xFF\n", 3), token + "AAAA"};
  for (size_t size = 1; size < token.size(); ++size) hostile.push_back(token.substr(0, size));
  for (size_t i = 0; i < token.size(); ++i) {
    hostile.push_back(token);
    hostile.back()[i] = token[i] == 'B' ? 'g' : 'B';
  }
  for (const std::string& bad : hostile) {
    const absl::Status status = store_->List("t", "m1", 4, bad).status();
    // The last character may carry unused bits: then the token is the same one, spelt otherwise.
    if (status.ok() && bad.size() == token.size()) continue;
    EXPECT_TRUE(HasCode(status, StatusCode::kInvalidArgument)) << bad.substr(0, 100);
    EXPECT_THAT(std::string(status.message()), testing::HasSubstr("field 'page_token' is"));
    EXPECT_LT(status.message().size(), 8000u);
  }
}

TEST_F(List, TokenOfTheLongestKeysWorks) {
  const ChunkKey last{std::string(256, '\xFF'), std::string(256, '\xFE'), std::string(128, '\xFD')};
  const absl::StatusOr<ChunkKey> back = DecodePageToken(last.tenant, "", EncodePageToken("", last));
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(*back, last);
}

}  // namespace
}  // namespace kvshrink::store

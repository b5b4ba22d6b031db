#include "store/chunk_record.h"

#include "store_test_support.h"

namespace kvshrink::store {
namespace {

ChunkRecord Sample() {
  ChunkRecord record;
  record.serial = 0xABCDEF0123456789;
  record.created_unix_ms = 1'700'000'000'123;
  for (uint32_t layer = 0; layer < 3; ++layer) {
    record.shards.push_back({Meta(layer, 100 + layer), 0x1111111111111111u * (layer + 1)});
    record.shards.back().meta.keys_only = layer == 1;
  }
  return record;
}

// The record's bytes with a new checksum after `edit`, as a forger would write them.
template <typename Edit>
std::string Forged(Edit edit) {
  ChunkRecord record = Sample();
  edit(&record);
  return EncodeRecord("id", record);
}

TEST(ChunkRecord, RoundTrip) {
  const std::string bytes = EncodeRecord("id", Sample());
  const absl::StatusOr<ChunkRecord> back = DecodeRecord("id", bytes);
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(*back, Sample());
  EXPECT_EQ(back->charged_bytes(), 303 + 3 * kShardOverheadBytes);
}

TEST(ChunkRecord, EveryFlippedBitIsFound) {
  const std::string good = EncodeRecord("id", Sample());
  for (size_t bit = 0; bit < 8 * good.size(); ++bit) {
    std::string bytes = good;
    bytes[bit / 8] = static_cast<char>(bytes[bit / 8] ^ (1 << bit % 8));
    EXPECT_TRUE(HasCode(DecodeRecord("id", bytes).status(), absl::StatusCode::kDataLoss)) << bit;
  }
}

TEST(ChunkRecord, EveryCutIsFound) {
  const std::string good = EncodeRecord("id", Sample());
  for (size_t size = 0; size < good.size(); ++size) {
    EXPECT_TRUE(
        HasCode(DecodeRecord("id", good.substr(0, size)).status(), absl::StatusCode::kDataLoss))
        << size;
  }
  EXPECT_FALSE(DecodeRecord("id", good + "x").ok());
}

TEST(ChunkRecord, BelongsToItsKey) {
  const absl::Status status = DecodeRecord("other", EncodeRecord("id", Sample())).status();
  EXPECT_TRUE(HasCode(status, absl::StatusCode::kDataLoss));
  EXPECT_THAT(std::string(status.message()), testing::HasSubstr("'checksum'"));
}

TEST(ChunkRecord, SealedNonsenseIsRefusedByField) {
  const auto message = [](const std::string& bytes) {
    return std::string(DecodeRecord("id", bytes).status().message());
  };
  EXPECT_THAT(message(Forged([](ChunkRecord* r) { r->shards.clear(); })),
              testing::HasSubstr("'layers' is 0"));
  EXPECT_THAT(message(Forged([](ChunkRecord* r) { r->shards.resize(4097); })),
              testing::HasSubstr("'layers' is 4097"));
  EXPECT_THAT(message(Forged([](ChunkRecord* r) { r->shards[1].meta.bytes = 0; })),
              testing::HasSubstr("'bytes' is 0"));
  EXPECT_THAT(message(Forged([](ChunkRecord* r) { r->shards[1].meta.bytes = ~uint64_t{0}; })),
              testing::HasSubstr("'bytes' is 18446744073709551615"));
  EXPECT_THAT(message(Forged([](ChunkRecord* r) { r->shards[2].meta.raw_bytes = ~uint64_t{0}; })),
              testing::HasSubstr("'raw_bytes'"));
  EXPECT_THAT(message("nothing of the kind, but long enough"), testing::HasSubstr("'magic'"));
}

}  // namespace
}  // namespace kvshrink::store

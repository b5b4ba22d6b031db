// Every violation that FORMAT.md section 6 lists gives its error; no damage goes unseen.
#include <gtest/gtest.h>

#include <functional>

#include "blocks.h"
#include "format/layout.h"

namespace kvshrink {
namespace {

namespace at = format::offset;
using testing::OptionsOf;

uint8_t* Data(std::string* bytes) { return reinterpret_cast<uint8_t*>(bytes->data()); }

struct Bounds {
  size_t index, low, scales, codes, end;
};

Bounds BoundsOf(const std::string& bytes) {
  const auto* data = reinterpret_cast<const uint8_t*>(bytes.data());
  const auto blocks = size_t{2} * format::LoadLittle<uint16_t>(data + at::kKvHeads) *
                      ((format::LoadLittle<uint32_t>(data + at::kTokens) + 127) / 128);
  Bounds bounds{};
  bounds.index = format::kHeaderBytes;
  bounds.low = bounds.index + blocks * format::kIndexEntryBytes;
  bounds.scales = bounds.low + format::LoadLittle<uint64_t>(data + at::kLowBytes);
  bounds.codes = bounds.scales + format::LoadLittle<uint64_t>(data + at::kScalesBytes);
  bounds.end = bounds.codes + format::LoadLittle<uint64_t>(data + at::kCodesBytes);
  return bounds;
}

// Makes all checksums right again, where the sections of the untouched shard lie.
void Sign(const Bounds& bounds, std::string* bytes) {
  uint8_t* data = Data(bytes);
  format::StoreLittle(format::SectionChecksum(data + bounds.index, bounds.low - bounds.index),
                      data + at::kIndexChecksum);
  format::StoreLittle(format::SectionChecksum(data + bounds.low, bounds.scales - bounds.low),
                      data + at::kLowChecksum);
  format::StoreLittle(format::SectionChecksum(data + bounds.scales, bounds.codes - bounds.scales),
                      data + at::kScalesChecksum);
  format::StoreLittle(format::SectionChecksum(data + bounds.codes, bounds.end - bounds.codes),
                      data + at::kCodesChecksum);
  format::StoreLittle(format::HeaderChecksum(data, at::kHeaderChecksum),
                      data + at::kHeaderChecksum);
}

std::string Encoded(Profile profile) {
  const TensorShape shape{140, 1, 16};
  const auto backend = MakeCpuBackend(1);
  const testing::Tensor k = testing::LowRankPlusNoise(shape, 3, 0.02F, 1);
  const testing::Tensor v = testing::Gaussian(shape, 2);
  return *EncodeShard(*backend, k.View(), v.View(), OptionsOf(profile));
}

// Parses and decodes everything.
absl::Status Read(const std::string& bytes, Extent extent = Extent::kWhole) {
  const auto shard = Shard::Parse(bytes, extent);
  if (!shard.ok()) {
    return shard.status();
  }
  const auto backend = MakeCpuBackend(1);
  return testing::DecodeAll(*backend, bytes,
                            shard->preview() ? DecodeForm::kLowRank : DecodeForm::kFull)
      .status();
}

void ExpectError(const std::string& bytes, const std::string& field) {
  const absl::Status status = Read(bytes);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << field;
  EXPECT_NE(std::string(status.message()).find("'" + field + "'"), std::string::npos)
      << field << ": " << status;
}

TEST(HostileShard, EachFieldOfTheHeader) {
  const std::string good = Encoded(Profile::kKvs2);
  ASSERT_TRUE(Read(good).ok()) << Read(good);
  struct Violation {
    size_t offset;
    int width;
    uint64_t value;
    std::string field;
  };
  const std::vector<Violation> violations = {
      {at::kMagic, 1, 'X', "magic"},
      {at::kVersion, 2, 2, "version"},
      {at::kVersion, 2, 0, "version"},
      {at::kProfile, 1, 12, "profile"},
      {at::kProfile, 1, 255, "profile"},
      {at::kDType, 1, 4, "dtype"},
      {at::kHeadDim, 2, 0, "head_dim"},
      {at::kHeadDim, 2, 513, "head_dim"},
      {at::kKvHeads, 2, 0, "kv_heads"},
      {at::kKvHeads, 2, 257, "kv_heads"},
      {at::kTokens, 4, 0, "tokens"},
      {at::kTokens, 4, 65537, "tokens"},
      {at::kTokens, 4, 0xFFFFFFFF, "tokens"},
      {at::kFirstToken, 4, 0x80000000, "first_token"},
      {at::kLayer, 2, 4096, "layer"},
      {at::kFlags, 2, 4, "flags"},
      {at::kFlags, 2, 7, "flags"},
      {at::kFlags, 2, 0x8001, "flags"},
      {at::kRawRows, 4, 141, "raw_rows"},
      {at::kExtBytes, 4, 8, "size"},
      {at::kExtBytes, 4, 4, "ext_bytes"},
      {at::kExtBytes, 4, 8192, "ext_bytes"},
      {at::kLowBytes, 8, 1, "low_bytes"},
      {at::kScalesBytes, 8, uint64_t{1} << 63, "scales_bytes"},
      {at::kCodesBytes, 8, 0, "codes_bytes"},
  };
  const Bounds bounds = BoundsOf(good);
  for (const Violation& violation : violations) {
    std::string bad = good;
    for (int i = 0; i < violation.width; ++i) {
      Data(&bad)[violation.offset + static_cast<size_t>(i)] =
          static_cast<uint8_t>(violation.value >> (8 * i));
    }
    format::StoreLittle(format::HeaderChecksum(Data(&bad), at::kHeaderChecksum),
                        Data(&bad) + at::kHeaderChecksum);
    const absl::Status status = Read(bad);
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << violation.field;
    if (violation.field !=
        "size") {  // with 8 bytes of extensions, the index is elsewhere: its checksum speaks first
      EXPECT_NE(std::string(status.message()).find("'" + violation.field + "'"), std::string::npos)
          << violation.field << ": " << status;
    }
  }
  // Entries: the product of allowed values may still be too much.
  std::string bad = good;
  format::StoreLittle<uint16_t>(512, Data(&bad) + at::kHeadDim);
  format::StoreLittle<uint16_t>(256, Data(&bad) + at::kKvHeads);
  format::StoreLittle<uint32_t>(65536, Data(&bad) + at::kTokens);
  Sign(bounds, &bad);
  ExpectError(bad, "entries");
  // A header that promises a large index is refused by its size, before anything is allocated.
  bad = good;
  format::StoreLittle<uint16_t>(1, Data(&bad) + at::kHeadDim);
  format::StoreLittle<uint16_t>(256, Data(&bad) + at::kKvHeads);
  format::StoreLittle<uint32_t>(65536, Data(&bad) + at::kTokens);
  Sign(bounds, &bad);
  ExpectError(bad, "size");
}

TEST(HostileShard, EachFieldOfTheIndex) {
  const std::string good = Encoded(Profile::kKvs2);
  const Bounds bounds = BoundsOf(good);
  const auto with_entry = [&](size_t offset, uint8_t value) {
    std::string bad = good;
    Data(&bad)[bounds.index + offset] = value;
    Sign(bounds, &bad);
    return bad;
  };
  ExpectError(with_entry(0, 0x80), "index[0].exponent");
  ExpectError(with_entry(1, 3), "index[0].code");
  ExpectError(with_entry(1, 23), "index[0].code");
  ExpectError(with_entry(1, 31), "index[0].code");
  ExpectError(with_entry(1, 36), "index[0].code");
  ExpectError(with_entry(1, 2), "index[0].code");  // fp8 in a kvs shard
  ExpectError(with_entry(2, 17), "index[0].rank");
  ExpectError(with_entry(2, 0), "index[0].factor_bytes");
  ExpectError(with_entry(3, 1), "index[0].reserved");
  std::string none = with_entry(4, 0);
  Data(&none)[bounds.index + 5] = 0;
  Sign(bounds, &none);
  ExpectError(none, "index[0].factor_bytes");
  ExpectError(with_entry(4, static_cast<uint8_t>(good[bounds.index + 4] + 4)), "low_bytes");
  ExpectError(with_entry(1, 17), "codes_bytes");
  ExpectError(with_entry(1, 32), "codes_bytes");
  ExpectError(with_entry(6 + 1, 0), "index[1].exponent");  // zero blocks have no exponent
}

TEST(HostileShard, TrellisCodesBelongToOneFamily) {
  for (const Profile profile : {Profile::kTq2, Profile::kEOptShrinkQ2}) {
    std::string bad = Encoded(profile);
    const Bounds bounds = BoundsOf(bad);
    Data(&bad)[bounds.index + 1] = 33;
    Sign(bounds, &bad);
    ExpectError(bad, "index[0].code");
  }
}

TEST(HostileShard, FactorRecordsThatContradictThemselves) {
  const std::string good = Encoded(Profile::kKvs2);
  const Bounds bounds = BoundsOf(good);
  const auto shard = Shard::Parse(good);
  ASSERT_TRUE(shard.ok());
  const BlockView& block = shard->blocks()[0];
  ASSERT_GT(block.rank, 0U);
  const size_t record = bounds.low + block.raw.size();
  const auto with_bits = [&](uint8_t value) {
    std::string bad = good;
    Data(&bad)[record] = value;
    Sign(bounds, &bad);
    return bad;
  };
  ExpectError(with_bits(0x11), "block[0].bits");
  ExpectError(with_bits(0x92), "block[0].bits");
  ExpectError(with_bits(0x88) == good ? with_bits(0x22) : with_bits(0x88), "block[0].factor_bytes");
}

TEST(HostileShard, NumbersThatMeanNothingInABlock) {
  const auto last_code = [](Profile profile, uint8_t value) {
    std::string bad = Encoded(profile);
    const Bounds bounds = BoundsOf(bad);
    Data(&bad)[bounds.codes] = value;
    Sign(bounds, &bad);
    return bad;
  };
  ExpectError(last_code(Profile::kKvs2, 255), "block[0].codes");
  ExpectError(last_code(Profile::kFp8, 0x7F), "block[0].codes");
  std::string bad = Encoded(Profile::kKvs3);
  Bounds bounds = BoundsOf(bad);
  Data(&bad)[bounds.codes] = 0x60;  // 6^5 = 0x1E60 in the first 13 bits
  Data(&bad)[bounds.codes + 1] = 0x1E;
  Sign(bounds, &bad);
  ExpectError(bad, "block[0].codes");
  for (const uint8_t step : {uint8_t{0}, uint8_t{65}}) {
    bad = Encoded(Profile::kKvs2);
    bounds = BoundsOf(bad);
    Data(&bad)[bounds.scales + 1] = step;
    Sign(bounds, &bad);
    ExpectError(bad, "block[0].scale");
  }
  bad = Encoded(Profile::kTq2);
  bounds = BoundsOf(bad);
  Data(&bad)[bounds.scales + 1] = 0xFC;  // minus infinity
  Data(&bad)[bounds.scales] = 0;
  Sign(bounds, &bad);
  ExpectError(bad, "block[0].scale");
}

TEST(HostileShard, EveryTruncationIsSeen) {
  for (const ProfileInfo& profile : testing::PlainProfiles()) {
    const std::string good = Encoded(profile.profile);
    const size_t preview = Shard::Parse(good)->preview_bytes();
    for (size_t size = 0; size < good.size(); ++size) {
      EXPECT_EQ(Read(good.substr(0, size)).code(), absl::StatusCode::kDataLoss)
          << profile.name << " " << size;
      EXPECT_EQ(Read(good.substr(0, size), Extent::kAllowPreview).ok(), size >= preview)
          << profile.name << " " << size;
    }
    ExpectError(good + std::string(1, '\0'), "size");
    EXPECT_FALSE(Read(good + "x", Extent::kAllowPreview).ok());
  }
}

TEST(HostileShard, EveryFlippedBitIsSeen) {
  for (const Profile profile : {Profile::kKvs2, Profile::kEOptShrinkQ2}) {
    const std::string good = Encoded(profile);
    for (size_t bit = 0; bit < good.size() * 8; ++bit) {
      std::string bad = good;
      bad[bit / 8] = static_cast<char>(bad[bit / 8] ^ (1 << (bit % 8)));
      ASSERT_EQ(Shard::Parse(bad).status().code(), absl::StatusCode::kDataLoss) << "bit " << bit;
    }
  }
}

// Damage with checksums made right again, as an attacker would: an error or some tensor, never
// worse (run under sanitizers too).
TEST(HostileShard, ResignedDamageNeverBreaksTheReader) {
  std::mt19937 random(11);
  for (const ProfileInfo& profile : testing::PlainProfiles()) {
    const std::string good = Encoded(profile.profile);
    const Bounds bounds = BoundsOf(good);
    for (int round = 0; round < 2000; ++round) {
      std::string bad = good;
      for (int change = 0; change < 1 + round % 4; ++change) {
        const size_t limit = round % 2 == 0 ? bounds.scales : bad.size();
        bad[random() % limit] = static_cast<char>(random());
      }
      Sign(bounds, &bad);
      const absl::Status status = Read(bad, Extent::kAllowPreview);
      EXPECT_TRUE(status.ok() || status.code() == absl::StatusCode::kDataLoss) << status;
    }
  }
}

}  // namespace
}  // namespace kvshrink

// The extension records of a shard: written, read, and every violation refused.
#include "format/extensions.h"

#include <gtest/gtest.h>

#include "blocks.h"
#include "format/layout.h"

namespace kvshrink {
namespace {

constexpr TensorShape kShape{200, 2, 64};

std::vector<Rope> Ropes() {
  std::vector<Rope> ropes;
  for (const RopeScaling scaling :
       {RopeScaling::kNone, RopeScaling::kLinear, RopeScaling::kNtk, RopeScaling::kYarn,
        RopeScaling::kLlama3, RopeScaling::kYarnUntruncated}) {
    Rope rope;
    rope.theta = 123456.5;
    rope.rotary_dim = 48;
    rope.pairing = RopePairing::kGptj;
    rope.scaling = scaling;
    rope.position_offset = -77;
    if (scaling != RopeScaling::kNone) {
      rope.factor = 1.5;
    }
    if (scaling == RopeScaling::kLlama3) {
      rope.low_freq_factor = 1.25;
      rope.high_freq_factor = 5;
    } else if (scaling == RopeScaling::kYarn || scaling == RopeScaling::kYarnUntruncated) {
      rope.beta_fast = 30;
      rope.beta_slow = 2;
    }
    if (static_cast<int>(scaling) >= 3) {
      rope.original_max_position = 8192;
    }
    ropes.push_back(rope);
  }
  return ropes;
}

std::span<const uint8_t> Bytes(const std::string& bytes) {
  return {reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()};
}

absl::Status Read(const std::string& bytes) {
  ShardExtensions extensions;
  return format::ReadExtensions(Bytes(bytes), kShape, &extensions);
}

void ExpectRefused(const std::string& bytes, const std::string& field) {
  const absl::Status status = Read(bytes);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << field;
  EXPECT_NE(std::string(status.message()).find("'" + field + "'"), std::string::npos)
      << field << ": " << status;
}

TEST(Extensions, WhatIsWrittenIsRead) {
  EXPECT_EQ(format::WriteExtensions({}), "");
  for (const Rope& rope : Ropes()) {
    const std::string bytes = format::WriteExtensions({rope});
    EXPECT_EQ(bytes.size() % 8, 0U);
    ShardExtensions read;
    ASSERT_TRUE(format::ReadExtensions(Bytes(bytes), kShape, &read).ok()) << RopeText(rope);
    EXPECT_EQ(read.rope, rope) << RopeText(rope);
  }
}

TEST(Extensions, BytesAreThoseOfTheFormat) {
  Rope rope = Ropes()[1];
  EXPECT_EQ(format::WriteExtensions({rope}),
            std::string("\x01\x00\x18\x00\x00\x00\x00\x00"   // type, size, reserved
                        "\x00\x00\x00\x00\x08\x24\xFE\x40"   // theta
                        "\x30\x00\x01\x01\xB3\xFF\xFF\xFF"   // dim, pairing, scaling, offset
                        "\x00\x00\x00\x00\x00\x00\xF8\x3F",  // factor
                        32));
}

TEST(Extensions, EveryViolationIsRefused) {
  for (const Rope& rope : Ropes()) {
    const std::string good = format::WriteExtensions({rope});
    ASSERT_TRUE(Read(good).ok());
    for (size_t size = 1; size < good.size(); ++size) {
      ExpectRefused(good.substr(0, size), "extension.size");
    }
    ExpectRefused(good + good, "extension.type");  // twice
    const auto with = [&](size_t offset, const std::string& bytes) {
      return std::string(good).replace(offset, bytes.size(), bytes);
    };
    ExpectRefused(with(0, std::string(2, '\0')), "extension.type");
    ExpectRefused(with(0, "\x09"), "extension.type");
    ExpectRefused(with(2, "\x04"), "extension.size");
    ExpectRefused(with(2, "\xF8\xFF"), "extension.size");
    ExpectRefused(with(2, std::string(1, '\0')), "extension.size");
    ExpectRefused(with(7, "\x01"), "extension.reserved");
    ExpectRefused(with(14, "\xF8\x7F"), "extension.rope.theta");  // infinity or NaN
    ExpectRefused(with(14, "\xF0\xBF"), "extension.rope.theta");  // negative
    ExpectRefused(with(16, "\x2F"), "extension.rope.rotary_dim");
    ExpectRefused(with(16, "\x42"), "extension.rope.rotary_dim");
    ExpectRefused(with(16, std::string(2, '\0')), "extension.rope.rotary_dim");
    ExpectRefused(with(18, "\x02"), "extension.rope.pairing");
    for (size_t at = 24; at + 8 <= good.size(); at += 8) {
      EXPECT_FALSE(Read(with(at + 6, "\xF8\x7F")).ok()) << RopeText(rope) << " " << at;
      EXPECT_FALSE(Read(with(at, std::string(8, '\0'))).ok()) << RopeText(rope) << " " << at;
      EXPECT_FALSE(Read(with(at + 7, "\xBF")).ok()) << RopeText(rope) << " " << at;
    }
  }
  // Another scaling takes another number of numbers; an unknown one takes none.
  std::string other = format::WriteExtensions({Ropes()[0]});
  other[19] = 1;
  ExpectRefused(other, "extension.size");
  other[19] = 6;
  ExpectRefused(other, "extension.rope.scaling");
}

TEST(Extensions, TheirBytesAreChecked) {
  const testing::Tensor k = testing::Gaussian(kShape, 1);
  const auto backend = MakeCpuBackend(1);
  EncodeOptions options = testing::OptionsOf(Profile::kKvs2);
  options.rope = Ropes()[3];
  const std::string good = *EncodeShard(*backend, k.View(), k.View(), options);
  ASSERT_TRUE(Shard::Parse(good).ok());
  EXPECT_EQ(Shard::Parse(good)->header().extensions.rope, options.rope);
  for (size_t i = 0; i < 56; ++i) {
    std::string bad = good;
    bad[format::kHeaderBytes + i] = static_cast<char>(bad[format::kHeaderBytes + i] ^ 1);
    const absl::Status status = Shard::Parse(bad).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
    EXPECT_NE(std::string(status.message()).find("'index_checksum'"), std::string::npos);
  }
}

}  // namespace
}  // namespace kvshrink

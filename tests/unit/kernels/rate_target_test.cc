// Rate target and fixed size: the rate is kept, the bits go where they help.
#include <gtest/gtest.h>

#include <limits>

#include "blocks.h"
#include "kvshrink/codec.h"

namespace kvshrink {
namespace {

using testing::Tensor;

EncodeOptions AtRate(double bits_per_entry, Profile profile = Profile::kKvs2) {
  EncodeOptions options;
  options.profile = profile;
  options.bits_per_entry = bits_per_entry;
  return options;
}

absl::StatusOr<std::string> Encode(const Tensor& k, const Tensor& v, const EncodeOptions& options,
                                   ShardReport* report = nullptr) {
  return EncodeShard(*MakeCpuBackend(2), k.View(), v.View(), options, report);
}

double ErrorSum(const ShardReport& report) {
  return report.k.relative_error() + report.v.relative_error();
}

TEST(RateTarget, IsKeptAndNearlySpent) {
  const Tensor k = testing::QwenLayer("k", 8);
  const Tensor v = testing::QwenLayer("v", 8);
  double before = 10;
  for (const double bits : {1.85, 2.0, 2.5, 3.0, 4.2, 6.0}) {
    ShardReport report;
    const auto bytes = Encode(k, v, AtRate(bits), &report);
    ASSERT_TRUE(bytes.ok()) << bytes.status();
    EXPECT_LE(bytes->size(), ShardBytesAt(k.shape, bits));
    EXPECT_GE(report.bits_per_entry(), bits - (bits < 5 ? 0.05 : 2)) << bits;
    EXPECT_LT(ErrorSum(report), before) << bits;
    before = ErrorSum(report);
    const auto measured =
        MeasureShard(*MakeCpuBackend(1), *Shard::Parse(*bytes), k.View(), v.View());
    ASSERT_TRUE(measured.ok());
    EXPECT_NEAR(measured->k.error_energy, report.k.error_energy, 0.01 * report.k.error_energy);
  }
}

TEST(RateTarget, TrellisProfilesChooseTrellisCodes) {
  const Tensor k = testing::QwenLayer("k", 8);
  const Tensor v = testing::QwenLayer("v", 8);
  for (const double bits : {2.0, 3.0, 4.2}) {
    ShardReport levels;
    ASSERT_TRUE(Encode(k, v, AtRate(bits), &levels).ok());
    for (const Profile profile : {Profile::kKvs2t, Profile::kKvs3t}) {
      ShardReport trellis;
      const auto bytes = Encode(k, v, AtRate(bits, profile), &trellis);
      ASSERT_TRUE(bytes.ok()) << bytes.status();
      EXPECT_LE(bytes->size(), ShardBytesAt(k.shape, bits));
      EXPECT_LT(ErrorSum(trellis), (bits < 4 ? 0.85 : 1.02) * ErrorSum(levels)) << bits;
    }
  }
}

TEST(RateTarget, FixedSizeIsTheSizeForAllChunks) {
  const TensorShape shape{256, 2, 64};
  const uint64_t expected = ShardBytesAt(shape, 2.5);
  EXPECT_EQ(expected % 4, 0U);
  for (const uint32_t seed : {1U, 2U, 3U}) {
    EncodeOptions options = AtRate(2.5);
    options.fixed_size = true;
    options.first_token = seed == 1 ? 0 : 256 * seed;
    const Tensor k = testing::Gaussian(shape, seed);
    const Tensor v = testing::Gaussian(shape, seed + 10);
    const auto bytes = Encode(k, v, options);
    ASSERT_TRUE(bytes.ok()) << bytes.status();
    EXPECT_EQ(bytes->size(), expected);
    const auto shard = Shard::Parse(*bytes);
    ASSERT_TRUE(shard.ok()) << shard.status();
    EXPECT_TRUE(shard->header().padded);
    EXPECT_TRUE(testing::DecodeAll(*MakeCpuBackend(1), *bytes).ok());
    EXPECT_TRUE(Shard::Parse(bytes->substr(0, shard->preview_bytes()), Extent::kAllowPreview).ok());
  }
}

TEST(RateTarget, ARotaryEmbeddingCountsInFixedSizes) {
  const Tensor k = testing::QwenLayer("k", 8);
  EncodeOptions options = AtRate(2.5);
  options.fixed_size = true;
  ShardReport without;
  ASSERT_TRUE(Encode(k, k, options, &without).ok());
  options.rope = Rope{.theta = 1e6};
  ShardReport with;
  const auto bytes = Encode(k, k, options, &with);
  ASSERT_TRUE(bytes.ok()) << bytes.status();
  EXPECT_EQ(bytes->size(), ShardBytesAt(k.shape, 2.5));
  EXPECT_LT(with.k.relative_error(), without.k.relative_error());
  EXPECT_TRUE(Shard::Parse(*bytes)->header().extensions.rope.has_value());
}

TEST(RateTarget, ExactBlocksArePaidByTheOthers) {
  Tensor k = testing::Gaussian({512, 2, 64}, 5);
  const Tensor v = testing::Gaussian({512, 2, 64}, 6);
  k.values[300 * 128 + 3] = std::numeric_limits<float>::quiet_NaN();
  ShardReport report;
  const auto bytes = Encode(k, v, AtRate(5), &report);
  ASSERT_TRUE(bytes.ok()) << bytes.status();
  EXPECT_LE(bytes->size(), ShardBytesAt(k.shape, 5));
  EXPECT_EQ(report.k.raw_blocks, 1U);
}

TEST(RateTarget, BothBackendsPlanAlike) {
  const Tensor k = testing::SmolLayer("k", 12);
  const Tensor v = testing::SmolLayer("v", 12);
  ShardReport cpu;
  ShardReport reference;
  ASSERT_TRUE(Encode(k, v, AtRate(2.3), &cpu).ok());
  ASSERT_TRUE(
      EncodeShard(*MakeReferenceBackend(), k.View(), v.View(), AtRate(2.3), &reference).ok());
  EXPECT_NEAR(cpu.k.error_energy, reference.k.error_energy, 0.02 * reference.k.error_energy);
  EXPECT_NEAR(cpu.v.error_energy, reference.v.error_energy, 0.02 * reference.v.error_energy);
}

void ExpectRefused(const EncodeOptions& options, const std::string& field,
                   const std::string& text) {
  const Tensor k = testing::Gaussian({128, 1, 64}, 1);
  const absl::Status status = Encode(k, k, options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(std::string(status.message()).find(field), std::string::npos) << status;
  EXPECT_NE(std::string(status.message()).find(text), std::string::npos) << status;
}

TEST(RateTarget, WhatItCantKeepIsRefused) {
  ExpectRefused(AtRate(1.0), "bits_per_entry", "at least");
  ExpectRefused(AtRate(-1), "bits_per_entry", "-1");
  ExpectRefused(AtRate(65), "bits_per_entry", "65");
  ExpectRefused(AtRate(std::numeric_limits<double>::quiet_NaN()), "bits_per_entry", "nan");
  ExpectRefused(AtRate(3, Profile::kTq2), "bits_per_entry", "tq2");
  EncodeOptions options = AtRate(2.5);
  options.max_relative_error = 0.1;
  ExpectRefused(options, "max_relative_error", "bits_per_entry");
  options = AtRate(0);
  options.fixed_size = true;
  ExpectRefused(options, "fixed_size", "bits_per_entry");
}

}  // namespace
}  // namespace kvshrink

// The CPU backend against the scalar double reference, and both against the exact solver.
#include <gtest/gtest.h>

#include <cmath>

#include "blocks.h"

namespace kvshrink {
namespace {

using testing::DecodeAll;
using testing::Decoded;
using testing::Tensor;

struct Case {
  std::string name;
  Tensor k, v;
};

std::vector<Case> Cases() {
  std::vector<Case> cases;
  cases.push_back({"smollm2 layer 0", testing::SmolLayer("k", 0), testing::SmolLayer("v", 0)});
  cases.push_back({"smollm2 layer 17", testing::SmolLayer("k", 17), testing::SmolLayer("v", 17)});
  cases.push_back({"qwen layer 0", testing::QwenLayer("k", 0), testing::QwenLayer("v", 0)});
  cases.push_back({"qwen layer 22", testing::QwenLayer("k", 22), testing::QwenLayer("v", 22)});
  for (const uint32_t d : {64U, 80U, 96U, 112U, 128U, 192U, 256U, 512U, 7U}) {
    const TensorShape shape{150, 2, d};
    cases.push_back({"structured d=" + std::to_string(d),
                     testing::LowRankPlusNoise(shape, 6, 0.05F, d),
                     testing::Gaussian(shape, d + 1)});
  }
  return cases;
}

// Decoders of one shard differ by rounding alone. A value is a sum of up to 12 products of factors
// and a row that has passed at most 2 x 9 butterflies: under 64 roundings, each of at most 2^-24 of
// a value that the row's norm bounds; that norm is at most 2 sqrt(d) 2^e, and the float
// exponentials of scales add 3 units in the last place.
double DecodeTolerance(const Shard& shard, const BlockView& block) {
  return 128 * 0x1p-24 * 2 * std::sqrt(static_cast<double>(shard.header().shape.head_dim)) *
         std::ldexp(1.0, block.exponent);
}

TEST(Oracle, DecodersAgreeWithinRounding) {
  const auto cpu = MakeCpuBackend(2);
  const auto reference = MakeReferenceBackend();
  for (const Case& test : Cases()) {
    for (const ProfileInfo& profile : testing::PlainProfiles()) {
      const auto bytes =
          EncodeShard(*cpu, test.k.View(), test.v.View(), testing::OptionsOf(profile.profile));
      ASSERT_TRUE(bytes.ok()) << bytes.status();
      const auto shard = Shard::Parse(*bytes);
      ASSERT_TRUE(shard.ok()) << shard.status();
      for (const DecodeForm form : {DecodeForm::kFull, DecodeForm::kLowRank}) {
        const auto a = DecodeAll(*cpu, *bytes, form);
        const auto b = DecodeAll(*reference, *bytes, form);
        ASSERT_TRUE(a.ok() && b.ok());
        for (const BlockView& block : shard->blocks()) {
          const bool key = block.kind == Kind::kKey;
          const double tolerance = DecodeTolerance(*shard, block);
          for (uint32_t t = 0; t < block.rows; ++t) {
            const size_t offset = test.k.View().layout.Offset(block.first_row + t, block.head);
            for (uint32_t c = 0; c < shard->header().shape.head_dim; ++c) {
              const float x = (key ? a->k : a->v).values[offset + c];
              const float y = (key ? b->k : b->v).values[offset + c];
              ASSERT_LE(std::abs(static_cast<double>(x) - static_cast<double>(y)), tolerance)
                  << test.name << " " << profile.name << " token " << block.first_row + t
                  << " channel " << c;
            }
          }
        }
      }
    }
  }
}

// Encoders may part where a value lies within rounding of a threshold, or two bit counts cost the
// same: their shards differ, what they lose and what they cost doesn't.
TEST(Oracle, EncodersLoseAndCostTheSame) {
  const auto cpu = MakeCpuBackend(2);
  const auto reference = MakeReferenceBackend();
  for (const Case& test : Cases()) {
    for (const ProfileInfo& profile : testing::PlainProfiles()) {
      ShardReport a;
      ShardReport b;
      ASSERT_TRUE(
          EncodeShard(*cpu, test.k.View(), test.v.View(), testing::OptionsOf(profile.profile), &a)
              .ok());
      ASSERT_TRUE(EncodeShard(*reference, test.k.View(), test.v.View(),
                              testing::OptionsOf(profile.profile), &b)
                      .ok());
      EXPECT_NEAR(a.bits_per_entry(), b.bits_per_entry(), 0.002 * b.bits_per_entry())
          << test.name << " " << profile.name;
      EXPECT_NEAR(a.k.relative_error(), b.k.relative_error(), 0.005 * b.k.relative_error())
          << test.name << " " << profile.name;
      EXPECT_NEAR(a.v.relative_error(), b.v.relative_error(), 0.005 * b.v.relative_error())
          << test.name << " " << profile.name;
    }
  }
}

// Three rounds of 16 probes lose at most what codec measurements allow: 1% at equal rate on the
// mean over blocks.
TEST(Oracle, SubspaceIterationIsAsGoodAsTheExactSolver) {
  const auto cpu = MakeCpuBackend(2);
  const auto exact = MakeReferenceBackend(/*exact=*/true);
  for (const Case& test : Cases()) {
    ShardReport a;
    ShardReport b;
    ASSERT_TRUE(
        EncodeShard(*cpu, test.k.View(), test.v.View(), testing::OptionsOf(Profile::kKvs2), &a)
            .ok());
    ASSERT_TRUE(
        EncodeShard(*exact, test.k.View(), test.v.View(), testing::OptionsOf(Profile::kKvs2), &b)
            .ok());
    // Rate and error together: a difference in bits counts as 2 ln 2 per bit of each entry.
    const auto cost = [](const ShardReport& report) {
      return std::log(report.k.relative_error()) + std::log(report.v.relative_error()) +
             4 * std::log(2.0) * report.bits_per_entry();
    };
    EXPECT_LE(cost(a), cost(b) + 2 * 0.01) << test.name;
  }
}

}  // namespace
}  // namespace kvshrink

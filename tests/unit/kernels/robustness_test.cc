// Blocks that break codecs: constant, tiny, huge, not finite, outliers, one token, denormal.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "blocks.h"

namespace kvshrink {
namespace {

using testing::DecodeAll;
using testing::Decoded;
using testing::OptionsOf;
using testing::Tensor;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Encodes with both backends, checks that all is finite and the error is no more than the block
// itself, returns the CPU's.
Decoded RoundTrip(const Tensor& k, const Tensor& v, Profile profile, ShardReport* report) {
  Decoded result;
  for (const bool cpu : {false, true}) {
    const auto backend = cpu ? MakeCpuBackend(2) : MakeReferenceBackend();
    const auto bytes = EncodeShard(*backend, k.View(), v.View(), OptionsOf(profile), report);
    EXPECT_TRUE(bytes.ok()) << bytes.status();
    const auto decoded = DecodeAll(*backend, *bytes);
    EXPECT_TRUE(decoded.ok()) << decoded.status();
    result = *decoded;
  }
  return result;
}

TEST(Robustness, ZeroAndConstantBlocks) {
  const TensorShape shape{140, 2, 64};
  for (const ProfileInfo& profile : testing::PlainProfiles()) {
    const Tensor zero = testing::Zeros(shape);
    Tensor constant = testing::Zeros(shape);
    std::fill(constant.values.begin(), constant.values.end(), -3.25F);
    ShardReport report;
    const Decoded decoded = RoundTrip(zero, constant, profile.profile, &report);
    EXPECT_EQ(decoded.k.values, zero.values) << profile.name;
    EXPECT_LT(testing::ErrorEnergy(constant.values, decoded.v.values),
              0.25 * testing::Energy(constant.values))
        << profile.name;
    if (profile.family == Family::kKvs) {
      // Rank one holds a constant; its factors have 8 bits at most.
      EXPECT_LT(report.v.relative_error(), 1e-4) << profile.name;
    }
  }
}

TEST(Robustness, NotFiniteBlocksAreRawAndExactAndOthersAreNot) {
  const TensorShape shape{256, 1, 64};
  for (const float poison : {kInfinity, -kInfinity, kNan}) {
    for (const ProfileInfo& profile : testing::PlainProfiles()) {
      Tensor k = testing::Gaussian(shape, 1);
      k.at(200, 0, 7) = poison;
      const Tensor v = testing::Gaussian(shape, 2);
      ShardReport report;
      const Decoded decoded = RoundTrip(k, v, profile.profile, &report);
      EXPECT_EQ(std::memcmp(decoded.k.values.data() + 128 * 64, k.values.data() + 128 * 64,
                            128 * 64 * sizeof(float)),
                0)
          << profile.name;
      if (profile.family != Family::kRaw) {
        EXPECT_EQ(report.k.raw_blocks, 1U) << profile.name;
        EXPECT_EQ(report.v.raw_blocks, 0U) << profile.name;
        EXPECT_GT(report.k.energy, 0);
        EXPECT_TRUE(std::isfinite(report.k.relative_error()));
      }
    }
  }
}

TEST(Robustness, ScalingByAPowerOfTwoScalesTheDecodeExactly) {
  const TensorShape shape{130, 1, 64};
  const Tensor k = testing::LowRankPlusNoise(shape, 4, 0.1F, 3);
  const Tensor v = testing::Gaussian(shape, 4);
  for (const ProfileInfo& profile : testing::PlainProfiles()) {
    ShardReport report;
    const Decoded plain = RoundTrip(k, v, profile.profile, &report);
    for (const int exponent : {-100, -20, -1, 3, 60, 120}) {
      Tensor scaled_k = k;
      Tensor scaled_v = v;
      for (float& value : scaled_k.values) {
        value = std::ldexp(value, exponent);
      }
      for (float& value : scaled_v.values) {
        value = std::ldexp(value, exponent);
      }
      const Decoded scaled = RoundTrip(scaled_k, scaled_v, profile.profile, &report);
      for (size_t i = 0; i < plain.k.values.size(); ++i) {
        ASSERT_EQ(scaled.k.values[i], std::ldexp(plain.k.values[i], exponent))
            << profile.name << " " << exponent;
        ASSERT_EQ(scaled.v.values[i], std::ldexp(plain.v.values[i], exponent))
            << profile.name << " " << exponent;
      }
    }
  }
}

TEST(Robustness, ExtremesOfFp32StayFinite) {
  const TensorShape shape{64, 1, 64};
  for (const float largest :
       {std::numeric_limits<float>::max(), 0x1p126F, std::numeric_limits<float>::min(),
        std::numeric_limits<float>::denorm_min() * 100}) {
    Tensor k = testing::Gaussian(shape, 5);
    float peak = 0;
    for (const float value : k.values) {
      peak = std::max(peak, std::abs(value));
    }
    for (float& value : k.values) {
      value = static_cast<float>(static_cast<double>(value) / static_cast<double>(peak) *
                                 static_cast<double>(largest));
    }
    for (const ProfileInfo& profile : testing::PlainProfiles()) {
      ShardReport report;
      const Decoded decoded = RoundTrip(k, k, profile.profile, &report);
      for (const float value : decoded.k.values) {
        ASSERT_TRUE(std::isfinite(value)) << profile.name << " " << largest;
      }
      if (largest < std::numeric_limits<float>::min()) {
        EXPECT_EQ(report.k.raw_blocks, report.k.blocks) << "denormals are beyond the exponent";
        EXPECT_EQ(decoded.k.values, k.values);
      }
      EXPECT_LT(testing::ErrorEnergy(k.values, decoded.k.values), 0.25 * testing::Energy(k.values))
          << profile.name << " " << largest;
    }
  }
}

TEST(Robustness, OutlierChannelsAndSinkTokens) {
  const TensorShape shape{256, 1, 128};
  Tensor k = testing::Gaussian(shape, 8);
  for (uint32_t t = 0; t < 256; ++t) {
    k.at(t, 0, 17) += 80;   // a biased channel
    k.at(t, 0, 90) -= 300;  // another
  }
  Tensor v = testing::Gaussian(shape, 9);
  for (uint32_t c = 0; c < 128; ++c) {
    v.at(40, 0, c) *= 200;  // a massive token
    v.at(41, 0, c) *= 1e-3F;
  }
  ShardReport report;
  const Decoded decoded = RoundTrip(k, v, Profile::kKvs2, &report);
  // What is left of K beside the bias is noise of energy 1 against 80^2 + 300^2 over 128 channels:
  // coded at 1.6 bits it loses a fifth.
  EXPECT_LT(report.k.relative_error() * (80.0 * 80 + 300.0 * 300) / 128, 0.30);
  // A row's own scale keeps small rows beside a massive one.
  double error = 0;
  double energy = 0;
  for (uint32_t c = 0; c < 128; ++c) {
    const double x = static_cast<double>(v.at(42, 0, c));
    const double y = static_cast<double>(decoded.v.values[v.View().layout.Offset(42, 0) + c]);
    error += (x - y) * (x - y);
    energy += x * x;
  }
  EXPECT_LT(error, 0.4 * energy);
}

TEST(Robustness, EveryNumberOfTokensAndAwkwardHeadDims) {
  for (const uint32_t tokens : {1U, 2U, 3U, 4U, 5U, 127U, 128U, 129U, 300U}) {
    for (const uint32_t d : {1U, 2U, 3U, 31U, 80U}) {
      const TensorShape shape{tokens, 1, d};
      const Tensor k = testing::Gaussian(shape, tokens);
      const Tensor v = testing::Gaussian(shape, d);
      for (const ProfileInfo& profile : testing::PlainProfiles()) {
        ShardReport report;
        const Decoded decoded = RoundTrip(k, v, profile.profile, &report);
        EXPECT_LE(testing::ErrorEnergy(k.values, decoded.k.values), 0.6 * testing::Energy(k.values))
            << profile.name << " " << tokens << " " << d;
        // The raw form bounds every profile's size, but for the padding of three parts.
        const uint32_t blocks = 2 * ((tokens + 127) / 128);
        EXPECT_LE(report.encoded_bytes,
                  96 + (6 + 3 * 3) * blocks + 2 * shape.entries() * sizeof(float));
      }
    }
  }
}

}  // namespace
}  // namespace kvshrink

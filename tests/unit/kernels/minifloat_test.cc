#include "stages/minifloat.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace kvshrink::stages {
namespace {

// Nearest of all finite values, ties to the even code; the slow way.
template <typename Code>
Code Nearest(double x, const std::vector<double>& finite) {
  Code best = 0;
  const double magnitude = std::abs(x);
  for (size_t code = 0; code < finite.size(); ++code) {
    const double distance = std::abs(magnitude - finite[code]);
    const double least = std::abs(magnitude - finite[best]);
    if (distance < least || (distance == least && code % 2 == 0)) {
      best = static_cast<Code>(code);
    }
  }
  return best;
}

TEST(Fp16, EveryCodeComesBack) {
  for (uint32_t code = 0; code < 65536; ++code) {
    const float value = Fp16ToFloat(static_cast<uint16_t>(code));
    if (std::isnan(value)) {
      EXPECT_GT(code & 0x7FFF, 0x7C00U);
      EXPECT_TRUE(std::isnan(Fp16ToFloat(FloatToFp16(value))));
      continue;
    }
    EXPECT_EQ(FloatToFp16(value), code);
  }
  EXPECT_EQ(Fp16ToFloat(0x3C00), 1.0F);
  EXPECT_EQ(Fp16ToFloat(0x0001), 0x1p-24F);
  EXPECT_EQ(Fp16ToFloat(0x7BFF), 65504.0F);
}

TEST(Fp16, RoundsToNearestEvenAndSaturates) {
  EXPECT_EQ(FloatToFp16(1.0F + 0x1p-11F), 0x3C00);
  EXPECT_EQ(FloatToFp16(1.0F + 3 * 0x1p-11F), 0x3C02);
  EXPECT_EQ(FloatToFp16(0x1p-25F), 0);
  EXPECT_EQ(FloatToFp16(3 * 0x1p-25F), 2);
  EXPECT_EQ(FloatToFp16(1e6F), 0x7BFF);
  EXPECT_EQ(FloatToFp16(-1e38F), 0xFBFF);
  EXPECT_EQ(FloatToFp16(std::numeric_limits<float>::infinity()), 0x7C00);
}

TEST(Bf16, EveryCodeComesBack) {
  for (uint32_t code = 0; code < 65536; ++code) {
    const float value = Bf16ToFloat(static_cast<uint16_t>(code));
    if (!std::isnan(value)) {
      EXPECT_EQ(FloatToBf16(value), code);
    }
  }
  EXPECT_EQ(FloatToBf16(std::numeric_limits<float>::max()), 0x7F7F);
  EXPECT_TRUE(std::isnan(Bf16ToFloat(FloatToBf16(std::numeric_limits<float>::quiet_NaN()))));
}

TEST(Fp8, NearestOfAllValues) {
  std::vector<double> finite;
  for (uint8_t code = 0; code < 0x7F; ++code) {
    finite.push_back(static_cast<double>(Fp8ToFloat(code)));
    EXPECT_EQ(FloatToFp8(Fp8ToFloat(code)), code);
    EXPECT_EQ(FloatToFp8(-Fp8ToFloat(code)), code | 0x80);
  }
  EXPECT_EQ(finite.back(), 448);
  EXPECT_EQ(finite[1], 0x1p-9);
  EXPECT_TRUE(std::isnan(Fp8ToFloat(0x7F)));
  EXPECT_TRUE(Fp8IsNan(0xFF));
  std::mt19937 random(1);
  for (int i = 0; i < 20000; ++i) {
    const float x = std::ldexp(std::uniform_real_distribution<float>(-1, 1)(random),
                               std::uniform_int_distribution<int>(-10, 9)(random));
    EXPECT_EQ(FloatToFp8(x) & 0x7F, Nearest<uint8_t>(static_cast<double>(x), finite)) << x;
  }
  EXPECT_EQ(FloatToFp8(1e30F), 0x7E);
}

}  // namespace
}  // namespace kvshrink::stages

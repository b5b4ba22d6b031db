#include "stages/scales.h"

#include <gtest/gtest.h>

#include <cmath>

#include "stages/exponent.h"
#include "stages/row_scales.h"

namespace kvshrink::stages {
namespace {

TEST(Scale8, NearestEighthOfAnOctave) {
  for (int q = 0; q < 256; ++q) {
    EXPECT_EQ(EncodeScale8(DecodeScale8<double>(q)), q);
  }
  for (double log = -23; log < 8; log += 0.0137) {
    const double back = DecodeScale8<double>(EncodeScale8(std::exp2(log)));
    EXPECT_LE(std::abs(std::log2(back) - log), 1.0 / 16 + 1e-12);
  }
  EXPECT_EQ(EncodeScale8(0.0), 0);
  EXPECT_EQ(EncodeScale8(1e9), 255);
}

TEST(Offsets, WithinATwelfthOfAnOctaveAndZeroIsZero) {
  const double block = 0.3;
  for (double log = 0; log > -5; log -= 0.013) {
    const double back = block * DecodeOffset<double>(EncodeOffset(block * std::exp2(log), block));
    EXPECT_LE(std::abs(std::log2(back / block) - log), 1.0 / 12 + 1e-12);
  }
  EXPECT_EQ(EncodeOffset(0.0, block), kZeroOffset);
  EXPECT_EQ(EncodeOffset(block * 1e-9, block), kZeroOffset);
  EXPECT_EQ(DecodeOffset<double>(kZeroOffset), 0);
}

TEST(RowScales, DecoderGetsWhatTheEncoderSaw) {
  for (const Family family : {Family::kKvs, Family::kTq}) {
    std::vector<double> scales = {0.5, 0.01, 0, 0.49, 3e-7, 0.25};
    std::vector<uint8_t> bytes;
    WriteRowScales<double>(family, 64, scales, &bytes);
    EXPECT_EQ(bytes.size(), family == Family::kKvs ? 1U + 4U : 12U);
    std::vector<double> back(scales.size());
    ASSERT_TRUE(ReadRowScales<double>(family, 64, bytes, back));
    EXPECT_EQ(back, scales);
    EXPECT_EQ(back[2], 0);
  }
}

TEST(RowScales, NormsThatAreNotNumbersAreRefused) {
  std::vector<float> scales(1);
  EXPECT_FALSE(ReadRowScales<float>(Family::kTq, 64, std::vector<uint8_t>{0x00, 0x7C}, scales));
  EXPECT_FALSE(ReadRowScales<float>(Family::kTq, 64, std::vector<uint8_t>{0x00, 0xBC}, scales));
  EXPECT_TRUE(ReadRowScales<float>(Family::kTq, 64, std::vector<uint8_t>{0x00, 0x3C}, scales));
}

TEST(RowSums, ErrorIsTheSumOfSquares) {
  const double x[] = {0.3, -0.7, 1.2};
  const double level[] = {0.5, -0.5, 1};
  RowSums<double> sums;
  double expected = 0;
  for (int i = 0; i < 3; ++i) {
    sums.energy += x[i] * x[i];
    sums.level_energy += level[i] * level[i];
    sums.product += x[i] * level[i];
    expected += (x[i] - 0.9 * level[i]) * (x[i] - 0.9 * level[i]);
  }
  EXPECT_NEAR(sums.Error(0.9), expected, 1e-15);
}

TEST(Exponent, BringsTheLargestIntoRange) {
  EXPECT_EQ(BlockExponent(1.0F), 1);
  EXPECT_EQ(BlockExponent(0.75F), 0);
  EXPECT_EQ(BlockExponent(0x1p-149F), -148);
  EXPECT_EQ(BlockExponent(0x1.8p127F), 128);
  for (const int exponent : {-254, -127, -3, 0, 1, 126, 127}) {
    EXPECT_EQ(PowerOfTwo(exponent).Times(0.75F), std::ldexp(0.75F, exponent));
  }
  const float infinity = INFINITY;
  EXPECT_FALSE(RangeOf(&infinity, 1).finite);
  const float nan = NAN;
  EXPECT_FALSE(RangeOf(&nan, 1).finite);
}

}  // namespace
}  // namespace kvshrink::stages

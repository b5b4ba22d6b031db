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

TEST(Offsets, WithinHalfAStepAndZeroIsZero) {
  const double block = 0.3;
  for (const int step : {1, 5, 16}) {
    const double reach = kMaxOffset * step / 16.0;
    for (double log = 0; log > -reach; log -= 0.013) {
      const int offset = EncodeOffset(block * std::exp2(log), block, step);
      EXPECT_LE(std::abs(std::log2(DecodeOffset<double>(offset, step)) - log), step / 32.0 + 1e-12);
    }
  }
  EXPECT_EQ(EncodeOffset(0.0, block, 1), kZeroOffset);
  EXPECT_EQ(EncodeOffset(block * 1e-9, block, 16), kZeroOffset);
  EXPECT_EQ(DecodeOffset<double>(kZeroOffset, 7), 0);
}

TEST(Offsets, StepIsTheFinestThatReachesTheSmallestRow) {
  for (double octaves = 0.01; octaves < 14; octaves += 0.037) {
    const double smallest = 0.3 * std::exp2(-octaves);
    const int step = OffsetStep(0.3, smallest);
    EXPECT_LE(octaves, kMaxOffset * step / 16.0 + 1e-12);
    EXPECT_TRUE(step == 1 || octaves > kMaxOffset * (step - 1) / 16.0 - 1e-12) << octaves;
    EXPECT_LE(EncodeOffset(smallest, 0.3, step), kMaxOffset);
  }
  EXPECT_EQ(OffsetStep(0.3, 0.0), 1);
  EXPECT_EQ(OffsetStep(0.3, 0.4), 1);
  EXPECT_EQ(OffsetStep(0.3, 1e-30), kCoarsestStep);
}

// A row 200 times as long as the others must not take their scales from them.
TEST(RowScales, OutlierRowLeavesTheOthersTheirScales) {
  std::vector<double> scales(128, 0.004);
  scales[17] = 0.8;
  const std::vector<double> wanted = scales;
  std::vector<uint8_t> bytes;
  WriteRowScales<double>(Family::kKvs, 64, scales, &bytes);
  for (size_t t = 0; t < scales.size(); ++t) {
    EXPECT_LE(std::abs(std::log2(scales[t] / wanted[t])), 0.32) << t;
  }
}

TEST(RowScales, DecoderGetsWhatTheEncoderSaw) {
  for (const Family family : {Family::kKvs, Family::kTq}) {
    std::vector<double> scales = {0.5, 0.01, 0, 0.49, 3e-9, 0.25};
    std::vector<uint8_t> bytes;
    WriteRowScales<double>(family, 64, scales, &bytes);
    EXPECT_EQ(bytes.size(), family == Family::kKvs ? 2U + 3U : 12U);
    std::vector<double> back(scales.size());
    ASSERT_TRUE(ReadRowScales<double>(family, 64, bytes, back));
    EXPECT_EQ(back, scales);
    EXPECT_EQ(back[2], 0);
  }
}

TEST(RowScales, NormsThatAreNotNumbersAndStepsOutOfRangeAreRefused) {
  std::vector<float> scales(1);
  EXPECT_FALSE(ReadRowScales<float>(Family::kTq, 64, std::vector<uint8_t>{0x00, 0x7C}, scales));
  EXPECT_FALSE(ReadRowScales<float>(Family::kTq, 64, std::vector<uint8_t>{0x00, 0xBC}, scales));
  EXPECT_TRUE(ReadRowScales<float>(Family::kTq, 64, std::vector<uint8_t>{0x00, 0x3C}, scales));
  EXPECT_FALSE(ReadRowScales<float>(Family::kKvs, 64, std::vector<uint8_t>{190, 0, 3}, scales));
  EXPECT_FALSE(ReadRowScales<float>(Family::kKvs, 64, std::vector<uint8_t>{190, 65, 3}, scales));
  EXPECT_TRUE(ReadRowScales<float>(Family::kKvs, 64, std::vector<uint8_t>{190, 64, 3}, scales));
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

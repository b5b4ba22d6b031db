#include "stages/digits.h"

#include <gtest/gtest.h>

#include <random>

namespace kvshrink::stages {
namespace {

const BlockCode kCodes[] = {BlockCode::kLevels3, BlockCode::kLevels4, BlockCode::kLevels5,
                            BlockCode::kLevels6, BlockCode::kLevels8, BlockCode::kLevels12,
                            BlockCode::kLevels16};

TEST(Digits, RoundTripOfEveryAlphabetAndLength) {
  std::mt19937 random(7);
  for (const BlockCode code : kCodes) {
    const int levels = CodebookOf(code)->levels;
    for (size_t count = 1; count < 70; ++count) {
      std::vector<uint8_t> digits(count);
      for (uint8_t& digit : digits) {
        digit = static_cast<uint8_t>(std::uniform_int_distribution<int>(0, levels - 1)(random));
      }
      std::vector<uint8_t> bytes;
      PackDigits(code, digits, &bytes);
      ASSERT_EQ(bytes.size(), DigitBytes(code, count)) << levels << " " << count;
      std::vector<uint8_t> back(count);
      ASSERT_TRUE(UnpackDigits(code, bytes, back));
      EXPECT_EQ(back, digits) << levels << " " << count;
    }
  }
}

TEST(Digits, RatesAreThoseOfTheFormat) {
  EXPECT_EQ(DigitBytes(BlockCode::kLevels3, 8192), 1639U);   // 1.6 bits
  EXPECT_EQ(DigitBytes(BlockCode::kLevels4, 8192), 2048U);   // 2
  EXPECT_EQ(DigitBytes(BlockCode::kLevels5, 8192), 2390U);   // 2.33
  EXPECT_EQ(DigitBytes(BlockCode::kLevels6, 8192), 2664U);   // 2.6
  EXPECT_EQ(DigitBytes(BlockCode::kLevels8, 8192), 3072U);   // 3
  EXPECT_EQ(DigitBytes(BlockCode::kLevels12, 8192), 3688U);  // 3.6
  EXPECT_EQ(DigitBytes(BlockCode::kLevels16, 8192), 4096U);  // 4
}

TEST(Digits, NumbersThatNoGroupHasAreRefused) {
  std::vector<uint8_t> digits(5);
  EXPECT_TRUE(UnpackDigits(BlockCode::kLevels3, std::vector<uint8_t>{242}, digits));
  EXPECT_FALSE(UnpackDigits(BlockCode::kLevels3, std::vector<uint8_t>{243}, digits));
  digits.resize(3);
  EXPECT_TRUE(UnpackDigits(BlockCode::kLevels5, std::vector<uint8_t>{124}, digits));
  EXPECT_FALSE(UnpackDigits(BlockCode::kLevels5, std::vector<uint8_t>{125}, digits));
  digits.resize(5);
  // 6^5 = 7776 = 0x1E60
  EXPECT_TRUE(UnpackDigits(BlockCode::kLevels6, std::vector<uint8_t>{0x5F, 0x1E}, digits));
  EXPECT_FALSE(UnpackDigits(BlockCode::kLevels6, std::vector<uint8_t>{0x60, 0x1E}, digits));
  // 12^5 = 248832 = 0x3CC00
  EXPECT_TRUE(UnpackDigits(BlockCode::kLevels12, std::vector<uint8_t>{0xFF, 0xCB, 0x03}, digits));
  EXPECT_FALSE(UnpackDigits(BlockCode::kLevels12, std::vector<uint8_t>{0x00, 0xCC, 0x03}, digits));
  for (const uint8_t digit : digits) {
    EXPECT_LT(digit, 12);
  }
}

TEST(Bits, LeastSignificantFirst) {
  std::vector<uint8_t> bytes;
  {
    BitWriter writer(&bytes);
    writer.Put(0b101, 3);
    writer.Put(0b11, 2);
    writer.Put(0x1FF, 9);
  }
  EXPECT_EQ(bytes, (std::vector<uint8_t>{0b11111101, 0b00111111}));
  BitReader reader(bytes);
  EXPECT_EQ(reader.Get(3), 0b101U);
  EXPECT_EQ(reader.Get(2), 0b11U);
  EXPECT_EQ(reader.Get(9), 0x1FFU);
  EXPECT_EQ(reader.Get(16), 0U);
}

}  // namespace
}  // namespace kvshrink::stages

// Digits to bytes and back: bit strings, and groups of digits of alphabets that are no power of two
// (proto/FORMAT.md section 5).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kvshrink/shard.h"
#include "stages/codebook.h"

namespace kvshrink::stages {

// Appends fields of up to 32 bits, least significant bit first.
class BitWriter {
 public:
  explicit BitWriter(std::vector<uint8_t>* out) : out_(out) {}
  ~BitWriter() { Flush(); }
  BitWriter(const BitWriter&) = delete;
  BitWriter& operator=(const BitWriter&) = delete;

  void Put(uint32_t value, int bits) {
    buffer_ |= uint64_t{value} << filled_;
    for (filled_ += bits; filled_ >= 8; filled_ -= 8) {
      out_->push_back(static_cast<uint8_t>(buffer_));
      buffer_ >>= 8;
    }
  }
  // Pads to a whole byte with zeros.
  void Flush() {
    if (filled_ > 0) {
      out_->push_back(static_cast<uint8_t>(buffer_));
    }
    buffer_ = 0;
    filled_ = 0;
  }

 private:
  std::vector<uint8_t>* out_;
  uint64_t buffer_ = 0;
  int filled_ = 0;
};

// Reads such fields. The caller has checked that they are there; past the end come zeros.
class BitReader {
 public:
  explicit BitReader(std::span<const uint8_t> bytes) : bytes_(bytes) {}

  uint32_t Get(int bits) {
    while (filled_ < bits) {
      const uint64_t next = position_ < bytes_.size() ? bytes_[position_] : 0;
      ++position_;
      buffer_ |= next << filled_;
      filled_ += 8;
    }
    const auto value = static_cast<uint32_t>(buffer_ & ((uint64_t{1} << bits) - 1));
    buffer_ >>= bits;
    filled_ -= bits;
    return value;
  }

 private:
  std::span<const uint8_t> bytes_;
  size_t position_ = 0;
  uint64_t buffer_ = 0;
  int filled_ = 0;
};

// How an alphabet's digits are grouped: `digits` digits in a field of `bits` bits. (Digits of two
// and four bits are grouped to bytes: the same bit string, written faster.)
struct Grouping {
  int digits = 1;
  int bits = 0;
};

constexpr Grouping GroupingOf(BlockCode code) {
  switch (code) {
    case BlockCode::kLevels3:
      return {5, 8};
    case BlockCode::kLevels5:
      return {3, 7};
    case BlockCode::kLevels6:
      return {5, 13};
    case BlockCode::kLevels12:
      return {5, 18};
    case BlockCode::kLevels4:
      return {4, 8};
    case BlockCode::kLevels8:
      return {1, 3};
    case BlockCode::kLevels16:
      return {2, 8};
    default:
      return {1, 0};
  }
}

constexpr const Codebook* CodebookOf(BlockCode code) {
  switch (code) {
    case BlockCode::kLevels3:
      return &kLevels3;
    case BlockCode::kLevels4:
      return &kLevels4;
    case BlockCode::kLevels5:
      return &kLevels5;
    case BlockCode::kLevels6:
      return &kLevels6;
    case BlockCode::kLevels8:
      return &kLevels8;
    case BlockCode::kLevels12:
      return &kLevels12;
    case BlockCode::kLevels16:
      return &kLevels16;
    default:
      return nullptr;
  }
}

// Bytes of `count` residual digits.
constexpr size_t DigitBytes(BlockCode code, size_t count) {
  const Grouping grouping = GroupingOf(code);
  const size_t digits = static_cast<size_t>(grouping.digits);
  const size_t groups = (count + digits - 1) / digits;
  return (groups * static_cast<size_t>(grouping.bits) + 7) / 8;
}

// Appends DigitBytes(code, digits.size()) bytes.
void PackDigits(BlockCode code, std::span<const uint8_t> digits, std::vector<uint8_t>* out);

// `bytes` holds DigitBytes(code, digits.size()) bytes. False when a group's number is out of range.
bool UnpackDigits(BlockCode code, std::span<const uint8_t> bytes, std::span<uint8_t> digits);

}  // namespace kvshrink::stages

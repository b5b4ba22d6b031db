#include "stages/digits.h"

#include <array>

namespace kvshrink::stages {
namespace {

// Digits of every byte of an alphabet packed in bytes: one look-up per group. Numbers that no group
// has are marked in `valid`.
template <int kLevels, int kDigits>
struct GroupTable {
  std::array<std::array<uint8_t, kDigits>, 256> digits{};
  int limit = 1;

  constexpr GroupTable() {
    for (int i = 0; i < kDigits; ++i) {
      limit *= kLevels;
    }
    for (int number = 0; number < limit; ++number) {
      int rest = number;
      for (int i = 0; i < kDigits; ++i) {
        digits[static_cast<size_t>(number)][static_cast<size_t>(i)] =
            static_cast<uint8_t>(rest % kLevels);
        rest /= kLevels;
      }
    }
  }
};

constexpr GroupTable<3, 5> kTernaryGroups;
constexpr GroupTable<4, 4> kQuaternaryGroups;
constexpr GroupTable<16, 2> kHexGroups;

template <int kLevels, int kDigits>
bool UnpackByteGroups(const GroupTable<kLevels, kDigits>& table, std::span<const uint8_t> bytes,
                      std::span<uint8_t> digits) {
  bool valid = true;
  size_t next = 0;
  for (const uint8_t byte : bytes) {
    valid &= byte < table.limit;
    const auto& group = table.digits[byte];
    for (size_t i = 0; i < kDigits && next < digits.size(); ++i) {
      digits[next++] = group[i];
    }
  }
  return valid;
}

// Groups of fields that are no bytes. Constants let the compiler divide by multiplication.
template <uint32_t kLevels, size_t kDigits, int kBits>
bool UnpackFields(std::span<const uint8_t> bytes, std::span<uint8_t> digits) {
  uint32_t limit = 1;
  for (size_t i = 0; i < kDigits; ++i) {
    limit *= kLevels;
  }
  BitReader reader(bytes);
  bool valid = true;
  for (size_t start = 0; start < digits.size(); start += kDigits) {
    uint32_t number = reader.Get(kBits);
    valid &= number < limit;
    for (size_t i = start; i < start + kDigits && i < digits.size(); ++i) {
      digits[i] = static_cast<uint8_t>(number % kLevels);
      number /= kLevels;
    }
  }
  return valid;
}

}  // namespace

void PackDigits(BlockCode code, std::span<const uint8_t> digits, std::vector<uint8_t>* out) {
  const Grouping grouping = GroupingOf(code);
  const auto levels = static_cast<uint32_t>(CodebookOf(code)->levels);
  out->reserve(out->size() + DigitBytes(code, digits.size()));
  BitWriter writer(out);
  for (size_t start = 0; start < digits.size(); start += static_cast<size_t>(grouping.digits)) {
    uint32_t number = 0;
    for (int i = grouping.digits - 1; i >= 0; --i) {
      const size_t place = start + static_cast<size_t>(i);
      number = number * levels + (place < digits.size() ? digits[place] : 0U);
    }
    writer.Put(number, grouping.bits);
  }
}

bool UnpackDigits(BlockCode code, std::span<const uint8_t> bytes, std::span<uint8_t> digits) {
  switch (code) {
    case BlockCode::kLevels3:
      return UnpackByteGroups(kTernaryGroups, bytes, digits);
    case BlockCode::kLevels4:
      return UnpackByteGroups(kQuaternaryGroups, bytes, digits);
    case BlockCode::kLevels5:
      return UnpackFields<5, 3, 7>(bytes, digits);
    case BlockCode::kLevels6:
      return UnpackFields<6, 5, 13>(bytes, digits);
    case BlockCode::kLevels8:
      return UnpackFields<8, 1, 3>(bytes, digits);
    case BlockCode::kLevels12:
      return UnpackFields<12, 5, 18>(bytes, digits);
    case BlockCode::kLevels16:
      return UnpackByteGroups(kHexGroups, bytes, digits);
    default:
      return false;
  }
}

}  // namespace kvshrink::stages

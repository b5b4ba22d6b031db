// Sizes and places of the parts of a shard (proto/FORMAT.md sections 2 to 5), shared by reader and
// writer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "kvshrink/profile.h"
#include "kvshrink/shard.h"

namespace kvshrink::format {

inline constexpr std::string_view kMagic = "KVS1";
inline constexpr uint16_t kVersion = 1;
inline constexpr size_t kHeaderBytes = 96;
inline constexpr uint16_t kFlagKeysOnly = 1;
inline constexpr uint16_t kFlagPadded = 2;
inline constexpr uint64_t kMaxPaddedBytes = uint64_t{1} << 31;  // of CODES
inline constexpr size_t kIndexEntryBytes = 6;
inline constexpr size_t kExtensionAlignment = 8;
inline constexpr uint32_t kMaxExtensionBytes = 4096;
inline constexpr uint32_t kMaxFormatRank = 127;
inline constexpr int kMinExponent = -126;
inline constexpr int kMaxExponent = 127;

// Offsets of the header's fields.
namespace offset {
inline constexpr size_t kMagic = 0, kVersion = 4, kProfile = 6, kDType = 7, kHeadDim = 8,
                        kKvHeads = 10, kTokens = 12, kFirstToken = 16, kLayer = 20, kFlags = 22,
                        kRawRows = 24, kExtBytes = 28, kLowBytes = 32, kScalesBytes = 40,
                        kCodesBytes = 48, kIndexChecksum = 56, kLowChecksum = 64,
                        kScalesChecksum = 72, kCodesChecksum = 80, kHeaderChecksum = 88;
}  // namespace offset

// XXH64, seed 0: of the header.
uint64_t HeaderChecksum(const void* data, size_t size);
// Of a section: in two levels, so that its pieces can be read in parallel (proto/FORMAT.md
// section 3).
uint64_t SectionChecksum(const void* data, size_t size);

// Whether blocks of the family may have this code.
bool FamilyHasCode(Family family, BlockCode code);
inline bool IsLevelCode(BlockCode code) {
  return static_cast<uint8_t>(code) >= static_cast<uint8_t>(BlockCode::kLevels3);
}
inline bool FamilyHasFactors(Family family) {
  return family == Family::kKvs || family == Family::kEOptShrinkQ;
}

// Bytes of a block's parts; m = coded rows, d = head_dim.
size_t ScaleBytes(Family family, BlockCode code, uint32_t m);
size_t CodeBytes(BlockCode code, uint32_t m, uint32_t d, DType dtype);

// Sets kind, head, rows and raw rows of block number `index` of a shard.
void PlaceBlock(const ShardHeader& header, uint32_t index, BlockView* block);

template <typename T>
T LoadLittle(const uint8_t* bytes) {
  T value = 0;
  for (size_t i = 0; i < sizeof(T); ++i) {
    value = static_cast<T>(value | static_cast<T>(T{bytes[i]} << (8 * i)));
  }
  return value;
}

template <typename T>
void StoreLittle(T value, uint8_t* bytes) {
  for (size_t i = 0; i < sizeof(T); ++i) {
    bytes[i] = static_cast<uint8_t>(value >> (8 * i));
  }
}

}  // namespace kvshrink::format

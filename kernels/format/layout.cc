#include "format/layout.h"

#include <xxhash.h>

#include <algorithm>
#include <vector>

#include "stages/digits.h"
#include "stages/scales.h"
#include "stages/trellis.h"

namespace kvshrink::format {

uint64_t HeaderChecksum(const void* data, size_t size) { return XXH64(data, size, 0); }

uint64_t SectionChecksum(const void* data, size_t size) {
  constexpr size_t kPieceBytes = 1024;
  const auto* bytes = static_cast<const uint8_t*>(data);
  std::vector<uint8_t> pieces((size + kPieceBytes - 1) / kPieceBytes * sizeof(uint64_t));
  for (size_t begin = 0; begin < size; begin += kPieceBytes) {
    StoreLittle<uint64_t>(XXH64(bytes + begin, std::min(kPieceBytes, size - begin), 0),
                          pieces.data() + begin / kPieceBytes * sizeof(uint64_t));
  }
  return XXH64(pieces.data(), pieces.size(), 0);
}

bool FamilyHasCode(Family family, BlockCode code) {
  switch (code) {
    case BlockCode::kZero:
    case BlockCode::kRaw:
      return true;
    case BlockCode::kFp8:
      return family == Family::kFp8;
    case BlockCode::kLevels3:
    case BlockCode::kLevels5:
    case BlockCode::kLevels6:
    case BlockCode::kLevels12:
    case BlockCode::kTrellis15:
    case BlockCode::kTrellis20:
    case BlockCode::kTrellis25:
    case BlockCode::kTrellis30:
      return family == Family::kKvs;
    case BlockCode::kLevels4:
    case BlockCode::kLevels8:
    case BlockCode::kLevels16:
      return family == Family::kKvs || family == Family::kTq || family == Family::kEOptShrinkQ;
  }
  return false;
}

size_t ScaleBytes(Family family, BlockCode code, uint32_t m) {
  if (!IsLevelCode(code)) {
    return 0;
  }
  return family == Family::kKvs ? stages::KvsScaleBytes(m) : size_t{2} * m;
}

size_t CodeBytes(BlockCode code, uint32_t m, uint32_t d, DType dtype) {
  const size_t entries = size_t{m} * d;
  switch (code) {
    case BlockCode::kZero:
      return 0;
    case BlockCode::kRaw:
      return entries * DTypeBytes(dtype);
    case BlockCode::kFp8:
      return entries;
    case BlockCode::kTrellis15:
    case BlockCode::kTrellis20:
    case BlockCode::kTrellis25:
    case BlockCode::kTrellis30:
      return stages::TrellisBytes(*stages::TrellisOf(code), entries);
    default:
      return stages::DigitBytes(code, entries);
  }
}

void PlaceBlock(const ShardHeader& header, uint32_t index, BlockView* block) {
  const uint32_t per_head = header.blocks_per_head();
  const uint32_t row = index / per_head;
  block->index = index;
  block->kind = row < header.shape.kv_heads ? Kind::kKey : Kind::kValue;
  block->head = row % header.shape.kv_heads;
  block->first_row = index % per_head * kBlockTokens;
  block->rows = std::min(kBlockTokens, header.shape.tokens - block->first_row);
  block->raw_rows =
      std::min(block->rows, header.raw_rows - std::min(header.raw_rows, block->first_row));
}

}  // namespace kvshrink::format

// What the key and the value side of one block, worked by one warp, share. Lane l holds the tokens
// 4 l .. 4 l + 3 of the block in per-token values, and channels l D / 32 and on in per-channel
// ones.
#pragma once

#include "attend/query_tiles.cuh"
#include "common/unpack.cuh"

namespace kvshrink::cuda {

inline constexpr uint32_t kChunkRows = 32;  // of digits in the tile at a time
inline constexpr int kWeightStride = kBlockTokens + 8;

// Shared memory of one warp.
template <int kDim, int kRows>
struct WarpShared {
  alignas(16) __half room[kTernaryHalfs<kDim, kChunkRows>];
  union {
    float products[kRows][kBlockTokens];
    __half weights[2][kRows][kWeightStride];  // high, low
    float tokens[kBlockTokens];
  };

  __device__ __half* tile() { return room + kRoomBefore; }
};

// The scales of a lane's four tokens; 0 for those that are no coded rows.
__device__ inline void LaneScales(const BlockDesc& block, uint32_t d, uint32_t lane,
                                  float (&scale)[4], bool* bad) {
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t row = lane * 4 + i;
    scale[i] = row >= block.raw_rows && row < block.rows
                   ? RowScale(block, d, row - block.raw_rows, bad)
                   : 0.0F;
  }
}

// The rotation over tokens, by the block's number of them. `scratch`: kBlockTokens floats.
__device__ inline void RotateTokens(bool inverse, uint32_t n, float (&x)[4], float* scratch,
                                    uint32_t lane) {
  if (n == kBlockTokens) {
    if (inverse) {
      WarpRotateInverse(stages::kTokenSeed, x, lane);
    } else {
      WarpRotate(stages::kTokenSeed, x, lane);
    }
    return;
  }
  __syncwarp();
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    scratch[lane * 4 + i] = x[i];
  }
  if (inverse) {
    RotateInverseAny(stages::kTokenSeed, scratch, n, lane);
  } else {
    RotateAny(stages::kTokenSeed, scratch, n, lane);
  }
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    x[i] = lane * 4 + i < n ? scratch[lane * 4 + i] : 0.0F;
  }
  __syncwarp();
}

// Value c of block row `row` where rows are kept plainly: raw rows, raw blocks, fp8.
__device__ inline float PlainValue(const BlockDesc& block, uint32_t d, uint32_t row, uint32_t c) {
  if (row < block.raw_rows) {
    return RawValue(block.low, block.dtype(), size_t{row} * d + c);
  }
  const size_t at = size_t{row - block.raw_rows} * d + c;
  if (block.code == static_cast<uint8_t>(BlockCode::kRaw)) {
    return RawValue(block.codes, block.dtype(), at);
  }
  return stages::Fp8ToFloat(block.codes[at]) * 0x1p-8F * PowerOfTwo(block.exponent);
}

// Rows 0 .. this - 1 of the block are plain.
__device__ inline uint32_t PlainRows(const BlockDesc& block) {
  const bool all = block.code == static_cast<uint8_t>(BlockCode::kRaw) ||
                   block.code == static_cast<uint8_t>(BlockCode::kFp8);
  return all ? block.rows : block.raw_rows;
}

// Calls use(first coded row, 16-row tiles in `tile` that hold digits, fine tile or null) for all
// coded rows, 32 (ternary) or 16 at a time; rows past the last are zero digits.
template <int kDim, typename Use>
__device__ inline bool ForEachChunk(const BlockDesc& block, __half* tile, uint32_t lane,
                                    const Use& use) {
  const uint32_t m = block.coded_rows();
  bool bad = false;
  if (block.code == static_cast<uint8_t>(BlockCode::kLevels3)) {
    for (uint32_t first = 0; first < m; first += kChunkRows) {
      const uint32_t count = min(kChunkRows, m - first);
      __syncwarp();
      bad |= UnpackTernaryRows<kDim, kChunkRows>(block, first, count, tile, lane);
      __syncwarp();
      use.template operator()<2, false>(first, tile, tile);
    }
    return bad;
  }
  const AlphabetLane alphabet = LoadAlphabet(block.code, lane);
  __half* fine = tile + 16 * kTileStride<kDim>;
  for (uint32_t first = 0; first < m; first += 16) {
    const uint32_t count = min(16U, m - first);
    __syncwarp();
    bad |= UnpackOtherRows<kDim>(block, alphabet, first, count, tile, fine, lane);
    ClearRows<kDim, 16>(count, tile, lane);
    ClearRows<kDim, 16>(count, fine, lane);
    __syncwarp();
    use.template operator()<1, true>(first, tile, fine);
  }
  return bad;
}

}  // namespace kvshrink::cuda

// The inverse rotation of rows by matrix instructions. With channel c = 16 j + k, the transform of
// length 16 G is one of length G over j (adds, in registers) and one of length 16 over k (a product
// with a matrix of signs, into which the rotation's own signs go too).
#pragma once

#include <cuda_fp16.h>

#include "common/mma.cuh"
#include "common/tables.cuh"

namespace kvshrink::cuda {

// Column 8 tile + i of the sums of a group is this channel of the group: a lane's four sums of a
// row, two of each tile, are consecutive channels.
constexpr uint32_t ChannelOfColumn(uint32_t tile, uint32_t i) {
  return i / 2 * 4 + i % 2 + 2 * tile;
}

// Right-hand tiles of group j as lane l holds them: tile 0 (k below 8, k from 8), tile 1 likewise.
template <int kDim>
struct HadamardTable {
  uint4 lane[kDim / 16][32] = {};
};

constexpr uint32_t HadamardHalf(uint32_t j, uint32_t k, uint32_t n) {
  uint32_t common = k & n;
  bool negative = stages::SignIsNegative(stages::kRowSeed, 16 * j + n);
  for (; common != 0; common &= common - 1) {
    negative = !negative;
  }
  return negative ? 0xBC00U : 0x3C00U;
}

template <int kDim>
constexpr HadamardTable<kDim> MakeHadamard() {
  HadamardTable<kDim> table;
  for (uint32_t j = 0; j < kDim / 16; ++j) {
    for (uint32_t lane = 0; lane < 32; ++lane) {
      uint32_t word[4] = {};
      for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t n = ChannelOfColumn(i / 2, lane / 4);
        const uint32_t k = lane % 4 * 2 + i % 2 * 8;
        word[i] = HadamardHalf(j, k, n) | (HadamardHalf(j, k + 1, n) << 16);
      }
      table.lane[j][lane] = {word[0], word[1], word[2], word[3]};
    }
  }
  return table;
}

template <int kDim>
__device__ const HadamardTable<kDim> kHadamard = MakeHadamard<kDim>();

__device__ inline uint32_t AddHalves(uint32_t a, uint32_t b) {
  const __half2 sum = __hadd2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&sum);
}

__device__ inline uint32_t SubtractHalves(uint32_t a, uint32_t b) {
  const __half2 sum = __hsub2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&sum);
}

// Loads 16 rows of a tile and transforms them over j.
template <int kDim, int kStride>
__device__ inline void LoadTransformed(const __half* tile, uint32_t lane,
                                       uint32_t (&a)[kDim / 16][4]) {
  const __half* row = tile + (lane % 16) * kStride + lane / 16 * 8;
#pragma unroll
  for (int j = 0; j < kDim / 16; ++j) {
    LoadTiles(a[j], row + 16 * j);
  }
#pragma unroll
  for (int half = 1; half < kDim / 16; half *= 2) {
#pragma unroll
    for (int j = 0; j < kDim / 16; ++j) {
      if ((j & half) == 0) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t sum = AddHalves(a[j][i], a[j + half][i]);
          a[j + half][i] = SubtractHalves(a[j][i], a[j + half][i]);
          a[j][i] = sum;
        }
      }
    }
  }
}

}  // namespace kvshrink::cuda

// The factors of a kvs block as fp16 pairs (high and low part) in shared memory, laid out as the
// tiles of matrix instructions: by one CTA.
#pragma once

#include "common/factors.cuh"
#include "common/mma.cuh"

namespace kvshrink::cuda {

inline constexpr uint32_t kTileRank = 16;  // components that there is room for

// Where channel c of a head stands among the columns of the residual's sums (decode.cu).
__device__ inline uint32_t ColumnOfChannel(uint32_t c) {
  const uint32_t n = c % 16;
  return c / 16 * 16 + (n / 2 % 2) * 8 + n / 4 * 2 + n % 2;
}

// Halfs of [half of the components][high, low][channel columns, then tokens][8 components].
template <int kDim>
inline constexpr size_t kFactorHalfs = size_t{2} * 2 * (kDim + kBlockTokens) * 8;

template <int kDim>
struct FactorTiles {
  __half* base;

  __device__ __half* Channel(uint32_t half, uint32_t part, uint32_t column) const {
    return base + ((half * 2 + part) * (kDim + kBlockTokens) + column) * 8;
  }
  __device__ __half* Token(uint32_t half, uint32_t part, uint32_t token) const {
    return Channel(half, part, kDim + token);
  }

  __device__ void PutChannel(uint32_t i, uint32_t c, float x) const {
    const SplitHalf split = Split(x);
    Channel(i / 8, 0, ColumnOfChannel(c))[i % 8] = split.high;
    Channel(i / 8, 1, ColumnOfChannel(c))[i % 8] = split.low;
  }
  __device__ void PutToken(uint32_t i, uint32_t t, float x) const {
    const SplitHalf split = Split(x);
    Token(i / 8, 0, t)[i % 8] = split.high;
    Token(i / 8, 1, t)[i % 8] = split.low;
  }
};

template <int kDim>
__device__ inline void DecodeChannel(const FactorTiles<kDim>& tiles, const LowPart& low,
                                     const ComponentPlace& place, uint32_t i, uint32_t lane) {
  constexpr int kPerLane = kDim / 32;
  float x[kPerLane];
  ReadLevels(low, place.channel_at, place.channel_bits, lane * kPerLane, x);
  float energy = 0;
#pragma unroll
  for (const float value : x) {
    energy += value * value;
  }
  const float inverse = rsqrtf(WarpSum(energy));
  WarpRotateInverse(stages::kChannelSeed, x, lane);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    tiles.PutChannel(i, lane * kPerLane + static_cast<uint32_t>(j), x[j] * inverse);
  }
}

// `scratch`: kBlockTokens floats of this warp.
template <int kDim>
__device__ inline void DecodeToken(const FactorTiles<kDim>& tiles, const LowPart& low,
                                   const ComponentPlace& place, uint32_t i, uint32_t n,
                                   float* scratch, uint32_t lane) {
  float x[4];
  ReadLevels(low, place.token_at, place.token_bits, lane * 4, x);
  if (n == kBlockTokens) {
    WarpRotateInverse(stages::kTokenSeed, x, lane);
  } else {
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
      scratch[lane * 4 + j] = x[j];
    }
    RotateInverseAny(stages::kTokenSeed, scratch, n, lane);
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
      x[j] = lane * 4 + j < n ? scratch[lane * 4 + j] : 0.0F;
    }
    __syncwarp();
  }
#pragma unroll
  for (uint32_t j = 0; j < 4; ++j) {
    tiles.PutToken(i, lane * 4 + j, x[j] * place.scale);
  }
}

// All factors of a block of rank 0 .. kTileRank; components up to 8 `halves` that aren't there are
// zero. `own_pair`: of the lane. Synchronises.
template <int kDim>
__device__ inline void DecodeFactors(const BlockDesc& block, const FactorTiles<kDim>& tiles,
                                     uint32_t halves, const LowPart& low, uint32_t own_pair,
                                     float* scratch) {
  const uint32_t lane = threadIdx.x % 32;
  if (block.rank < 8 * halves) {
    auto* words = reinterpret_cast<uint4*>(tiles.base);
    for (uint32_t i = threadIdx.x; i < kFactorHalfs<kDim> / 16 * halves; i += blockDim.x) {
      words[i] = make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
  }
  const LanePlaces places(own_pair, block.rows, kDim, low.bit_string(block.rank), lane);
  for (uint32_t v = threadIdx.x / 32; v < 2U * block.rank; v += blockDim.x / 32) {
    const ComponentPlace place = places.Get(v / 2, kDim);
    if (v % 2 == 0) {
      DecodeChannel(tiles, low, place, v / 2, lane);
    } else {
      DecodeToken(tiles, low, place, v / 2, block.rows, scratch, lane);
    }
  }
  __syncthreads();
}

}  // namespace kvshrink::cuda

// The rotated residual of a block and its digits.
// A row's Hadamard transform of d = 16 h points is split: the 16-point part of each group of 16
// channels is a product on tensor cores (exact: the block is fp16, the matrix +-1), which also
// brings the row's values together; the rest are additions inside a thread. The low-rank part is
// taken off between the two: its channel factors have been through the 16-point part.
// A warp works on 16 rows at a time. Thread (g, c) of the warp holds of rows g and g + 8 the
// channels 16 h + 4 c + {0, 1, 2, 3}: accumulator tiles 2 h (first two) and 2 h + 1.
#pragma once

#include "cuda/encode/token_factors.cuh"
#include "stages/codebook.h"

namespace kvshrink::cuda {

// Columns of the 16-point Hadamard matrix in that order, as B of a product.
struct HadamardFragment {
  uint32_t b[2][2];  // tile parity; rows 2 c.. and 2 c + 8..
};

__device__ __forceinline__ HadamardFragment MakeHadamardFragment(int lane) {
  HadamardFragment fragment;
  const int n = lane >> 2;
  const int c = lane & 3;
#pragma unroll
  for (int parity = 0; parity < 2; ++parity) {
    const int column = (n >> 1) * 4 + parity * 2 + (n & 1);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int row = 2 * c + 8 * part;
      fragment.b[parity][part] = 0x3C003C00U |
                                 ((static_cast<uint32_t>(__popc(row & column)) & 1U) << 15) |
                                 ((static_cast<uint32_t>(__popc((row + 1) & column)) & 1U) << 31);
    }
  }
  return fragment;
}

// Token factors of 16 rows, negated, as A of a product: high and low parts.
struct TokenFragment {
  uint32_t high[4], low[4];
};

__device__ __forceinline__ TokenFragment LoadTokenFactors(const float* factors, int first_row,
                                                          int lane) {
  TokenFragment fragment;
  const int g = lane >> 2;
  const int c = lane & 3;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = first_row + g + (i & 1) * 8;
    const int component = 2 * c + (i >> 1) * 8;
    const bool there = component < static_cast<int>(kFactorCap);
    const float first = there ? -factors[component * kFactorStride + row] : 0.0F;
    const float second = there ? -factors[(component + 1) * kFactorStride + row] : 0.0F;
    fragment.high[i] = PackHalves(first, second);
    const float2 rounded = UnpackHalves(fragment.high[i]);
    fragment.low[i] = PackHalves(first - rounded.x, second - rounded.y);
  }
  return fragment;
}

inline constexpr int kGroupTiles = 16;  // accumulator tiles at a time: 128 channels

// Tiles of kDim >= 128: half a row of 256 channels at a time. kHalf = which, and the point of the
// transform over the two halves is taken in the product.
template <int kDim>
struct ResidualShape {
  static constexpr int kTiles = kDim == 64 ? 8 : kGroupTiles;
  static constexpr int kHalves = kDim == 256 ? 2 : 1;
};

// acc = 16-point transforms of rows first_row.. of X, less the low-rank part when rank > 0. For
// d = 256, `half` chooses the sums (0) or differences (1) of the two halves of the channels.
template <int kDim>
__device__ __forceinline__ void RotateShort(uint32_t x, uint32_t panel, int first_row, int half,
                                            int rank, const HadamardFragment& hadamard,
                                            const TokenFragment& tokens, int lane,
                                            float (&acc)[ResidualShape<kDim>::kTiles][4]) {
  constexpr int kTiles = ResidualShape<kDim>::kTiles;
  const int row = first_row + (lane & 15);
#pragma unroll
  for (int h = 0; h < kTiles / 2; ++h) {
    const Fragment4 a = LoadMatrices(x + ChunkOffset<kDim>(row, 2 * h + (lane >> 4)));
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      float(&tile)[4] = acc[2 * h + parity];
      tile[0] = tile[1] = tile[2] = tile[3] = 0;
      MultiplyHalf(tile, a.r, hadamard.b[parity][0], hadamard.b[parity][1]);
    }
    if constexpr (ResidualShape<kDim>::kHalves == 2) {
      const uint32_t flip = half == 0 ? 0U : 0x80008000U;
      const Fragment4 far = LoadMatrices(x + ChunkOffset<kDim>(row, 2 * h + 16 + (lane >> 4)));
#pragma unroll
      for (int parity = 0; parity < 2; ++parity) {
        MultiplyHalf(acc[2 * h + parity], far.r, hadamard.b[parity][0] ^ flip,
                     hadamard.b[parity][1] ^ flip);
      }
    }
  }
  if (rank > 0) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int channel_row = 8 * j + (lane & 7) + (half << 7);
      const Fragment4 b = LoadMatrices(panel + ResidualOffset(channel_row, lane >> 3));
      MultiplyHalf(acc[j], tokens.high, b.r[0], b.r[1]);
      MultiplyHalf(acc[j], tokens.low, b.r[0], b.r[1]);
      MultiplyHalf(acc[j], tokens.high, b.r[2], b.r[3]);
    }
  }
}

// The rest of the transform: over the groups of 16 channels.
template <int kTiles>
__device__ __forceinline__ void RotateLong(float (&acc)[kTiles][4]) {
#pragma unroll
  for (int bit = 2; bit < kTiles; bit *= 2) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if ((j & bit) == 0) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float sum = acc[j][i] + acc[j | bit][i];
          acc[j | bit][i] = acc[j][i] - acc[j | bit][i];
          acc[j][i] = sum;
        }
      }
    }
  }
}

// Squares of the two rows of a thread, summed over the row's four threads.
template <int kTiles>
__device__ __forceinline__ float2 RowSquares(const float (&acc)[kTiles][4]) {
  float2 sum = make_float2(0, 0);
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    sum.x = fmaf(acc[j][0], acc[j][0], sum.x);
    sum.x = fmaf(acc[j][1], acc[j][1], sum.x);
    sum.y = fmaf(acc[j][2], acc[j][2], sum.y);
    sum.y = fmaf(acc[j][3], acc[j][3], sum.y);
  }
  sum.x += __shfl_xor_sync(kAllLanes, sum.x, 1);
  sum.y += __shfl_xor_sync(kAllLanes, sum.y, 1);
  sum.x += __shfl_xor_sync(kAllLanes, sum.x, 2);
  sum.y += __shfl_xor_sync(kAllLanes, sum.y, 2);
  return sum;
}

template <int kLevels>
constexpr stages::CodebookTable<kLevels> LevelTable() {
  if constexpr (kLevels == 3) {
    return stages::kTable3;
  } else if constexpr (kLevels == 4) {
    return stages::kTable4;
  } else if constexpr (kLevels == 5) {
    return stages::kTable5;
  } else if constexpr (kLevels == 6) {
    return stages::kTable6;
  } else if constexpr (kLevels == 8) {
    return stages::kTable8;
  } else if constexpr (kLevels == 12) {
    return stages::kTable12;
  } else {
    return stages::kTable16;
  }
}

// Digit, as a float, of the value x, 1 / inverse being the row's scale; adds the squared error in
// units of the scale.
template <int kLevels>
__device__ __forceinline__ float Quantise(float x, float inverse, float* error) {
  constexpr auto table = LevelTable<kLevels>();
  constexpr int kMiddle = kLevels / 2;  // first level that isn't negative
  if constexpr (kLevels == 3) {
    constexpr float kStep = table.level[2];
    const float y = fmaf(x, inverse, kStep);  // levels at 0, 1, 2 steps
    const float digit = (y > table.threshold[1] + kStep ? 1.0F : 0.0F) +
                        (y > table.threshold[0] + kStep ? 1.0F : 0.0F);
    const float off = fmaf(-kStep, digit, y);
    *error = fmaf(off, off, *error);
    return digit;
  } else {
    // Magnitudes against the thresholds above zero; an even alphabet has one at zero too.
    const float y = x * inverse;
    const float magnitude = fabsf(y);
    float step = 0;
    float level = table.level[kMiddle];
#pragma unroll
    for (int i = kMiddle; i + 1 < kLevels; ++i) {
      const float above = magnitude > table.threshold[static_cast<size_t>(i)] ? 1.0F : 0.0F;
      const float rise =
          table.level[static_cast<size_t>(i + 1)] - table.level[static_cast<size_t>(i)];
      step += above;
      level = fmaf(above, rise, level);
    }
    const float off = magnitude - level;
    *error = fmaf(off, off, *error);
    constexpr float kHalf = kLevels % 2 == 1 ? 0.0F : 0.5F;
    return static_cast<float>(kMiddle) - kHalf + (y > 0 ? step + kHalf : -step - kHalf);
  }
}

// Four digits as the bytes of a word.
__device__ __forceinline__ uint32_t FourDigits(float d0, float d1, float d2, float d3) {
  constexpr float kInteger = 8388608.0F;  // 2^23: the low bits of a float are an integer
  const float low = fmaf(d1, 256.0F, d0 + kInteger);
  const float high = fmaf(d3, 256.0F, d2 + kInteger);
  return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x5410);
}

// Where the digits of a row lie until they are packed: bytes, in the row's own place of X. Words
// of four digits are turned by the row so that eight rows use all banks.
template <int kDim>
__device__ __forceinline__ uint32_t DigitOffset(int row, int word) {
  return static_cast<uint32_t>(row * BlockShape<kDim>::kRowBytes +
                               ((word ^ ((row & 7) << 2)) << 2));
}

// Digits of two rows, whose scales are 1 / inverse, four in a word: words[0] of row g, words[1] of
// row g + 8. Adds the squared error in those units.
template <int kLevels, int kTiles>
__device__ __forceinline__ void QuantiseRows(const float (&acc)[kTiles][4], float2 inverse,
                                             uint32_t (&words)[2][kTiles / 2], float2* error) {
#pragma unroll
  for (int h = 0; h < kTiles / 2; ++h) {
    const float(&a)[4] = acc[2 * h];
    const float(&b)[4] = acc[2 * h + 1];
    words[0][h] = FourDigits(Quantise<kLevels>(a[0], inverse.x, &error->x),
                             Quantise<kLevels>(a[1], inverse.x, &error->x),
                             Quantise<kLevels>(b[0], inverse.x, &error->x),
                             Quantise<kLevels>(b[1], inverse.x, &error->x));
    words[1][h] = FourDigits(Quantise<kLevels>(a[2], inverse.y, &error->y),
                             Quantise<kLevels>(a[3], inverse.y, &error->y),
                             Quantise<kLevels>(b[2], inverse.y, &error->y),
                             Quantise<kLevels>(b[3], inverse.y, &error->y));
  }
}

template <int kDim, int kWords>
__device__ __forceinline__ void StoreDigits(const uint32_t (&words)[2][kWords], uint8_t* x,
                                            int first_row, int half, int lane) {
#pragma unroll
  for (int h = 0; h < kWords; ++h) {
    const int word = (half << 5) + 4 * h + (lane & 3);
    const int row = first_row + (lane >> 2);
    *reinterpret_cast<uint32_t*>(x + DigitOffset<kDim>(row, word)) = words[0][h];
    *reinterpret_cast<uint32_t*>(x + DigitOffset<kDim>(row + 8, word)) = words[1][h];
  }
}

}  // namespace kvshrink::cuda

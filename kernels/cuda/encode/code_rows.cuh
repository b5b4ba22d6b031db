// A warp's rows: their squares, then their digits.
#pragma once

#include "cuda/encode/residual.cuh"
#include "stages/minifloat.h"

namespace kvshrink::cuda {

// Rotated values of this encoder are 2^8 sqrt(d) times those relative to the exponent.
template <int kDim>
__device__ __forceinline__ float RotatedUnit() {
  return kDim == 64 ? 2048.0F : kDim == 128 ? 2896.30938F : 4096.0F;
}

// Squared rows of the residual before the long part of the rotation, for their scales.
template <int kDim>
__device__ __forceinline__ void MeasureRows(uint32_t x, uint32_t panel, const float* factors,
                                            int rank, const HadamardFragment& hadamard,
                                            float* values, int first_token, int lane) {
  using Residual = ResidualShape<kDim>;
#pragma unroll 1
  for (int m = 0; m < BlockShape<kDim>::kTokensPerWarp / 16; ++m) {
    const int first = first_token + 16 * m;
    TokenFragment tokens{};
    if (rank > 0) {
      tokens = LoadTokenFactors(factors, first, lane);
    }
    float2 squares = make_float2(0, 0);
#pragma unroll 1
    for (int half = 0; half < Residual::kHalves; ++half) {
      float acc[Residual::kTiles][4];
      RotateShort<kDim>(x, panel, first, half, rank, hadamard, tokens, lane, acc);
      const float2 part = RowSquares(acc);
      squares.x += part.x;
      squares.y += part.y;
    }
    if ((lane & 3) == 0) {
      values[first + (lane >> 2)] = squares.x;
      values[first + (lane >> 2) + 8] = squares.y;
    }
  }
}

// What the residual's pass needs of a block.
struct ResidualInput {
  uint32_t x, panel;  // shared addresses
  const float* factors;
  int rank, rows, raw_rows;
  uint8_t* block;
  float* values;  // in: scales of rows (kvs); out: bits of the norms (tq)
};

// Digits of the warp's rows, into the rows' place in X. Returns the thread's squared error.
template <int kDim, int kLevels, bool kFactored>
__device__ __forceinline__ float CodeRows(const ResidualInput& in, int first_token, int lane) {
  using Residual = ResidualShape<kDim>;
  const HadamardFragment hadamard = MakeHadamardFragment(lane);
  const float unit = RotatedUnit<kDim>();
  float error = 0;
#pragma unroll 1
  for (int m = 0; m < BlockShape<kDim>::kTokensPerWarp / 16; ++m) {
    const int first = first_token + 16 * m;
    const int row0 = first + (lane >> 2);
    TokenFragment tokens{};
    if (kFactored && in.rank > 0) {
      tokens = LoadTokenFactors(in.factors, first, lane);
    }
    float2 scale = make_float2(0, 0);
    if constexpr (kFactored) {
      const bool coded0 = row0 >= in.raw_rows && row0 < in.rows;
      const bool coded1 = row0 + 8 >= in.raw_rows && row0 + 8 < in.rows;
      scale = make_float2(coded0 ? in.values[row0] : 0.0F, coded1 ? in.values[row0 + 8] : 0.0F);
    }
    uint32_t words[Residual::kHalves][2][Residual::kTiles / 2];
    [[maybe_unused]] float2 squares = make_float2(0, 0);
    if constexpr (!kFactored && Residual::kHalves == 2) {
      float acc[Residual::kTiles][4];
      RotateShort<kDim>(in.x, in.panel, first, 0, in.rank, hadamard, tokens, lane, acc);
      RotateLong(acc);
      squares = RowSquares(acc);
    }
#pragma unroll
    for (int half = Residual::kHalves - 1; half >= 0; --half) {
      float acc[Residual::kTiles][4];
      RotateShort<kDim>(in.x, in.panel, first, half, in.rank, hadamard, tokens, lane, acc);
      RotateLong(acc);
      if constexpr (!kFactored) {
        if (half == Residual::kHalves - 1) {
          const float2 part = RowSquares(acc);
          // TurboQuant's scale is the row's own length, in fp16.
          const uint16_t norm0 = stages::FloatToFp16(sqrtf(squares.x + part.x) / unit);
          const uint16_t norm1 = stages::FloatToFp16(sqrtf(squares.y + part.y) / unit);
          const float root = rsqrtf(static_cast<float>(kDim));
          scale = make_float2(stages::Fp16ToFloat(norm0) * root, stages::Fp16ToFloat(norm1) * root);
          if ((lane & 3) == 0) {
            in.values[row0] = __uint_as_float(norm0);
            in.values[row0 + 8] = __uint_as_float(norm1);
          }
        }
      }
      const float2 inverse = make_float2(scale.x > 0 ? 1.0F / (scale.x * unit) : 0.0F,
                                         scale.y > 0 ? 1.0F / (scale.y * unit) : 0.0F);
      float2 part_error = make_float2(0, 0);
      QuantiseRows<kLevels>(acc, inverse, words[half], &part_error);
      error = fmaf(part_error.x, scale.x * scale.x, error);
      error = fmaf(part_error.y, scale.y * scale.y, error);
    }
    __syncwarp();
#pragma unroll
    for (int half = 0; half < Residual::kHalves; ++half) {
      StoreDigits<kDim>(words[half], in.block, first, half, lane);
    }
  }
  return error;
}

}  // namespace kvshrink::cuda

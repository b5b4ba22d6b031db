// The leading right singular vectors of a block: subspace iteration on tensor cores (rule:
// stages/subspace.h). With X the scaled block (n x d) and P the probes:
//   Z = P; four times: Y = X Z, Q = orthonormal basis of Y, Z = X^T Q;
//   then the eigenvectors of (X^T Q)^T (X^T Q) turn Z into the singular vectors.
// So each step orthonormalises over tokens, where the columns' lengths differ by singular values
// and not by their squares, which is what fp32 sums can carry. Y, Q and Z are rounded to fp16; sums
// are fp32. Columns are kept near length 64: Q by the inverse of their part of Y.
#pragma once

#include "cuda/encode/block_input.cuh"
#include "cuda/encode/small_algebra.cuh"

namespace kvshrink::cuda {

// A panel is 128 (or d) rows of 16 fp16 values: two chunks of 16 bytes a row.
__device__ __forceinline__ uint32_t PanelOffset(int row, int half) {
  return static_cast<uint32_t>(row * 32 + ((half ^ ((row >> 2) & 1)) << 4));
}

// Rows k0 .. k0 + 15 of a panel as B of a product (k x 16): r[0], r[1] for columns 0..7, r[2], r[3]
// for columns 8..15.
__device__ __forceinline__ Fragment4 LoadPanel(uint32_t panel, int k0, int lane) {
  const int row = k0 + (lane & 15);
  return LoadMatricesTransposed(panel + PanelOffset(row, lane >> 4));
}

// acc = X Z for the warp's tokens: kTiles of 16 rows. `panel` has d rows.
template <int kDim, int kTiles>
__device__ __forceinline__ void MultiplyRows(uint32_t x, uint32_t panel, int first_token, int lane,
                                             float (&acc)[kTiles][2][4]) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      acc[m][i >> 2][i & 3] = 0;
    }
  }
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    const Fragment4 b = LoadPanel(panel, 16 * k, lane);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      const int row = first_token + 16 * m + (lane & 15);
      const Fragment4 a = LoadMatrices(x + ChunkOffset<kDim>(row, 2 * k + (lane >> 4)));
      MultiplyHalf(acc[m][0], a.r, b.r[0], b.r[1]);
      MultiplyHalf(acc[m][1], a.r, b.r[2], b.r[3]);
    }
  }
}

// acc = X^T Q for the warp's channels: kTiles of 16. `panel` has 128 rows.
template <int kDim, int kTiles>
__device__ __forceinline__ void MultiplyColumns(uint32_t x, uint32_t panel, int first_channel,
                                                int lane, float (&acc)[kTiles][2][4]) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      acc[m][i >> 2][i & 3] = 0;
    }
  }
#pragma unroll
  for (int k = 0; k < static_cast<int>(kBlockTokens) / 16; ++k) {
    const Fragment4 b = LoadPanel(panel, 16 * k, lane);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      const int token = 16 * k + (lane & 7) + ((lane >> 4) << 3);
      const int chunk = first_channel / 8 + 2 * m + ((lane >> 3) & 1);
      const Fragment4 a = LoadMatricesTransposed(x + ChunkOffset<kDim>(token, chunk));
      MultiplyHalf(acc[m][0], a.r, b.r[0], b.r[1]);
      MultiplyHalf(acc[m][1], a.r, b.r[2], b.r[3]);
    }
  }
}

// Rounds to fp16 what is stored, in place too.
template <int kTiles>
__device__ __forceinline__ void StorePanel(uint8_t* panel, int first_row, int lane, float scale,
                                           float (&acc)[kTiles][2][4]) {
  const int g = lane >> 2;
  const int c = lane & 3;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int low = 0; low < 2; ++low) {
        const int row = first_row + 16 * m + 8 * low + g;
        const uint32_t bits =
            PackHalves(acc[m][half][2 * low] * scale, acc[m][half][2 * low + 1] * scale);
        *reinterpret_cast<uint32_t*>(panel + PanelOffset(row, half) + 4 * c) = bits;
        const float2 rounded = UnpackHalves(bits);
        acc[m][half][2 * low] = rounded.x;
        acc[m][half][2 * low + 1] = rounded.y;
      }
    }
  }
}

// g = P^T P of a panel of `rows` rows, by one warp.
template <int kRows>
__device__ __forceinline__ void GramOfPanel(uint32_t panel, int lane, float* g) {
  float acc[2][4] = {};
#pragma unroll
  for (int k = 0; k < kRows / 16; ++k) {
    const Fragment4 b = LoadPanel(panel, 16 * k, lane);
    const uint32_t a[4] = {b.r[0], b.r[2], b.r[1], b.r[3]};
    MultiplyHalf(acc[0], a, b.r[0], b.r[1]);
    MultiplyHalf(acc[1], a, b.r[2], b.r[3]);
  }
  const int row = lane >> 2;
  const int column = 2 * (lane & 3);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* out = g + row * kP + 8 * half + column;
    *reinterpret_cast<float2*>(out) = make_float2(acc[half][0], acc[half][1]);
    *reinterpret_cast<float2*>(out + 8 * kP) = make_float2(acc[half][2], acc[half][3]);
  }
  __syncwarp();
}

// acc = acc w: `acc` holds fp16 values, w (16 x 16 fp32, shared) is taken as two tf32 parts. The
// columns of a 16 x 8 product are taken in the order 0 2 4 6 1 3 5 7, which is the order that turns
// an accumulator into a left factor.
template <int kTiles>
__device__ __forceinline__ void MultiplySmall(const float* w, int lane,
                                              float (&acc)[kTiles][2][4]) {
  const int g = lane >> 2;
  const int c = lane & 3;
  float out[kTiles][2][4] = {};
#pragma unroll
  for (int from = 0; from < 2; ++from) {
#pragma unroll
    for (int to = 0; to < 2; ++to) {
      const float* source = w + (8 * from + 2 * c) * kP + 8 * to + g;
      const uint32_t high0 = RoundTf32(source[0]);
      const uint32_t high1 = RoundTf32(source[kP]);
      const uint32_t low0 = RoundTf32(source[0] - __uint_as_float(high0));
      const uint32_t low1 = RoundTf32(source[kP] - __uint_as_float(high1));
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        const uint32_t a[4] = {__float_as_uint(acc[m][from][0]), __float_as_uint(acc[m][from][2]),
                               __float_as_uint(acc[m][from][1]), __float_as_uint(acc[m][from][3])};
        MultiplyTf32(out[m][to], a, high0, high1);
        MultiplyTf32(out[m][to], a, low0, low1);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      acc[m][i >> 2][i & 3] = out[m][i >> 2][i & 3];
    }
  }
}

// The probes, their entries times the signs of the row rotation, as the panel Z.
template <int kDim>
__device__ __forceinline__ void StoreProbes(uint8_t* panel, int thread) {
  for (int channel = thread; channel < kDim; channel += BlockShape<kDim>::kThreads) {
    uint32_t bits = kProbeSigns.channel[channel];
    bits ^= SignBit(kRowSigns, static_cast<uint32_t>(channel)) ? 0xFFFFU : 0U;
    uint32_t words[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      // +-4 in fp16
      words[i] =
          0x44004400U | (((bits >> (2 * i)) & 1U) << 15) | (((bits >> (2 * i + 1)) & 1U) << 31);
    }
    *reinterpret_cast<uint4*>(panel + PanelOffset(channel, 0)) =
        make_uint4(words[0], words[1], words[2], words[3]);
    *reinterpret_cast<uint4*>(panel + PanelOffset(channel, 1)) =
        make_uint4(words[4], words[5], words[6], words[7]);
  }
}

// Products X^T Q. The last one stands for the product that Rayleigh and Ritz take on the right side
// in other backends; with three, the error is up to 1% above the exact solver's, with four 0.4%.
inline constexpr int kLeftSteps = stages::kSubspaceRounds + 1;
inline constexpr int kJacobiSweeps = 2;  // a third changes the error by less than 2e-4

// What the warps share beside the block.
struct SubspaceScratch {
  uint8_t* tokens;    // panel of 128 rows
  uint8_t* channels;  // panel of d rows; Z on return
  float* w;           // 16 x 16; on return Z w are the singular vectors, descending
  float* lambda;      // 16: squared singular values over `energy`, descending
  float* squares;     // warps x 16
};

// All threads. `energy`: sum of squares of the block in shared memory, above 0.
template <int kDim>
__device__ __forceinline__ void FindSubspace(uint32_t x, float energy,
                                             const SubspaceScratch& scratch, int thread) {
  using Shape = BlockShape<kDim>;
  constexpr int kTokenTiles = Shape::kTokensPerWarp / 16;
  constexpr int kChannelTiles = Shape::kChannelsPerWarp / 16;
  const int lane = thread & 31;
  const int warp = thread >> 5;
  const int first_token = warp * Shape::kTokensPerWarp;
  const int first_channel = warp * Shape::kChannelsPerWarp;
  const uint32_t tokens = SharedAddress(scratch.tokens);
  const uint32_t channels = SharedAddress(scratch.channels);
  const float inverse = rsqrtf(energy);

  StoreProbes<kDim>(scratch.channels, thread);
  __syncthreads();
#pragma unroll 1
  for (int step = 0; step < kLeftSteps; ++step) {
    float y[kTokenTiles][2][4];
    MultiplyRows<kDim, kTokenTiles>(x, channels, first_token, lane, y);
    StorePanel<kTokenTiles>(scratch.tokens, first_token, lane, inverse, y);
    __syncthreads();
    if (warp == 0) {
      GramOfPanel<static_cast<int>(kBlockTokens)>(tokens, lane, scratch.w);
      // 64 * 2e-5: a component below it has no part in what 16-bit input can say.
      InvertCholesky<Scaling::kInverse>(scratch.w, lane, 1e-6F, 1.6e-6F);
    }
    __syncthreads();
    MultiplySmall<kTokenTiles>(scratch.w, lane, y);
    StorePanel<kTokenTiles>(scratch.tokens, first_token, lane, 1.0F, y);
    if (step == kLeftSteps - 1) {
      // Lengths of the columns as rounded: the eigenvalues are relative to them.
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i >> 1;
        float sum = 0;
#pragma unroll
        for (int m = 0; m < kTokenTiles; ++m) {
          sum += y[m][half][i & 1] * y[m][half][i & 1] +
                 y[m][half][2 + (i & 1)] * y[m][half][2 + (i & 1)];
        }
        sum += __shfl_xor_sync(kAllLanes, sum, 4);
        sum += __shfl_xor_sync(kAllLanes, sum, 8);
        sum += __shfl_xor_sync(kAllLanes, sum, 16);
        if (lane < 4) {
          scratch.squares[warp * kP + 8 * half + 2 * lane + (i & 1)] = sum;
        }
      }
    }
    __syncthreads();
    float z[kChannelTiles][2][4];
    MultiplyColumns<kDim, kChannelTiles>(x, tokens, first_channel, lane, z);
    StorePanel<kChannelTiles>(scratch.channels, first_channel, lane, 64.0F * inverse, z);
    __syncthreads();
  }
  if (warp != 0) {
    return;
  }
  GramOfPanel<kDim>(channels, lane, scratch.w);
  const int column = lane & 15;
  float square = 0;
#pragma unroll
  for (int i = 0; i < Shape::kWarps; ++i) {
    square += scratch.squares[i * kP + column];
  }
  // Turns Z's column into X^T q / |X|_F for a unit vector q.
  const float unit = square > 0 ? rsqrtf(square) * (1.0F / 64.0F) : 0.0F;
  float a[kP];
#pragma unroll
  for (int k = 0; k < kP; ++k) {
    const float other = __shfl_xor_sync(kAllLanes, unit, k);
    a[k] =
        lane < kP ? scratch.w[column * kP + (column ^ k)] * unit * other : (k == 0 ? 1.0F : 0.0F);
  }
  __syncwarp();
  Jacobi(a, lane, kJacobiSweeps);
  const float value = fmaxf(__shfl_sync(kAllLanes, a[0], column), 0.0F);
  int place = 0;
#pragma unroll
  for (int k = 1; k < kP; ++k) {
    const float other = __shfl_xor_sync(kAllLanes, value, k);
    place += other > value || (other == value && (column ^ k) < column) ? 1 : 0;
  }
  if (lane < kP) {
    scratch.lambda[place] = value;
  }
  const float length = value > 1e-14F ? rsqrtf(value) : 0.0F;
#pragma unroll
  for (int k = 0; k < kP; ++k) {
    const float other = __shfl_xor_sync(kAllLanes, unit, k);
    if (lane >= kP) {
      scratch.w[(column ^ k) * kP + place] = a[k] * other * length;
    }
  }
  __syncwarp();
}

}  // namespace kvshrink::cuda

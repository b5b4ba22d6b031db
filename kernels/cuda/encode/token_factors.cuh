// Factors over tokens: least squares on the coded channel factors, then their own coding (rules:
// stages/kvs_factors.h).
#pragma once

#include "cuda/encode/factors.cuh"

namespace kvshrink::cuda {

// Least squares: the token's row y of X V becomes y W W^T, W W^T = (V^T V)^-1. Each lane one token.
__device__ __forceinline__ void SolveToken(const float* w, int rank, float* factors, int token) {
  float y[kFactorCap];
#pragma unroll
  for (int i = 0; i < static_cast<int>(kFactorCap); ++i) {
    y[i] = i < rank ? factors[i * kFactorStride + token] : 0.0F;
  }
  float u[kFactorCap];
#pragma unroll
  for (int j = 0; j < static_cast<int>(kFactorCap); ++j) {
    u[j] = 0;
    if (j < rank) {
#pragma unroll
      for (int k = 0; k <= j; ++k) {
        u[j] = fmaf(y[k], w[k * kP + j], u[j]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < static_cast<int>(kFactorCap); ++i) {
    if (i < rank) {
      float a = 0;
#pragma unroll
      for (int j = i; j < static_cast<int>(kFactorCap); ++j) {
        if (j < rank) {
          a = fmaf(u[j], w[i * kP + j], a);
        }
      }
      factors[i * kFactorStride + token] = a;
    }
  }
}

// Rotation of n values in shared memory by one warp, for lengths that are no power of two.
__device__ __forceinline__ void HadamardInShared(float* x, int power, int lane) {
  const float scale = rsqrtf(static_cast<float>(power));
  for (int half = 1; half < power; half *= 2) {
    for (int i = lane; i < power / 2; i += 32) {
      float* a = x + (i / half) * 2 * half + i % half;
      const float sum = a[0] + a[half];
      a[half] = a[0] - a[half];
      a[0] = sum;
    }
    __syncwarp();
  }
  for (int i = lane; i < power; i += 32) {
    x[i] *= scale;
  }
  __syncwarp();
}
__device__ __forceinline__ void FlipInShared(float* x, int first, int count, const SignBits& signs,
                                             int lane) {
  for (int i = first + lane; i < first + count; i += 32) {
    x[i] = WithSign(x[i], SignBit(signs, static_cast<uint32_t>(i)));
  }
  __syncwarp();
}

// Codes one token factor, a row of `factors` times 16 / 2^8 of the block's units, in place: zeros
// above the rank. One warp.
__device__ __forceinline__ void CodeTokenVector(float* factors, int component, int n,
                                                FactorPlan* plan, uint32_t* words, int lane) {
  float* row = factors + component * kFactorStride;
  if (component >= plan->rank) {
    for (int i = lane; i < static_cast<int>(kBlockTokens); i += 32) {
      row[i] = 0;
    }
    return;
  }
  const int bits = plan->token_bits[component];
  const uint32_t start =
      plan->first_bit[component] +
      static_cast<uint32_t>(plan->first_bit[component + 1] - plan->first_bit[component] - bits * n);
  if (n == static_cast<int>(kBlockTokens)) {
    const float4 four = *reinterpret_cast<const float4*>(row + 4 * lane);
    float a[4] = {four.x, four.y, four.z, four.w};
    const uint32_t flips = (kTokenSigns.word[lane >> 3] >> (4 * (lane & 7))) & 15U;
    float energy = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      energy = fmaf(a[i], a[i], energy);
      a[i] = WithSign(a[i], ((flips >> i) & 1U) != 0);
    }
    WarpHadamard<4, 7>(a, lane);
    energy = WarpSum(energy);
    // Stored: 1/16 of 2^8 times the true value.
    const float rms = sqrtf(energy * (1.0F / kBlockTokens)) * 0.0625F;
    const uint8_t q = stages::EncodeScale8(rms);
    const float scale = stages::DecodeScale8<float>(q) * 16.0F;
    const float inverse = 0.0883883476F / scale;  // 1 / sqrt(128)
    uint64_t digits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int digit = FactorDigit(bits, a[i] * inverse);
      digits |= static_cast<uint64_t>(digit) << (i * bits);
      a[i] = FactorLevel(bits, digit);
    }
    PutBits(words, start + static_cast<uint32_t>(4 * lane * bits), digits, 4 * bits);
    WarpHadamard<4, 7>(a, lane);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = WithSign(a[i] * scale * 0.0883883476F, ((flips >> i) & 1U) != 0);
    }
    *reinterpret_cast<float4*>(row + 4 * lane) = make_float4(a[0], a[1], a[2], a[3]);
    if (lane == 0) {
      plan->scale[component] = q;
    }
    return;
  }
  const int power = 1 << (31 - __clz(n));
  FlipInShared(row, 0, power, kTokenSigns, lane);
  HadamardInShared(row, power, lane);
  if (power < n) {
    FlipInShared(row, n - power, power, kTokenSigns2, lane);
    HadamardInShared(row + n - power, power, lane);
  }
  float energy = 0;
  for (int i = lane; i < n; i += 32) {
    energy = fmaf(row[i], row[i], energy);
  }
  energy = WarpSum(energy);
  const uint8_t q = stages::EncodeScale8(sqrtf(energy / static_cast<float>(n)) * 0.0625F);
  const float scale = stages::DecodeScale8<float>(q) * 16.0F;
  for (int i = lane; i < static_cast<int>(kBlockTokens); i += 32) {
    float value = 0;
    if (i < n) {
      const int digit = FactorDigit(bits, row[i] / scale);
      PutBits(words, start + static_cast<uint32_t>(i * bits), static_cast<uint64_t>(digit), bits);
      value = FactorLevel(bits, digit) * scale;
    }
    row[i] = value;
  }
  __syncwarp();
  if (power < n) {
    HadamardInShared(row + n - power, power, lane);
    FlipInShared(row, n - power, power, kTokenSigns2, lane);
  }
  HadamardInShared(row, power, lane);
  FlipInShared(row, 0, power, kTokenSigns, lane);
  if (lane == 0) {
    plan->scale[component] = q;
  }
}

}  // namespace kvshrink::cuda

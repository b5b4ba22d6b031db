// What the lanes of a warp do together.
#pragma once

#include <cstdint>

#include "common/tables.cuh"

namespace kvshrink::cuda {

inline constexpr uint32_t kAllLanes = 0xFFFFFFFFU;

__device__ inline float WarpSum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, step);
  }
  return x;
}

__device__ inline float WarpMax(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  }
  return x;
}

// Unnormalised Walsh-Hadamard transform of 32 kPerLane values, entry lane * kPerLane + i in x[i].
template <int kPerLane>
__device__ inline void WarpHadamard(float (&x)[kPerLane], uint32_t lane) {
#pragma unroll
  for (int half = 1; half < kPerLane; half *= 2) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if ((i & half) == 0) {
        const float sum = x[i] + x[i + half];
        x[i + half] = x[i] - x[i + half];
        x[i] = sum;
      }
    }
  }
#pragma unroll
  for (uint32_t step = 1; step < 32; step *= 2) {
    const float sign = (lane & step) != 0 ? -1.0F : 1.0F;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      x[i] = fmaf(x[i], sign, __shfl_xor_sync(kAllLanes, x[i], step));
    }
  }
}

// Multiplies entry lane * kPerLane + i by its sign and by `scale`.
template <int kPerLane>
__device__ inline void WarpSigns(uint32_t seed, float scale, float (&x)[kPerLane], uint32_t lane) {
  const uint32_t bits = SignBits(seed, lane * kPerLane);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    x[i] *= __uint_as_float(__float_as_uint(scale) ^ ((bits << (31 - i)) & 0x80000000U));
  }
}

// rot(seed, x) and its inverse for a length of 32 kPerLane.
template <int kPerLane>
__device__ inline void WarpRotate(uint32_t seed, float (&x)[kPerLane], uint32_t lane) {
  WarpSigns(seed, rsqrtf(32.0F * kPerLane), x, lane);
  WarpHadamard(x, lane);
}

template <int kPerLane>
__device__ inline void WarpRotateInverse(uint32_t seed, float (&x)[kPerLane], uint32_t lane) {
  WarpHadamard(x, lane);
  WarpSigns(seed, rsqrtf(32.0F * kPerLane), x, lane);
}

// One pass over the first `power` entries of x in shared memory, by one warp.
__device__ inline void PassHadamard(float* x, uint32_t power, uint32_t lane) {
  for (uint32_t half = 1; half < power; half *= 2) {
    for (uint32_t i = lane; i < power / 2; i += 32) {
      const uint32_t at = (i / half) * 2 * half + i % half;
      const float a = x[at];
      const float b = x[at + half];
      x[at] = a + b;
      x[at + half] = a - b;
    }
    __syncwarp();
  }
}

__device__ inline void PassSigns(uint32_t seed, uint32_t first, float* x, uint32_t power,
                                 uint32_t lane) {
  const float scale = rsqrtf(static_cast<float>(power));
  for (uint32_t i = lane; i < power; i += 32) {
    x[i] *= (SignBits(seed, first + i) & 1U) != 0 ? -scale : scale;
  }
  __syncwarp();
}

// rot(seed, x) and its inverse for any length, x in shared memory, by one warp.
__device__ inline void RotateAny(uint32_t seed, float* x, uint32_t length, uint32_t lane) {
  const uint32_t power = stages::LargestPowerOfTwo(length);
  const uint32_t rest = length - power;
  __syncwarp();
  PassSigns(seed, 0, x, power, lane);
  PassHadamard(x, power, lane);
  if (rest > 0) {
    PassSigns(seed + 1, rest, x + rest, power, lane);
    PassHadamard(x + rest, power, lane);
  }
}

__device__ inline void RotateInverseAny(uint32_t seed, float* x, uint32_t length, uint32_t lane) {
  const uint32_t power = stages::LargestPowerOfTwo(length);
  const uint32_t rest = length - power;
  __syncwarp();
  if (rest > 0) {
    PassHadamard(x + rest, power, lane);
    PassSigns(seed + 1, rest, x + rest, power, lane);
  }
  PassHadamard(x, power, lane);
  PassSigns(seed, 0, x, power, lane);
}

}  // namespace kvshrink::cuda

// XXH64 with seed 0 by four lanes: each keeps one of its four sums. Data are little-endian words at
// a multiple of four bytes, the length is a multiple of four.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace kvshrink::cuda {

inline constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87ULL;
inline constexpr uint64_t kPrime2 = 0xC2B2AE3D27D4EB4FULL;
inline constexpr uint64_t kPrime3 = 0x165667B19E3779F9ULL;
inline constexpr uint64_t kPrime4 = 0x85EBCA77C2B2AE63ULL;
inline constexpr uint64_t kPrime5 = 0x27D4EB2F165667C5ULL;

__device__ __forceinline__ uint64_t RotateLeft(uint64_t x, int bits) {
  return (x << bits) | (x >> (64 - bits));
}
__device__ __forceinline__ uint64_t HashRound(uint64_t sum, uint64_t input) {
  return RotateLeft(sum + input * kPrime2, 31) * kPrime1;
}
__device__ __forceinline__ uint64_t Load64(const uint32_t* words) {
  return words[0] | static_cast<uint64_t>(words[1]) << 32;
}

__device__ __forceinline__ uint64_t HashStart(int part) {
  switch (part) {
    case 0:
      return kPrime1 + kPrime2;
    case 1:
      return kPrime2;
    case 2:
      return 0;
    default:
      return 0ULL - kPrime1;
  }
}

// From the four sums over the whole stripes of 32 bytes, which the four lanes hold, and the words
// that are left. All four lanes get the hash; `mask` names them.
__device__ __forceinline__ uint64_t HashEnd(uint64_t sum, int part, uint32_t mask,
                                            const uint32_t* rest, uint64_t bytes) {
  const int first = (threadIdx.x & 31) & ~3;
  uint64_t sums[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sums[i] = __shfl_sync(mask, sum, first + i);
  }
  uint64_t hash = kPrime5;
  if (bytes >= 32) {
    hash = RotateLeft(sums[0], 1) + RotateLeft(sums[1], 7) + RotateLeft(sums[2], 12) +
           RotateLeft(sums[3], 18);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      hash = (hash ^ HashRound(0, sums[i])) * kPrime1 + kPrime4;
    }
  }
  hash += bytes;
  uint32_t left = static_cast<uint32_t>(bytes & 31) / 4;
  for (; left >= 2; left -= 2, rest += 2) {
    hash = RotateLeft(hash ^ HashRound(0, Load64(rest)), 27) * kPrime1 + kPrime4;
  }
  if (left == 1) {
    hash = RotateLeft(hash ^ (rest[0] * kPrime1), 23) * kPrime2 + kPrime3;
  }
  hash = (hash ^ (hash >> 33)) * kPrime2;
  hash = (hash ^ (hash >> 29)) * kPrime3;
  return hash ^ (hash >> 32);
}

// The whole of it; `part` = lane % 4.
__device__ __forceinline__ uint64_t HashByFour(const uint32_t* words, uint64_t bytes, int part,
                                               uint32_t mask) {
  uint64_t sum = HashStart(part);
  const auto stripes = static_cast<uint32_t>(bytes / 32);
  const uint32_t* own = words + 2 * part;
#pragma unroll 8
  for (uint32_t i = 0; i < stripes; ++i) {
    sum = HashRound(sum, Load64(own + 8 * i));
  }
  return HashEnd(sum, part, mask, words + 8 * uint64_t{stripes}, bytes);
}

}  // namespace kvshrink::cuda

// XXH64, seed 0: by one thread. Section checksums hash pieces of 1024 bytes apart, then their
// hashes (proto/FORMAT.md section 3).
#pragma once

#include <cstdint>

#include "stages/portable.h"

namespace kvshrink::cuda {

inline constexpr uint32_t kChecksumPiece = 1024;

namespace xxh {

inline constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87ULL;
inline constexpr uint64_t kPrime2 = 0xC2B2AE3D27D4EB4FULL;
inline constexpr uint64_t kPrime3 = 0x165667B19E3779F9ULL;
inline constexpr uint64_t kPrime4 = 0x85EBCA77C2B2AE63ULL;
inline constexpr uint64_t kPrime5 = 0x27D4EB2F165667C5ULL;

KVS_FN uint64_t RotateLeft(uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); }

KVS_FN uint64_t Round(uint64_t sum, uint64_t input) {
  return RotateLeft(sum + input * kPrime2, 31) * kPrime1;
}

KVS_FN uint64_t MergeRound(uint64_t hash, uint64_t sum) {
  return (hash ^ Round(0, sum)) * kPrime1 + kPrime4;
}

}  // namespace xxh

// Words come from `word(i)`, i < bytes / 4 rounded up (32 bits each, little-endian; the last one
// zero-extended).
template <typename Words>
KVS_FN uint64_t Xxh64(const Words& word, uint64_t bytes) {
  using namespace xxh;
  const auto pair = [&](uint64_t at) {
    return uint64_t{word(at / 4)} | (uint64_t{word(at / 4 + 1)} << 32);
  };
  uint64_t at = 0;
  uint64_t hash = kPrime5;
  if (bytes >= 32) {
    uint64_t sum[4] = {kPrime1 + kPrime2, kPrime2, 0, 0 - kPrime1};
    for (; at + 32 <= bytes; at += 32) {
      for (int i = 0; i < 4; ++i) {
        sum[i] = Round(sum[i], pair(at + 8 * static_cast<uint64_t>(i)));
      }
    }
    hash = RotateLeft(sum[0], 1) + RotateLeft(sum[1], 7) + RotateLeft(sum[2], 12) +
           RotateLeft(sum[3], 18);
    for (const uint64_t lane : sum) {
      hash = MergeRound(hash, lane);
    }
  }
  hash += bytes;
  for (; at + 8 <= bytes; at += 8) {
    hash = RotateLeft(hash ^ Round(0, pair(at)), 27) * kPrime1 + kPrime4;
  }
  for (; at + 4 <= bytes; at += 4) {
    hash = RotateLeft(hash ^ (uint64_t{word(at / 4)} * kPrime1), 23) * kPrime2 + kPrime3;
  }
  for (; at < bytes; ++at) {
    const uint32_t byte = (word(at / 4) >> (8 * (at % 4))) & 255U;
    hash = RotateLeft(hash ^ (byte * kPrime5), 11) * kPrime1;
  }
  hash = (hash ^ (hash >> 33)) * kPrime2;
  hash = (hash ^ (hash >> 29)) * kPrime3;
  return hash ^ (hash >> 32);
}

}  // namespace kvshrink::cuda

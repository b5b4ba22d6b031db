// Fixed tables of the encoder on the device, made by the compiler from the shared stages.
#pragma once

#include <array>
#include <cstdint>

#include "stages/codebook.h"
#include "stages/rotate.h"
#include "stages/subspace.h"

namespace kvshrink::cuda {

inline constexpr uint32_t kTableChannels = 512;  // kMaxHeadDim

// Bit j % 32 of word j / 32: sign j of a rotation is negative.
struct SignBits {
  uint32_t word[kTableChannels / 32] = {};

  constexpr explicit SignBits(uint32_t seed) {
    for (uint32_t j = 0; j < kTableChannels; ++j) {
      if (stages::SignIsNegative(seed, j)) {
        word[j / 32] |= 1U << (j % 32);
      }
    }
  }
};

// Bit j of entry c: probe j is negative at channel c.
struct ProbeBits {
  uint16_t channel[kTableChannels] = {};

  constexpr ProbeBits() {
    for (uint32_t c = 0; c < kTableChannels; ++c) {
      for (uint32_t j = 0; j < stages::kProbes; ++j) {
        if (stages::SignIsNegative(stages::kProbeSeed + j, c)) {
          channel[c] = static_cast<uint16_t>(channel[c] | (1U << j));
        }
      }
    }
  }
};

// Codebooks of 2^b levels, b = 2..8, one behind the other: levels of b bits begin at 2^b - 4,
// thresholds likewise.
struct FactorTables {
  float level[508] = {};
  float threshold[508] = {};

  constexpr FactorTables() {
    for (int bits = stages::kMinFactorBits; bits <= stages::kMaxFactorBits; ++bits) {
      const stages::Codebook& book = stages::FactorCodebook(bits);
      const int begin = (1 << bits) - 4;
      for (int i = 0; i < book.levels; ++i) {
        level[begin + i] = book.level[i];
        threshold[begin + i] = i + 1 < book.levels ? book.threshold[i] : 3.0e38F;
      }
    }
  }
};

__device__ const SignBits kRowSigns{stages::kRowSeed};
__device__ const SignBits kChannelSigns{stages::kChannelSeed};
__device__ const SignBits kTokenSigns{stages::kTokenSeed};
__device__ const SignBits kTokenSigns2{stages::kTokenSeed + 1};  // second pass: odd lengths
__device__ const ProbeBits kProbeSigns{};
__device__ const FactorTables kFactorTables{};

__device__ __forceinline__ bool SignBit(const SignBits& signs, uint32_t j) {
  return ((signs.word[j >> 5] >> (j & 31)) & 1U) != 0;
}

// Digit of the level nearest to x, ties down, by bisection over 2^bits - 1 thresholds.
__device__ __forceinline__ int FactorDigit(int bits, float x) {
  const float* threshold = kFactorTables.threshold + (1 << bits) - 4;
  int low = 0;
  for (int half = 1 << (bits - 1); half > 0; half >>= 1) {
    low += x > __ldg(threshold + low + half - 1) ? half : 0;
  }
  return low;
}

__device__ __forceinline__ float FactorLevel(int bits, int digit) {
  return __ldg(kFactorTables.level + (1 << bits) - 4 + digit);
}

}  // namespace kvshrink::cuda

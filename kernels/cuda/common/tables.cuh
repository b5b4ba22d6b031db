// Fixed tables in device memory, built at compile time from the stages' own: levels of the
// alphabets, and the signs of the rotations.
#pragma once

#include <cstdint>

#include "kvshrink/shard.h"
#include "stages/codebook.h"
#include "stages/digits.h"
#include "stages/rotate.h"

namespace kvshrink::cuda {

// Levels of the factors' alphabets: those of b bits begin at 2^b - 4.
struct FactorLevels {
  float level[508] = {};
};

constexpr FactorLevels MakeFactorLevels() {
  FactorLevels table;
  for (int bits = stages::kMinFactorBits; bits <= stages::kMaxFactorBits; ++bits) {
    const stages::Codebook& codebook = stages::FactorCodebook(bits);
    for (int c = 0; c < codebook.levels; ++c) {
      table.level[(1 << bits) - 4 + c] = codebook.level[c];
    }
  }
  return table;
}

// An alphabet of the residual as integers: level = unit * (coarse + fine / 512), coarse at most 128
// and fine at most 256 in magnitude, so that sums of sixteen are exact in fp16 and products of
// rotations too. Digits are grouped: `digits` of them in a field of `bits` bits. Of three levels
// the digit itself is the integer (unit 2^24 times the level: a digit is read as a fp16 denormal),
// less one.
struct ResidualAlphabet {
  float unit = 0;
  int levels = 0;
  int digits = 0;
  int bits = 0;
  int16_t coarse[16] = {};
  int16_t fine[16] = {};
};

constexpr int kFirstAlphabet = static_cast<int>(BlockCode::kLevels3);
constexpr int kAlphabets = 7;

struct ResidualAlphabets {
  ResidualAlphabet of[kAlphabets];
};

constexpr int RoundToInt(double x) {
  return x < 0 ? -static_cast<int>(0.5 - x) : static_cast<int>(x + 0.5);
}

constexpr ResidualAlphabet MakeAlphabet(BlockCode code) {
  const stages::Codebook& codebook = *stages::CodebookOf(code);
  const stages::Grouping grouping = stages::GroupingOf(code);
  ResidualAlphabet alphabet;
  alphabet.levels = codebook.levels;
  alphabet.digits = grouping.digits;
  alphabet.bits = grouping.bits;
  if (code == BlockCode::kLevels3) {
    alphabet.unit = codebook.level[2] * 0x1p24F;
    return alphabet;
  }
  const double unit = static_cast<double>(codebook.level[codebook.levels - 1]) / 128;
  alphabet.unit = static_cast<float>(unit);
  for (int c = 0; c < codebook.levels; ++c) {
    const double value = static_cast<double>(codebook.level[c]) / unit;
    const int coarse = RoundToInt(value);
    alphabet.coarse[c] = static_cast<int16_t>(coarse);
    alphabet.fine[c] = static_cast<int16_t>(RoundToInt((value - coarse) * 512));
  }
  return alphabet;
}

constexpr ResidualAlphabets MakeAlphabets() {
  ResidualAlphabets table;
  for (int i = 0; i < kAlphabets; ++i) {
    table.of[i] = MakeAlphabet(static_cast<BlockCode>(kFirstAlphabet + i));
  }
  return table;
}

// Bit j of seed s (1..6) is set when sign(s, j) is negative.
struct SignTable {
  uint32_t word[6][kMaxHeadDim / 32] = {};
};

constexpr SignTable MakeSigns() {
  SignTable table;
  for (uint32_t seed = 1; seed <= 6; ++seed) {
    for (uint32_t j = 0; j < kMaxHeadDim; ++j) {
      if (stages::SignIsNegative(seed, j)) {
        table.word[seed - 1][j / 32] |= 1U << (j % 32);
      }
    }
  }
  return table;
}

static __device__ const FactorLevels kFactorLevelTable = MakeFactorLevels();
static __device__ const ResidualAlphabets kAlphabetTable = MakeAlphabets();
static __device__ const SignTable kSignTable = MakeSigns();

// The signs of entries first..first+31 of a rotation, bit 0 being that of `first`; `first` and what
// is used of the result must not cross a multiple of 32.
__device__ inline uint32_t SignBits(uint32_t seed, uint32_t first) {
  return kSignTable.word[seed - 1][first / 32] >> (first % 32);
}

}  // namespace kvshrink::cuda

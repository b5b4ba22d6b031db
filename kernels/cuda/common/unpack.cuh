// Residual digits of a few rows of a block as integers in a fp16 tile in shared memory, by one warp
// (what the integers stand for: common/tables.cuh).
#pragma once

#include <cuda_fp16.h>

#include "common/mma.cuh"
#include "common/tables.cuh"
#include "common/view.h"
#include "common/warp.cuh"

namespace kvshrink::cuda {

// Elements from one row of a tile to the next: 16 bytes more than the row, against bank conflicts.
template <int kDim>
inline constexpr int kTileStride = kDim + 8;

// Of each lane: the coarse (low half) and fine (high half) integers of digit `lane`, as fp16.
struct AlphabetLane {
  uint32_t pair = 0;
};

__device__ inline AlphabetLane LoadAlphabet(uint32_t code, uint32_t lane) {
  AlphabetLane result;
  if (code >= kFirstAlphabet && code < kFirstAlphabet + kAlphabets && lane < 16) {
    const ResidualAlphabet& alphabet = kAlphabetTable.of[code - kFirstAlphabet];
    result.pair = PackHalves(__short2half_rn(alphabet.coarse[lane]),
                             __float2half_rn(alphabet.fine[lane] * (1.0F / 512)));
  }
  return result;
}

__device__ inline uint32_t Permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
}

// Four bytes of five ternary digits each: digit i of the twenty is half i of out. True when a byte
// is 243 or more. A byte b becomes the fraction x = ceil(256 b / 243) / 256; each multiplication by
// three brings up the next digit, the most significant first. Two bytes are worked at once.
__device__ inline bool UnpackTernary(uint32_t word, uint32_t (&out)[10]) {
  constexpr uint32_t kLow = 0x00FF00FFU;
  uint32_t x[2] = {word & kLow, (word >> 8) & kLow};
  uint32_t digits[2][5];  // [byte parity][digit]: in bytes 1 and 3
  uint32_t beyond = 0;
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    x[p] += ((x[p] * 55 + 1008U * 0x10001U) >> 10) & 0x000F000FU;
    beyond |= x[p];
#pragma unroll
    for (int i = 4; i >= 0; --i) {
      x[p] = (x[p] & kLow) * 3;
      digits[p][i] = x[p];
    }
  }
  // Half i is byte 1 or 3 of its register above a zero byte (the copied sign of a small byte).
#pragma unroll
  for (int i = 0; i < 10; ++i) {
    const int first = 2 * i;
    const int second = 2 * i + 1;
    const uint32_t from_a = first / 5 < 2 ? 1 : 3;
    const uint32_t from_b = second / 5 < 2 ? 5 : 7;
    const uint32_t selector = from_a | ((from_a | 8U) << 4) | (from_b << 8) | ((from_b | 8U) << 12);
    out[i] =
        Permute(digits[first / 5 % 2][first % 5], digits[second / 5 % 2][second % 5], selector);
  }
  return (beyond & 0x01000100U) != 0;
}

// Words that hold the digits of `kRows` rows of `kDim`, 32 lanes at a time.
template <int kDim, int kRows>
inline constexpr int kTernarySteps = (kRows * kDim / 20 + 2 + 31) / 32;

// Digits come in whole words: a tile for them has room before its first row and after its last.
template <int kDim, int kRows>
inline constexpr int kRowsWithRoom = (kTernarySteps<kDim, kRows> * 640 + kDim - 1) / kDim + 1;
inline constexpr int kRoomBefore = 64;
template <int kDim, int kRows>
inline constexpr size_t kTernaryHalfs =
    kRoomBefore + size_t{kRowsWithRoom<kDim, kRows>} * kTileStride<kDim>;

// The lane's words of the digits of rows first .. first + count - 1 of the coded rows; zero past
// the last word.
template <int kDim, int kRows>
__device__ inline void LoadTernary(const BlockDesc& block, uint32_t first, uint32_t count,
                                   uint32_t lane, uint32_t (&buffer)[kTernarySteps<kDim, kRows>]) {
  const uint32_t first_word = first * kDim / 20 + lane;
  const uint32_t end = count == 0 ? 0 : ((first + count) * kDim + 19) / 20;
  const uint32_t* words = reinterpret_cast<const uint32_t*>(block.codes) + first_word;
#pragma unroll
  for (uint32_t step = 0; step < kTernarySteps<kDim, kRows>; ++step) {
    buffer[step] = first_word + step * 32 < end ? __ldg(words + step * 32) : 0;
  }
}

__device__ inline void StoreShared(uint32_t address, uint32_t a, uint32_t b) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}

// Those digits to a tile (with room around it): all its rows are written, zeros where there are no
// digits. True when a group is out of range.
template <int kDim, int kRows>
__device__ inline bool UnpackTernaryWords(const uint32_t (&buffer)[kTernarySteps<kDim, kRows>],
                                          uint32_t first, __half* tile, uint32_t lane) {
  // Place of the lane's first digit among the rows'; below 0 in the first word.
  const int base =
      static_cast<int>((first * kDim / 20 + lane) * 20) - static_cast<int>(first * kDim);
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(tile));
  constexpr int kRoom = kTileStride<kDim> - kDim;
  const auto address = [&](int at) {
    // A shift, so that what is below 0 goes to the row before.
    return shared + static_cast<uint32_t>(2 * (at + (at >> (kDim == 64    ? 6
                                                            : kDim == 128 ? 7
                                                                          : 8)) *
                                                        kRoom));
  };
  // 640 digits on, a step, are whole rows but of 256.
  constexpr bool kWholeRows = 640 % kDim == 0;
  constexpr uint32_t kStepBytes = 640 / kDim * kTileStride<kDim> * 2;
  uint32_t to[5];
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    to[i] = address(base + 4 * i);
  }
  bool bad = false;
#pragma unroll
  for (uint32_t step = 0; step < kTernarySteps<kDim, kRows>; ++step) {
    uint32_t halves[10];
    bad |= UnpackTernary(buffer[step], halves);
#pragma unroll
    for (uint32_t i = 0; i < 5; ++i) {
      const uint32_t place = kWholeRows ? to[i] + step * kStepBytes
                                        : address(base + static_cast<int>(step * 640 + 4 * i));
      StoreShared(place, halves[2 * i], halves[2 * i + 1]);
    }
  }
  return bad;
}

template <int kDim, int kRows>
__device__ inline bool UnpackTernaryRows(const BlockDesc& block, uint32_t first, uint32_t count,
                                         __half* tile, uint32_t lane) {
  uint32_t buffer[kTernarySteps<kDim, kRows>];
  LoadTernary<kDim, kRows>(block, first, count, lane, buffer);
  return UnpackTernaryWords<kDim, kRows>(buffer, first, tile, lane);
}

// A field of up to 25 bits at a bit offset; words past the end read as zero.
__device__ inline uint32_t Field(const uint32_t* words, uint32_t word_count, uint32_t bit,
                                 uint32_t bits) {
  const uint32_t at = bit / 32;
  const uint32_t low = __ldg(words + at);
  const uint32_t high = at + 1 < word_count ? __ldg(words + at + 1) : 0;
  return __funnelshift_r(low, high, bit % 32) & ((1U << bits) - 1);
}

// The digits of group `group` go one by one to put(digit number, digit). True when the group's
// number is out of range.
template <typename Put>
__device__ inline bool UnpackGroup(uint32_t code, const BlockDesc& block, uint32_t word_count,
                                   uint32_t group, const Put& put) {
  const ResidualAlphabet& alphabet = kAlphabetTable.of[code - kFirstAlphabet];
  const auto levels = static_cast<uint32_t>(alphabet.levels);
  const auto digits = static_cast<uint32_t>(alphabet.digits);
  const auto bits = static_cast<uint32_t>(alphabet.bits);
  uint32_t number =
      Field(reinterpret_cast<const uint32_t*>(block.codes), word_count, group * bits, bits);
  for (uint32_t i = 0; i < digits; ++i) {
    put(group * digits + i, number % levels);
    number /= levels;
  }
  return number != 0;
}

// Rows of an alphabet of kLevels, kDigits digits in kBits bits (those of powers of two in groups as
// large as a field), with the fine integers in a second tile.
template <int kDim, int kLevels, int kDigits, int kBits>
__device__ inline bool UnpackGroups(const BlockDesc& block, const AlphabetLane& alphabet,
                                    uint32_t first, uint32_t count, __half* coarse, __half* fine,
                                    uint32_t lane) {
  const uint32_t begin = first * kDim;
  const uint32_t wanted = count * kDim;
  const uint32_t all = block.coded_rows() * kDim;
  const uint32_t word_count = ((all + kDigits - 1) / kDigits * kBits + 31) / 32;
  const uint32_t last_group = (begin + wanted + kDigits - 1) / kDigits;
  const auto* words = reinterpret_cast<const uint32_t*>(block.codes);
  bool bad = false;
  for (uint32_t group = begin / kDigits; group < last_group; group += 32) {
    const uint32_t mine = group + lane;
    uint32_t number = mine < last_group ? Field(words, word_count, mine * kBits, kBits) : 0;
    const uint32_t base = mine * kDigits - begin;
#pragma unroll
    for (uint32_t i = 0; i < kDigits; ++i) {
      const uint32_t digit = number % kLevels;
      number /= kLevels;
      const uint32_t pair = __shfl_sync(kAllLanes, alphabet.pair, static_cast<int>(digit));
      const uint32_t at = base + i;
      if (mine < last_group && at < wanted) {
        const uint32_t place = at + at / kDim * (kTileStride<kDim> - kDim);
        coarse[place] = __ushort_as_half(static_cast<unsigned short>(pair));
        fine[place] = __ushort_as_half(static_cast<unsigned short>(pair >> 16));
      }
    }
    bad |= number != 0;
  }
  return bad;
}

template <int kDim>
__device__ inline bool UnpackOtherRows(const BlockDesc& block, const AlphabetLane& alphabet,
                                       uint32_t first, uint32_t count, __half* coarse, __half* fine,
                                       uint32_t lane) {
  switch (static_cast<BlockCode>(block.code)) {
    case BlockCode::kLevels4:
      return UnpackGroups<kDim, 4, 8, 16>(block, alphabet, first, count, coarse, fine, lane);
    case BlockCode::kLevels5:
      return UnpackGroups<kDim, 5, 3, 7>(block, alphabet, first, count, coarse, fine, lane);
    case BlockCode::kLevels6:
      return UnpackGroups<kDim, 6, 5, 13>(block, alphabet, first, count, coarse, fine, lane);
    case BlockCode::kLevels8:
      return UnpackGroups<kDim, 8, 8, 24>(block, alphabet, first, count, coarse, fine, lane);
    case BlockCode::kLevels12:
      return UnpackGroups<kDim, 12, 5, 18>(block, alphabet, first, count, coarse, fine, lane);
    default:
      return UnpackGroups<kDim, 16, 4, 16>(block, alphabet, first, count, coarse, fine, lane);
  }
}

template <int kDim, int kRows>
__device__ inline void ClearRows(uint32_t count, __half* tile, uint32_t lane) {
  for (uint32_t row = count; row < kRows; ++row) {
    for (uint32_t i = lane * 2; i < kDim; i += 64) {
      *reinterpret_cast<uint32_t*>(tile + row * kTileStride<kDim> + i) = 0;
    }
  }
}

}  // namespace kvshrink::cuda

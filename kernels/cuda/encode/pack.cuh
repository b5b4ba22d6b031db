// Digits of a block, as bytes in the rows of X, to the record of its CODES part: whole words, the
// rest of the last one zero (format: proto/FORMAT.md section 5).
#pragma once

#include "cuda/encode/residual.cuh"

namespace kvshrink::cuda {

// How an alphabet is packed: units of kDigits digits fill kWords words; a group of kGroup digits
// has kBits bits.
template <int kLevels>
struct Packing;
template <>
struct Packing<3> {
  static constexpr int kGroup = 5, kBits = 8, kDigits = 20, kWords = 1;
};
template <>
struct Packing<4> {
  static constexpr int kGroup = 1, kBits = 2, kDigits = 16, kWords = 1;
};
template <>
struct Packing<5> {
  static constexpr int kGroup = 3, kBits = 7, kDigits = 96, kWords = 7;
};
template <>
struct Packing<6> {
  static constexpr int kGroup = 5, kBits = 13, kDigits = 160, kWords = 13;
};
template <>
struct Packing<8> {
  static constexpr int kGroup = 1, kBits = 3, kDigits = 32, kWords = 3;
};
template <>
struct Packing<12> {
  static constexpr int kGroup = 5, kBits = 18, kDigits = 80, kWords = 9;
};
template <>
struct Packing<16> {
  static constexpr int kGroup = 1, kBits = 4, kDigits = 8, kWords = 1;
};

template <int kLevels>
__device__ __forceinline__ uint32_t CodeBytes(uint32_t digits) {
  using P = Packing<kLevels>;
  return ((digits + P::kGroup - 1) / P::kGroup * P::kBits + 7) / 8;
}

// Word `index` (four digits) of the coded rows; zeros past the last.
template <int kDim>
__device__ __forceinline__ uint32_t DigitWord(const uint8_t* x, int raw_rows, uint32_t index,
                                              uint32_t count) {
  if (index >= count) {
    return 0;
  }
  const int row = raw_rows + static_cast<int>(index / (kDim / 4));
  return *reinterpret_cast<const uint32_t*>(
      x + DigitOffset<kDim>(row, static_cast<int>(index % (kDim / 4))));
}

__device__ __forceinline__ uint32_t FourTernary(uint32_t digits) {
  return static_cast<uint32_t>(__dp4a(digits, 0x1B090301U, 0U));
}

template <int kDim, int kLevels>
__device__ __forceinline__ void PackBlock(const uint8_t* x, int rows, int raw_rows, uint32_t* out,
                                          int thread) {
  using P = Packing<kLevels>;
  const auto digits = static_cast<uint32_t>((rows - raw_rows) * kDim);
  const uint32_t count = digits / 4;  // words of digits
  const uint32_t out_words = (CodeBytes<kLevels>(digits) + 3) / 4;
  const uint32_t units = (digits + P::kDigits - 1) / P::kDigits;
  for (uint32_t unit = static_cast<uint32_t>(thread); unit < units;
       unit += BlockShape<kDim>::kThreads) {
    if constexpr (kLevels == 3) {
      uint32_t w[5];
#pragma unroll
      for (int i = 0; i < 5; ++i) {
        w[i] = DigitWord<kDim>(x, raw_rows, 5 * unit + i, count);
      }
      const uint32_t b0 = FourTernary(w[0]) + 81 * (w[1] & 255U);
      const uint32_t b1 = FourTernary(__funnelshift_r(w[1], w[2], 8)) + 81 * ((w[2] >> 8) & 255U);
      const uint32_t b2 = FourTernary(__funnelshift_r(w[2], w[3], 16)) + 81 * ((w[3] >> 16) & 255U);
      const uint32_t b3 = FourTernary(__funnelshift_r(w[3], w[4], 24)) + 81 * (w[4] >> 24);
      out[unit] = b0 | (b1 << 8) | (b2 << 16) | (b3 << 24);
    } else if constexpr (kLevels == 4 || kLevels == 16) {
      uint32_t word = 0;
#pragma unroll
      for (int i = 0; i < P::kDigits / 4; ++i) {
        const uint32_t four = DigitWord<kDim>(x, raw_rows, unit * (P::kDigits / 4) + i, count);
        const uint32_t packed = kLevels == 4
                                    ? (four | (four >> 6) | (four >> 12) | (four >> 18)) & 255U
                                    : ((four & 15U) | ((four >> 4) & 0xF0U) |
                                       ((four >> 8) & 0xF00U) | ((four >> 12) & 0xF000U));
        word |= packed << (i * 4 * P::kBits);
      }
      out[unit] = word;
    } else {
      uint64_t buffer = 0;
      int filled = 0;
      uint32_t group = 0;
      uint32_t weight = 1;
      int in_group = 0;
      uint32_t place = unit * P::kWords;
      for (int i = 0; i < P::kDigits / 4; ++i) {
        uint32_t four = DigitWord<kDim>(x, raw_rows, unit * (P::kDigits / 4) + i, count);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          group += (four & 255U) * weight;
          four >>= 8;
          weight *= kLevels;
          if (++in_group == P::kGroup) {
            buffer |= static_cast<uint64_t>(group) << filled;
            filled += P::kBits;
            group = 0;
            weight = 1;
            in_group = 0;
            if (filled >= 32) {
              if (place < out_words) {
                out[place] = static_cast<uint32_t>(buffer);
              }
              ++place;
              buffer >>= 32;
              filled -= 32;
            }
          }
        }
      }
    }
  }
}

}  // namespace kvshrink::cuda

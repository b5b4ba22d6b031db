// Scales and factor records of a block.
#pragma once

#include "common/tables.cuh"
#include "common/view.h"
#include "common/warp.cuh"
#include "stages/minifloat.h"

namespace kvshrink::cuda {

__device__ inline float Scale8(uint32_t q) {
  return exp2f((static_cast<float>(q) - 191.0F) * 0.125F);
}

// 2^exponent of a block, -126 .. 127.
__device__ inline float PowerOfTwo(int exponent) {
  return __uint_as_float(static_cast<uint32_t>(exponent + 127) << 23);
}

// The stored form of a row's scale: loaded early, decoded later.
struct StoredScale {
  uint32_t block = 0;  // kvs: byte q, byte step
  uint32_t row = 0;    // kvs: the byte with the row's offset; else its fp16 norm

  StoredScale() = default;
  __device__ StoredScale(const BlockDesc& block_desc, uint32_t t) {
    if (block_desc.family() == static_cast<uint32_t>(Family::kKvs)) {
      block = *reinterpret_cast<const uint16_t*>(block_desc.scales);
      row = block_desc.scales[2 + t / 2];
    } else {
      row = reinterpret_cast<const uint16_t*>(block_desc.scales)[t];
    }
  }
};

// What multiplies the rotated levels of coded row t; of fp16 norms that are negative or not finite
// *bad is set.
__device__ inline float DecodeScale(const BlockDesc& block, const StoredScale& stored, uint32_t d,
                                    uint32_t t, bool* bad) {
  if (block.family() == static_cast<uint32_t>(Family::kKvs)) {
    const uint32_t offset = (stored.row >> (4 * (t % 2))) & 15U;
    const float below = static_cast<float>(offset * (stored.block >> 8)) * 0.0625F;
    return offset == 15
               ? 0.0F
               : exp2f((static_cast<float>(stored.block & 255U) - 191.0F) * 0.125F - below);
  }
  const float norm = stages::Fp16ToFloat(static_cast<uint16_t>(stored.row));
  *bad |= !(norm >= 0 && norm <= 65504.0F);
  return norm * rsqrtf(static_cast<float>(d));
}

__device__ inline float RowScale(const BlockDesc& block, uint32_t d, uint32_t t, bool* bad) {
  return DecodeScale(block, StoredScale(block, t), d, t, bad);
}

// Where one component of a kvs record lies: bits from the start of the block's LOW part.
struct ComponentPlace {
  uint32_t channel_bits = 0, token_bits = 0;  // of a digit
  uint32_t channel_at = 0, token_at = 0;
  float scale = 0;  // of the token factor
};

// Component number i is that of the caller's loop; `at` runs along and begins at the bit string.
__device__ inline ComponentPlace NextComponent(const uint8_t* record, uint32_t i, uint32_t n,
                                               uint32_t d, uint32_t* at) {
  ComponentPlace place;
  place.token_bits = record[2 * i] & 15U;
  place.channel_bits = record[2 * i] >> 4U;
  place.scale = Scale8(record[2 * i + 1]);
  place.channel_at = *at;
  place.token_at = *at + place.channel_bits * d;
  *at = place.token_at + place.token_bits * n;
  return place;
}

// The places of up to 32 components, one a lane: their bytes are read at once.
struct LanePlaces {
  uint32_t pair = 0;  // bits, scale
  uint32_t at = 0;    // of the channel digits

  // The lane's own pair, and the places of all.
  __device__ static uint32_t LoadPair(const uint8_t* record, uint32_t rank, uint32_t lane) {
    return lane < rank ? record[2 * lane] | (uint32_t{record[2 * lane + 1]} << 8) : 0;
  }
  __device__ LanePlaces(uint32_t own_pair, uint32_t n, uint32_t d, uint32_t begin, uint32_t lane)
      : pair(own_pair) {
    const uint32_t size = (pair >> 4 & 15U) * d + (pair & 15U) * n;
    uint32_t sum = size;
#pragma unroll
    for (uint32_t step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(kAllLanes, sum, step);
      sum += lane >= step ? other : 0;
    }
    at = begin + sum - size;
  }
  __device__ ComponentPlace Get(uint32_t i, uint32_t d) const {
    const uint32_t its_pair = __shfl_sync(kAllLanes, pair, static_cast<int>(i));
    ComponentPlace place;
    place.token_bits = its_pair & 15U;
    place.channel_bits = its_pair >> 4 & 15U;
    place.scale = Scale8(its_pair >> 8);
    place.channel_at = __shfl_sync(kAllLanes, at, static_cast<int>(i));
    place.token_at = place.channel_at + place.channel_bits * d;
    return place;
  }
};

// The LOW part of a block as 32-bit words, and its record.
struct LowPart {
  const uint32_t* words = nullptr;
  const uint8_t* record = nullptr;
  uint32_t last_word = 0;
  uint32_t raw_bytes = 0;

  __device__ LowPart(const BlockDesc& block, uint32_t d)
      : words(reinterpret_cast<const uint32_t*>(block.low)),
        raw_bytes(block.raw_rows * d * BytesOfDType(block.dtype())) {
    record = block.low + raw_bytes;
    const uint32_t bytes = raw_bytes + block.factor_bytes;
    last_word = bytes == 0 ? 0 : (bytes - 1) / 4;
  }
  __device__ uint32_t bit_string(uint32_t rank) const { return 8 * (raw_bytes + 2 * rank); }
  // 32 bits from a bit offset on; what is past the part reads as something.
  __device__ uint32_t Window(uint32_t bit) const {
    const uint32_t at = bit / 32;
    return __funnelshift_r(__ldg(words + min(at, last_word)), __ldg(words + min(at + 1, last_word)),
                           bit % 32);
  }
};

__device__ inline float FactorLevel(uint32_t bits, uint32_t digit) {
  return kFactorLevelTable.level[(1U << bits) - 4 + digit];
}

// kPerLane levels from digit `first` on of a string of `bits`-bit digits that begins at bit `at`.
template <int kPerLane>
__device__ inline void ReadLevels(const LowPart& low, uint32_t at, uint32_t bits, uint32_t first,
                                  float (&x)[kPerLane]) {
  const uint32_t mask = (1U << bits) - 1;
#pragma unroll
  for (int i = 0; i < kPerLane; i += 4) {
    uint32_t window = low.Window(at + (first + static_cast<uint32_t>(i)) * bits);
#pragma unroll
    for (int j = i; j < i + 4 && j < kPerLane; ++j) {
      x[j] = FactorLevel(bits, window & mask);
      window >>= bits;
    }
  }
}

// use(place) for every component of a kvs block, by one warp.
template <typename Use>
__device__ inline void ForEachComponent(const BlockDesc& block, const LowPart& low, uint32_t d,
                                        uint32_t lane, const Use& use) {
  uint32_t begin = low.bit_string(block.rank);
  for (uint32_t first = 0; first < block.rank; first += 32) {
    const uint32_t count = min(32U, block.rank - first);
    const LanePlaces places(LanePlaces::LoadPair(low.record + 2 * first, count, lane), block.rows,
                            d, begin, lane);
    for (uint32_t i = 0; i < count; ++i) {
      const ComponentPlace place = places.Get(i, d);
      use(place);
      begin = place.token_at + place.token_bits * block.rows;
    }
  }
}

// Asks for a block's parts to come to the L2: a line a lane. For a block that is worked next.
__device__ inline void Prefetch(const uint8_t* bytes, uint32_t count, uint32_t lane) {
  if (lane * 128 < count) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(bytes + size_t{lane} * 128));
  }
}

__device__ inline void PrefetchBlock(const BlockDesc& block, uint32_t d, uint32_t lane) {
  if (block.has_levels() && block.code < kFirstAlphabet + kAlphabets) {
    const ResidualAlphabet& alphabet = kAlphabetTable.of[block.code - kFirstAlphabet];
    const uint32_t digits = block.coded_rows() * d;
    Prefetch(
        block.codes,
        digits / static_cast<uint32_t>(alphabet.digits) * static_cast<uint32_t>(alphabet.bits) / 8,
        lane);
    Prefetch(block.scales, 1, lane);
    Prefetch(block.low, block.raw_rows * d * BytesOfDType(block.dtype()) + block.factor_bytes,
             lane);
  }
}

// One value of the shard's dtype, number i from `bytes`.
__device__ inline float RawValue(const uint8_t* bytes, uint32_t dtype, size_t i) {
  switch (dtype) {
    case 0:
      return reinterpret_cast<const float*>(bytes)[i];
    case 1:
      return stages::Fp16ToFloat(reinterpret_cast<const uint16_t*>(bytes)[i]);
    case 2:
      return stages::Bf16ToFloat(reinterpret_cast<const uint16_t*>(bytes)[i]);
    default:
      return stages::Fp8ToFloat(bytes[i]);
  }
}

// A number of an eoptshrinkq record: phi_i, then the two codebooks, then digits.
struct ShrinkRecord {
  const uint8_t* bytes;
  uint32_t rank, n, d;

  __device__ float Half(uint32_t i) const {
    // Records begin at any byte when rows are fp8.
    return stages::Fp16ToFloat(static_cast<uint16_t>(bytes[2 * i] | (bytes[2 * i + 1] << 8)));
  }
  __device__ bool Finite() const {
    bool finite = true;
    for (uint32_t i = 0; i < rank + 32; ++i) {
      finite &= isfinite(Half(i));
    }
    return finite;
  }
  __device__ uint32_t Digit(uint32_t i) const {
    return (bytes[2 * rank + 64 + i / 2] >> (4 * (i % 2))) & 15U;
  }
  __device__ float Token(uint32_t i, uint32_t t) const {
    return Half(i) * Half(rank + Digit(i * (n + d) + t));
  }
  __device__ float Channel(uint32_t i, uint32_t c) const {
    return Half(rank + 16 + Digit(i * (n + d) + n + c));
  }
};

}  // namespace kvshrink::cuda

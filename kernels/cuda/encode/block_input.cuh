// A block from global into shared memory: as fp16, scaled by a power of two so that the largest
// magnitude is in [2^7, 2^8), its channels times the signs of the row rotation. Values of bf16 and
// fp16 stay exact down to 2^-22 of the largest, and a fp32 value keeps 11 bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/encode/encode_types.cuh"
#include "cuda/encode/tables.cuh"
#include "cuda/encode/warp_math.cuh"

namespace kvshrink::cuda {

inline constexpr int kInputShift = 8;  // 2^8 times a value relative to the block's exponent

// Threads of a block and how its rows and channels are dealt out.
template <int kDim>
struct BlockShape {
  static constexpr int kWarps = kDim == 256 ? 8 : 4;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kTokensPerWarp = static_cast<int>(kBlockTokens) / kWarps;
  static constexpr int kChannelsPerWarp = kDim / kWarps;
  static constexpr int kRowBytes = kDim * 2;
  static constexpr int kChunks = kDim / 8;  // of 8 channels in a row
  static constexpr int kRowStep = kThreads / kChunks;
  static constexpr int kPasses = static_cast<int>(kBlockTokens) / kRowStep;
};

struct BlockPlace {
  const EncodeTensor* tensor;
  uint32_t kind, head, first_row;
  int rows, raw_rows;
};

// Byte offset of chunk `chunk` of a row: the rotation of chunks keeps eight rows off one bank.
template <int kDim>
__device__ __forceinline__ uint32_t ChunkOffset(int row, int chunk) {
  return static_cast<uint32_t>(row * BlockShape<kDim>::kRowBytes + ((chunk ^ (row & 7)) << 4));
}

__device__ __forceinline__ const uint8_t* RowAddress(const BlockPlace& place, int row,
                                                     uint32_t value_bytes) {
  return TokenAddress(*place.tensor, place.first_row + static_cast<uint32_t>(row), place.head,
                      value_bytes);
}

// Eight values as they came.
template <DType kType>
struct Chunk {
  uint4 word;
};
template <>
struct Chunk<DType::kFp32> {
  uint4 word, word2;
};

template <DType kType>
__device__ __forceinline__ Chunk<kType> LoadChunk(const uint8_t* row, int chunk) {
  Chunk<kType> result;
  if constexpr (kType == DType::kFp32) {
    result.word = __ldg(reinterpret_cast<const uint4*>(row) + 2 * chunk);
    result.word2 = __ldg(reinterpret_cast<const uint4*>(row) + 2 * chunk + 1);
  } else {
    result.word = __ldg(reinterpret_cast<const uint4*>(row) + chunk);
  }
  return result;
}

// Bits of the largest magnitude: of fp32, or of a pair of 16-bit values each.
template <DType kType>
__device__ __forceinline__ uint32_t LargestBits(const Chunk<kType>& chunk, uint32_t largest) {
  if constexpr (kType == DType::kFp32) {
    const uint32_t words[8] = {chunk.word.x,  chunk.word.y,  chunk.word.z,  chunk.word.w,
                               chunk.word2.x, chunk.word2.y, chunk.word2.z, chunk.word2.w};
#pragma unroll
    for (const uint32_t word : words) {
      largest = max(largest, word & 0x7FFFFFFFU);
    }
    return largest;
  } else {
    largest = __vmaxu2(largest, chunk.word.x & 0x7FFF7FFFU);
    largest = __vmaxu2(largest, chunk.word.y & 0x7FFF7FFFU);
    largest = __vmaxu2(largest, chunk.word.z & 0x7FFF7FFFU);
    return __vmaxu2(largest, chunk.word.w & 0x7FFF7FFFU);
  }
}

// fp32 bits of the largest magnitude that LargestBits found.
template <DType kType>
__device__ __forceinline__ uint32_t LargestAsFp32(uint32_t bits) {
  if constexpr (kType == DType::kFp32) {
    return bits;
  }
  const uint32_t one = max(bits & 0xFFFFU, bits >> 16);
  if constexpr (kType == DType::kBf16) {
    return one << 16;
  } else {
    return __float_as_uint(__half2float(__ushort_as_half(static_cast<unsigned short>(one))));
  }
}

template <DType kType>
__device__ __forceinline__ void ToFloats(const Chunk<kType>& chunk, float (&x)[8]) {
  const uint32_t words[4] = {chunk.word.x, chunk.word.y, chunk.word.z, chunk.word.w};
  if constexpr (kType == DType::kFp32) {
    const uint32_t more[4] = {chunk.word2.x, chunk.word2.y, chunk.word2.z, chunk.word2.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = __uint_as_float(words[i]);
      x[i + 4] = __uint_as_float(more[i]);
    }
  } else if constexpr (kType == DType::kBf16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = __uint_as_float(words[i] << 16);
      x[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000U);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = UnpackHalves(words[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
}

struct BlockInputSummary {
  uint32_t largest;    // fp32 bits of the largest magnitude; 0x7F800000 and up: not finite
  int exponent;        // that brings it into [1/2, 1)
  int shift;           // 2^shift times a value is what is stored
  float coded_energy;  // sum of squares of the coded rows as stored in shared memory
  float energy;        // of all rows, likewise
};

// Sum over the CTA, in a fixed order. `scratch` has one float a warp.
template <int kWarps>
__device__ __forceinline__ float BlockSum(float x, float* scratch, int warp, int lane) {
  x = WarpSum(x);
  if (lane == 0) {
    scratch[warp] = x;
  }
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    sum += scratch[i];
  }
  __syncthreads();
  return sum;
}

// Scaled, signed and packed; adds the squares of what is stored.
__device__ __forceinline__ uint4 PackChunk(float (&x)[8], float first, float second, bool wide,
                                           const uint32_t (&signs)[4], float* energy) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    x[i] *= first;
    if (wide) {
      x[i] *= second;
    }
    *energy = fmaf(x[i], x[i], *energy);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = PackHalves(x[2 * i], x[2 * i + 1]) ^ signs[i];
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// All threads of the CTA. `x`: the block's place in shared memory; `scratch`: 32 floats. On return
// all is in place for all threads. When the block is not finite or all zero, nothing is stored.
template <int kDim, DType kType>
__device__ __forceinline__ BlockInputSummary LoadBlock(const BlockPlace& place, uint8_t* x,
                                                       float* scratch, int thread) {
  using Shape = BlockShape<kDim>;
  constexpr uint32_t kBytes = kType == DType::kFp32 ? 4 : 2;
  constexpr bool kKeep = kType != DType::kFp32;  // in registers between the two passes
  const int lane = thread & 31;
  const int warp = thread >> 5;
  const int chunk = thread % Shape::kChunks;
  const int first_row = thread / Shape::kChunks;
  const Chunk<kType> zero{};
  Chunk<kType> kept[kKeep ? Shape::kPasses : 1];
  uint32_t largest = 0;
#pragma unroll
  for (int pass = 0; pass < Shape::kPasses; ++pass) {
    const int row = first_row + pass * Shape::kRowStep;
    Chunk<kType> loaded = zero;
    if (row < place.rows) {
      loaded = LoadChunk<kType>(RowAddress(place, row, kBytes), chunk);
    }
    if (kKeep) {
      kept[kKeep ? pass : 0] = loaded;
    } else if (row >= place.raw_rows) {
      largest = LargestBits<kType>(loaded, largest);
    }
  }
  if (kKeep) {
#pragma unroll
    for (int pass = 0; pass < Shape::kPasses; ++pass) {
      if (first_row + pass * Shape::kRowStep >= place.raw_rows) {
        largest = LargestBits<kType>(kept[kKeep ? pass : 0], largest);
      }
    }
  }
  largest = __reduce_max_sync(kAllLanes, LargestAsFp32<kType>(largest));
  auto* maxima = reinterpret_cast<uint32_t*>(scratch);
  if (lane == 0) {
    maxima[warp] = largest;
  }
  __syncthreads();
  largest = maxima[0];
#pragma unroll
  for (int i = 1; i < Shape::kWarps; ++i) {
    largest = max(largest, maxima[i]);
  }
  BlockInputSummary summary;
  summary.largest = largest;
  int exponent = static_cast<int>(largest >> 23) - 126;
  if (largest < 0x00800000U) {  // denormal
    exponent = 32 - __clz(static_cast<int>(largest)) - 149;
  }
  summary.exponent = largest == 0 || largest >= 0x7F800000U ? 0 : exponent;
  const int shift = kInputShift - summary.exponent;
  summary.shift = shift;
  const bool wide = shift > 120 || shift < -120;
  const int shift1 = wide ? shift / 2 : shift;
  const float factor = __uint_as_float(static_cast<uint32_t>(127 + shift1) << 23);
  const float factor2 =
      wide ? __uint_as_float(static_cast<uint32_t>(127 + shift - shift1) << 23) : 1.0F;
  const uint32_t byte = (kRowSigns.word[chunk >> 2] >> ((chunk & 3) * 8)) & 255U;
  uint32_t signs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    signs[i] = (((byte >> (2 * i)) & 1U) << 15) | (((byte >> (2 * i + 1)) & 1U) << 31);
  }
  float coded = 0;
  float raw = 0;
#pragma unroll
  for (int pass = 0; pass < Shape::kPasses; ++pass) {
    const int row = first_row + pass * Shape::kRowStep;
    Chunk<kType> loaded = kept[kKeep ? pass : 0];
    if (!kKeep) {
      loaded = row < place.rows ? LoadChunk<kType>(RowAddress(place, row, kBytes), chunk) : zero;
    }
    float values[8];
    ToFloats<kType>(loaded, values);
    const bool is_raw = row < place.raw_rows;
    uint4 packed = PackChunk(values, factor, factor2, wide, signs, is_raw ? &raw : &coded);
    if (is_raw) {
      packed = make_uint4(0, 0, 0, 0);
    }
    *reinterpret_cast<uint4*>(x + ChunkOffset<kDim>(row, chunk)) = packed;
  }
  __syncthreads();  // `maxima` is read; also the end of the stores
  summary.coded_energy = BlockSum<Shape::kWarps>(coded, scratch, warp, lane);
  summary.energy = summary.coded_energy;
  if (place.raw_rows > 0) {
    summary.energy += BlockSum<Shape::kWarps>(raw, scratch, warp, lane);
  }
  return summary;
}

}  // namespace kvshrink::cuda

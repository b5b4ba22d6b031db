// Coded rows of any block, of any head_dim, rank and code, as fp32 in shared memory: the plain way,
// by one CTA. What the tuned kernels leave out comes here.
#pragma once

#include "common/factors.cuh"
#include "common/unpack.cuh"

namespace kvshrink::cuda {

inline constexpr uint32_t kGenericRows = 16;

// Bits of what was found wrong.
enum BlockError : uint32_t { kScaleError = 1, kFactorError = 2, kCodesError = 4 };

// Floats of shared memory that a CTA needs: rows, a channel factor, a token factor.
inline constexpr size_t GenericFloats(uint32_t d) {
  return size_t{kGenericRows} * d + d + kBlockTokens;
}

// Levels (not yet scaled), fp8 or raw values of rows first .. first + count - 1 into rows.
__device__ inline uint32_t GenericCodes(const BlockDesc& block, uint32_t d, uint32_t first,
                                        uint32_t count, float* rows) {
  const uint32_t begin = first * d;
  const uint32_t end = begin + count * d;
  uint32_t errors = 0;
  if (block.code < kFirstAlphabet) {
    for (uint32_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      float value = 0;
      if (block.code == static_cast<uint8_t>(BlockCode::kRaw)) {
        value = RawValue(block.codes, block.dtype(), i);
      } else if (block.code == static_cast<uint8_t>(BlockCode::kFp8)) {
        value = stages::Fp8ToFloat(block.codes[i]) * 0x1p-8F;
        errors |= stages::Fp8IsNan(block.codes[i]) ? kCodesError : 0;
      }
      rows[i - begin] = value;
    }
    return errors;
  }
  const ResidualAlphabet& alphabet = kAlphabetTable.of[block.code - kFirstAlphabet];
  const bool ternary = alphabet.levels == 3;
  const auto digits = static_cast<uint32_t>(alphabet.digits);
  const auto bits = static_cast<uint32_t>(alphabet.bits);
  const uint32_t all = block.coded_rows() * d;
  const uint32_t word_count = ((all + digits - 1) / digits * bits + 31) / 32;
  const uint32_t last_group = (end + digits - 1) / digits;
  for (uint32_t group = begin / digits + threadIdx.x; group < last_group; group += blockDim.x) {
    const bool bad =
        UnpackGroup(block.code, block, word_count, group, [&](uint32_t at, uint32_t digit) {
          if (at >= begin && at < end) {
            const float integer = ternary ? (static_cast<float>(digit) - 1.0F) * 0x1p-24F
                                          : static_cast<float>(alphabet.coarse[digit]) +
                                                alphabet.fine[digit] * (1.0F / 512);
            rows[at - begin] = alphabet.unit * integer;
          }
        });
    errors |= bad ? kCodesError : 0;
  }
  return errors;
}

// Component i of a kvs record, both factors ready to multiply: by warps 0 and 1.
__device__ inline void GenericFactor(const LowPart& low, const ComponentPlace& place, uint32_t n,
                                     uint32_t d, float* channel, float* token) {
  const uint32_t lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    float energy = 0;
    for (uint32_t c = lane; c < d; c += 32) {
      const uint32_t digit =
          low.Window(place.channel_at + c * place.channel_bits) & ((1U << place.channel_bits) - 1);
      channel[c] = FactorLevel(place.channel_bits, digit);
      energy += channel[c] * channel[c];
    }
    const float inverse = rsqrtf(WarpSum(energy));
    for (uint32_t c = lane; c < d; c += 32) {
      channel[c] *= inverse;
    }
    RotateInverseAny(stages::kChannelSeed, channel, d, lane);
  } else if (threadIdx.x < 64) {
    for (uint32_t t = lane; t < n; t += 32) {
      const uint32_t digit =
          low.Window(place.token_at + t * place.token_bits) & ((1U << place.token_bits) - 1);
      token[t] = place.scale * FactorLevel(place.token_bits, digit);
    }
    RotateInverseAny(stages::kTokenSeed, token, n, lane);
  }
}

__device__ inline void AddOuter(const float* channel, const float* token, uint32_t d,
                                uint32_t count, float* rows) {
  for (uint32_t i = threadIdx.x; i < count * d; i += blockDim.x) {
    rows[i] += token[i / d] * channel[i % d];
  }
}

// Low-rank part, added to rows.
__device__ inline uint32_t GenericLowRank(const BlockDesc& block, uint32_t d, uint32_t first,
                                          uint32_t count, float* rows, float* channel,
                                          float* token) {
  const LowPart low(block, d);
  const uint32_t n = block.rows;
  const float* my_tokens = token + block.raw_rows + first;
  if (block.family() == static_cast<uint32_t>(Family::kEOptShrinkQ)) {
    const ShrinkRecord record{low.record, block.rank, n, d};
    for (uint32_t i = 0; i < block.rank; ++i) {
      for (uint32_t c = threadIdx.x; c < d; c += blockDim.x) {
        channel[c] = record.Channel(i, c);
      }
      for (uint32_t t = threadIdx.x; t < n; t += blockDim.x) {
        token[t] = record.Token(i, t);
      }
      __syncthreads();
      AddOuter(channel, my_tokens, d, count, rows);
      __syncthreads();
    }
    return record.Finite() ? 0 : kFactorError;
  }
  uint32_t at = low.bit_string(block.rank);
  for (uint32_t i = 0; i < block.rank; ++i) {
    const ComponentPlace place = NextComponent(low.record, i, n, d, &at);
    GenericFactor(low, place, n, d, channel, token);
    __syncthreads();
    AddOuter(channel, my_tokens, d, count, rows);
    __syncthreads();
  }
  return 0;
}

// Coded rows first .. first + count - 1 (count <= kGenericRows) into shared[0 .. count d).
// Synchronises before and after; the result is a thread's own part of the errors.
__device__ inline uint32_t GenericDecodeRows(const BlockDesc& block, uint32_t d, DecodeForm form,
                                             uint32_t first, uint32_t count, float* shared) {
  float* rows = shared;
  float* channel = rows + kGenericRows * d;
  float* token = channel + d;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t warps = blockDim.x / 32;
  uint32_t errors = 0;
  __syncthreads();
  if (form == DecodeForm::kFull) {
    errors |= GenericCodes(block, d, first, count, rows);
  } else {
    for (uint32_t i = threadIdx.x; i < count * d; i += blockDim.x) {
      rows[i] = 0;
    }
  }
  __syncthreads();
  if (block.has_levels() && form == DecodeForm::kFull) {
    for (uint32_t t = threadIdx.x / 32; t < count; t += warps) {
      bool bad = false;
      const float scale = RowScale(block, d, first + t, &bad);
      errors |= bad ? kScaleError : 0;
      RotateInverseAny(stages::kRowSeed, rows + t * d, d, lane);
      for (uint32_t c = lane; c < d; c += 32) {
        rows[t * d + c] *= scale;
      }
    }
    __syncthreads();
  }
  if (block.rank > 0) {
    errors |= GenericLowRank(block, d, first, count, rows, channel, token);
  }
  if (block.code != static_cast<uint8_t>(BlockCode::kRaw)) {
    const float up = PowerOfTwo(block.exponent);
    for (uint32_t i = threadIdx.x; i < count * d; i += blockDim.x) {
      rows[i] = fminf(fmaxf(rows[i] * up, -3.40282347e38F), 3.40282347e38F);
    }
    __syncthreads();
  }
  return errors;
}

}  // namespace kvshrink::cuda

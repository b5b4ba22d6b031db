// Rank, bits and the coded factors of a block (rules: stages/rank_rule.h, stages/kvs_factors.h).
#pragma once

#include "cuda/encode/subspace.cuh"
#include "stages/rank_rule.h"
#include "stages/scales.h"

namespace kvshrink::cuda {

inline constexpr int kFactorStride = 132;  // floats of a row of factors: off one bank

// Offset in the residual's panel of channel factors: rows of 16 high and 16 low fp16 values; row
// order as the tiles of the residual want it (residual.cuh).
__device__ __forceinline__ int ResidualRow(int channel) {
  const int low = channel & 15;
  return (channel & ~15) + ((low >> 1) & 1) * 8 + (low >> 2) * 2 + (low & 1);
}
__device__ __forceinline__ uint32_t ResidualOffset(int row, int chunk) {
  return static_cast<uint32_t>(row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4));
}

// The choice of one block.
struct FactorPlan {
  int rank;
  uint8_t token_bits[kFactorCap], channel_bits[kFactorCap];
  uint8_t scale[kFactorCap];
  uint16_t first_bit[kFactorCap + 1];  // of a component's digits in the record; then its end
};

inline constexpr int kBitPairs = 24;
struct BitPairs {
  uint8_t token[kBitPairs] = {};
  uint8_t channel[kBitPairs] = {};
  float kept[kBitPairs] = {};  // 1 - min(1, distortion)

  constexpr BitPairs() {
    int count = 0;
    for (int x = stages::kMinFactorBits; x <= stages::kMaxFactorBits; ++x) {
      const int last = x + 2 < stages::kMaxFactorBits ? x + 2 : stages::kMaxFactorBits;
      for (int y = x - 1 > stages::kMinFactorBits ? x - 1 : stages::kMinFactorBits; y <= last;
           ++y) {
        token[count] = static_cast<uint8_t>(x);
        channel[count] = static_cast<uint8_t>(y);
        const double distortion =
            stages::FactorCodebook(x).distortion + stages::FactorCodebook(y).distortion;
        kept[count] = static_cast<float>(1 - (distortion < 1 ? distortion : 1));
        ++count;
      }
    }
  }
};

// One warp. lambda: relative to the block's energy, descending. Components side by side: a
// component's cost needs only the eigenvalues before it. Lanes 16.. take the second half of the
// pairs.
__device__ __forceinline__ void ChooseFactors(const float* lambda, int n, int d, float price,
                                              int cap, int lane, FactorPlan* plan) {
  const int component = lane & 15;
  const float own = lambda[component];
  float before = 0;
#pragma unroll
  for (int i = 0; i < kP; ++i) {
    before += i < component ? lambda[i] : 0.0F;
  }
  const float left = 1.0F - before;
  const float share = left > 0 ? fminf(1.0F, own / left) : 0.0F;
  const float rate = price * 2 * 0.693147180559945309F / (static_cast<float>(n) * d);
  float best = 0;
  int chosen = -1;
  constexpr BitPairs pairs;
  const bool second = lane >= kP;
#pragma unroll
  for (int i = 0; i < kBitPairs / 2; ++i) {
    const int j = i + kBitPairs / 2;
    const float kept = second ? pairs.kept[j] : pairs.kept[i];
    const int token = second ? pairs.token[j] : pairs.token[i];
    const int channel = second ? pairs.channel[j] : pairs.channel[i];
    const int bits = token * n + channel * d + stages::kComponentOverheadBits;
    const float cost = fmaf(rate, static_cast<float>(bits), __logf(fmaf(-share, kept, 1.0F)));
    if (cost < best) {
      best = cost;
      chosen = token | channel << 4;
    }
  }
  const float upper = __shfl_down_sync(kAllLanes, best, 16);
  const int upper_chosen = __shfl_down_sync(kAllLanes, chosen, 16);
  if (upper < best) {
    chosen = upper_chosen;
  }
  const bool wanted = chosen >= 0 && share > 0 && component < cap;
  const uint32_t votes = __ballot_sync(kAllLanes, wanted) & 0xFFFFU;
  const int rank = __ffs(static_cast<int>(~votes)) - 1;
  const int token_bits = chosen >= 0 ? chosen & 15 : 0;
  const int channel_bits = chosen >= 0 ? chosen >> 4 : 0;
  int end = component < rank ? token_bits * n + channel_bits * d : 0;
#pragma unroll
  for (int step = 1; step < kP; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, end, step, 16);
    end += component >= step ? other : 0;
  }
  if (lane < rank) {
    plan->token_bits[lane] = static_cast<uint8_t>(token_bits);
    plan->channel_bits[lane] = static_cast<uint8_t>(channel_bits);
    plan->first_bit[lane + 1] = static_cast<uint16_t>(16 * rank + end);
  }
  if (lane == 0) {
    plan->rank = rank;
    plan->first_bit[0] = static_cast<uint16_t>(16 * rank);
  }
  __syncwarp();
}

// ORs `count` bits into a string of 32-bit words that began as zeros.
__device__ __forceinline__ void PutBits(uint32_t* words, uint32_t bit, uint64_t value, int count) {
  uint32_t* word = words + (bit >> 5);
  const int shift = static_cast<int>(bit & 31);
  atomicOr(word, static_cast<uint32_t>(value << shift));
  if (shift + count > 32) {
    atomicOr(word + 1, static_cast<uint32_t>((value << shift) >> 32));
    if (shift + count > 64) {
      atomicOr(word + 2, static_cast<uint32_t>(value >> (64 - shift)));
    }
  }
}

// Walsh-Hadamard transform of a vector of 32 kEach entries, lane l holding kEach consecutive ones
// from kEach l; only the kBits lowest bits of the index take part.
template <int kEach, int kBits>
__device__ __forceinline__ void WarpHadamard(float (&v)[kEach], int lane) {
  constexpr int kInLane = kEach == 2 ? 1 : kEach == 4 ? 2 : 3;
#pragma unroll
  for (int bit = 0; bit < kBits; ++bit) {
    if (bit < kInLane) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int partner = i ^ (1 << bit);
        if (i < partner) {
          const float sum = v[i] + v[partner];
          v[partner] = v[i] - v[partner];
          v[i] = sum;
        }
      }
    } else {
      const int mask = 1 << (bit - kInLane);
      const bool upper = (lane & mask) != 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const float other = __shfl_xor_sync(kAllLanes, v[i], mask);
        v[i] = other + (upper ? -v[i] : v[i]);
      }
    }
  }
}

__device__ __forceinline__ float WithSign(float x, bool negative) { return negative ? -x : x; }

// V = Z w of the warp's channels, transposed into rows of `factors`, as many as the rank.
template <int kDim>
__device__ __forceinline__ void StoreChannelVectors(const SubspaceScratch& scratch, int rank,
                                                    float* factors, int stride, int thread) {
  using Shape = BlockShape<kDim>;
  constexpr int kTiles = Shape::kChannelsPerWarp / 16;
  const int lane = thread & 31;
  const int g = lane >> 2;
  const int c = lane & 3;
  const int first = (thread >> 5) * Shape::kChannelsPerWarp;
  float v[kTiles][2][4];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int half = i >> 1;
      const int low = i & 1;
      const int row = first + 16 * m + 8 * low + g;
      const float2 pair = UnpackHalves(
          *reinterpret_cast<const uint32_t*>(scratch.channels + PanelOffset(row, half) + 4 * c));
      v[m][half][2 * low] = pair.x;
      v[m][half][2 * low + 1] = pair.y;
    }
  }
  MultiplySmall<kTiles>(scratch.w, lane, v);
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int component = 8 * (i >> 2) + 2 * c + (i & 1);
      const int row = first + 16 * m + 8 * ((i >> 1) & 1) + g;
      if (component < rank) {
        factors[component * stride + row] = v[m][i >> 2][i & 3];
      }
    }
  }
}

// Codes one channel factor, a row of `factors` (its entries times the signs of the row rotation),
// and leaves it there as decoded, times 16. One warp.
template <int kDim>
__device__ __forceinline__ void CodeChannelVector(float* row, int component, const FactorPlan& plan,
                                                  uint32_t* words, int lane) {
  constexpr int kEach = kDim / 32;
  constexpr int kBits = kDim == 64 ? 6 : kDim == 128 ? 7 : 8;
  const int first = lane * kEach;
  const int bits = plan.channel_bits[component];
  const uint32_t flips =
      (kRowSigns.word[first >> 5] ^ kChannelSigns.word[first >> 5]) >> (first & 31);
  float v[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    v[i] = WithSign(row[first + i], ((flips >> i) & 1U) != 0);
  }
  WarpHadamard<kEach, kBits>(v, lane);
  uint64_t digits = 0;
  float energy = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int digit = FactorDigit(bits, v[i]);
    digits |= static_cast<uint64_t>(digit) << (i * bits);
    v[i] = FactorLevel(bits, digit);
    energy = fmaf(v[i], v[i], energy);
  }
  PutBits(words, plan.first_bit[component] + static_cast<uint32_t>(first * bits), digits,
          kEach * bits);
  energy = WarpSum(energy);
  WarpHadamard<kEach, kBits>(v, lane);
  // 16 / (|levels| sqrt(d)); the inverse transform's scale is in it.
  const float scale = 16.0F * rsqrtf(energy * kDim);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    row[first + i] = WithSign(v[i] * scale, ((flips >> i) & 1U) != 0);
  }
}

// The decoded channel factors as columns of two panels: `plain` in the basis of X, `residual` with
// the 16-point transforms of the residual's product (and, for d = 256, the point over the halves)
// done. Each thread one channel; columns past the rank are zero.
template <int kDim>
__device__ __forceinline__ void StorePanels(const float* factors, int stride, int rank,
                                            uint8_t* plain, uint8_t* residual, int thread) {
  for (int channel = thread; channel < kDim; channel += BlockShape<kDim>::kThreads) {
    uint32_t exact[kP / 2];
    uint32_t high[kP / 2];
    uint32_t low[kP / 2];
#pragma unroll
    for (int pair = 0; pair < kP / 2; ++pair) {
      float v[2] = {};
      exact[pair] = 0;
      high[pair] = 0;
      low[pair] = 0;
      if (2 * pair < rank) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          v[j] = 2 * pair + j < rank ? factors[(2 * pair + j) * stride + channel] : 0.0F;
        }
        exact[pair] = PackHalves(v[0], v[1]);
        if constexpr (kDim == 256) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float far =
                2 * pair + j < rank ? factors[(2 * pair + j) * stride + (channel ^ 128)] : 0.0F;
            v[j] = channel < 128 ? v[j] + far : far - v[j];
          }
        }
#pragma unroll
        for (int mask = 1; mask < 16; mask *= 2) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float other = __shfl_xor_sync(kAllLanes, v[j], mask);
            v[j] = other + WithSign(v[j], (thread & mask) != 0);
          }
        }
        high[pair] = PackHalves(v[0], v[1]);
        const float2 rounded = UnpackHalves(high[pair]);
        low[pair] = PackHalves(v[0] - rounded.x, v[1] - rounded.y);
      }
    }
    const int row = ResidualRow(channel);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      *reinterpret_cast<uint4*>(plain + PanelOffset(channel, half)) = make_uint4(
          exact[4 * half], exact[4 * half + 1], exact[4 * half + 2], exact[4 * half + 3]);
      *reinterpret_cast<uint4*>(residual + ResidualOffset(row, half)) =
          make_uint4(high[4 * half], high[4 * half + 1], high[4 * half + 2], high[4 * half + 3]);
      *reinterpret_cast<uint4*>(residual + ResidualOffset(row, 2 + half)) =
          make_uint4(low[4 * half], low[4 * half + 1], low[4 * half + 2], low[4 * half + 3]);
    }
  }
}

}  // namespace kvshrink::cuda

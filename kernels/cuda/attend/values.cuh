// Weighted sums of one block of values, by one warp.
#pragma once

#include "attend/warp_block.cuh"

namespace kvshrink::cuda {

// What a warp has summed so far, relative to a running maximum of the logits: in the rows' rotated
// basis as the sums of matrix instructions (channels by rows of queries), and in the basis of the
// channel factors by lane. `ones` is a lane's part of what is to be taken off every channel of the
// first: ternary digits stand for themselves less one.
template <int kDim, int kRows>
struct ValueSums {
  float rotated[kDim / 16][4] = {};
  float channel[kRows][kDim / 32] = {};
  float ones[kRows] = {};
};

template <int kRows>
__device__ inline float ByColumn(const float (&x)[kRows], uint32_t column) {
  float value = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    value = column == static_cast<uint32_t>(r) ? x[r] : value;
  }
  return value;
}

template <int kDim, int kRows>
__device__ inline void Rescale(const float (&by)[kRows], uint32_t lane,
                               ValueSums<kDim, kRows>* sums) {
  const float by0 = ByColumn(by, lane % 4 * 2);
  const float by1 = ByColumn(by, lane % 4 * 2 + 1);
#pragma unroll
  for (int j = 0; j < kDim / 16; ++j) {
    sums->rotated[j][0] *= by0;
    sums->rotated[j][1] *= by1;
    sums->rotated[j][2] *= by0;
    sums->rotated[j][3] *= by1;
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    sums->ones[r] *= by[r];
#pragma unroll
    for (int j = 0; j < kDim / 32; ++j) {
      sums->channel[r][j] *= by[r];
    }
  }
}

// Adds `factor` times (integers of the residual)^T times the weights.
template <int kDim, int kRows>
struct ValueProducts {
  const WarpShared<kDim, kRows>* shared;
  ValueSums<kDim, kRows>* sums;
  float factor;
  uint32_t lane;

  __device__ uint32_t Weights(uint32_t part, uint32_t token) const {
    const uint32_t row = lane / 4;
    return row < kRows ? *reinterpret_cast<const uint32_t*>(
                             &shared->weights[part][row][token + lane % 4 * 2])
                       : 0;
  }

  template <int kTiles, bool kFine>
  __device__ void operator()(uint32_t first, const __half* tile, const __half* fine) const {
    uint32_t high[kTiles][2];
    uint32_t low[kTiles][2];
#pragma unroll
    for (uint32_t i = 0; i < kTiles; ++i) {
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        high[i][half] = Weights(0, first + i * 16 + half * 8);
        low[i][half] = Weights(1, first + i * 16 + half * 8);
      }
    }
    const uint32_t place = (lane % 8 + lane / 16 * 8) * kTileStride<kDim> + lane / 8 % 2 * 8;
#pragma unroll
    for (int j = 0; j < kDim / 16; ++j) {
      float part[4] = {};
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        uint32_t a[4];
        LoadTilesTransposed(a, tile + i * 16 * kTileStride<kDim> + place + 16 * j);
        Mma16(part, a, high[i][0], high[i][1]);
        Mma16(part, a, low[i][0], low[i][1]);
        if constexpr (kFine) {
          LoadTilesTransposed(a, fine + place + 16 * j);
          Mma16(part, a, high[i][0], high[i][1]);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums->rotated[j][i] += factor * part[i];
      }
    }
  }
};

// weights[row of queries][coded row] = p times the row's scale over the block's largest, split in
// two halves; the largest is the result.
template <int kDim, int kRows>
__device__ inline float PutWeights(const BlockDesc& block, const float (&p)[kRows][4],
                                   WarpShared<kDim, kRows>* shared, uint32_t lane, float factor,
                                   ValueSums<kDim, kRows>* sums, bool* bad) {
  float scale[4];
  LaneScales(block, kDim, lane, scale, bad);
  const float largest = WarpMax(fmaxf(fmaxf(scale[0], scale[1]), fmaxf(scale[2], scale[3])));
  const float inverse = largest > 0 ? 1.0F / largest : 0.0F;
  const bool ternary = block.code == static_cast<uint8_t>(BlockCode::kLevels3);
  __syncwarp();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float sum = 0;
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
      const uint32_t row = lane * 4 + j;
      // Coded rows come first, then zeros in the places of the raw rows.
      const uint32_t place =
          row >= block.raw_rows ? row - block.raw_rows : kBlockTokens - block.raw_rows + row;
      const SplitHalf split = Split(p[r][j] * (scale[j] * inverse));
      shared->weights[0][r][place] = split.high;
      shared->weights[1][r][place] = split.low;
      sum += __half2float(split.high) + __half2float(split.low);
    }
    sums->ones[r] += ternary ? sum * (largest * factor * 0x1p-24F) : 0;
  }
  __syncwarp();
  return largest;
}

template <int kDim, int kRows>
__device__ inline void AddValueFactors(const BlockDesc& block, const float (&p)[kRows][4],
                                       WarpShared<kDim, kRows>* shared, uint32_t lane,
                                       ValueSums<kDim, kRows>* sums) {
  constexpr int kPerLane = kDim / 32;
  float rotated[kRows][4];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      rotated[r][j] = p[r][j];
    }
    RotateTokens(false, block.rows, rotated[r], shared->tokens, lane);
  }
  const LowPart low(block, kDim);
  const float up = PowerOfTwo(block.exponent);
  ForEachComponent(block, low, kDim, lane, [&](const ComponentPlace& place) {
    float u[kPerLane];
    ReadLevels(low, place.channel_at, place.channel_bits, lane * kPerLane, u);
    float a[4];
    ReadLevels(low, place.token_at, place.token_bits, lane * 4, a);
    float energy = 0;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      energy += u[j] * u[j];
    }
    const float factor = rsqrtf(WarpSum(energy)) * place.scale * up;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float weight = WarpSum(rotated[r][0] * a[0] + rotated[r][1] * a[1] +
                                   rotated[r][2] * a[2] + rotated[r][3] * a[3]) *
                           factor;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        sums->channel[r][j] += weight * u[j];
      }
    }
  });
}

// Values in their own basis: plain rows, and factors that aren't rotated. They join the sums in the
// basis of the channel factors.
template <int kDim, int kRows>
__device__ inline void AddPlainValues(const BlockDesc& block, const float (&p)[kRows][4],
                                      uint32_t lane, ValueSums<kDim, kRows>* sums, bool* bad) {
  constexpr int kPerLane = kDim / 32;
  const bool shrink =
      block.has_levels() && block.family() == static_cast<uint32_t>(Family::kEOptShrinkQ);
  const ShrinkRecord record{LowPart(block, kDim).record, block.rank, block.rows, kDim};
  const uint32_t plain_rows = PlainRows(block);
  const uint32_t components = shrink ? block.rank : 0;
  *bad |= components > 0 && !record.Finite();
  const float up = PowerOfTwo(block.exponent);
  for (int r = 0; r < kRows; ++r) {
    float mine[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      mine[j] = 0;
#pragma unroll
      for (int rr = 0; rr < kRows; ++rr) {
        mine[j] = rr == r ? p[rr][j] : mine[j];
      }
    }
    float plain[kPerLane] = {};
    for (uint32_t row = 0; row < plain_rows; ++row) {
      const float source = ByColumn(mine, row % 4);
      const float weight = __shfl_sync(kAllLanes, source, static_cast<int>(row / 4));
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        plain[j] +=
            weight * PlainValue(block, kDim, row, lane * kPerLane + static_cast<uint32_t>(j));
      }
    }
    for (uint32_t i = 0; i < components; ++i) {
      float weight = 0;
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        const uint32_t row = lane * 4 + j;
        weight += row >= block.raw_rows && row < block.rows ? mine[j] * record.Token(i, row) : 0;
      }
      weight = WarpSum(weight) * up;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        plain[j] += weight * record.Channel(i, lane * kPerLane + static_cast<uint32_t>(j));
      }
    }
    WarpRotate(stages::kChannelSeed, plain, lane);
#pragma unroll
    for (int rr = 0; rr < kRows; ++rr) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        sums->channel[rr][j] += rr == r ? plain[j] : 0;
      }
    }
  }
}

// Adds p times the block's values. p is 0 for tokens that aren't there.
template <int kDim, int kRows>
__device__ inline ShardField ValueBlock(const BlockDesc& block, const float (&p)[kRows][4],
                                        WarpShared<kDim, kRows>* shared, uint32_t lane,
                                        ValueSums<kDim, kRows>* sums) {
  bool bad_scale = false;
  bool bad_codes = false;
  bool bad_factor = false;
  const bool shrink = block.family() == static_cast<uint32_t>(Family::kEOptShrinkQ);
  if (block.has_levels()) {
    if (block.rank > 0 && !shrink) {
      // Raw rows have no part in the factors.
      float coded[kRows][4];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) {
          coded[r][j] = lane * 4 + j >= block.raw_rows ? p[r][j] : 0;
        }
      }
      AddValueFactors(block, coded, shared, lane, sums);
    }
    const float factor =
        kAlphabetTable.of[block.code - kFirstAlphabet].unit * PowerOfTwo(block.exponent);
    const float largest = PutWeights(block, p, shared, lane, factor, sums, &bad_scale);
    const ValueProducts<kDim, kRows> products{shared, sums, largest * factor, lane};
    bad_codes = ForEachChunk<kDim>(block, shared->tile(), lane, products);
    __syncwarp();
  }
  if (PlainRows(block) > 0 || (block.rank > 0 && shrink)) {
    AddPlainValues(block, p, lane, sums, &bad_factor);
  }
  return bad_scale    ? ShardField::kScale
         : bad_factor ? ShardField::kFactor
         : bad_codes  ? ShardField::kCodes
                      : ShardField::kNone;
}

}  // namespace kvshrink::cuda

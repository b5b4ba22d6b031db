// Logits of one block of keys for the rows of queries of its head, by one warp.
#pragma once

#include "attend/warp_block.cuh"

namespace kvshrink::cuda {

// Products of the rotated queries with the integers of the residual, into shared->products (by row
// of the block).
template <int kDim, int kRows>
struct KeyProducts {
  const QueryTiles<kDim, kRows>& queries;
  WarpShared<kDim, kRows>* shared;
  uint32_t raw_rows, rows;
  bool ternary;
  uint32_t lane;

  // kTiles tiles of 16 rows; the fine integers are in `fine`.
  template <int kTiles, bool kFine>
  __device__ void operator()(uint32_t first, const __half* tile, const __half* fine) const {
    const uint32_t t = lane % 4;
    float sums[kTiles][4];
    const bool mine = 2 * t < kRows;
    const float minus0 = ternary && mine ? -0x1p-24F * queries.sum[2 * t] : 0;
    const float minus1 = ternary && mine ? -0x1p-24F * queries.sum[2 * t + 1] : 0;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      sums[i][0] = sums[i][2] = minus0;
      sums[i][1] = sums[i][3] = minus1;
    }
    const uint32_t place = (lane % 16) * kTileStride<kDim> + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      const uint4 b = queries.tile[k][lane];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        uint32_t a[4];
        LoadTiles(a, tile + i * 16 * kTileStride<kDim> + place + 16 * k);
        Mma16(sums[i], a, b.x, b.y);
        Mma16(sums[i], a, b.z, b.w);
        if constexpr (kFine) {
          LoadTiles(a, fine + place + 16 * k);
          Mma16(sums[i], a, b.x, b.y);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (uint32_t part = 0; part < 4; ++part) {
        const uint32_t row =
            raw_rows + first + static_cast<uint32_t>(i) * 16 + lane / 4 + part / 2 * 8;
        if (mine && row < rows) {
          shared->products[2 * t + part % 2][row] = sums[i][part];
        }
      }
    }
  }
};

// Adds the low-rank part's products to x (rotated over tokens until the last step).
template <int kDim, int kRows>
__device__ inline void AddKeyFactors(const BlockDesc& block, const QueryTiles<kDim, kRows>& queries,
                                     WarpShared<kDim, kRows>* shared, uint32_t lane,
                                     float (&x)[kRows][4]) {
  constexpr int kPerLane = kDim / 32;
  const LowPart low(block, kDim);
  ForEachComponent(block, low, kDim, lane, [&](const ComponentPlace& place) {
    float u[kPerLane];
    ReadLevels(low, place.channel_at, place.channel_bits, lane * kPerLane, u);
    float a[4];
    ReadLevels(low, place.token_at, place.token_bits, lane * 4, a);
    float energy = 0;
    float product[kRows] = {};
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      energy += u[j] * u[j];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        product[r] += u[j] * queries.channel[r][lane * kPerLane + static_cast<uint32_t>(j)];
      }
    }
    const float factor = rsqrtf(WarpSum(energy)) * place.scale;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float weight = WarpSum(product[r]) * factor;
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        x[r][j] += weight * a[j];
      }
    }
  });
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    RotateTokens(true, block.rows, x[r], shared->tokens, lane);
  }
}

template <int kDim, int kRows>
__device__ inline void AddKeyShrinkFactors(const BlockDesc& block,
                                           const QueryTiles<kDim, kRows>& queries, uint32_t lane,
                                           float (&x)[kRows][4], bool* bad) {
  const ShrinkRecord record{LowPart(block, kDim).record, block.rank, block.rows, kDim};
  *bad |= !record.Finite();
  for (uint32_t i = 0; i < block.rank; ++i) {
    for (int r = 0; r < kRows; ++r) {
      float product = 0;
      for (uint32_t c = lane; c < kDim; c += 32) {
        product += record.Channel(i, c) * queries.plain[r][c];
      }
      product = WarpSum(product);
      for (uint32_t j = 0; j < 4; ++j) {
        const uint32_t row = lane * 4 + j;
        const float weight = row < block.rows ? record.Token(i, row) * product : 0;
        // A run-time index would put x in local memory.
#pragma unroll
        for (int rr = 0; rr < kRows; ++rr) {
#pragma unroll
          for (uint32_t jj = 0; jj < 4; ++jj) {
            x[rr][jj] += rr == r && jj == j ? weight : 0;
          }
        }
      }
    }
  }
}

// Products of plain rows, in place of what x holds there.
template <int kDim, int kRows>
__device__ inline void PlainProducts(const BlockDesc& block, const QueryTiles<kDim, kRows>& queries,
                                     uint32_t lane, float (&x)[kRows][4]) {
  const uint32_t plain = PlainRows(block);
  for (uint32_t row = 0; row < plain; ++row) {
    float product[kRows] = {};
    for (uint32_t c = lane; c < kDim; c += 32) {
      const float value = PlainValue(block, kDim, row, c);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        product[r] += value * queries.plain[r][c];
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      product[r] = WarpSum(product[r]);
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        x[r][j] = row == lane * 4 + j ? product[r] : x[r][j];
      }
    }
  }
}

// q k of the lane's four tokens for every row of queries (divided by the row's scale). The result
// is the errors found.
template <int kDim, int kRows>
__device__ inline ShardField KeyBlock(const BlockDesc& block,
                                      const QueryTiles<kDim, kRows>& queries,
                                      WarpShared<kDim, kRows>* shared, uint32_t lane,
                                      float (&x)[kRows][4]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      x[r][j] = 0;
    }
  }
  ShardField error = ShardField::kNone;
  if (block.has_levels()) {
    bool bad_factor = false;
    if (block.rank > 0 && block.family() == static_cast<uint32_t>(Family::kEOptShrinkQ)) {
      AddKeyShrinkFactors(block, queries, lane, x, &bad_factor);
    } else if (block.rank > 0) {
      AddKeyFactors(block, queries, shared, lane, x);
    }
    const KeyProducts<kDim, kRows> products{queries,
                                            shared,
                                            block.raw_rows,
                                            block.rows,
                                            block.code == static_cast<uint8_t>(BlockCode::kLevels3),
                                            lane};
    const bool bad_codes = ForEachChunk<kDim>(block, shared->tile(), lane, products);
    __syncwarp();
    bool bad_scale = false;
    float scale[4];
    LaneScales(block, kDim, lane, scale, &bad_scale);
    const float unit = kAlphabetTable.of[block.code - kFirstAlphabet].unit;
    const float up = PowerOfTwo(block.exponent);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float4 product = *reinterpret_cast<const float4*>(&shared->products[r][lane * 4]);
      const float values[4] = {product.x, product.y, product.z, product.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        // What lies where there are no coded rows was never written.
        const float residual = scale[j] > 0 ? values[j] * (scale[j] * unit) : 0;
        x[r][j] = (x[r][j] + residual) * up;
      }
    }
    __syncwarp();
    error = bad_scale    ? ShardField::kScale
            : bad_factor ? ShardField::kFactor
            : bad_codes  ? ShardField::kCodes
                         : ShardField::kNone;
  }
  if (PlainRows(block) > 0) {
    PlainProducts(block, queries, lane, x);
  }
  return error;
}

}  // namespace kvshrink::cuda

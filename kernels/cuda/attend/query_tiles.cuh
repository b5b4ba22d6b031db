// The queries of one kv head, as the attend kernels read them: plain, in the bases of the row and
// of the channel-factor rotation, each divided by its row's largest rotated magnitude; and the
// first of those rotations as the right-hand tiles of matrix instructions (high and low halves).
#pragma once

#include "attend/attend_args.cuh"
#include "common/mma.cuh"
#include "common/warp.cuh"

namespace kvshrink::cuda {

template <int kDim, int kRows>
struct QueryTiles {
  float plain[kRows][kDim];
  float channel[kRows][kDim];  // rotated as channel factors are
  uint4 tile[kDim / 16][32];   // high (k below 8, from 8), low
  float scale[kRows];          // what was divided by
  float sum[kRows];            // of the rotated row, as the tiles hold it
};

template <int kDim>
__device__ inline void PutQueryTile(uint4 (*tile)[32], uint32_t row, uint32_t channel, float x) {
  const SplitHalf split = Split(x);
  const uint32_t k = channel % 16;
  const uint32_t lane = row * 4 + k % 8 / 2;
  auto* halfs = reinterpret_cast<__half*>(&tile[channel / 16][lane]);
  halfs[k / 8 * 2 + k % 2] = split.high;
  halfs[4 + k / 8 * 2 + k % 2] = split.low;
}

// One row by one warp. Rows past the last are zero.
template <int kDim, int kRows>
__device__ inline void LoadQuery(const AttendArgs& args, uint32_t sequence, uint32_t head,
                                 uint32_t first_row, uint32_t r, uint32_t lane,
                                 QueryTiles<kDim, kRows>* queries) {
  constexpr int kPerLane = kDim / 32;
  float x[kPerLane];
  const bool there = first_row + r < args.rows();
  const size_t at = there ? args.Row(sequence, head, first_row + r) * kDim : 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    x[i] = there ? QueryValue(args, at + lane * kPerLane + static_cast<uint32_t>(i)) : 0;
  }
  float rotated[kPerLane];
  float channel[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    rotated[i] = x[i];
    channel[i] = x[i];
  }
  WarpRotate(stages::kRowSeed, rotated, lane);
  WarpRotate(stages::kChannelSeed, channel, lane);
  float largest = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    largest = fmaxf(largest, fabsf(rotated[i]));
  }
  largest = WarpMax(largest);
  const float scale = largest > 0 ? largest : 1.0F;
  const float inverse = 1.0F / scale;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const uint32_t c = lane * kPerLane + static_cast<uint32_t>(i);
    queries->plain[r][c] = x[i] * inverse;
    queries->channel[r][c] = channel[i] * inverse;
    const SplitHalf split = Split(rotated[i] * inverse);
    sum += __half2float(split.high) + __half2float(split.low);
    PutQueryTile<kDim>(queries->tile, r, c, rotated[i] * inverse);
  }
  sum = WarpSum(sum);
  if (lane == 0) {
    queries->scale[r] = scale;
    queries->sum[r] = sum;
  }
}

template <int kDim, int kRows>
__device__ inline void LoadQueries(const AttendArgs& args, uint32_t sequence, uint32_t head,
                                   uint32_t first_row, QueryTiles<kDim, kRows>* queries) {
  for (uint32_t i = threadIdx.x; i < kDim / 16 * 32; i += blockDim.x) {
    queries->tile[i / 32][i % 32] = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();
  for (uint32_t r = threadIdx.x / 32; r < kRows; r += blockDim.x / 32) {
    LoadQuery(args, sequence, head, first_row, r, threadIdx.x % 32, queries);
  }
  __syncthreads();
}

}  // namespace kvshrink::cuda

// Attention on the compressed form, for one head dim (attend_64.cu and so on). A sequence's blocks
// are dealt out to warps; each warp works whole blocks, keys then values, with a running softmax of
// its own, and never leaves the rotated bases. Warps of a CTA are merged there, CTAs (splits) by a
// second kernel.
#pragma once

#include "attend/attend_launch.cuh"
#include "attend/keys.cuh"
#include "attend/values.cuh"

namespace kvshrink::cuda {

inline constexpr uint32_t kWarps = 8;

template <int kDim, int kRows>
struct alignas(16) CtaShared {
  QueryTiles<kDim, kRows> queries;
  WarpShared<kDim, kRows> warp[kWarps];
  float largest[kWarps][kRows], sum[kWarps][kRows];
};

// The running softmax of a warp.
template <int kRows>
struct Softmax {
  float largest[kRows];
  float sum[kRows];  // a lane's part

  __device__ Softmax() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      largest[r] = kMinusInfinity;
      sum[r] = 0;
    }
  }

  // Turns logits into weights relative to the new maximum; `by` is what older sums are multiplied
  // by. False when no row has a finite logit yet... then all weights are 0.
  __device__ bool Advance(float (&x)[kRows][4], float (&by)[kRows]) {
    bool changed = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float here = WarpMax(fmaxf(fmaxf(x[r][0], x[r][1]), fmaxf(x[r][2], x[r][3])));
      const float next = fmaxf(largest[r], here);
      by[r] = next == largest[r] ? 1.0F : __expf(largest[r] - next);
      changed |= by[r] != 1.0F;
      largest[r] = next;
      sum[r] *= by[r];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        x[r][j] = x[r][j] == kMinusInfinity ? 0 : __expf(x[r][j] - next);
        sum[r] += x[r][j];
      }
    }
    return changed;
  }
};

// Writes a warp's value sums to its own shared memory: [basis][row][channel].
template <int kDim, int kRows>
__device__ void PutSums(ValueSums<kDim, kRows>& sums, uint32_t lane, float* to) {
  float ones[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    ones[r] = WarpSum(sums.ones[r]);
  }
  const float ones0 = ByColumn(ones, lane % 4 * 2);
  const float ones1 = ByColumn(ones, lane % 4 * 2 + 1);
  __syncwarp();
#pragma unroll
  for (uint32_t j = 0; j < kDim / 16; ++j) {
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t row = lane % 4 * 2 + i % 2;
      if (row < kRows) {
        to[row * kDim + 16 * j + lane / 4 + i / 2 * 8] =
            sums.rotated[j][i] - (i % 2 == 0 ? ones0 : ones1);
      }
    }
  }
#pragma unroll
  for (uint32_t r = 0; r < kRows; ++r) {
#pragma unroll
    for (uint32_t j = 0; j < kDim / 32; ++j) {
      to[(kRows + r) * kDim + lane * (kDim / 32) + j] = sums.channel[r][j];
    }
  }
}

// Merges the warps of the CTA and writes the row's state: output and lse when there is one split.
template <int kDim, int kRows>
__device__ void Merge(const AttendArgs& args, uint32_t sequence, uint32_t head, uint32_t first_row,
                      CtaShared<kDim, kRows>* shared) {
  constexpr int kPerLane = kDim / 32;
  static_assert(sizeof(float) * 2 * kRows * kDim <= sizeof(WarpShared<kDim, kRows>));
  const uint32_t lane = threadIdx.x % 32;
  for (uint32_t r = threadIdx.x / 32; r < kRows && first_row + r < args.rows(); r += kWarps) {
    float largest = kMinusInfinity;
    for (uint32_t w = 0; w < kWarps; ++w) {
      largest = fmaxf(largest, shared->largest[w][r]);
    }
    float sum = 0;
    float rotated[kPerLane] = {};
    float channel[kPerLane] = {};
    for (uint32_t w = 0; w < kWarps; ++w) {
      const float by =
          shared->largest[w][r] == kMinusInfinity ? 0 : __expf(shared->largest[w][r] - largest);
      sum += by * shared->sum[w][r];
      const auto* from = reinterpret_cast<const float*>(&shared->warp[w]);
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const uint32_t c = lane * kPerLane + static_cast<uint32_t>(j);
        rotated[j] += by * from[r * kDim + c];
        channel[j] += by * from[(kRows + r) * kDim + c];
      }
    }
    // Of the first basis the transform's own scale is in the sums' unit: levels of unit variance.
    WarpRotateInverse(stages::kRowSeed, rotated, lane);
    WarpRotateInverse(stages::kChannelSeed, channel, lane);
    PutPartial<kPerLane>(args, args.Row(sequence, head, first_row + r), lane, largest, sum, rotated,
                         channel);
  }
}

template <int kDim, int kRows>
__global__ void __launch_bounds__(kWarps * 32, kDim <= 128 && kRows <= 4 ? 2 : 1)
    AttendKernel(AttendArgs args) {
  extern __shared__ uint4 memory[];
  auto* shared = reinterpret_cast<CtaShared<kDim, kRows>*>(memory);
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t sequence = blockIdx.z;
  const uint32_t head = blockIdx.y % args.view.kv_heads;
  const uint32_t first_row = blockIdx.y / args.view.kv_heads * kRows;
  LoadQueries(args, sequence, head, first_row, &shared->queries);
  Softmax<kRows> softmax;
  ValueSums<kDim, kRows> sums;
  BlockWalk walk(args, sequence, blockIdx.x * kWarps + warp, args.splits * kWarps);
  for (BlockPlace place; walk.Next(args, &place);) {
    const BlockDesc keys = args.view.blocks[args.view.Place(place.shard, 0, head, place.block)];
    const BlockDesc values = args.view.blocks[args.view.Place(place.shard, 1, head, place.block)];
    float x[kRows][4];
    const ShardField key_error = KeyBlock(keys, shared->queries, &shared->warp[warp], lane, x);
    const int64_t first =
        int64_t{args.view.shards[place.shard].first_token} + place.block * kBlockTokens + lane * 4;
#pragma unroll
    for (uint32_t r = 0; r < kRows; ++r) {
      const float scale = shared->queries.scale[r];
      const int64_t own = OwnPosition(args, sequence, first_row + r);
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        x[r][j] = lane * 4 + j < keys.rows ? ToLogit(args, x[r][j] * scale, first + j, own)
                                           : kMinusInfinity;
      }
    }
    float by[kRows];
    if (softmax.Advance(x, by)) {
      Rescale(by, lane, &sums);
    }
    const ShardField value_error = ValueBlock(values, x, &shared->warp[warp], lane, &sums);
    const ShardField error = key_error != ShardField::kNone ? key_error : value_error;
    if (error != ShardField::kNone) {
      ReportBlock(args, place.shard, error, place.block);
    }
  }
  __syncwarp();
  PutSums(sums, lane, reinterpret_cast<float*>(&shared->warp[warp]));
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float sum = WarpSum(softmax.sum[r]);
    if (lane == 0) {
      shared->largest[warp][r] = softmax.largest[r];
      shared->sum[warp][r] = sum;
    }
  }
  __syncthreads();
  Merge(args, sequence, head, first_row, shared);
}

template <int kDim, int kRows>
__global__ void __launch_bounds__(kWarps * 32, 1) ScoresKernel(AttendArgs args) {
  extern __shared__ uint4 memory[];
  auto* shared = reinterpret_cast<CtaShared<kDim, kRows>*>(memory);
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t sequence = blockIdx.z;
  const uint32_t head = blockIdx.y % args.view.kv_heads;
  const uint32_t first_row = blockIdx.y / args.view.kv_heads * kRows;
  LoadQueries(args, sequence, head, first_row, &shared->queries);
  BlockWalk walk(args, sequence, blockIdx.x * kWarps + warp, args.splits * kWarps);
  for (BlockPlace place; walk.Next(args, &place);) {
    const BlockDesc keys = args.view.blocks[args.view.Place(place.shard, 0, head, place.block)];
    float x[kRows][4];
    const ShardField error = KeyBlock(keys, shared->queries, &shared->warp[warp], lane, x);
    if (error != ShardField::kNone) {
      ReportBlock(args, place.shard, error, place.block);
    }
    const uint32_t first = place.block * kBlockTokens + lane * 4;
#pragma unroll
    for (uint32_t r = 0; r < kRows; ++r) {
      PutLogits(args, sequence, head, first_row + r, keys.rows,
                args.view.shards[place.shard].first_token, place.base, first,
                shared->queries.scale[r], x[r]);
    }
  }
  ClearTail(args, sequence, head, first_row, kRows, walk.tokens());
}

template <int kDim, int kRows>
int Launch(const AttendArgs& args, uint32_t sequences, bool scores, cudaStream_t stream) {
  const auto kernel = scores ? ScoresKernel<kDim, kRows> : AttendKernel<kDim, kRows>;
  constexpr int kBytes = sizeof(CtaShared<kDim, kRows>);
  static_assert(kBytes <= 227 * 1024);
  const cudaError_t result =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (result != cudaSuccess) {
    return result;
  }
  const uint32_t row_groups = (args.queries * args.group + kRows - 1) / kRows;
  const dim3 grid(args.splits, args.view.kv_heads * row_groups, sequences);
  kernel<<<grid, kWarps * 32, kBytes, stream>>>(args);
  return cudaGetLastError();
}

template <int kDim>
int LaunchDim(const AttendArgs& args, uint32_t sequences, bool scores, cudaStream_t stream) {
  return args.queries * args.group <= 4 ? Launch<kDim, 4>(args, sequences, scores, stream)
                                        : Launch<kDim, 8>(args, sequences, scores, stream);
}

}  // namespace kvshrink::cuda

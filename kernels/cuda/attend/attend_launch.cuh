// What the tuned and the plain attend kernels share on the way out.
#pragma once

#include <cuda_runtime.h>

#include "attend/attend_args.cuh"
#include "common/warp.cuh"

namespace kvshrink::cuda {

// Rows of queries that a CTA of the plain kernel works at most.
inline constexpr uint32_t kPlainQueryRows = 8;

int Launch64(const AttendArgs& args, uint32_t sequences, bool scores, cudaStream_t stream);
int Launch128(const AttendArgs& args, uint32_t sequences, bool scores, cudaStream_t stream);
int Launch256(const AttendArgs& args, uint32_t sequences, bool scores, cudaStream_t stream);
int LaunchPlain(const AttendArgs& args, uint32_t sequences, bool scores, cudaStream_t stream);

// A row's sums over one split, by one warp: the two parts are added.
template <int kPerLane>
__device__ inline void PutPartial(const AttendArgs& args, size_t row, uint32_t lane, float largest,
                                  float sum, const float (&a)[kPerLane],
                                  const float (&b)[kPerLane]) {
  const size_t at = row * args.splits + blockIdx.x;
  if (lane == 0) {
    args.states[at] = make_float2(largest, sum);
  }
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    args.partials[at * args.head_dim + lane * kPerLane + static_cast<uint32_t>(j)] = a[j] + b[j];
  }
}

__device__ inline float* LogitRow(const AttendArgs& args, uint32_t sequence, uint32_t head,
                                  uint32_t row) {
  return args.logits + args.Row(sequence, head, row) * args.stride;
}

// Four products of a row of queries, of the tokens first .. first + 3 of a shard.
__device__ inline void PutLogits(const AttendArgs& args, uint32_t sequence, uint32_t head,
                                 uint32_t row, uint32_t block_rows, uint32_t first_token,
                                 uint32_t base, uint32_t first, float scale, const float (&x)[4]) {
  if (row >= args.rows()) {
    return;
  }
  const int64_t own = OwnPosition(args, sequence, row);
  float* to = LogitRow(args, sequence, head, row);
#pragma unroll
  for (uint32_t j = 0; j < 4; ++j) {
    const uint32_t token = first + j;
    if (token % kBlockTokens < block_rows && base + token < args.stride) {
      to[base + token] = ToLogit(args, x[j] * scale, int64_t{first_token} + token, own);
    }
  }
}

// Past the last token there is -inf. By the CTA of the first split.
__device__ inline void ClearTail(const AttendArgs& args, uint32_t sequence, uint32_t head,
                                 uint32_t first_row, uint32_t rows, uint32_t tokens) {
  for (uint32_t r = 0; r < rows && first_row + r < args.rows() && blockIdx.x == 0; ++r) {
    float* to = LogitRow(args, sequence, head, first_row + r);
    for (uint32_t i = tokens + threadIdx.x; i < args.stride; i += blockDim.x) {
      to[i] = kMinusInfinity;
    }
  }
}

}  // namespace kvshrink::cuda

// What the decode kernels share: arguments, the target of a block, rows that are kept exactly.
#pragma once

#include "common/factors.cuh"
#include "common/store.cuh"
#include "common/view.h"

namespace kvshrink::cuda {

struct DecodeArgs {
  View view;
  const CudaTarget* targets = nullptr;
  TensorLayout layout;
  uint64_t* status = nullptr;
  uint32_t head_dim = 0;
  uint32_t head_begin = 0, heads = 0;
  uint32_t token_begin = 0, token_end = 0;
  uint32_t first_kind = 0;
  DecodeForm form = DecodeForm::kFull;
};

// The block that this CTA decodes: blockIdx is (block of the head, kind and head, shard).
struct Work {
  BlockDesc block;
  uint32_t shard, kind, head, first_token;
  uint32_t number;  // of the block in its shard
  CudaTarget target;

  // The target's row of a block's row.
  template <typename Value>
  __device__ Value* Row(const DecodeArgs& args, uint32_t row) const {
    auto* base = static_cast<Value*>(kind == 0 ? target.k : target.v);
    return base +
           PlaceOf(args.layout, target.block_table, target.first_row + first_token + row, head);
  }
  __device__ bool Wanted(const DecodeArgs& args, uint32_t row) const {
    const uint32_t token = first_token + row;
    return token >= args.token_begin && token < args.token_end;
  }
};

// False when there is nothing to do.
__device__ inline bool FindWork(const DecodeArgs& args, Work* work) {
  work->shard = blockIdx.z;
  work->kind = args.first_kind + blockIdx.y / args.heads;
  work->head = args.head_begin + blockIdx.y % args.heads;
  const uint32_t b = args.token_begin / kBlockTokens + blockIdx.x;
  const ShardInfo info = args.view.shards[work->shard];
  if (info.tokens == 0) {
    return false;
  }
  if (info.preview != 0 && args.form == DecodeForm::kFull) {
    if (threadIdx.x == 0) {
      Report(args.status, work->shard, ShardField::kSize, 0);
    }
    return false;
  }
  work->block = args.view.blocks[args.view.Place(work->shard, work->kind, work->head, b)];
  work->first_token = b * kBlockTokens;
  work->number = (work->kind * args.view.kv_heads + work->head) *
                     ((info.tokens + kBlockTokens - 1) / kBlockTokens) +
                 b;
  work->target = args.targets[work->shard];
  return work->block.code != kNoBlock;
}

// `count` rows of exact values, from block row `first` on.
template <typename Out>
__device__ inline void CopyRows(const DecodeArgs& args, const Work& work, const uint8_t* bytes,
                                uint32_t first, uint32_t count) {
  const uint32_t d = args.head_dim;
  const uint32_t dtype = work.block.dtype();
  for (uint32_t i = threadIdx.x; i < count * d; i += blockDim.x) {
    const uint32_t row = first + i / d;
    if (work.Wanted(args, row)) {
      auto* to = work.Row<typename Out::Value>(args, row) + i % d;
      if (dtype == Out::kDType) {
        *to = reinterpret_cast<const typename Out::Value*>(bytes)[i];
      } else {
        *to = Out::Round(RawValue(bytes, dtype, i));
      }
    }
  }
}

template <typename Out>
__device__ inline void ZeroRows(const DecodeArgs& args, const Work& work, uint32_t first,
                                uint32_t count) {
  const uint32_t d = args.head_dim;
  for (uint32_t i = threadIdx.x; i < count * d; i += blockDim.x) {
    if (work.Wanted(args, first + i / d)) {
      work.Row<typename Out::Value>(args, first + i / d)[i % d] = typename Out::Value{0};
    }
  }
}

__device__ inline void ReportErrors(const DecodeArgs& args, const Work& work, uint32_t errors) {
  if (errors != 0) {
    const ShardField field = (errors & 1U) != 0   ? ShardField::kScale
                             : (errors & 2U) != 0 ? ShardField::kFactor
                                                  : ShardField::kCodes;
    Report(args.status, work.shard, field, work.number);
  }
}

}  // namespace kvshrink::cuda

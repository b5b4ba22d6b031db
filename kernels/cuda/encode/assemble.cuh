// Slots to shards.
#pragma once

#include <cuda_runtime.h>

#include "cuda/encode/encode_types.cuh"

namespace kvshrink::cuda {

// Of a block's parts in their sections.
struct BlockOffsets {
  uint32_t low, scales, codes;
};

// Sections of a shard: index, LOW, SCALES, CODES.
struct ShardPlan {
  uint32_t begin[4];
  uint32_t bytes[4];
  uint32_t written;
};

struct AssembleArguments {
  const EncodeJob* jobs;
  EncodeReport* reports;
  const BlockRecord* records;
  const uint8_t* slots;
  SlotLayout slot;
  BlockOffsets* offsets;  // of job j from j * blocks_per_job
  ShardPlan* plans;
  uint64_t* pieces;  // of job j from j * pieces_per_job
  uint64_t pieces_per_job;
  uint32_t blocks_per_job;
  uint32_t kv_heads, head_dim, value_bytes;
  uint8_t profile, dtype;
  bool kvs_scales;
};

// Of a shard of at most so many bytes.
uint64_t MaxPieces(uint64_t shard_bytes);

cudaError_t LaunchAssemble(const AssembleArguments& args, uint32_t jobs, cudaStream_t stream);

}  // namespace kvshrink::cuda

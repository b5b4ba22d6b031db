// What the attend kernels share: arguments, and a sequence's tokens as a list of blocks.
#pragma once

#include "common/factors.cuh"
#include "common/store.cuh"
#include "common/view.h"

namespace kvshrink::cuda {

inline constexpr float kMinusInfinity = -__builtin_huge_valf();

struct AttendArgs {
  View view;
  const uint32_t* chunks = nullptr;
  const uint32_t* chunk_counts = nullptr;
  const void* q = nullptr;
  const int32_t* first_query = nullptr;
  uint64_t* status = nullptr;
  uint32_t shards = 0;
  uint32_t max_chunks = 0;
  uint32_t head_dim = 0;
  uint32_t queries = 0, q_heads = 0, group = 0;  // group: query heads of a kv head
  uint32_t splits = 0;
  uint32_t window = 0;
  float scale = 0, softcap = 0;
  DType q_dtype = DType::kFp32;
  // Partial results, [sequence][row of queries and heads][split]: maximum, sum; and [..][head_dim].
  float2* states = nullptr;
  float* partials = nullptr;
  // Scores only.
  float* logits = nullptr;
  uint32_t stride = 0;

  // Rows that read one kv head: query i, head g of its group.
  __device__ uint32_t rows() const { return queries * group; }
  __device__ size_t Row(uint32_t sequence, uint32_t kv_head, uint32_t row) const {
    return (size_t{sequence} * queries + row / group) * q_heads + kv_head * group + row % group;
  }
};

__device__ inline float QueryValue(const AttendArgs& args, size_t i) {
  switch (args.q_dtype) {
    case DType::kFp32:
      return static_cast<const float*>(args.q)[i];
    case DType::kFp16:
      return stages::Fp16ToFloat(static_cast<const uint16_t*>(args.q)[i]);
    default:
      return stages::Bf16ToFloat(static_cast<const uint16_t*>(args.q)[i]);
  }
}

// A walk over the blocks of a sequence, in the order of its chunks.
class BlockWalk {
 public:
  __device__ BlockWalk(const AttendArgs& args, uint32_t sequence)
      : chunks_(args.chunks + size_t{sequence} * args.max_chunks),
        count_(min(args.chunk_counts[sequence], args.max_chunks)) {}

  // Chunks that name no shard, or one that failed its parse, count as empty.
  __device__ uint32_t BlocksOf(const AttendArgs& args, uint32_t chunk) const {
    const uint32_t shard = chunks_[chunk];
    return shard < args.shards && args.view.shards[shard].preview == 0
               ? (args.view.shards[shard].tokens + kBlockTokens - 1) / kBlockTokens
               : 0;
  }
  __device__ uint32_t chunks() const { return count_; }
  __device__ uint32_t Shard(uint32_t chunk) const { return chunks_[chunk]; }

 private:
  const uint32_t* chunks_;
  uint32_t count_;
};

// What a query's logit of a key at `position` becomes.
__device__ inline float ToLogit(const AttendArgs& args, float product, int64_t position,
                                int64_t own) {
  float logit = product * args.scale;
  if (args.softcap > 0) {
    logit = args.softcap * tanhf(logit / args.softcap);
  }
  const bool sees = own < 0 || (position <= own &&
                                (args.window == 0 || position > own - int64_t{args.window}));
  return sees ? logit : kMinusInfinity;
}

// The position of a row's query; negative: it sees all.
__device__ inline int64_t OwnPosition(const AttendArgs& args, uint32_t sequence, uint32_t row) {
  if (args.first_query == nullptr || args.first_query[sequence] < 0) {
    return -1;
  }
  return int64_t{args.first_query[sequence]} + row / args.group;
}

__device__ inline void ReportBlock(const AttendArgs& args, uint32_t shard, ShardField field,
                                   uint32_t number) {
  Report(args.status, shard, field, number);
}

}  // namespace kvshrink::cuda

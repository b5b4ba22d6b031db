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

// A block of a sequence: its shard, its number in the shard's head, and how many tokens are before
// the shard.
struct BlockPlace {
  uint32_t shard = 0, block = 0, base = 0;
};

// A walk by one warp over the blocks of a sequence, from `first` on every `step`-th, counted over
// its chunks. Chunks that name no shard, one that failed its parse, or a preview, count as empty.
class BlockWalk {
 public:
  __device__ BlockWalk(const AttendArgs& args, uint32_t sequence, uint32_t first, uint32_t step)
      : chunks_(args.chunks + size_t{sequence} * args.max_chunks),
        count_(min(args.chunk_counts[sequence], args.max_chunks)),
        next_(first),
        step_(step) {
    Load(args);
  }

  // False when there are no more. Each lane gets the same.
  __device__ bool Next(const AttendArgs& args, BlockPlace* place) {
    while (next_ - before_ >= total_) {
      if (window_ + 32 >= count_) {
        return false;
      }
      before_ += total_;
      tokens_before_ += window_tokens_;
      window_ += 32;
      Load(args);
    }
    const uint32_t own = next_ - before_;
    const int lane = __ffs(static_cast<int>(__ballot_sync(0xFFFFFFFFU, end_ > own))) - 1;
    place->shard = __shfl_sync(0xFFFFFFFFU, shard_, lane);
    place->block = own - __shfl_sync(0xFFFFFFFFU, end_ - blocks_, lane);
    place->base = tokens_before_ + __shfl_sync(0xFFFFFFFFU, base_, lane);
    next_ += step_;
    return true;
  }
  // Tokens of the whole sequence; after Next has given false.
  __device__ uint32_t tokens() const { return tokens_before_ + window_tokens_; }

 private:
  // 32 chunks, one a lane.
  __device__ void Load(const AttendArgs& args) {
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t chunk = window_ + lane;
    uint32_t tokens = 0;
    shard_ = chunk < count_ ? chunks_[chunk] : 0xFFFFFFFFU;
    if (shard_ < args.shards && args.view.shards[shard_].preview == 0) {
      tokens = args.view.shards[shard_].tokens;
    }
    blocks_ = (tokens + kBlockTokens - 1) / kBlockTokens;
    end_ = blocks_;
    uint32_t token_end = tokens;
#pragma unroll
    for (uint32_t step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(0xFFFFFFFFU, end_, step);
      const uint32_t other_tokens = __shfl_up_sync(0xFFFFFFFFU, token_end, step);
      end_ += lane >= step ? other : 0;
      token_end += lane >= step ? other_tokens : 0;
    }
    base_ = token_end - tokens;
    total_ = __shfl_sync(0xFFFFFFFFU, end_, 31);
    window_tokens_ = __shfl_sync(0xFFFFFFFFU, token_end, 31);
  }

  const uint32_t* chunks_;
  uint32_t count_;
  uint32_t next_, step_;
  uint32_t window_ = 0;                                   // first chunk of the 32 at hand
  uint32_t before_ = 0, tokens_before_ = 0;               // of the chunks before them
  uint32_t total_ = 0, window_tokens_ = 0;                // of them
  uint32_t shard_ = 0, blocks_ = 0, end_ = 0, base_ = 0;  // of the lane's
};

// What a query's logit of a key at `position` becomes.
__device__ inline float ToLogit(const AttendArgs& args, float product, int64_t position,
                                int64_t own) {
  float logit = product * args.scale;
  if (args.softcap > 0) {
    logit = args.softcap * tanhf(logit / args.softcap);
  }
  const bool sees =
      own < 0 || (position <= own && (args.window == 0 || position > own - int64_t{args.window}));
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

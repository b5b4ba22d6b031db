// The device form of a batch of shards: what a parse writes into the view and kernels read.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvshrink/cuda_api.h"
#include "stages/portable.h"

namespace kvshrink::cuda {

// One shard. 16 bytes.
struct ShardInfo {
  uint32_t tokens = 0;  // 0: the shard failed a check, and none of its blocks is there
  uint32_t first_token = 0;
  uint32_t raw_rows = 0;
  uint8_t dtype = 0;
  uint8_t family = 0;
  uint8_t preview = 0;
  uint8_t reserved = 0;
};

inline constexpr uint8_t kNoBlock = 255;  // `code` of a place that holds no block

// One block: where its parts lie, each at a multiple of 4 bytes, and the fields of its index entry.
// 32 bytes.
struct alignas(16) BlockDesc {
  const uint8_t* low = nullptr;  // raw rows, then the factor record
  const uint8_t* scales = nullptr;
  const uint8_t* codes = nullptr;
  int8_t exponent = 0;
  uint8_t code = kNoBlock;
  uint8_t rank = 0;
  uint8_t rows = 0;      // n
  uint8_t raw_rows = 0;  // n - m
  uint8_t kind = 0;      // family in the low half, dtype in the high half
  uint16_t factor_bytes = 0;

  KVS_FN uint32_t coded_rows() const { return uint32_t{rows} - raw_rows; }
  KVS_FN uint32_t family() const { return kind & 15U; }
  KVS_FN uint32_t dtype() const { return kind >> 4U; }
  KVS_FN bool has_levels() const { return code >= 16 && code != kNoBlock; }
};
static_assert(sizeof(ShardInfo) == 16 && sizeof(BlockDesc) == 32);

KVS_FN uint32_t BytesOfDType(uint32_t dtype) { return dtype == 0 ? 4 : dtype == 3 ? 1 : 2; }

// The view: infos, then the blocks of all shards, [shard][kind][head][block of the head].
struct View {
  ShardInfo* shards = nullptr;
  BlockDesc* blocks = nullptr;
  uint32_t kv_heads = 0;
  uint32_t max_blocks = 0;  // per head

  KVS_FN size_t Place(uint32_t shard, uint32_t kind, uint32_t head, uint32_t block) const {
    return ((size_t{shard} * 2 + kind) * kv_heads + head) * max_blocks + block;
  }
};

inline uint32_t MaxBlocks(const ShardBatch& batch) {
  return (batch.max_tokens + kBlockTokens - 1) / kBlockTokens;
}

inline size_t ViewBytes(const ShardBatch& batch) {
  return size_t{batch.shards} *
         (sizeof(ShardInfo) + size_t{2} * batch.kv_heads * MaxBlocks(batch) * sizeof(BlockDesc));
}

inline View ViewOf(const ShardBatch& batch, void* view) {
  View result;
  result.shards = static_cast<ShardInfo*>(view);
  result.blocks = reinterpret_cast<BlockDesc*>(result.shards + batch.shards);
  result.kv_heads = batch.kv_heads;
  result.max_blocks = MaxBlocks(batch);
  return result;
}

inline bool ValidBatch(const ShardBatch& batch) {
  return batch.shards >= 1 && batch.shards <= kMaxBatchShards && batch.kv_heads >= 1 &&
         batch.kv_heads <= kMaxKvHeads && batch.head_dim >= 1 && batch.head_dim <= kMaxHeadDim &&
         batch.max_tokens >= 1 && batch.max_tokens <= kMaxTokens;
}

}  // namespace kvshrink::cuda

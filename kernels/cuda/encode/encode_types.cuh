// What the encoder's kernels share: jobs, a block's record, the shape of its scratch.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kvshrink/block.h"
#include "kvshrink/cuda_encode.h"
#include "kvshrink/shard.h"

namespace kvshrink::cuda {

// Outcome of one block; its bytes are in its slot. 24 bytes.
struct BlockRecord {
  int16_t exponent;
  uint8_t code;
  uint8_t rank;
  uint16_t factor_bytes;
  float error;    // sum of squared error, in units of 4^exponent
  double energy;  // of all rows; not finite where a row isn't
};

// Bytes of a block's slot, its three parts one behind the other, each a multiple of 16.
struct SlotLayout {
  uint32_t scales;  // offset of the scales; factors are at 0
  uint32_t codes;   // offset of the codes
  uint32_t bytes;
};

constexpr uint32_t RoundUp(uint32_t value, uint32_t unit) {
  return (value + unit - 1) / unit * unit;
}

inline constexpr uint32_t kFactorCap = 12;

constexpr SlotLayout SlotLayoutOf(uint32_t head_dim) {
  const uint32_t factors = RoundUp(2 * kFactorCap + kFactorCap * (kBlockTokens + head_dim), 16);
  const uint32_t scales = RoundUp(2 * kBlockTokens, 16);
  const uint32_t codes = RoundUp(kBlockTokens * head_dim / 2 + 16, 16);
  return {factors, factors + scales, factors + scales + codes};
}

// Everything the block kernel is told.
struct BlockKernelArguments {
  const EncodeJob* jobs;
  BlockRecord* records;  // of job j from j * blocks_per_job
  uint8_t* slots;        // likewise, slot.bytes each
  SlotLayout slot;
  uint32_t blocks_per_job;  // of the largest job
  uint32_t kv_heads;
  uint32_t head_dim;
  uint32_t value_bytes;
  DType dtype;
  int levels;
  float price[2];  // rank rule of K and V
  int cap[2];
};

// First byte of a token's row.
__device__ __forceinline__ const uint8_t* TokenAddress(const EncodeTensor& tensor, uint32_t token,
                                                       uint32_t head, uint32_t value_bytes) {
  uint64_t offset = uint64_t{head} * tensor.head_stride;
  if (tensor.page_tokens == 0) {
    offset += token * tensor.token_stride;
  } else {
    uint32_t page = token / tensor.page_tokens;
    const uint32_t within = token % tensor.page_tokens;
    page = tensor.block_table != nullptr ? __ldg(tensor.block_table + page) : page;
    offset += page * tensor.page_stride + within * tensor.token_stride;
  }
  return static_cast<const uint8_t*>(tensor.data) + offset * value_bytes;
}

}  // namespace kvshrink::cuda

// Encoding on the device: strided tensors in device memory to complete shards in device memory.
// Part of cuda_api.h's contract: caller's stream and workspace, no allocation, no synchronisation,
// fit for graph capture.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvshrink/block.h"
#include "kvshrink/profile.h"

namespace kvshrink::cuda {

// K or V of one layer of one chunk in device memory. Strides and page_stride are in elements; a
// token's row of head_dim elements is contiguous and begins at a multiple of 16 bytes.
struct EncodeTensor {
  const void* data = nullptr;
  // Of each page its number, for page_tokens > 0; null: pages lie one behind the other.
  const uint32_t* block_table = nullptr;
  uint32_t page_tokens = 0;
  uint64_t page_stride = 0;
  uint64_t token_stride = 0;
  uint64_t head_stride = 0;
};

// One shard. The array of jobs lies in device memory.
struct EncodeJob {
  EncodeTensor k, v;
  uint32_t tokens = 0;
  uint32_t raw_rows = 0;  // of the chunk, kept exactly
  uint32_t first_token = 0;
  uint32_t layer = 0;
  uint8_t* out = nullptr;  // at a multiple of 16 bytes
  uint64_t capacity = 0;
};

// Written to device memory for each job.
struct EncodeKindReport {
  uint64_t bytes = 0;  // of its sections, and half of what both kinds share
  double error_energy = 0;
  double energy = 0;
  double max_block_relative_error = 0;
  uint32_t blocks = 0;
  uint32_t raw_blocks = 0;
  uint32_t escalated_blocks = 0;
  uint32_t rank_histogram[16] = {};
};
struct EncodeReport {
  uint64_t bytes = 0;    // of the shard
  uint32_t written = 0;  // 0: it didn't fit `capacity`; nothing was written
  uint32_t reserved = 0;
  EncodeKindReport kind[2];
};

// What the jobs of a batch share.
struct EncodeBatch {
  Profile profile = kDefaultProfile;
  DType dtype = DType::kBf16;
  uint32_t kv_heads = 0;
  uint32_t head_dim = 0;
  uint32_t jobs = 0;
  uint32_t max_tokens = 0;              // of a job
  double max_relative_error = 0;        // must be 0
  const EncodeJob* job_list = nullptr;  // device memory, `jobs` of them
  EncodeReport* report_list = nullptr;  // device memory, `jobs` of them
};

struct CudaEncodeApi {
  // Whether batches of this profile, dtype and head_dim can be encoded on the device (kvs2..4 and
  // tq2..4 of bf16, fp16 and fp32, head_dim 64, 128 and 256, no bound on the error). The lists may
  // be null.
  bool (*supported)(const EncodeBatch& batch) = nullptr;
  // Upper bound of a shard's bytes, whatever its contents.
  uint64_t (*max_shard_bytes)(const EncodeBatch& batch, uint32_t tokens) = nullptr;
  // Bytes of workspace for a batch; the lists may still be null.
  size_t (*workspace_bytes)(const EncodeBatch& batch) = nullptr;
  // `workspace` lies at a multiple of 256 bytes.
  int (*encode)(const EncodeBatch& batch, void* workspace, size_t workspace_bytes,
                void* stream) = nullptr;
};

}  // namespace kvshrink::cuda

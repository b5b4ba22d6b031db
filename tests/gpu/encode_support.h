// Host tensors through the encoder of the CUDA module, for its tests.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "device.h"
#include "kvshrink/block.h"
#include "kvshrink/codec.h"

namespace kvshrink::testing {

using Bytes = Buffer<uint8_t>;

inline void PutBytes(const Bytes& buffer, const void* from, size_t bytes) {
  Check(cudaMemcpy(buffer.get(), from, bytes, cudaMemcpyHostToDevice));
}

struct GpuShard {
  std::string bytes;
  cuda::EncodeReport report;
};

// The layout's strides go to the device as they are; `table` may give the order of the pages, and
// then `extent` bytes hold them all.
inline GpuShard EncodeOnGpu(const cuda::CudaEncodeApi& api, const ConstTensor& k,
                            const ConstTensor& v, const EncodeOptions& options,
                            const std::vector<uint32_t>* table = nullptr, size_t extent = 0) {
  cuda::EncodeBatch batch;
  batch.profile = options.profile;
  batch.dtype = k.dtype;
  batch.kv_heads = k.shape.kv_heads;
  batch.head_dim = k.shape.head_dim;
  batch.jobs = 1;
  batch.max_tokens = k.shape.tokens;
  if (extent == 0) {
    extent = *LayoutExtent(k.shape, k.layout) * DTypeBytes(k.dtype);
  }
  const Bytes device_k(extent);
  const Bytes device_v(extent);
  PutBytes(device_k, k.data, extent);
  PutBytes(device_v, v.data, extent);
  Buffer<uint32_t> device_table(table == nullptr ? std::vector<uint32_t>(1) : *table);
  const uint64_t capacity = api.max_shard_bytes(batch, k.shape.tokens);
  const Bytes out(capacity);
  cuda::EncodeJob job;
  job.k.data = device_k.get();
  job.k.block_table = table == nullptr ? nullptr : device_table.get();
  job.k.page_tokens = k.layout.page_tokens;
  job.k.page_stride = k.layout.page_stride;
  job.k.token_stride = k.layout.token_stride;
  job.k.head_stride = k.layout.head_stride;
  job.v = job.k;
  job.v.data = device_v.get();
  job.tokens = k.shape.tokens;
  job.first_token = options.first_token;
  job.layer = options.layer;
  job.raw_rows = std::min(k.shape.tokens,
                          options.raw_tokens - std::min(options.raw_tokens, options.first_token));
  job.out = out.get();
  job.capacity = capacity;
  const Buffer<cuda::EncodeJob> jobs(std::vector<cuda::EncodeJob>{job});
  Buffer<cuda::EncodeReport> reports(1);
  batch.job_list = jobs.get();
  batch.report_list = reports.get();
  const size_t workspace_bytes = api.workspace_bytes(batch);
  const Bytes workspace(workspace_bytes);
  EXPECT_TRUE(api.supported(batch));
  EXPECT_EQ(api.encode(batch, workspace.get(), workspace_bytes, nullptr), 0);
  GpuShard shard;
  shard.report = reports.Get()[0];
  EXPECT_EQ(shard.report.written, 1U);
  if (shard.report.bytes <= capacity) {
    const std::vector<uint8_t> bytes = out.Get();
    shard.bytes.assign(bytes.begin(),
                       bytes.begin() + static_cast<std::ptrdiff_t>(shard.report.bytes));
  }
  return shard;
}

}  // namespace kvshrink::testing

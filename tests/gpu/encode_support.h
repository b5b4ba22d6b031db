// Host tensors through the encoder of the CUDA module, for its tests.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/encode/encode_api.h"
#include "kvshrink/block.h"
#include "kvshrink/codec.h"

namespace kvshrink::cuda {

inline void CudaOk(cudaError_t error) { ASSERT_EQ(error, cudaSuccess) << cudaGetErrorString(error); }

// Device memory that starts as 0xA5 bytes.
class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t bytes) : bytes_(bytes) {
    CudaOk(cudaMalloc(&data_, bytes == 0 ? 1 : bytes));
    CudaOk(cudaMemset(data_, 0xA5, bytes));
  }
  ~DeviceBuffer() { cudaFree(data_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  void Put(const void* from, size_t bytes) const {
    CudaOk(cudaMemcpy(data_, from, bytes, cudaMemcpyHostToDevice));
  }
  void Get(void* to, size_t bytes) const {
    CudaOk(cudaMemcpy(to, data_, bytes, cudaMemcpyDeviceToHost));
  }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

struct GpuShard {
  std::string bytes;
  EncodeReport report;
};

// The layout's strides go to the device as they are; `table` may give the order of the pages, and
// then `extent` bytes hold them all.
inline GpuShard EncodeOnGpu(const ConstTensor& k, const ConstTensor& v, const EncodeOptions& options,
                            const std::vector<uint32_t>* table = nullptr, size_t extent = 0) {
  const CudaEncodeApi& api = *EncodeApi();
  EncodeBatch batch;
  batch.profile = options.profile;
  batch.dtype = k.dtype;
  batch.kv_heads = k.shape.kv_heads;
  batch.head_dim = k.shape.head_dim;
  batch.jobs = 1;
  batch.max_tokens = k.shape.tokens;
  batch.max_relative_error = options.max_relative_error;
  if (extent == 0) {
    extent = *LayoutExtent(k.shape, k.layout) * DTypeBytes(k.dtype);
  }
  const DeviceBuffer device_k(extent), device_v(extent);
  device_k.Put(k.data, extent);
  device_v.Put(v.data, extent);
  const DeviceBuffer device_table(4 * (table == nullptr ? 0 : table->size()));
  if (table != nullptr) {
    device_table.Put(table->data(), 4 * table->size());
  }
  const DeviceBuffer out(api.max_shard_bytes(batch, k.shape.tokens));
  EncodeJob job;
  job.k = {device_k.data(),        table == nullptr ? nullptr : device_table.as<uint32_t>(),
           k.layout.page_tokens,   k.layout.page_stride,
           k.layout.token_stride,  k.layout.head_stride};
  job.v = job.k;
  job.v.data = device_v.data();
  job.tokens = k.shape.tokens;
  job.first_token = options.first_token;
  job.layer = options.layer;
  job.raw_rows = std::min(k.shape.tokens,
                          options.raw_tokens - std::min(options.raw_tokens, options.first_token));
  job.out = out.as<uint8_t>();
  job.capacity = out.bytes();
  const DeviceBuffer jobs(sizeof(EncodeJob)), reports(sizeof(EncodeReport));
  jobs.Put(&job, sizeof(job));
  batch.job_list = jobs.as<EncodeJob>();
  batch.report_list = reports.as<EncodeReport>();
  const DeviceBuffer workspace(api.workspace_bytes(batch));
  EXPECT_EQ(api.encode(batch, workspace.data(), workspace.bytes(), nullptr), 0);
  CudaOk(cudaDeviceSynchronize());
  GpuShard shard;
  reports.Get(&shard.report, sizeof(EncodeReport));
  EXPECT_EQ(shard.report.written, 1U);
  if (shard.report.bytes <= out.bytes()) {
    shard.bytes.resize(shard.report.bytes);
    out.Get(shard.bytes.data(), shard.bytes.size());
  }
  return shard;
}

}  // namespace kvshrink::cuda

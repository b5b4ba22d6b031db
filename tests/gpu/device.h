// Device memory and the module, for the tests of the GPU backend.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "blocks.h"
#include "kvshrink/cuda.h"

namespace kvshrink::testing {

inline void Check(cudaError_t result) {
  if (result != cudaSuccess) {
    throw std::runtime_error(cudaGetErrorString(result));
  }
}

// Device memory of `count` values, filled with bytes 0xA5 until something is written: a wrong read
// must not find zeros.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t count) : count_(count) {
    Check(cudaMalloc(&data_, bytes()));
    Check(cudaMemset(data_, 0xA5, bytes()));
  }
  explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) { Set(values); }
  ~Buffer() { cudaFree(data_); }
  Buffer(Buffer&& other) noexcept : data_(other.data_), count_(other.count_) {
    other.data_ = nullptr;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer& operator=(Buffer&&) = delete;

  T* get() const { return static_cast<T*>(data_); }
  size_t bytes() const { return (count_ + 1) * sizeof(T); }
  void Set(const std::vector<T>& values) {
    Check(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  std::vector<T> Get() const {
    Check(cudaDeviceSynchronize());
    std::vector<T> values(count_);
    Check(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  void* data_ = nullptr;
  size_t count_ = 0;
};

// The module; null where there is none, or no GPU: `skip_reason` says why.
inline const cuda::CudaApi* Api(std::string* skip_reason) {
  const auto api = cuda::LoadModule();
  if (!api.ok()) {
    *skip_reason = std::string(api.status().message());
    return nullptr;
  }
  return *api;
}

class GpuTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string reason;
    api_ = Api(&reason);
    if (api_ == nullptr) {
      GTEST_SKIP() << reason;
    }
  }
  void ExpectOk(int result) const { EXPECT_EQ(result, 0) << api_->result_text(result); }

  const cuda::CudaApi* api_ = nullptr;
};

// Shards in device memory, with their view.
class DeviceBatch {
 public:
  DeviceBatch(const cuda::CudaApi& api, const std::vector<std::string>& shards, TensorShape shape)
      : api_(api), pointers_(shards.size()), sizes_(shards.size()), status_(shards.size()) {
    std::vector<const void*> pointers;
    std::vector<uint64_t> sizes;
    for (const std::string& shard : shards) {
      bytes_.emplace_back(std::vector<uint8_t>(shard.begin(), shard.end()));
      pointers.push_back(bytes_.back().get());
      sizes.push_back(shard.size());
    }
    pointers_.Set(pointers);
    sizes_.Set(sizes);
    batch_ = {pointers_.get(), sizes_.get(),   static_cast<uint32_t>(shards.size()),
              shape.kv_heads,  shape.head_dim, shape.tokens};
    view_ = std::make_unique<Buffer<uint8_t>>(api.view_bytes(batch_));
  }

  int Parse() {
    return api_.parse({batch_, view_->get(), api_.view_bytes(batch_), status_.get()}, nullptr);
  }
  const cuda::ShardBatch& batch() const { return batch_; }
  const void* view() const { return view_->get(); }
  uint64_t* status() const { return status_.get(); }
  std::vector<uint64_t> Status() const { return status_.Get(); }

 private:
  const cuda::CudaApi& api_;
  std::vector<Buffer<uint8_t>> bytes_;
  Buffer<const void*> pointers_;
  Buffer<uint64_t> sizes_;
  Buffer<uint64_t> status_;
  std::unique_ptr<Buffer<uint8_t>> view_;
  cuda::ShardBatch batch_;
};

// Parameters that decode everything of a batch.
inline cuda::DecodeParams DecodeAllParams(const DeviceBatch& batch, DType dtype,
                                          TensorLayout layout, const cuda::CudaTarget* targets,
                                          DecodeForm form = DecodeForm::kFull) {
  cuda::DecodeParams params;
  params.batch = batch.batch();
  params.view = batch.view();
  params.form = form;
  params.dtype = dtype;
  params.layout = layout;
  params.targets = targets;
  params.head_end = params.batch.kv_heads;
  params.token_end = params.batch.max_tokens;
  params.status = batch.status();
  return params;
}

}  // namespace kvshrink::testing

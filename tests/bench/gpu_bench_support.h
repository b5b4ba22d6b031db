// What kvshrink-gpu-bench measures with: device memory, a timer of graph replays, batches of
// shards.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "blocks.h"
#include "kvshrink/cuda.h"

namespace kvshrink::bench {

inline constexpr uint32_t kLayers = 32;
inline constexpr uint32_t kHeads = 8;
inline constexpr uint32_t kDim = 128;
inline constexpr uint32_t kChunkTokens = 1024;
inline constexpr uint32_t kQHeads = 32;

inline void Check(cudaError_t result) {
  if (result != cudaSuccess) {
    throw std::runtime_error(cudaGetErrorString(result));
  }
}

class DeviceMemory {
 public:
  explicit DeviceMemory(size_t bytes) { Check(cudaMalloc(&data_, std::max<size_t>(bytes, 16))); }
  ~DeviceMemory() { cudaFree(data_); }
  DeviceMemory(DeviceMemory&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  DeviceMemory& operator=(DeviceMemory&&) = delete;

  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

template <typename T>
DeviceMemory ToDevice(const std::vector<T>& values) {
  DeviceMemory memory(values.size() * sizeof(T));
  Check(cudaMemcpy(memory.as<void>(), values.data(), values.size() * sizeof(T),
                   cudaMemcpyHostToDevice));
  return memory;
}

// Median milliseconds of one run of what `record` puts on a stream.
class Timer {
 public:
  Timer() {
    Check(cudaStreamCreate(&stream_));
    Check(cudaEventCreate(&begin_));
    Check(cudaEventCreate(&end_));
  }
  double Median(int repeats, const std::function<int(cudaStream_t)>& record) const {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    Check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal));
    const int result = record(stream_);
    Check(cudaStreamEndCapture(stream_, &graph));
    if (result != 0) {
      throw std::runtime_error("a call gave " + std::to_string(result));
    }
    Check(cudaGraphInstantiate(&executable, graph, 0));
    std::vector<float> times;
    for (int i = 0; i < repeats + 3; ++i) {
      Check(cudaEventRecord(begin_, stream_));
      Check(cudaGraphLaunch(executable, stream_));
      Check(cudaEventRecord(end_, stream_));
      Check(cudaEventSynchronize(end_));
      float milliseconds = 0;
      Check(cudaEventElapsedTime(&milliseconds, begin_, end_));
      if (i >= 3) {
        times.push_back(milliseconds);
      }
    }
    Check(cudaGraphExecDestroy(executable));
    Check(cudaGraphDestroy(graph));
    std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
    return static_cast<double>(times[static_cast<size_t>(repeats / 2)]);
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

inline testing::Tensor ChunkKeys(uint32_t i) {
  return testing::LowRankPlusNoise({kChunkTokens, kHeads, kDim}, 6, 0.25F, 1000 + 10 * i);
}
inline testing::Tensor ChunkValues(uint32_t i) {
  return testing::LowRankPlusNoise({kChunkTokens, kHeads, kDim}, 3, 0.7F, 2000 + 10 * i);
}

// Distinct shards of a chunk each, K with a few strong components, V with weaker ones.
inline std::vector<std::string> EncodeChunks(const Backend& backend, Profile profile,
                                             uint32_t count) {
  std::vector<std::string> shards;
  for (uint32_t i = 0; i < count; ++i) {
    const testing::Tensor k = ChunkKeys(i);
    const testing::Tensor v = ChunkValues(i);
    EncodeOptions options = testing::OptionsOf(profile);
    options.first_token = i == 0 ? 0 : kChunkTokens;
    shards.push_back(*EncodeShard(backend, k.View(), v.View(), options));
  }
  return shards;
}

// `copies` shards, each in its own memory, from a few distinct ones; parsed.
class Batch {
 public:
  Batch(const cuda::CudaApi& api, const std::vector<std::string>& distinct, uint32_t copies)
      : arena_(ArenaBytes(distinct, copies)), status_(copies * sizeof(uint64_t)) {
    std::vector<const void*> pointers;
    std::vector<uint64_t> sizes;
    size_t offset = 0;
    for (uint32_t i = 0; i < copies; ++i) {
      const std::string& shard = distinct[i % distinct.size()];
      Check(cudaMemcpy(arena_.as<char>() + offset, shard.data(), shard.size(),
                       cudaMemcpyHostToDevice));
      pointers.push_back(arena_.as<char>() + offset);
      sizes.push_back(shard.size());
      bytes_ += shard.size();
      offset += (shard.size() + 255) / 256 * 256;
    }
    pointers_.push_back(ToDevice(pointers));
    sizes_.push_back(ToDevice(sizes));
    shape_ = {pointers_[0].as<const void*>(),
              sizes_[0].as<uint64_t>(),
              copies,
              kHeads,
              kDim,
              kChunkTokens};
    view_.emplace_back(api.view_bytes(shape_));
  }

  int Parse(const cuda::CudaApi& api, cudaStream_t stream) const {
    return api.parse({shape_, view_[0].as<void>(), api.view_bytes(shape_), status()}, stream);
  }
  const cuda::ShardBatch& shape() const { return shape_; }
  const void* view() const { return view_[0].as<void>(); }
  uint64_t* status() const { return status_.as<uint64_t>(); }
  uint64_t bytes() const { return bytes_; }

 private:
  static size_t ArenaBytes(const std::vector<std::string>& distinct, uint32_t copies) {
    size_t bytes = 0;
    for (uint32_t i = 0; i < copies; ++i) {
      bytes += (distinct[i % distinct.size()].size() + 255) / 256 * 256;
    }
    return bytes;
  }

  DeviceMemory arena_, status_;
  std::vector<DeviceMemory> pointers_, sizes_, view_;
  cuda::ShardBatch shape_;
  uint64_t bytes_ = 0;
};

}  // namespace kvshrink::bench

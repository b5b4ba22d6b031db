// kvshrink-gpu-bench: what the CUDA module does on the shape of a Llama-3.1-8B prefill (32 layers,
// 8 kv heads of 128, bf16), as one JSON object. Times are medians of CUDA events around replays of
// captured graphs; all buffers together are far larger than the L2.
//
//   kvshrink-gpu-bench [--tokens 8192] [--out FILE]
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "blocks.h"
#include "kvshrink/cuda.h"

namespace kvshrink {
namespace {

using nlohmann::json;

constexpr uint32_t kLayers = 32;
constexpr uint32_t kHeads = 8;
constexpr uint32_t kDim = 128;
constexpr uint32_t kChunkTokens = 1024;
constexpr uint32_t kQHeads = 32;

void Check(cudaError_t result) {
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

// Distinct shards of a chunk each, K with a few strong components, V with weaker ones.
std::vector<std::string> EncodeChunks(const Backend& backend, Profile profile, uint32_t count) {
  std::vector<std::string> shards;
  const TensorShape shape{kChunkTokens, kHeads, kDim};
  for (uint32_t i = 0; i < count; ++i) {
    const testing::Tensor k = testing::LowRankPlusNoise(shape, 6, 0.25F, 1000 + 10 * i);
    const testing::Tensor v = testing::LowRankPlusNoise(shape, 3, 0.7F, 2000 + 10 * i);
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

json CopyCeiling(const Timer& timer) {
  constexpr size_t kBytes = size_t{2} << 30;
  const DeviceMemory from(kBytes);
  const DeviceMemory to(kBytes);
  Check(cudaMemset(from.as<void>(), 1, kBytes));
  const double ms = timer.Median(20, [&](cudaStream_t stream) {
    return static_cast<int>(
        cudaMemcpyAsync(to.as<void>(), from.as<void>(), kBytes, cudaMemcpyDeviceToDevice, stream));
  });
  return {{"read_and_written_gb_per_s", 2 * static_cast<double>(kBytes) / ms * 1e-6}};
}

// Into a paged cache [pages][16][heads][dim] per layer, K and V apart.
json Decode(const cuda::CudaApi& api, const Timer& timer, const Backend& backend, Profile profile,
            uint32_t tokens) {
  const uint32_t chunks = tokens / kChunkTokens;
  const uint32_t shards = kLayers * chunks;
  const std::vector<std::string> distinct = EncodeChunks(backend, profile, 8);
  const Batch batch(api, distinct, shards);
  constexpr uint32_t kPage = 16;
  const size_t layer_bytes = size_t{tokens} * kHeads * kDim * 2;
  const DeviceMemory cache(2 * kLayers * layer_bytes);
  std::vector<int32_t> table(tokens / kPage);
  for (uint32_t i = 0; i < table.size(); ++i) {
    table[i] = static_cast<int32_t>((i * 37) % table.size());
  }
  const DeviceMemory device_table = ToDevice(table);
  std::vector<cuda::CudaTarget> targets;
  for (uint32_t i = 0; i < shards; ++i) {
    char* layer = cache.as<char>() + size_t{2} * (i / chunks) * layer_bytes;
    targets.push_back(
        {layer, layer + layer_bytes, device_table.as<int32_t>(), i % chunks * kChunkTokens, 0});
  }
  const DeviceMemory device_targets = ToDevice(targets);
  cuda::DecodeParams params;
  params.batch = batch.shape();
  params.view = batch.view();
  params.layout = LayoutBnhd({tokens, kHeads, kDim}, kPage);
  params.targets = device_targets.as<cuda::CudaTarget>();
  params.head_end = kHeads;
  params.token_end = kChunkTokens;
  params.status = batch.status();
  const double parse_ms = timer.Median(20, [&](cudaStream_t s) { return batch.Parse(api, s); });
  const double raw = 2.0 * kLayers * static_cast<double>(layer_bytes);
  json result = {{"profile", GetProfileInfo(profile).name},
                 {"bits_per_entry", static_cast<double>(batch.bytes()) * 16 / raw},
                 {"parse_ms", parse_ms}};
  for (const DecodeForm form : {DecodeForm::kFull, DecodeForm::kLowRank}) {
    params.form = form;
    const double ms = timer.Median(20, [&](cudaStream_t s) { return api.decode(params, s); });
    const std::string name = form == DecodeForm::kFull ? "decode" : "decode_low_rank";
    result[name + "_gb_per_s"] = raw / ms * 1e-6;
    result[name + "_ms"] = ms;
  }
  std::vector<uint64_t> status(shards);
  Check(cudaMemcpy(status.data(), batch.status(), shards * 8, cudaMemcpyDeviceToHost));
  if (std::any_of(status.begin(), status.end(), [](uint64_t s) { return s != 0; })) {
    throw std::runtime_error("a shard's status isn't 0");
  }
  return result;
}

// One layer's step: `sequences` of `tokens` each, their chunks dealt from one batch.
json Attend(const cuda::CudaApi& api, const Timer& timer, const Batch& batch, uint32_t sequences,
            uint32_t tokens) {
  const uint32_t chunks = tokens / kChunkTokens;
  std::vector<uint32_t> table(size_t{sequences} * chunks);
  for (uint32_t i = 0; i < table.size(); ++i) {
    table[i] = i % batch.shape().shards;
  }
  const DeviceMemory device_table = ToDevice(table);
  const DeviceMemory counts = ToDevice(std::vector<uint32_t>(sequences, chunks));
  const testing::Tensor q = testing::Gaussian({sequences, kQHeads, kDim}, 5);
  const DeviceMemory device_q = ToDevice(q.values);
  const DeviceMemory output(q.values.size() * sizeof(float));
  const DeviceMemory lse(size_t{sequences} * kQHeads * sizeof(float));
  cuda::AttendParams params;
  params.batch = batch.shape();
  params.view = batch.view();
  params.sequences = sequences;
  params.max_chunks = chunks;
  params.chunks = device_table.as<uint32_t>();
  params.chunk_counts = counts.as<uint32_t>();
  params.q_heads = kQHeads;
  params.q = device_q.as<void>();
  params.output = output.as<float>();
  params.lse = lse.as<float>();
  params.status = batch.status();
  params.workspace_bytes = api.attend_workspace_bytes(params);
  const DeviceMemory workspace(params.workspace_bytes);
  params.workspace = workspace.as<void>();
  const double ms = timer.Median(50, [&](cudaStream_t s) { return api.attend(params, s); });
  const double raw = 2.0 * sequences * tokens * kHeads * kDim * 2;
  return {
      {"sequences", sequences}, {"tokens", tokens}, {"ms", ms}, {"raw_gb_per_s", raw / ms * 1e-6}};
}

// As many chunks as the largest case reads, each in its own memory.
json AttendAll(const cuda::CudaApi& api, const Timer& timer, const Backend& backend,
               Profile profile) {
  const Batch batch(api, EncodeChunks(backend, profile, 8), 1024);
  if (batch.Parse(api, nullptr) != 0) {
    throw std::runtime_error("parse");
  }
  json result = {{"profile", GetProfileInfo(profile).name},
                 {"q_heads", kQHeads},
                 {"stored_bytes", batch.bytes()}};
  for (const auto& [sequences, tokens] :
       {std::pair{1U, 32768U}, std::pair{32U, 4096U}, std::pair{32U, 32768U}}) {
    result["cases"].push_back(Attend(api, timer, batch, sequences, tokens));
  }
  return result;
}

json Card() {
  cudaDeviceProp properties{};
  Check(cudaGetDeviceProperties(&properties, 0));
  int driver = 0;
  int runtime = 0;
  Check(cudaDriverGetVersion(&driver));
  Check(cudaRuntimeGetVersion(&runtime));
  return {{"name", properties.name},
          {"multiprocessors", properties.multiProcessorCount},
          {"l2_bytes", properties.l2CacheSize},
          {"driver_cuda", driver},
          {"runtime_cuda", runtime}};
}

int Main(int argc, char** argv) {
  uint32_t tokens = 8192;
  std::string out;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string flag = argv[i];
    if (flag == "--tokens") {
      tokens = static_cast<uint32_t>(std::atoi(argv[i + 1])) / kChunkTokens * kChunkTokens;
    } else if (flag == "--out") {
      out = argv[i + 1];
    }
  }
  const auto api = cuda::LoadModule();
  if (!api.ok()) {
    std::fprintf(stderr, "%s\n", std::string(api.status().message()).c_str());
    return 1;
  }
  const Timer timer;
  const auto backend = MakeCpuBackend();
  json report = {{"card", Card()},
                 {"shape",
                  {{"layers", kLayers},
                   {"tokens", tokens},
                   {"kv_heads", kHeads},
                   {"head_dim", kDim},
                   {"dtype", "bf16"}}}};
  report["copy"] = CopyCeiling(timer);
  for (const Profile profile :
       {Profile::kKvs2, Profile::kKvs3, Profile::kKvs4, Profile::kTq2, Profile::kTq4}) {
    report["decode"].push_back(Decode(**api, timer, *backend, profile, tokens));
  }
  for (const Profile profile : {Profile::kKvs2, Profile::kTq2, Profile::kKvs4}) {
    report["attend"].push_back(AttendAll(**api, timer, *backend, profile));
  }
  const std::string text = report.dump(1);
  std::printf("%s\n", text.c_str());
  if (!out.empty()) {
    std::ofstream(out) << text << "\n";
  }
  return 0;
}

}  // namespace
}  // namespace kvshrink

int main(int argc, char** argv) {
  try {
    return kvshrink::Main(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

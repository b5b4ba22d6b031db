// kvshrink-gpu-bench: what the CUDA module does on the shape of a Llama-3.1-8B prefill (32 layers,
// 8 kv heads of 128, bf16), as one JSON object. Times are medians of CUDA events around replays of
// captured graphs; all buffers together are far larger than the L2.
//
//   kvshrink-gpu-bench [--tokens 8192] [--out FILE]
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>

#include "gpu_bench_support.h"
#include "stages/minifloat.h"

namespace kvshrink::bench {
namespace {

using nlohmann::json;

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

// [T, H, D] bf16 of every layer, K and V, made of a few distinct chunks; a job a chunk.
json Encode(const cuda::CudaApi& api, const Timer& timer, Profile profile, uint32_t tokens) {
  constexpr uint32_t kDistinct = 8;
  constexpr size_t kChunkValues = size_t{kChunkTokens} * kHeads * kDim;
  const uint32_t jobs = kLayers * (tokens / kChunkTokens);
  const DeviceMemory raw(2 * jobs * kChunkValues * 2);
  for (uint32_t i = 0; i < 2 * kDistinct; ++i) {
    const testing::Tensor chunk = i % 2 == 0 ? ChunkKeys(i / 2) : ChunkValues(i / 2);
    std::vector<uint16_t> values;
    std::transform(chunk.values.begin(), chunk.values.end(), std::back_inserter(values),
                   stages::FloatToBf16);
    for (uint32_t to = i; to < 2 * jobs; to += 2 * kDistinct) {
      Check(cudaMemcpy(raw.as<uint16_t>() + to * kChunkValues, values.data(), kChunkValues * 2,
                       cudaMemcpyHostToDevice));
    }
  }
  cuda::EncodeBatch batch;
  batch.profile = profile;
  batch.kv_heads = kHeads;
  batch.head_dim = kDim;
  batch.jobs = jobs;
  batch.max_tokens = kChunkTokens;
  const uint64_t capacity = (api.encode->max_shard_bytes(batch, kChunkTokens) + 255) / 256 * 256;
  const DeviceMemory shards(capacity * jobs);
  std::vector<cuda::EncodeJob> list(jobs);
  for (uint32_t i = 0; i < jobs; ++i) {
    list[i].k.data = raw.as<uint16_t>() + size_t{2} * i * kChunkValues;
    list[i].v.data = raw.as<uint16_t>() + (size_t{2} * i + 1) * kChunkValues;
    list[i].k.token_stride = list[i].v.token_stride = kHeads * kDim;
    list[i].k.head_stride = list[i].v.head_stride = kDim;
    list[i].tokens = kChunkTokens;
    list[i].layer = i % kLayers;
    list[i].out = shards.as<uint8_t>() + i * capacity;
    list[i].capacity = capacity;
  }
  const DeviceMemory device_list = ToDevice(list);
  const DeviceMemory reports(jobs * sizeof(cuda::EncodeReport));
  batch.job_list = device_list.as<cuda::EncodeJob>();
  batch.report_list = reports.as<cuda::EncodeReport>();
  const size_t workspace_bytes = api.encode->workspace_bytes(batch);
  const DeviceMemory workspace(workspace_bytes);
  const double ms = timer.Median(20, [&](cudaStream_t stream) {
    return api.encode->encode(batch, workspace.as<void>(), workspace_bytes, stream);
  });
  std::vector<cuda::EncodeReport> told(jobs);
  Check(cudaMemcpy(told.data(), reports.as<void>(), jobs * sizeof(cuda::EncodeReport),
                   cudaMemcpyDeviceToHost));
  double bytes = 0;
  for (const cuda::EncodeReport& report : told) {
    if (report.written == 0) {
      throw std::runtime_error("a shard wasn't written");
    }
    bytes += static_cast<double>(report.bytes);
  }
  const double raw_bytes = 2.0 * jobs * static_cast<double>(kChunkValues) * 2;
  return {{"profile", GetProfileInfo(profile).name},
          {"bits_per_entry", bytes * 16 / raw_bytes},
          {"encode_ms", ms},
          {"encode_gb_per_s", raw_bytes / ms * 1e-6}};
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
    report["encode"].push_back(Encode(**api, timer, profile, tokens));
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
}  // namespace kvshrink::bench

int main(int argc, char** argv) {
  try {
    return kvshrink::bench::Main(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

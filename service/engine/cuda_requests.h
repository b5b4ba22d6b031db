// Between the daemon's objects and the structs of the CUDA module: what the device is asked for,
// and what its answers are worth. Nothing here calls CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "kvshrink/codec.h"
#include "kvshrink/cuda_api.h"
#include "kvshrink/cuda_encode.h"
#include "kvshrink/shard.h"
#include "service/engine/tensor_plan.h"

namespace kvshrink::service {

// Whether the device encodes such an object; else the CPU does.
bool DeviceEncodes(const cuda::CudaEncodeApi& api, const TensorPlan& plan,
                   const EncodeOptions& options);
// Whether it decodes such a shard to such tensors.
bool DeviceDecodes(const ShardHeader& header, const TensorPlan& plan,
                   std::span<const uint32_t> kv_heads);

// A batch of the one object, its lists still null.
cuda::EncodeBatch BatchOf(const TensorPlan& plan, const EncodeOptions& options);
// K or V, whose first element lies at `data` of the device.
cuda::EncodeTensor TensorAt(const std::byte* data, const TensorLayout& layout);
ShardReport DeviceReport(const TensorPlan& plan, const cuda::EncodeReport& made);
// That the device's bytes are the shard that was asked for. INTERNAL.
absl::Status CheckMade(std::string_view bytes, const TensorPlan& plan,
                       const EncodeOptions& options);

// Heads begin .. end - 1 of a shard, which become the output's from `place` on.
struct HeadRun {
  uint32_t begin = 0, end = 0, place = 0;

  bool operator==(const HeadRun&) const = default;
};
// `picked`, ascending, in as few runs as can be; empty = all heads.
std::vector<HeadRun> RunsOf(uint32_t all_heads, std::span<const uint32_t> picked);
// Where the heads of a run go: head `begin` to the output's `place`. The address may lie before the
// output; what is written lies inside.
cuda::CudaTarget TargetOf(const HeadRun& run, const TensorPlan& plan, std::byte* output);

}  // namespace kvshrink::service

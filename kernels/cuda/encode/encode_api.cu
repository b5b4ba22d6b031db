// The encoder as the module exports it.
#include <algorithm>

#include "cuda/encode/encode_api.h"

#include "cuda/encode/assemble.cuh"
#include "cuda/encode/launch.cuh"
#include "format/layout.h"
#include "stages/rank_rule.h"

namespace kvshrink::cuda {
namespace {

constexpr int kBadArgument = -1;
constexpr size_t kAlignment = 256;

// Hands out parts of the workspace; with a null base it only counts.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<uint8_t*>(base)) {}

  template <typename T>
  T* Take(uint64_t count) {
    const uint64_t begin = used_;
    used_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + begin);
  }
  uint64_t used() const { return used_; }

 private:
  uint8_t* base_;
  uint64_t used_ = 0;
};

uint32_t BlocksOf(const EncodeBatch& batch, uint32_t tokens) {
  return 2 * batch.kv_heads * ((tokens + kBlockTokens - 1) / kBlockTokens);
}

uint64_t MaxShardBytes(const EncodeBatch& batch, uint32_t tokens) {
  // A coded block is smaller than its raw bytes; each part is padded by up to 3 bytes.
  return format::kHeaderBytes + uint64_t{BlocksOf(batch, tokens)} * (format::kIndexEntryBytes + 9) +
         uint64_t{2} * tokens * batch.kv_heads * batch.head_dim * DTypeBytes(batch.dtype);
}

struct Workspace {
  BlockRecord* records;
  uint8_t* slots;
  BlockOffsets* offsets;
  ShardPlan* plans;
  uint64_t* pieces;
  uint64_t pieces_per_job;
  uint64_t bytes;
};

Workspace Carve(const EncodeBatch& batch, void* base) {
  Carver carver(base);
  Workspace space;
  const uint64_t blocks = uint64_t{BlocksOf(batch, batch.max_tokens)} * batch.jobs;
  space.records = carver.Take<BlockRecord>(blocks);
  space.offsets = carver.Take<BlockOffsets>(blocks);
  space.plans = carver.Take<ShardPlan>(batch.jobs);
  space.pieces_per_job = MaxPieces(MaxShardBytes(batch, batch.max_tokens));
  space.pieces = carver.Take<uint64_t>(space.pieces_per_job * batch.jobs);
  space.slots = carver.Take<uint8_t>(blocks * SlotLayoutOf(batch.head_dim).bytes);
  space.bytes = carver.used();
  return space;
}

size_t WorkspaceBytes(const EncodeBatch& batch) { return Carve(batch, nullptr).bytes; }

using Launcher = cudaError_t (*)(const BlockKernelArguments&, uint32_t jobs, cudaStream_t);

// Levels of the residual's alphabet (0: not a profile of the fast path).
struct FastProfile {
  bool kvs = false;
  int levels = 0;
};

constexpr FastProfile FastProfileOf(Profile profile) {
  switch (profile) {
    case Profile::kKvs2:
      return {true, 3};
    case Profile::kKvs3:
      return {true, 6};
    case Profile::kKvs4:
      return {true, 12};
    case Profile::kTq2:
      return {false, 4};
    case Profile::kTq3:
      return {false, 8};
    case Profile::kTq4:
      return {false, 16};
    default:
      return {};
  }
}

Launcher LauncherOf(bool kvs, uint32_t head_dim) {
  switch (head_dim) {
    case 64:
      return kvs ? LaunchKvs64 : LaunchTq64;
    case 128:
      return kvs ? LaunchKvs128 : LaunchTq128;
    case 256:
      return kvs ? LaunchKvs256 : LaunchTq256;
    default:
      return nullptr;
  }
}

bool Supported(const EncodeBatch& batch) {
  const FastProfile profile = FastProfileOf(batch.profile);
  return profile.levels != 0 && LauncherOf(profile.kvs, batch.head_dim) != nullptr &&
         batch.dtype != DType::kFp8E4m3 && batch.max_relative_error == 0;
}

int Encode(const EncodeBatch& batch, void* workspace, size_t workspace_bytes, void* stream) {
  const FastProfile profile = FastProfileOf(batch.profile);
  const Launcher launcher = LauncherOf(profile.kvs, batch.head_dim);
  const Workspace space = Carve(batch, workspace);
  if (!Supported(batch) || batch.jobs == 0 || batch.max_tokens == 0 || batch.kv_heads == 0 ||
      batch.jobs > 65535 || workspace == nullptr || workspace_bytes < space.bytes ||
      batch.job_list == nullptr || batch.report_list == nullptr) {
    return kBadArgument;
  }
  const uint32_t blocks = BlocksOf(batch, batch.max_tokens);
  const auto value_bytes = static_cast<uint32_t>(DTypeBytes(batch.dtype));
  const SlotLayout slot = SlotLayoutOf(batch.head_dim);
  const stages::RankPolicy policy[2] = {stages::RankPolicyOf(Kind::kKey),
                                        stages::RankPolicyOf(Kind::kValue)};
  const BlockKernelArguments blocks_args = {
      batch.job_list,
      space.records,
      space.slots,
      slot,
      blocks,
      batch.kv_heads,
      batch.head_dim,
      value_bytes,
      batch.dtype,
      profile.levels,
      {static_cast<float>(policy[0].price), static_cast<float>(policy[1].price)},
      {policy[0].cap, policy[1].cap}};
  auto* const queue = static_cast<cudaStream_t>(stream);
  const cudaError_t error = launcher(blocks_args, batch.jobs, queue);
  if (error != cudaSuccess) {
    return error;
  }
  const AssembleArguments args = {batch.job_list,
                                  batch.report_list,
                                  space.records,
                                  space.slots,
                                  slot,
                                  space.offsets,
                                  space.plans,
                                  space.pieces,
                                  space.pieces_per_job,
                                  blocks,
                                  batch.kv_heads,
                                  batch.head_dim,
                                  value_bytes,
                                  static_cast<uint8_t>(batch.profile),
                                  static_cast<uint8_t>(batch.dtype),
                                  profile.kvs};
  return LaunchAssemble(args, batch.jobs, queue);
}

constexpr CudaEncodeApi kApi = {Supported, MaxShardBytes, WorkspaceBytes, Encode};

}  // namespace

const CudaEncodeApi* EncodeApi() { return &kApi; }

}  // namespace kvshrink::cuda

// Attend and scores: checks, the number of splits, the merge of splits.
#include <cmath>

#include "attend/attend_launch.cuh"
#include "common/launch.h"
#include "kvshrink/attention.h"

namespace kvshrink::cuda {
namespace {

// One CTA a row (of queries and heads): softmax-weighted sum of the splits' results.
__global__ void __launch_bounds__(128) MergeKernel(AttendArgs args, float* output, float* lse) {
  const size_t row = blockIdx.x;
  const float2* states = args.states + row * args.splits;
  float largest = kMinusInfinity;
  for (uint32_t s = 0; s < args.splits; ++s) {
    largest = fmaxf(largest, states[s].x);
  }
  float sum = 0;
  for (uint32_t s = 0; s < args.splits; ++s) {
    sum += states[s].x == kMinusInfinity ? 0 : __expf(states[s].x - largest) * states[s].y;
  }
  const float inverse = sum > 0 ? 1 / sum : 0;
  for (uint32_t c = threadIdx.x; c < args.head_dim; c += blockDim.x) {
    float value = 0;
    for (uint32_t s = 0; s < args.splits; ++s) {
      const float by = states[s].x == kMinusInfinity ? 0 : __expf(states[s].x - largest);
      value += by * args.partials[(row * args.splits + s) * args.head_dim + c];
    }
    output[row * args.head_dim + c] = value * inverse;
  }
  if (threadIdx.x == 0) {
    lse[row] = sum > 0 ? largest + logf(sum) : kMinusInfinity;
  }
}

bool Tuned(uint32_t d) { return d == 64 || d == 128 || d == 256; }

bool ValidAttend(const AttendParams& params) {
  const ShardBatch& batch = params.batch;
  return ValidBatch(batch) && params.sequences >= 1 && params.sequences <= 65535 &&
         params.max_chunks >= 1 && params.max_chunks <= 1U << 20 && params.queries >= 1 &&
         params.queries <= kMaxQueries && params.q_heads >= 1 && params.q_heads <= kMaxQHeads &&
         params.q_heads % batch.kv_heads == 0 && std::isfinite(params.scale) &&
         std::isfinite(params.softcap) && params.softcap >= 0 &&
         params.q_dtype != DType::kFp8E4m3 &&
         uint64_t{params.queries} * (params.q_heads / batch.kv_heads) * batch.kv_heads <= 65535;
}

size_t Rows(const AttendParams& params) {
  return size_t{params.sequences} * params.queries * params.q_heads;
}

// CTAs that share a sequence's blocks: enough to fill the card twice over, none with less than a
// block for each of its warps.
uint32_t Splits(const AttendParams& params) {
  constexpr uint32_t kCtas = 264;  // two on each of 132 multiprocessors
  const uint32_t group = params.q_heads / params.batch.kv_heads * params.queries;
  const uint32_t heads = params.batch.kv_heads * ((group + 7) / 8);
  const uint64_t blocks = uint64_t{params.max_chunks} * MaxBlocks(params.batch);
  const uint64_t warps = Tuned(params.batch.head_dim) ? 8 : 1;
  const uint64_t wanted =
      (kCtas + uint64_t{heads} * params.sequences - 1) / (uint64_t{heads} * params.sequences);
  const uint64_t most = (blocks + warps - 1) / warps;
  return static_cast<uint32_t>(wanted < most ? wanted : most);
}

size_t WorkspaceBytes(const AttendParams& params) {
  return Rows(params) * Splits(params) *
         (sizeof(float2) + size_t{params.batch.head_dim} * sizeof(float));
}

AttendArgs ArgsOf(const AttendParams& params) {
  AttendArgs args;
  args.view = ViewOf(params.batch, const_cast<void*>(params.view));
  args.chunks = params.chunks;
  args.chunk_counts = params.chunk_counts;
  args.q = params.q;
  args.first_query = params.first_query;
  args.status = params.status;
  args.shards = params.batch.shards;
  args.max_chunks = params.max_chunks;
  args.head_dim = params.batch.head_dim;
  args.queries = params.queries;
  args.q_heads = params.q_heads;
  args.group = params.q_heads / params.batch.kv_heads;
  args.splits = Splits(params);
  args.window = params.window;
  args.scale =
      params.scale != 0 ? params.scale : 1 / std::sqrt(static_cast<float>(params.batch.head_dim));
  args.softcap = params.softcap;
  args.q_dtype = params.q_dtype;
  return args;
}

int Run(const AttendArgs& args, const AttendParams& params, bool scores, cudaStream_t stream) {
  switch (args.head_dim) {
    case 64:
      return Launch64(args, params.sequences, scores, stream);
    case 128:
      return Launch128(args, params.sequences, scores, stream);
    case 256:
      return Launch256(args, params.sequences, scores, stream);
    default:
      return LaunchPlain(args, params.sequences, scores, stream);
  }
}

bool HasPointers(const AttendParams& params) {
  return params.view != nullptr && params.chunks != nullptr && params.chunk_counts != nullptr &&
         params.q != nullptr && params.status != nullptr;
}

}  // namespace

uint64_t ApiAttendWorkspaceBytes(const AttendParams& params) {
  return ValidAttend(params) ? WorkspaceBytes(params) : 0;
}

int ApiAttend(const AttendParams& params, void* stream) {
  if (!ValidAttend(params) || !HasPointers(params) || params.output == nullptr ||
      params.lse == nullptr || params.workspace == nullptr ||
      params.workspace_bytes < WorkspaceBytes(params)) {
    return kBadArgument;
  }
  AttendArgs args = ArgsOf(params);
  args.partials = static_cast<float*>(params.workspace);
  args.states =
      reinterpret_cast<float2*>(args.partials + Rows(params) * args.splits * args.head_dim);
  const auto queue = static_cast<cudaStream_t>(stream);
  const int result = Run(args, params, false, queue);
  if (result != kOk) {
    return result;
  }
  MergeKernel<<<static_cast<unsigned>(Rows(params)), 128, 0, queue>>>(args, params.output,
                                                                      params.lse);
  return cudaGetLastError();
}

int ApiScores(const ScoresParams& params, void* stream) {
  if (!ValidAttend(params.attend) || !HasPointers(params.attend) || params.logits == nullptr ||
      params.stride == 0) {
    return kBadArgument;
  }
  AttendArgs args = ArgsOf(params.attend);
  args.logits = params.logits;
  args.stride = params.stride;
  return Run(args, params.attend, true, static_cast<cudaStream_t>(stream));
}

}  // namespace kvshrink::cuda

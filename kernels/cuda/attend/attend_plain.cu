// Attention for the head dims that the tuned kernels leave out: rows are decoded to shared memory,
// 16 at a time, and attended to in their own basis.
#include "attend/attend_launch.cuh"
#include "decode/generic_rows.cuh"

namespace kvshrink::cuda {
namespace {

constexpr uint32_t kThreads = 128;

// Shared memory: the rows being decoded, then queries and sums [rows][d], logits [rows][16], and
// per row the running maximum, sum and rescaling.
struct PlainShared {
  float* decoded;
  float* queries;
  float* sums;
  float* logits;
  float* state;  // [3][rows]

  __device__ PlainShared(float* memory, uint32_t d)
      : decoded(memory),
        queries(memory + GenericFloats(d)),
        sums(queries + kPlainQueryRows * d),
        logits(sums + kPlainQueryRows * d),
        state(logits + kPlainQueryRows * kGenericRows) {}
  __device__ float& largest(uint32_t r) const { return state[r]; }
  __device__ float& sum(uint32_t r) const { return state[kPlainQueryRows + r]; }
  __device__ float& by(uint32_t r) const { return state[2 * kPlainQueryRows + r]; }
};

size_t PlainBytes(uint32_t d) {
  return (GenericFloats(d) + size_t{2} * kPlainQueryRows * d + kPlainQueryRows * kGenericRows +
          3 * kPlainQueryRows) *
         sizeof(float);
}

// Rows first .. first + count - 1 of a block (raw rows too) into decoded.
__device__ uint32_t OpenRows(const BlockDesc& block, uint32_t d, uint32_t first, uint32_t count,
                             const PlainShared& shared) {
  if (first < block.raw_rows) {  // then all of them are: see RowsFrom
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < count * d; i += kThreads) {
      shared.decoded[i] = RawValue(block.low, block.dtype(), size_t{first} * d + i);
    }
    __syncthreads();
    return 0;
  }
  return GenericDecodeRows(block, d, DecodeForm::kFull, first - block.raw_rows, count,
                           shared.decoded);
}

// How many rows from `first` on are opened at once: raw or coded, not both.
__device__ uint32_t RowsFrom(const BlockDesc& block, uint32_t first) {
  const uint32_t end = first < block.raw_rows ? block.raw_rows : block.rows;
  return min(kGenericRows, end - first);
}

struct Job {
  uint32_t sequence, head, first_row, rows;
  uint32_t shard, block, base;
};

// Logits of `count` opened keys, tokens first and on of the block, into shared.
__device__ void Logits(const AttendArgs& args, const Job& job, uint32_t first, uint32_t count,
                       const PlainShared& shared) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t d = args.head_dim;
  for (uint32_t i = threadIdx.x / 32; i < job.rows * count; i += kThreads / 32) {
    const uint32_t r = i / count;
    const uint32_t t = i % count;
    float product = 0;
    for (uint32_t c = lane; c < d; c += 32) {
      product += shared.queries[r * d + c] * shared.decoded[t * d + c];
    }
    product = WarpSum(product);
    if (lane == 0) {
      const uint32_t token = job.block * kBlockTokens + first + t;
      const int64_t position = int64_t{args.view.shards[job.shard].first_token} + token;
      const float logit =
          ToLogit(args, product, position, OwnPosition(args, job.sequence, job.first_row + r));
      shared.logits[r * kGenericRows + t] = logit;
      if (args.logits != nullptr && job.base + token < args.stride) {
        LogitRow(args, job.sequence, job.head, job.first_row + r)[job.base + token] = logit;
      }
    }
  }
  __syncthreads();
}

// One thread a row: logits to weights.
__device__ void Advance(const Job& job, uint32_t count, const PlainShared& shared) {
  const uint32_t r = threadIdx.x;
  if (r < job.rows) {
    float next = shared.largest(r);
    for (uint32_t t = 0; t < count; ++t) {
      next = fmaxf(next, shared.logits[r * kGenericRows + t]);
    }
    shared.by(r) = next == shared.largest(r) ? 1 : __expf(shared.largest(r) - next);
    shared.sum(r) *= shared.by(r);
    for (uint32_t t = 0; t < count; ++t) {
      float& logit = shared.logits[r * kGenericRows + t];
      logit = logit == kMinusInfinity ? 0 : __expf(logit - next);
      shared.sum(r) += logit;
    }
    shared.largest(r) = next;
  }
  __syncthreads();
}

__device__ void AddValues(const AttendArgs& args, const Job& job, uint32_t count,
                          const PlainShared& shared) {
  const uint32_t d = args.head_dim;
  for (uint32_t i = threadIdx.x; i < job.rows * d; i += kThreads) {
    const uint32_t r = i / d;
    float sum = shared.sums[i] * shared.by(r);
    for (uint32_t t = 0; t < count; ++t) {
      sum += shared.logits[r * kGenericRows + t] * shared.decoded[t * d + i % d];
    }
    shared.sums[i] = sum;
  }
  __syncthreads();
}

__device__ uint32_t WorkBlock(const AttendArgs& args, const Job& job, const PlainShared& shared) {
  const BlockDesc keys = args.view.blocks[args.view.Place(job.shard, 0, job.head, job.block)];
  const BlockDesc values = args.view.blocks[args.view.Place(job.shard, 1, job.head, job.block)];
  uint32_t errors = 0;
  for (uint32_t first = 0; first < keys.rows;) {
    const uint32_t count = RowsFrom(keys, first);
    errors |= OpenRows(keys, args.head_dim, first, count, shared);
    Logits(args, job, first, count, shared);
    if (args.logits == nullptr) {
      Advance(job, count, shared);
      errors |= OpenRows(values, args.head_dim, first, count, shared);
      AddValues(args, job, count, shared);
    }
    first += count;
  }
  return errors;
}

__global__ void __launch_bounds__(kThreads) PlainKernel(AttendArgs args) {
  extern __shared__ float memory[];
  const uint32_t d = args.head_dim;
  const PlainShared shared(memory, d);
  Job job;
  job.sequence = blockIdx.z;
  job.head = blockIdx.y % args.view.kv_heads;
  job.first_row = blockIdx.y / args.view.kv_heads * kPlainQueryRows;
  job.rows = min(kPlainQueryRows, args.rows() - job.first_row);
  for (uint32_t i = threadIdx.x; i < kPlainQueryRows * d; i += kThreads) {
    const bool there = i / d < job.rows;
    shared.queries[i] =
        there
            ? QueryValue(args, args.Row(job.sequence, job.head, job.first_row + i / d) * d + i % d)
            : 0;
    shared.sums[i] = 0;
  }
  if (threadIdx.x < kPlainQueryRows) {
    shared.largest(threadIdx.x) = kMinusInfinity;
    shared.sum(threadIdx.x) = 0;
  }
  __syncthreads();
  // Every warp walks; they agree.
  BlockWalk walk(args, job.sequence, blockIdx.x, args.splits);
  for (BlockPlace place; walk.Next(args, &place);) {
    job.shard = place.shard;
    job.block = place.block;
    job.base = place.base;
    if (WorkBlock(args, job, shared) != 0) {
      ReportBlock(args, job.shard, ShardField::kCodes, job.block);
    }
  }
  if (args.logits != nullptr) {
    ClearTail(args, job.sequence, job.head, job.first_row, job.rows, walk.tokens());
    return;
  }
  for (uint32_t i = threadIdx.x; i < job.rows * d; i += kThreads) {
    const size_t at =
        args.Row(job.sequence, job.head, job.first_row + i / d) * args.splits + blockIdx.x;
    args.partials[at * d + i % d] = shared.sums[i];
    if (i % d == 0) {
      args.states[at] = make_float2(shared.largest(i / d), shared.sum(i / d));
    }
  }
}

}  // namespace

int LaunchPlain(const AttendArgs& args, uint32_t sequences, bool scores, cudaStream_t stream) {
  (void)scores;  // args.logits says so
  const size_t bytes = PlainBytes(args.head_dim);
  const cudaError_t result = cudaFuncSetAttribute(
      PlainKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (result != cudaSuccess) {
    return result;
  }
  const uint32_t row_groups = (args.queries * args.group + kPlainQueryRows - 1) / kPlainQueryRows;
  const dim3 grid(args.splits, args.view.kv_heads * row_groups, sequences);
  PlainKernel<<<grid, kThreads, bytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace kvshrink::cuda

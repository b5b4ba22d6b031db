// From the blocks' slots to shards (proto/FORMAT.md): places by prefix sums, the copy, checksums,
// header and report.
#include "cuda/encode/assemble.cuh"

#include <cfloat>

#include "cuda/encode/checksums.cuh"
#include "stages/scales.h"

namespace kvshrink::cuda {
namespace {

constexpr uint32_t kIndexEntryBytes = 6;
constexpr int kPlanThreads = 256;

struct PartBytes {
  uint32_t raw, factors, scales, codes;
};

__device__ __forceinline__ uint32_t Pad4(uint32_t bytes) { return (bytes + 3) & ~3U; }

__device__ uint32_t LevelCodeBytes(BlockCode code, uint32_t digits) {
  switch (code) {
    case BlockCode::kLevels3:
      return (digits + 4) / 5;
    case BlockCode::kLevels4:
      return (digits + 3) / 4;
    case BlockCode::kLevels5:
      return ((digits + 2) / 3 * 7 + 7) / 8;
    case BlockCode::kLevels6:
      return ((digits + 4) / 5 * 13 + 7) / 8;
    case BlockCode::kLevels8:
      return (digits * 3 + 7) / 8;
    case BlockCode::kLevels12:
      return ((digits + 4) / 5 * 18 + 7) / 8;
    case BlockCode::kLevels16:
      return (digits + 1) / 2;
    default:
      return 0;
  }
}

struct Place {
  uint32_t kind, head, first_row, rows, raw_rows;
};

__device__ __forceinline__ Place PlaceOf(const EncodeJob& job, uint32_t kv_heads, uint32_t number) {
  const uint32_t per_head = (job.tokens + kBlockTokens - 1) / kBlockTokens;
  const uint32_t row = number / per_head;
  Place place;
  place.kind = row / kv_heads;
  place.head = row % kv_heads;
  place.first_row = number % per_head * kBlockTokens;
  place.rows = min(kBlockTokens, job.tokens - place.first_row);
  place.raw_rows = min(place.rows, job.raw_rows - min(job.raw_rows, place.first_row));
  return place;
}

__device__ PartBytes PartsOf(const AssembleArguments& args, const BlockRecord& record,
                             const Place& place) {
  const uint32_t m = place.rows - place.raw_rows;
  const auto code = static_cast<BlockCode>(record.code);
  const uint32_t row_bytes = args.head_dim * args.value_bytes;
  PartBytes parts;
  parts.raw = place.raw_rows * row_bytes;
  parts.factors = record.factor_bytes;
  const bool levels = record.code >= static_cast<uint8_t>(BlockCode::kLevels3);
  parts.scales = !levels           ? 0U
                 : args.kvs_scales ? static_cast<uint32_t>(stages::KvsScaleBytes(m))
                                   : 2 * m;
  parts.codes = code == BlockCode::kRaw ? m * row_bytes : LevelCodeBytes(code, m * args.head_dim);
  return parts;
}

// Exclusive prefix sums of three values over the CTA; `total` gets the sums.
__device__ uint3 ScanThree(uint3 value, uint3* total) {
  __shared__ uint3 warp_sums[kPlanThreads / 32];
  const uint32_t lane = threadIdx.x & 31;
  const uint32_t warp = threadIdx.x >> 5;
  uint3 sum = value;
  for (uint32_t step = 1; step < 32; step *= 2) {
    const uint32_t a = __shfl_up_sync(0xFFFFFFFFU, sum.x, step);
    const uint32_t b = __shfl_up_sync(0xFFFFFFFFU, sum.y, step);
    const uint32_t c = __shfl_up_sync(0xFFFFFFFFU, sum.z, step);
    if (lane >= step) {
      sum.x += a;
      sum.y += b;
      sum.z += c;
    }
  }
  if (lane == 31) {
    warp_sums[warp] = sum;
  }
  __syncthreads();
  uint3 before = make_uint3(0, 0, 0);
  uint3 all = make_uint3(0, 0, 0);
  for (uint32_t i = 0; i < kPlanThreads / 32; ++i) {
    const uint3 other = warp_sums[i];
    if (i < warp) {
      before = make_uint3(before.x + other.x, before.y + other.y, before.z + other.z);
    }
    all = make_uint3(all.x + other.x, all.y + other.y, all.z + other.z);
  }
  __syncthreads();
  *total = all;
  return make_uint3(before.x + sum.x - value.x, before.y + sum.y - value.y,
                    before.z + sum.z - value.z);
}

__device__ void WriteHeader(const AssembleArguments& args, const EncodeJob& job,
                            const ShardPlan& plan, uint8_t* out) {
  for (uint32_t i = 0; i < kHeaderBytes; ++i) {
    out[i] = 0;
  }
  out[0] = 'K';
  out[1] = 'V';
  out[2] = 'S';
  out[3] = '1';
  Store(out, 4, uint16_t{1});
  out[6] = args.profile;
  out[7] = args.dtype;
  Store(out, 8, static_cast<uint16_t>(args.head_dim));
  Store(out, 10, static_cast<uint16_t>(args.kv_heads));
  Store(out, 12, job.tokens);
  Store(out, 16, job.first_token);
  Store(out, 20, static_cast<uint16_t>(job.layer));
  Store(out, 24, job.raw_rows);
  Store(out, 32, uint64_t{plan.bytes[1]});
  Store(out, 40, uint64_t{plan.bytes[2]});
  Store(out, 48, uint64_t{plan.bytes[3]});
}

// Sum or maximum over the CTA in a fixed order.
template <typename Op>
__device__ double Reduce(double value, Op op) {
  __shared__ double parts[kPlanThreads];
  parts[threadIdx.x] = value;
  __syncthreads();
  for (uint32_t half = kPlanThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      parts[threadIdx.x] = op(parts[threadIdx.x], parts[threadIdx.x + half]);
    }
    __syncthreads();
  }
  const double result = parts[0];
  __syncthreads();
  return result;
}

// What the blocks of one kind became, of one thread's share.
struct KindSums {
  double bytes = 0, error = 0, energy = 0, worst = 0, blocks = 0, raw = 0;
};

// `shared`: the kind's half of what both share.
__device__ void WriteReport(const KindSums& sums, uint32_t shared, const uint32_t* ranks,
                            EncodeKindReport* out) {
  const auto add = [](double a, double b) { return a + b; };
  const auto larger = [](double a, double b) { return a > b ? a : b; };
  const double bytes = Reduce(sums.bytes, add);
  const double error = Reduce(sums.error, add);
  const double energy = Reduce(sums.energy, add);
  const double worst = Reduce(sums.worst, larger);
  const double blocks = Reduce(sums.blocks, add);
  const double raw = Reduce(sums.raw, add);
  if (threadIdx.x == 0) {
    out->bytes = static_cast<uint64_t>(bytes) + shared;
    out->error_energy = error;
    out->energy = energy;
    out->max_block_relative_error = worst;
    out->blocks = static_cast<uint32_t>(blocks);
    out->raw_blocks = static_cast<uint32_t>(raw);
    out->escalated_blocks = 0;
  }
  if (threadIdx.x < 16) {
    out->rank_histogram[threadIdx.x] = ranks[threadIdx.x];
  }
}

// One CTA a shard: where its parts go; index, header (less checksums), report.
__global__ void __launch_bounds__(kPlanThreads) PlanShardsKernel(const AssembleArguments args) {
  __shared__ uint32_t ranks[2][16];
  const EncodeJob& job = args.jobs[blockIdx.x];
  const BlockRecord* records = args.records + uint64_t{blockIdx.x} * args.blocks_per_job;
  BlockOffsets* offsets = args.offsets + uint64_t{blockIdx.x} * args.blocks_per_job;
  const uint32_t per_head = (job.tokens + kBlockTokens - 1) / kBlockTokens;
  const uint32_t blocks = 2 * args.kv_heads * per_head;
  if (threadIdx.x < 32) {
    ranks[threadIdx.x >> 4][threadIdx.x & 15] = 0;
  }
  __syncthreads();
  KindSums sums[2];
  uint3 running = make_uint3(0, 0, 0);
  for (uint32_t first = 0; first < blocks; first += kPlanThreads) {
    const uint32_t number = first + threadIdx.x;
    uint3 sizes = make_uint3(0, 0, 0);
    if (number < blocks) {
      const BlockRecord record = records[number];
      const Place place = PlaceOf(job, args.kv_heads, number);
      const PartBytes parts = PartsOf(args, record, place);
      sizes = make_uint3(Pad4(parts.raw + parts.factors), Pad4(parts.scales), Pad4(parts.codes));
      KindSums& sum = sums[place.kind];
      sum.blocks += 1;
      sum.bytes += sizes.x + sizes.y + sizes.z;
      if (record.code == static_cast<uint8_t>(BlockCode::kRaw)) {
        sum.raw += 1;
      } else {
        atomicAdd(&ranks[place.kind][record.rank], 1U);
      }
      if (fabs(record.energy) <= DBL_MAX) {
        const double error = scalbn(static_cast<double>(record.error), 2 * record.exponent);
        sum.energy += record.energy;
        sum.error += error;
        sum.worst = fmax(sum.worst, record.energy > 0 ? error / record.energy : 0);
      }
    }
    uint3 total;
    const uint3 before = ScanThree(sizes, &total);
    if (number < blocks) {
      offsets[number] = {running.x + before.x, running.y + before.y, running.z + before.z};
    }
    running = make_uint3(running.x + total.x, running.y + total.y, running.z + total.z);
  }
  ShardPlan plan;
  plan.bytes[0] = kIndexEntryBytes * blocks;
  plan.bytes[1] = running.x;
  plan.bytes[2] = running.y;
  plan.bytes[3] = running.z;
  plan.begin[0] = kHeaderBytes;
  for (int i = 1; i < 4; ++i) {
    plan.begin[i] = plan.begin[i - 1] + plan.bytes[i - 1];
  }
  const uint64_t bytes = uint64_t{plan.begin[3]} + plan.bytes[3];
  plan.written = bytes <= job.capacity ? 1 : 0;
  EncodeReport* report = args.reports + blockIdx.x;
  if (threadIdx.x == 0) {
    args.plans[blockIdx.x] = plan;
    report->bytes = bytes;
    report->written = plan.written;
    if (plan.written != 0) {
      WriteHeader(args, job, plan, job.out);
    }
  }
  const uint32_t shared = plan.begin[1];
  WriteReport(sums[0], shared - shared / 2, ranks[0], &report->kind[0]);
  WriteReport(sums[1], shared / 2, ranks[1], &report->kind[1]);
  if (plan.written == 0) {
    return;
  }
  auto* index = reinterpret_cast<uint16_t*>(job.out + kHeaderBytes);
  for (uint32_t i = threadIdx.x; i < blocks; i += kPlanThreads) {
    const BlockRecord record = records[i];
    index[3 * i] = static_cast<uint16_t>((record.exponent & 255) | (record.code << 8));
    index[3 * i + 1] = record.rank;
    index[3 * i + 2] = record.factor_bytes;
  }
}

__device__ void CopyWords(const uint8_t* from, uint8_t* to, uint32_t bytes) {
  const auto* source = reinterpret_cast<const uint32_t*>(from);
  auto* target = reinterpret_cast<uint32_t*>(to);
  for (uint32_t i = threadIdx.x; i < (bytes + 3) / 4; i += blockDim.x) {
    target[i] = source[i];
  }
}

// Rows of the input as they are.
__device__ void CopyRows(const AssembleArguments& args, const EncodeTensor& tensor,
                         const Place& place, uint32_t first, uint32_t count, uint8_t* to) {
  const uint32_t row_words = args.head_dim * args.value_bytes / 4;
  for (uint32_t row = 0; row < count; ++row) {
    const uint32_t token = place.first_row + first + row;
    const auto* source = reinterpret_cast<const uint32_t*>(
        TokenAddress(tensor, token, place.head, args.value_bytes));
    auto* target = reinterpret_cast<uint32_t*>(to) + uint64_t{row} * row_words;
    for (uint32_t i = threadIdx.x; i < row_words; i += blockDim.x) {
      target[i] = source[i];
    }
  }
}

// One CTA a block.
__global__ void __launch_bounds__(128) CopyBlocksKernel(const AssembleArguments args) {
  const EncodeJob& job = args.jobs[blockIdx.y];
  const ShardPlan& plan = args.plans[blockIdx.y];
  const uint32_t per_head = (job.tokens + kBlockTokens - 1) / kBlockTokens;
  const uint32_t number = blockIdx.x;
  if (number >= 2 * args.kv_heads * per_head || plan.written == 0) {
    return;
  }
  const uint64_t slot_number = uint64_t{blockIdx.y} * args.blocks_per_job + number;
  const BlockRecord record = args.records[slot_number];
  const BlockOffsets at = args.offsets[slot_number];
  const Place place = PlaceOf(job, args.kv_heads, number);
  const PartBytes parts = PartsOf(args, record, place);
  const EncodeTensor& tensor = place.kind == 0 ? job.k : job.v;
  const uint8_t* slot = args.slots + slot_number * args.slot.bytes;
  uint8_t* low = job.out + plan.begin[1] + at.low;
  if (place.raw_rows > 0) {
    CopyRows(args, tensor, place, 0, place.raw_rows, low);
  }
  CopyWords(slot, low + parts.raw, parts.factors);
  CopyWords(slot + args.slot.scales, job.out + plan.begin[2] + at.scales, parts.scales);
  uint8_t* codes = job.out + plan.begin[3] + at.codes;
  if (record.code == static_cast<uint8_t>(BlockCode::kRaw)) {
    CopyRows(args, tensor, place, place.raw_rows, place.rows - place.raw_rows, codes);
  } else {
    CopyWords(slot + args.slot.codes, codes, parts.codes);
  }
}

}  // namespace

uint64_t MaxPieces(uint64_t shard_bytes) { return shard_bytes / kPieceBytes + 4; }

cudaError_t LaunchAssemble(const AssembleArguments& args, uint32_t jobs, cudaStream_t stream) {
  PlanShardsKernel<<<jobs, kPlanThreads, 0, stream>>>(args);
  CopyBlocksKernel<<<dim3(args.blocks_per_job, jobs), 128, 0, stream>>>(args);
  constexpr uint32_t kHashBlocks = 2112;  // 16 a multiprocessor of an H100
  HashPiecesKernel<<<dim3((kHashBlocks + jobs - 1) / jobs, jobs), 128, 0, stream>>>(args);
  FinishShardsKernel<<<jobs, 128, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace kvshrink::cuda

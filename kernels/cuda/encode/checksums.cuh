// Checksums of a shard's sections and header, on the device.
#pragma once

#include "cuda/encode/assemble.cuh"
#include "cuda/encode/xxh64.cuh"

namespace kvshrink::cuda {
namespace {

constexpr uint32_t kHeaderBytes = 96;
constexpr uint32_t kPieceBytes = 1024;

template <typename T>
__device__ void Store(uint8_t* out, uint32_t offset, T value) {
  for (uint32_t i = 0; i < sizeof(T); ++i) {
    out[offset + i] = static_cast<uint8_t>(static_cast<uint64_t>(value) >> (8 * i));
  }
}

__device__ __forceinline__ uint32_t Pieces(uint32_t bytes) {
  return (bytes + kPieceBytes - 1) / kPieceBytes;
}

// Hashes of all pieces of a shard's sections, one behind the other; four lanes a piece.
__global__ void __launch_bounds__(128) HashPiecesKernel(const AssembleArguments args) {
  const EncodeJob& job = args.jobs[blockIdx.y];
  const ShardPlan plan = args.plans[blockIdx.y];
  if (plan.written == 0) {
    return;
  }
  uint64_t* hashes = args.pieces + uint64_t{blockIdx.y} * args.pieces_per_job;
  uint32_t end[4];
  uint32_t total = 0;
  for (int i = 0; i < 4; ++i) {
    total += Pieces(plan.bytes[i]);
    end[i] = total;
  }
  const int part = static_cast<int>(threadIdx.x & 3);
  const uint32_t mask = 15U << (threadIdx.x & 28);
  for (uint32_t piece = blockIdx.x * 32 + threadIdx.x / 4; piece < total; piece += gridDim.x * 32) {
    const int section = piece < end[0] ? 0 : piece < end[1] ? 1 : piece < end[2] ? 2 : 3;
    const uint32_t first = section == 0 ? piece : piece - end[section - 1];
    const uint32_t bytes = min(kPieceBytes, plan.bytes[section] - first * kPieceBytes);
    const auto* words = reinterpret_cast<const uint32_t*>(job.out + plan.begin[section]) +
                        uint64_t{first} * (kPieceBytes / 4);
    const uint64_t hash = HashByFour(words, bytes, part, mask);
    if (part == 0) {
      hashes[piece] = hash;
    }
  }
}

// The sections' checksums from those of their pieces, then the header's. One warp a shard; a
// section's pieces go through shared memory.
__global__ void __launch_bounds__(128) FinishShardsKernel(const AssembleArguments args) {
  constexpr uint32_t kStage = 256;  // pieces of a section at a time
  __shared__ uint32_t staged[4][2 * kStage];
  const EncodeJob& job = args.jobs[blockIdx.x];
  const ShardPlan plan = args.plans[blockIdx.x];
  if (plan.written == 0) {
    return;
  }
  const auto section = static_cast<int>(threadIdx.x >> 5);  // a warp each
  const uint32_t lane = threadIdx.x & 31;
  const uint64_t* hashes = args.pieces + uint64_t{blockIdx.x} * args.pieces_per_job;
  for (int i = 0; i < section; ++i) {
    hashes += Pieces(plan.bytes[i]);
  }
  const uint32_t count = Pieces(plan.bytes[section]);
  const int part = static_cast<int>(lane & 3);
  uint64_t sum = HashStart(part);
  uint32_t* stage = staged[section];
  uint32_t left = 0;
  for (uint32_t first = 0; first < count; first += kStage) {
    const uint32_t now = min(kStage, count - first);
    for (uint32_t i = lane; i < now; i += 32) {
      const uint64_t hash = hashes[first + i];
      stage[2 * i] = static_cast<uint32_t>(hash);
      stage[2 * i + 1] = static_cast<uint32_t>(hash >> 32);
    }
    __syncwarp();
    if (lane < 4) {
      for (uint32_t i = 0; i < now / 4; ++i) {
        sum = HashRound(sum, Load64(stage + 8 * i + 2 * part));
      }
      left = now / 4 * 8;
    }
    __syncwarp();
  }
  if (lane < 4) {
    const uint64_t hash = HashEnd(sum, part, 15U, stage + left, uint64_t{count} * 8);
    if (lane == 0) {
      Store(job.out, 56 + 8 * static_cast<uint32_t>(section), hash);
    }
  }
  __syncthreads();
  if (threadIdx.x < 4) {
    const uint64_t hash = HashByFour(reinterpret_cast<const uint32_t*>(job.out), 88, part, 15U);
    if (threadIdx.x == 0) {
      Store(job.out, 88, hash);
    }
  }
}

}  // namespace
}  // namespace kvshrink::cuda

// The k largest of each row of logits: the k-th key by four passes of 8 bits, then those above it
// and the first of those equal to it, sorted.
#include <cuda_runtime.h>

#include "attend/attend_args.cuh"
#include "common/launch.h"

namespace kvshrink::cuda {
namespace {

constexpr uint32_t kThreads = 256;

// Larger float, larger key; a NaN of any sign counts as -inf.
__device__ uint32_t KeyOf(float x) {
  const uint32_t bits = __float_as_uint(isnan(x) ? kMinusInfinity : x);
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}

struct Shared {
  uint32_t histogram[256];
  uint32_t prefix, wanted, count, equal;
  uint64_t chosen[kMaxTopK];  // key above the place's complement: sorts both ways right
};

// The key that the k-th largest has; what is left of k for those equal to it goes to
// shared->wanted.
__device__ uint32_t SelectKey(const float* row, uint32_t stride, uint32_t k, Shared* shared) {
  if (threadIdx.x == 0) {
    shared->prefix = 0;
    shared->wanted = k;
  }
  for (int shift = 24; shift >= 0; shift -= 8) {
    shared->histogram[threadIdx.x] = 0;
    __syncthreads();
    const uint32_t prefix = shared->prefix;
    const uint32_t above = shift == 24 ? 0 : 0xFFFFFFFFU << (shift + 8);
    for (uint32_t i = threadIdx.x; i < stride; i += kThreads) {
      const uint32_t key = KeyOf(row[i]);
      if ((key & above) == (prefix & above)) {
        atomicAdd(&shared->histogram[(key >> shift) & 255U], 1U);
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      uint32_t wanted = shared->wanted;
      int digit = 255;
      for (; digit > 0 && shared->histogram[digit] < wanted; --digit) {
        wanted -= shared->histogram[digit];
      }
      shared->prefix |= static_cast<uint32_t>(digit) << shift;
      shared->wanted = wanted;
    }
    __syncthreads();
  }
  return shared->prefix;
}

// Puts the chosen into shared->chosen, in any order but fixed membership: of equal keys the first.
__device__ void Collect(const float* row, uint32_t stride, uint32_t key, Shared* shared) {
  if (threadIdx.x == 0) {
    shared->count = 0;
    shared->equal = 0;
  }
  __syncthreads();
  for (uint32_t first = 0; first < stride; first += kThreads) {
    const uint32_t i = first + threadIdx.x;
    const uint32_t mine = i < stride ? KeyOf(row[i]) : 0;
    if (i < stride && mine > key) {
      shared->chosen[atomicAdd(&shared->count, 1U)] = (uint64_t{mine} << 32) | (~i);
    }
    // Equal ones in order of place, a round of threads at a time.
    const int equal = i < stride && mine == key ? 1 : 0;
    const uint32_t before = shared->equal;
    __syncthreads();
    const uint32_t lanes = __ballot_sync(0xFFFFFFFFU, equal);
    if (threadIdx.x % 32 == 0) {
      shared->histogram[threadIdx.x / 32] = static_cast<uint32_t>(__popc(lanes));
    }
    __syncthreads();
    uint32_t rank = before + static_cast<uint32_t>(__popc(lanes & ((1U << threadIdx.x % 32) - 1)));
    uint32_t all = before;
    for (uint32_t w = 0; w < kThreads / 32; ++w) {
      rank += w < threadIdx.x / 32 ? shared->histogram[w] : 0;
      all += shared->histogram[w];
    }
    if (equal != 0 && rank < shared->wanted) {
      shared->chosen[atomicAdd(&shared->count, 1U)] = (uint64_t{mine} << 32) | (~i);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      shared->equal = all;
    }
    __syncthreads();
  }
}

// Descending, `size` a power of two.
__device__ void Sort(uint64_t* values, uint32_t size) {
  for (uint32_t width = 2; width <= size; width *= 2) {
    for (uint32_t step = width / 2; step > 0; step /= 2) {
      __syncthreads();
      for (uint32_t i = threadIdx.x; i < size; i += kThreads) {
        const uint32_t other = i ^ step;
        if (other > i) {
          const bool descending = (i & width) == 0;
          if ((values[i] < values[other]) == descending) {
            const uint64_t value = values[i];
            values[i] = values[other];
            values[other] = value;
          }
        }
      }
    }
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads) TopKKernel(TopKParams params) {
  __shared__ Shared shared;
  const float* row = params.logits + size_t{blockIdx.x} * params.stride;
  const uint32_t k = min(params.k, params.stride);
  const uint32_t key = SelectKey(row, params.stride, k, &shared);
  Collect(row, params.stride, key, &shared);
  uint32_t size = 1;
  while (size < k) {
    size *= 2;
  }
  for (uint32_t i = k + threadIdx.x; i < size; i += kThreads) {
    shared.chosen[i] = 0;
  }
  Sort(shared.chosen, size);
  for (uint32_t i = threadIdx.x; i < params.k; i += kThreads) {
    const uint32_t place = i < k ? ~static_cast<uint32_t>(shared.chosen[i]) : 0;
    const float value = i < k ? row[place] : kMinusInfinity;
    const bool there = value > kMinusInfinity;
    params.values[size_t{blockIdx.x} * params.k + i] = there ? value : kMinusInfinity;
    params.places[size_t{blockIdx.x} * params.k + i] = there ? place : UINT32_MAX;
  }
}

}  // namespace

int ApiTopK(const TopKParams& params, void* stream) {
  if (params.logits == nullptr || params.values == nullptr || params.places == nullptr ||
      params.rows == 0 || params.stride == 0 || params.k < 1 || params.k > kMaxTopK) {
    return kBadArgument;
  }
  TopKKernel<<<params.rows, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
  return cudaGetLastError();
}

}  // namespace kvshrink::cuda

// What the CUDA module offers, as plain structs and function pointers: no CUDA header is needed to
// call it. Streams (cudaStream_t) and pointers to device memory are void*. The contract that all
// calls share (caller's stream and workspace, no allocation, no synchronisation) is told in
// kernels/README.md.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvshrink/block.h"
#include "kvshrink/codec.h"

namespace kvshrink::cuda {

// Changes whenever a struct below does: library and module are built together.
inline constexpr uint32_t kAbiVersion = 1;

// Result of a call: 0, a cudaError_t, or this.
inline constexpr int kOk = 0;
inline constexpr int kBadArgument = -1;

// What the module exports under the name kEntryPoint, as `const CudaApi* (uint32_t abi)`: null when
// it was built for another ABI.
struct CudaApi {
  uint32_t abi = 0;
  // Text of a result; static storage.
  const char* (*result_text)(int result) = nullptr;
  // Devices of this machine; a result other than kOk where there is no driver.
  int (*device_count)(int* count) = nullptr;
};

inline constexpr const char* kEntryPoint = "kvshrink_cuda_api";

}  // namespace kvshrink::cuda

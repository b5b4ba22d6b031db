// The codec on an NVIDIA GPU, by the CUDA module. What the device can't do, and everything once it
// has failed, is done by the CPU.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

#include "absl/status/statusor.h"
#include "kvshrink/codec.h"
#include "kvshrink/cuda_api.h"
#include "service/engine/codec.h"

namespace kvshrink::service {

struct CudaCodecOptions {
  uint64_t device_bytes = 0;  // of device memory for objects in work, taken at once
  int lanes = 1;              // objects on the device at a time: one per thread that calls
};

// Takes the memory. `cpu` must outlive it. Errors, each of one line: what CUDA says, or
// RESOURCE_EXHAUSTED when the device has less memory free.
absl::StatusOr<std::unique_ptr<Codec>> MakeCudaCodec(const cuda::CudaApi& api,
                                                     const CudaCodecOptions& options,
                                                     const Backend& cpu);

// The codec that `backend` (auto, cpu, cuda) names. "cuda" where that can't be: FAILED_PRECONDITION
// saying what is missing and what to do; "auto" then logs it and runs on the CPU.
absl::StatusOr<std::unique_ptr<Codec>> ChooseCodec(std::string_view backend,
                                                   const CudaCodecOptions& options,
                                                   const Backend& cpu);

}  // namespace kvshrink::service

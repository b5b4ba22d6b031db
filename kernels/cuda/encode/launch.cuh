// The block kernel of each family and head_dim: one translation unit each, so that they compile
// side by side.
#pragma once

#include <cuda_runtime.h>

#include "cuda/encode/encode_types.cuh"

namespace kvshrink::cuda {

// Errors: of the launch.
cudaError_t LaunchKvs64(const BlockKernelArguments& args, uint32_t jobs, cudaStream_t stream);
cudaError_t LaunchKvs128(const BlockKernelArguments& args, uint32_t jobs, cudaStream_t stream);
cudaError_t LaunchKvs256(const BlockKernelArguments& args, uint32_t jobs, cudaStream_t stream);
cudaError_t LaunchTq64(const BlockKernelArguments& args, uint32_t jobs, cudaStream_t stream);
cudaError_t LaunchTq128(const BlockKernelArguments& args, uint32_t jobs, cudaStream_t stream);
cudaError_t LaunchTq256(const BlockKernelArguments& args, uint32_t jobs, cudaStream_t stream);

}  // namespace kvshrink::cuda

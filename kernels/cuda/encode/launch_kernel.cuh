// Of launch.cuh's functions.
#pragma once

#include "cuda/encode/encode_kernel.cuh"
#include "cuda/encode/launch.cuh"

namespace kvshrink::cuda {

template <int kDim, bool kFactored>
cudaError_t LaunchBlocks(const BlockKernelArguments& args, uint32_t jobs, cudaStream_t stream) {
  const auto kernel = EncodeBlocksKernel<kDim, kFactored>;
  constexpr uint32_t kBytes =
      kFactored ? SharedLayout<kDim>::kBytes : SharedLayout<kDim>::kPlainBytes;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) {
    return error;
  }
  kernel<<<dim3(args.blocks_per_job, jobs), BlockShape<kDim>::kThreads, kBytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace kvshrink::cuda

#include "cuda/encode/launch_kernel.cuh"

namespace kvshrink::cuda {

cudaError_t LaunchTq256(const BlockKernelArguments& args, uint32_t jobs, cudaStream_t stream) {
  return LaunchBlocks<256, false>(args, jobs, stream);
}

}  // namespace kvshrink::cuda

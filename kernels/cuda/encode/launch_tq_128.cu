#include "cuda/encode/launch_kernel.cuh"

namespace kvshrink::cuda {

cudaError_t LaunchTq128(const BlockKernelArguments& args, uint32_t jobs, cudaStream_t stream) {
  return LaunchBlocks<128, false>(args, jobs, stream);
}

}  // namespace kvshrink::cuda

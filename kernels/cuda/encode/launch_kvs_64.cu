#include "cuda/encode/launch_kernel.cuh"

namespace kvshrink::cuda {

cudaError_t LaunchKvs64(const BlockKernelArguments& args, uint32_t jobs, cudaStream_t stream) {
  return LaunchBlocks<64, true>(args, jobs, stream);
}

}  // namespace kvshrink::cuda

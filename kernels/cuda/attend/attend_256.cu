#include "attend/attend_kernel.cuh"

namespace kvshrink::cuda {

int Launch256(const AttendArgs& args, uint32_t sequences, bool scores, cudaStream_t stream) {
  return LaunchDim<256>(args, sequences, scores, stream);
}

}  // namespace kvshrink::cuda

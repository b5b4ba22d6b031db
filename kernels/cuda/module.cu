// The module's entry point.
#include <cuda_runtime.h>

#include "common/launch.h"
#include "common/runtime_api.h"
#include "encode/encode_api.h"

namespace kvshrink::cuda {
namespace {

const char* ResultText(int result) {
  return result == kBadArgument ? "an argument is out of range"
                                : cudaGetErrorString(static_cast<cudaError_t>(result));
}

int DeviceCount(int* count) {
  const cudaError_t result = cudaGetDeviceCount(count);
  // A failed probe must not be taken for a later call's failure.
  (void)cudaGetLastError();
  return result;
}

const CudaApi kApi = {
    .abi = kAbiVersion,
    .result_text = ResultText,
    .device_count = DeviceCount,
    .view_bytes = ApiViewBytes,
    .parse = ApiParse,
    .decode = ApiDecode,
    .attend_workspace_bytes = ApiAttendWorkspaceBytes,
    .attend = ApiAttend,
    .scores = ApiScores,
    .top_k = ApiTopK,
    .runtime = RuntimeApi(),
    .encode = EncodeApi(),
};

}  // namespace
}  // namespace kvshrink::cuda

extern "C" __attribute__((visibility("default"))) const kvshrink::cuda::CudaApi* kvshrink_cuda_api(
    uint32_t abi) {
  return abi == kvshrink::cuda::kAbiVersion ? &kvshrink::cuda::kApi : nullptr;
}

// The parts of the CUDA runtime that the module lends to programs that aren't linked against it.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>

#include "common/runtime_api.h"

namespace kvshrink::cuda {
namespace {

cudaStream_t StreamOf(void* stream) { return static_cast<cudaStream_t>(stream); }
cudaEvent_t EventOf(void* event) { return static_cast<cudaEvent_t>(event); }

int DeviceInfo(CudaDeviceInfo* info) {
  cudaDeviceProp properties;
  cudaError_t result = cudaGetDeviceProperties(&properties, 0);
  size_t free_bytes = 0;
  size_t memory_bytes = 0;
  if (result == cudaSuccess) {
    result = cudaMemGetInfo(&free_bytes, &memory_bytes);
  }
  if (result == cudaSuccess) {
    const size_t length = std::min(std::strlen(properties.name), sizeof(info->name) - 1);
    std::memcpy(info->name, properties.name, length);
    info->name[length] = '\0';
    info->memory_bytes = memory_bytes;
    info->free_bytes = free_bytes;
  }
  return result;
}

int Allocate(void** pointer, uint64_t bytes) { return cudaMalloc(pointer, bytes); }
int Release(void* pointer) { return cudaFree(pointer); }
int AllocateHost(void** pointer, uint64_t bytes) { return cudaMallocHost(pointer, bytes); }
int ReleaseHost(void* pointer) { return cudaFreeHost(pointer); }

int CreateStream(void** stream) {
  return cudaStreamCreateWithFlags(reinterpret_cast<cudaStream_t*>(stream), cudaStreamNonBlocking);
}
int DestroyStream(void* stream) { return cudaStreamDestroy(StreamOf(stream)); }

int CreateEvent(void** event) {
  return cudaEventCreateWithFlags(reinterpret_cast<cudaEvent_t*>(event),
                                  cudaEventDisableTiming | cudaEventBlockingSync);
}
int DestroyEvent(void* event) { return cudaEventDestroy(EventOf(event)); }
int RecordEvent(void* event, void* stream) {
  return cudaEventRecord(EventOf(event), StreamOf(stream));
}
int AwaitEvent(void* event) { return cudaEventSynchronize(EventOf(event)); }
int Synchronize(void* stream) { return cudaStreamSynchronize(StreamOf(stream)); }

int Copy(void* to, const void* from, uint64_t bytes, void* stream) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, StreamOf(stream));
}
int Clear(void* device, uint64_t bytes, void* stream) {
  return cudaMemsetAsync(device, 0, bytes, StreamOf(stream));
}

constexpr CudaRuntimeApi kApi = {
    .device_info = DeviceInfo,
    .allocate = Allocate,
    .release = Release,
    .allocate_host = AllocateHost,
    .release_host = ReleaseHost,
    .create_stream = CreateStream,
    .destroy_stream = DestroyStream,
    .create_event = CreateEvent,
    .destroy_event = DestroyEvent,
    .record_event = RecordEvent,
    .await_event = AwaitEvent,
    .synchronize = Synchronize,
    .copy = Copy,
    .clear = Clear,
};

}  // namespace

const CudaRuntimeApi* RuntimeApi() { return &kApi; }

}  // namespace kvshrink::cuda

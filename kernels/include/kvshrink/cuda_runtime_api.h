// What a program that isn't linked against CUDA needs of its runtime to feed the module's kernels:
// memory, streams, events, copies. Part of cuda_api.h's contract: results are 0 or a cudaError_t;
// streams, events and pointers to device memory are void*. All work is on device 0 of those that
// the process sees (CUDA_VISIBLE_DEVICES chooses).
#pragma once

#include <cstdint>

namespace kvshrink::cuda {

struct CudaDeviceInfo {
  char name[256] = {};
  uint64_t memory_bytes = 0;
  uint64_t free_bytes = 0;
};

struct CudaRuntimeApi {
  int (*device_info)(CudaDeviceInfo* info) = nullptr;

  // Device memory, at a multiple of 256 bytes. Waits for the device: not for the path of a request.
  int (*allocate)(void** pointer, uint64_t bytes) = nullptr;
  int (*release)(void* pointer) = nullptr;
  // Page-locked host memory, which copies need to be asynchronous.
  int (*allocate_host)(void** pointer, uint64_t bytes) = nullptr;
  int (*release_host)(void* pointer) = nullptr;

  // A stream that doesn't wait for the default one.
  int (*create_stream)(void** stream) = nullptr;
  int (*destroy_stream)(void* stream) = nullptr;
  // An event without a clock. await_event puts the thread to sleep until the event has passed.
  int (*create_event)(void** event) = nullptr;
  int (*destroy_event)(void* event) = nullptr;
  int (*record_event)(void* event, void* stream) = nullptr;
  int (*await_event)(void* event) = nullptr;
  // Waits for everything on the stream.
  int (*synchronize)(void* stream) = nullptr;

  // Between page-locked host memory and the device, in either direction.
  int (*copy)(void* to, const void* from, uint64_t bytes, void* stream) = nullptr;
  int (*clear)(void* device, uint64_t bytes, void* stream) = nullptr;
};

}  // namespace kvshrink::cuda

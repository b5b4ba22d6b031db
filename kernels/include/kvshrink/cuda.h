// The CUDA module: found and loaded at run time, so that one build serves machines with and without
// a GPU.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "kvshrink/cuda_api.h"

namespace kvshrink::cuda {

// Loads the module once per process and gives its functions, which stay valid until the process
// ends. `path` names the module; empty: the environment variable KVSHRINK_CUDA_MODULE, else
// libkvshrink_cuda.so beside the executable, else by the dynamic linker's search. Thread-safe.
// Errors, each of one line: NOT_FOUND (no module), FAILED_PRECONDITION (a module of another build),
// UNAVAILABLE (no driver, or no device). An error isn't kept: the next call tries again.
absl::StatusOr<const CudaApi*> LoadModule(const std::string& path = "");

// OK for kOk, else INTERNAL or INVALID_ARGUMENT with the module's text and what was being done.
absl::Status ToStatus(const CudaApi& api, int result, std::string_view what);

}  // namespace kvshrink::cuda

// The runtime's calls that module.cu puts in its table.
#pragma once

#include "kvshrink/cuda_runtime_api.h"

namespace kvshrink::cuda {

const CudaRuntimeApi* RuntimeApi();

}  // namespace kvshrink::cuda

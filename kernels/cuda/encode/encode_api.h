// What the module offers for encoding.
#pragma once

#include "kvshrink/cuda_encode.h"

namespace kvshrink::cuda {

const CudaEncodeApi* EncodeApi();

}  // namespace kvshrink::cuda

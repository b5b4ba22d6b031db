// Tensors of any dtype as floats. Every value of the dtypes is a float, so nothing is rounded.
#pragma once

#include <cstddef>
#include <vector>

#include "kvshrink/block.h"

namespace kvshrink::client {

// `count` packed values of `dtype`, at any alignment.
void ToFloats(DType dtype, const std::byte* data, size_t count, float* out);

// All values, packed as [tokens, kv_heads, head_dim] whatever the tensor's layout.
std::vector<float> ToFloats(const ConstTensor& tensor);

}  // namespace kvshrink::client

// Rows of a block out of strided tensors and back.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "kvshrink/block.h"

namespace kvshrink {

// `count` consecutive tokens of one head.
struct RowRange {
  uint32_t head = 0;
  uint32_t first_row = 0;
  uint32_t count = 0;
};

// rows: count x head_dim fp32.
void GatherRows(const ConstTensor& tensor, const RowRange& range, float* rows);

// Appends the rows' exact bytes.
void AppendRowBytes(const ConstTensor& tensor, const RowRange& range, std::string* bytes);

// Rounds to the tensor's dtype.
void ScatterRows(const float* rows, const RowRange& range, const MutableTensor& tensor);

// `bytes` holds the rows in dtype `from`; copied exactly when that is the tensor's dtype.
void ScatterRowBytes(std::span<const uint8_t> bytes, DType from, const RowRange& range,
                     const MutableTensor& tensor);

}  // namespace kvshrink

// Where K and V lie in one byte string, checked: what a body must hold before memory is given to
// it.
#pragma once

#include <cstdint>
#include <string_view>

#include "absl/status/statusor.h"
#include "kvshrink/block.h"

namespace kvshrink::service {

struct TensorPlan {
  DType dtype = DType::kFp16;
  TensorShape shape;
  TensorLayout layout;  // of K, and of V
  uint64_t v_offset_bytes = 0;
  uint64_t bytes = 0;  // from the first byte of K to the last that V uses
  uint64_t max_bytes =
      0;  // the same with the padding that strides leave behind the last row or page

  // Views into `body`, which must hold `bytes` bytes and outlive them.
  ConstTensor K(std::string_view body) const;
  ConstTensor V(std::string_view body) const;
  MutableTensor K(std::byte* body) const;
  MutableTensor V(std::byte* body) const;
};

// Bytes of K and V packed.
uint64_t PackedBytes(const TensorShape& shape, DType dtype);

// Memory that encoding takes beside the tensors, at most: the coded blocks and the shard made of
// them, should all be kept raw.
uint64_t EncodeBytes(const TensorShape& shape, DType dtype);

// Checks the shape, that elements don't overlap, and the place of V (0 = directly after K). `field`
// is the path of the tensor in its request, for errors: INVALID_ARGUMENT naming the field.
absl::StatusOr<TensorPlan> MakeTensorPlan(DType dtype, const TensorShape& shape,
                                          const TensorLayout& layout, uint64_t v_offset_bytes,
                                          std::string_view field);

}  // namespace kvshrink::service

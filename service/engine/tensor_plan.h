// Where K and V (or K alone) lie in one byte string, checked: what a body must hold before memory
// is given to it.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "absl/status/statusor.h"
#include "kvshrink/block.h"

namespace kvshrink::service {

struct TensorPlan {
  DType dtype = DType::kFp16;
  TensorShape shape;
  TensorLayout layout;  // of K, and of V
  bool keys_only = false;
  uint64_t v_offset_bytes = 0;  // 0 with keys only
  uint64_t bytes = 0;           // from the first byte of K to the last that V (or K) uses
  uint64_t max_bytes =
      0;  // the same with the padding that strides leave behind the last row or page

  // Views into `body`, which must hold `bytes` bytes and outlive them. No V with keys only.
  ConstTensor K(std::string_view body) const;
  std::optional<ConstTensor> V(std::string_view body) const;
  MutableTensor K(std::byte* body) const;
  std::optional<MutableTensor> V(std::byte* body) const;
};

// Bytes of K and V (or K alone) packed.
uint64_t PackedBytes(const TensorShape& shape, DType dtype, bool keys_only);

// Memory that encoding takes beside the tensors, at most: the coded blocks and the shard made of
// them, should all be kept raw.
uint64_t EncodeBytes(const TensorShape& shape, DType dtype, bool keys_only);

// Checks the shape, that elements don't overlap, and the place of V (0 = directly after K, or keys
// only). `field` is the path of the tensor in its request, for errors: INVALID_ARGUMENT naming the
// field.
absl::StatusOr<TensorPlan> MakeTensorPlan(DType dtype, const TensorShape& shape,
                                          const TensorLayout& layout, bool keys_only,
                                          uint64_t v_offset_bytes, std::string_view field);

}  // namespace kvshrink::service

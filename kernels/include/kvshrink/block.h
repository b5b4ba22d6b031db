// Tensors as callers hold them: strided, of any supported dtype. Nothing here owns memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include "absl/status/status.h"

namespace kvshrink {

// Values are the bytes of the shard header (proto/FORMAT.md section 3).
enum class DType : uint8_t { kFp32 = 0, kFp16 = 1, kBf16 = 2, kFp8E4m3 = 3 };

constexpr size_t DTypeBytes(DType dtype) {
  return dtype == DType::kFp32 ? 4 : dtype == DType::kFp8E4m3 ? 1 : 2;
}
std::string_view DTypeName(DType dtype);  // "fp32", "fp16", "bf16", "fp8_e4m3"
std::optional<DType> DTypeFromName(std::string_view name);

inline constexpr uint32_t kBlockTokens = 128;
inline constexpr uint32_t kMaxHeadDim = 512;
inline constexpr uint32_t kMaxKvHeads = 256;
inline constexpr uint32_t kMaxTokens = 65536;
inline constexpr uint64_t kMaxEntries = uint64_t{1} << 27;  // of K of one shard, and of its V
inline constexpr uint32_t kMaxLayer = 4095;
inline constexpr uint32_t kMaxPosition =
    (uint32_t{1} << 31) - 1;  // of a token in its sequence, plus one

// Size of the K (or V) tensor of one layer of one chunk.
struct TensorShape {
  uint32_t tokens = 0;
  uint32_t kv_heads = 0;
  uint32_t head_dim = 0;

  bool operator==(const TensorShape&) const = default;
  size_t entries() const { return size_t{tokens} * kv_heads * head_dim; }
};

// Checks the limits above. Errors: INVALID_ARGUMENT naming the field.
absl::Status ValidateShape(const TensorShape& shape);

// Where element (token, head, channel) lies, in elements:
//   (token / page_tokens) * page_stride + (token % page_tokens) * token_stride + head * head_stride
//   + channel.
// [T,H,D], [H,T,D], one half of [2,T,H*D] and the paged forms [B,N,H,D] and [B,H,N,D] are all of
// this kind.
struct TensorLayout {
  uint32_t page_tokens = 0;  // 0: no pages
  uint64_t page_stride = 0;
  uint64_t token_stride = 0;
  uint64_t head_stride = 0;

  uint64_t Offset(uint32_t token, uint32_t head) const {
    const uint64_t page = page_tokens == 0 ? 0 : token / page_tokens;
    const uint64_t row = page_tokens == 0 ? token : token % page_tokens;
    return page * page_stride + row * token_stride + uint64_t{head} * head_stride;
  }
};

TensorLayout LayoutThd(const TensorShape& shape);                         // [T,H,D]
TensorLayout LayoutHtd(const TensorShape& shape);                         // [H,T,D]
TensorLayout LayoutBnhd(const TensorShape& shape, uint32_t page_tokens);  // [B,N,H,D]
TensorLayout LayoutBhnd(const TensorShape& shape, uint32_t page_tokens);  // [B,H,N,D]

// Elements from the first to one past the last that the layout touches for this shape; nullopt on
// overflow of 2^40.
std::optional<uint64_t> LayoutExtent(const TensorShape& shape, const TensorLayout& layout);

// `count` packed values of a dtype to fp32, exactly.
void ToFloats(const void* values, DType dtype, size_t count, float* floats);

// Host memory. `data` points at element (0, 0, 0); no alignment is needed, rows are copied
// byte-wise.
struct ConstTensor {
  const std::byte* data = nullptr;
  DType dtype = DType::kFp16;
  TensorShape shape;
  TensorLayout layout;
};

struct MutableTensor {
  std::byte* data = nullptr;
  DType dtype = DType::kFp16;
  TensorShape shape;
  TensorLayout layout;
};

}  // namespace kvshrink

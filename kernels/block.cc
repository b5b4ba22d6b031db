#include "kvshrink/block.h"

#include <algorithm>
#include <array>

#include "kvshrink/error.h"

namespace kvshrink {
namespace {

constexpr std::array<std::string_view, 4> kDTypeNames = {"fp32", "fp16", "bf16", "fp8_e4m3"};
constexpr uint64_t kMaxStride = uint64_t{1}
                                << 28;  // times 65536 tokens or pages: far from overflow
constexpr uint64_t kMaxExtent = uint64_t{1} << 40;

absl::Status CheckRange(std::string_view field, uint64_t value, uint64_t most) {
  if (value < 1 || value > most) {
    return BadArgument(field, value, StrCat("must be 1..", most));
  }
  return absl::OkStatus();
}

}  // namespace

std::string_view DTypeName(DType dtype) { return kDTypeNames[static_cast<size_t>(dtype)]; }

std::optional<DType> DTypeFromName(std::string_view name) {
  const auto* found = std::find(kDTypeNames.begin(), kDTypeNames.end(), name);
  if (found == kDTypeNames.end()) {
    return std::nullopt;
  }
  return static_cast<DType>(found - kDTypeNames.begin());
}

absl::Status ValidateShape(const TensorShape& shape) {
  KVSHRINK_RETURN_IF_ERROR(CheckRange("tokens", shape.tokens, kMaxTokens));
  KVSHRINK_RETURN_IF_ERROR(CheckRange("kv_heads", shape.kv_heads, kMaxKvHeads));
  KVSHRINK_RETURN_IF_ERROR(CheckRange("head_dim", shape.head_dim, kMaxHeadDim));
  if (shape.entries() > kMaxEntries) {
    return BadArgument("tokens * kv_heads * head_dim", shape.entries(),
                       StrCat("must be at most ", kMaxEntries));
  }
  return absl::OkStatus();
}

TensorLayout LayoutThd(const TensorShape& shape) {
  return {0, 0, uint64_t{shape.kv_heads} * shape.head_dim, shape.head_dim};
}

TensorLayout LayoutHtd(const TensorShape& shape) {
  return {0, 0, shape.head_dim, uint64_t{shape.tokens} * shape.head_dim};
}

TensorLayout LayoutBnhd(const TensorShape& shape, uint32_t page_tokens) {
  const uint64_t token = uint64_t{shape.kv_heads} * shape.head_dim;
  return {page_tokens, page_tokens * token, token, shape.head_dim};
}

TensorLayout LayoutBhnd(const TensorShape& shape, uint32_t page_tokens) {
  const uint64_t head = uint64_t{page_tokens} * shape.head_dim;
  return {page_tokens, shape.kv_heads * head, shape.head_dim, head};
}

std::optional<uint64_t> LayoutExtent(const TensorShape& shape, const TensorLayout& layout) {
  if (std::max({layout.page_stride, layout.token_stride, layout.head_stride}) > kMaxStride) {
    return std::nullopt;
  }
  // Strides are not negative, so the last page's last token (or the last full page's) lies
  // farthest.
  const uint32_t last = shape.tokens - 1;
  uint64_t extent = layout.Offset(last, shape.kv_heads - 1);
  if (layout.page_tokens != 0 && last >= layout.page_tokens) {
    const uint32_t end_of_page = last / layout.page_tokens * layout.page_tokens - 1;
    extent = std::max(extent, layout.Offset(end_of_page, shape.kv_heads - 1));
  }
  extent += shape.head_dim;
  return extent <= kMaxExtent ? std::optional(extent) : std::nullopt;
}

}  // namespace kvshrink

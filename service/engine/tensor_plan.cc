#include "service/engine/tensor_plan.h"

#include <algorithm>
#include <array>
#include <optional>
#include <string>

#include "kvshrink/error.h"
#include "kvshrink/strcat.h"

namespace kvshrink::service {
namespace {

// Strides up to here keep every sum below 2^64: at most 2^16 steps of a stride each.
constexpr uint64_t kMaxStride = uint64_t{1} << 40;

struct Axis {
  std::string_view name;
  uint64_t count;
  uint64_t stride;
};

std::array<Axis, 3> AxesOf(const TensorShape& shape, const TensorLayout& layout) {
  const uint64_t page = layout.page_tokens == 0 ? shape.tokens : layout.page_tokens;
  return {{{"head_stride", shape.kv_heads, layout.head_stride},
           {"token_stride", std::min<uint64_t>(shape.tokens, page), layout.token_stride},
           {"page_stride", (shape.tokens + page - 1) / page, layout.page_stride}}};
}

absl::Status Named(std::string_view field, const absl::Status& status) {
  return absl::Status(status.code(), StrCat(field, ": ", status.message()));
}

// A stride must reach past everything that lies inside one of its steps; else two elements would
// share a place.
absl::Status CheckStrides(const TensorShape& shape, const TensorLayout& layout,
                          std::string_view field) {
  std::array<Axis, 3> axes = AxesOf(shape, layout);
  std::sort(axes.begin(), axes.end(),
            [](const Axis& a, const Axis& b) { return a.stride < b.stride; });
  uint64_t span = shape.head_dim;
  for (const Axis& axis : axes) {
    const std::string name = StrCat(field, ".layout.", axis.name);
    if (axis.stride > kMaxStride) {
      return BadArgument(name, axis.stride, StrCat("must be at most ", kMaxStride));
    }
    if (axis.count <= 1) {
      continue;
    }
    if (axis.stride < span) {
      return BadArgument(name, axis.stride,
                         StrCat("must be at least ", span, ", else elements overlap"));
    }
    span += (axis.count - 1) * axis.stride;
  }
  return absl::OkStatus();
}

// Elements of a tensor whose last row, head or page is followed by the padding of its stride.
uint64_t PaddedExtent(const TensorShape& shape, const TensorLayout& layout, uint64_t extent) {
  for (const Axis& axis : AxesOf(shape, layout)) {
    if (axis.count > 1) {
      extent = std::max(extent, axis.count * axis.stride);
    }
  }
  if (layout.page_tokens !=
      0) {  // whole pages, also when the last isn't full, or there is one only
    const uint64_t page = uint64_t{layout.page_tokens - 1} * layout.token_stride +
                          (shape.kv_heads - 1) * layout.head_stride + shape.head_dim;
    const uint64_t pages = (shape.tokens - 1) / layout.page_tokens;
    extent = std::max(extent, pages * layout.page_stride + page);
  }
  return extent;
}

}  // namespace

ConstTensor TensorPlan::K(std::string_view body) const {
  return {reinterpret_cast<const std::byte*>(body.data()), dtype, shape, layout};
}
std::optional<ConstTensor> TensorPlan::V(std::string_view body) const {
  if (keys_only) {
    return std::nullopt;
  }
  return ConstTensor{reinterpret_cast<const std::byte*>(body.data()) + v_offset_bytes, dtype, shape,
                     layout};
}
MutableTensor TensorPlan::K(std::byte* body) const { return {body, dtype, shape, layout}; }
std::optional<MutableTensor> TensorPlan::V(std::byte* body) const {
  if (keys_only) {
    return std::nullopt;
  }
  return MutableTensor{body + v_offset_bytes, dtype, shape, layout};
}

uint64_t PackedBytes(const TensorShape& shape, DType dtype, bool keys_only) {
  return (keys_only ? 1 : 2) * uint64_t{shape.entries()} * DTypeBytes(dtype);
}

uint64_t EncodeBytes(const TensorShape& shape, DType dtype, bool keys_only) {
  return 2 * PackedBytes(shape, dtype, keys_only);
}

// Whether V may start at this element: behind all of K, or beside K in pages that hold both
// ([B,2,N,H,D]).
bool PlaceOfV(const TensorShape& shape, const TensorLayout& layout, uint64_t extent,
              uint64_t offset) {
  if (offset >= extent) {
    return true;
  }
  if (layout.page_tokens == 0) {
    return false;
  }
  const uint64_t tokens = std::min(shape.tokens, layout.page_tokens);
  const uint64_t in_page = (tokens - 1) * layout.token_stride +
                           (shape.kv_heads - uint64_t{1}) * layout.head_stride + shape.head_dim;
  return offset >= in_page && offset + in_page <= layout.page_stride;
}

absl::StatusOr<TensorPlan> MakeTensorPlan(DType dtype, const TensorShape& shape,
                                          const TensorLayout& layout, bool keys_only,
                                          uint64_t v_offset_bytes, std::string_view field) {
  if (absl::Status status = ValidateShape(shape); !status.ok()) {
    return Named(StrCat(field, ".shape"), status);
  }
  if (layout.page_tokens > kMaxTokens) {
    return BadArgument(StrCat(field, ".layout.page_tokens"), layout.page_tokens,
                       StrCat("must be at most ", kMaxTokens));
  }
  KVSHRINK_RETURN_IF_ERROR(CheckStrides(shape, layout, field));
  const std::optional<uint64_t> extent = LayoutExtent(shape, layout);
  if (!extent.has_value()) {
    return absl::InvalidArgumentError(StrCat(
        "field '", field, ".layout': its strides reach beyond 2^40 elements for this shape"));
  }
  const uint64_t size = DTypeBytes(dtype);
  const uint64_t extent_bytes = *extent * size;
  const uint64_t padded_bytes = PaddedExtent(shape, layout, *extent) * size;
  const std::string v_field = StrCat(field, ".v_offset_bytes");
  if (keys_only) {
    if (v_offset_bytes != 0) {
      return BadArgument(v_field, v_offset_bytes, "must be 0 with keys_only");
    }
    return TensorPlan{dtype, shape, layout, true, 0, extent_bytes, padded_bytes};
  }
  TensorPlan plan{dtype, shape, layout, false, v_offset_bytes, 0, 0};
  if (plan.v_offset_bytes == 0) {
    plan.v_offset_bytes = extent_bytes;
  }
  if (plan.v_offset_bytes % size != 0) {
    return BadArgument(v_field, v_offset_bytes,
                       StrCat("must be a multiple of ", size, ", the size of ", DTypeName(dtype)));
  }
  if (plan.v_offset_bytes > size * kMaxStride ||
      !PlaceOfV(shape, layout, *extent, plan.v_offset_bytes / size)) {
    return BadArgument(v_field, v_offset_bytes,
                       StrCat("must be ", extent_bytes, " (the extent of K) to ", size * kMaxStride,
                              ", or lie beside K in its pages"));
  }
  plan.bytes = plan.v_offset_bytes + extent_bytes;
  plan.max_bytes = plan.v_offset_bytes + padded_bytes;
  return plan;
}

}  // namespace kvshrink::service

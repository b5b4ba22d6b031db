#include "service/rpc/tensor_spec.h"

#include <string>

#include "kvshrink/error.h"
#include "kvshrink/strcat.h"
#include "service/rpc/convert.h"

namespace kvshrink::service {
namespace {

bool Paged(v1::Order order) { return order == v1::ORDER_BNHD || order == v1::ORDER_BHND; }

bool HasStrides(const v1::Layout& layout) {
  return layout.page_stride() != 0 || layout.token_stride() != 0 || layout.head_stride() != 0;
}

// `layout` has passed CheckLayout, `shape` ValidateShape.
TensorLayout ToLayout(const v1::Layout& layout, const TensorShape& shape) {
  if (HasStrides(layout)) {
    return {layout.page_tokens(), layout.page_stride(), layout.token_stride(),
            layout.head_stride()};
  }
  switch (layout.order()) {
    case v1::ORDER_HTD:
      return LayoutHtd(shape);
    case v1::ORDER_BNHD:
      return LayoutBnhd(shape, layout.page_tokens());
    case v1::ORDER_BHND:
      return LayoutBhnd(shape, layout.page_tokens());
    default:
      return LayoutThd(shape);
  }
}

absl::StatusOr<TensorPlan> Plan(DType dtype, const TensorShape& shape, const v1::Layout& layout,
                                bool keys_only, uint64_t v_offset_bytes) {
  KVSHRINK_RETURN_IF_ERROR(CheckLayout(layout, "tensor.layout"));
  KVSHRINK_RETURN_IF_ERROR(ValidateShape(shape));
  return MakeTensorPlan(dtype, shape, ToLayout(layout, shape), keys_only, v_offset_bytes, "tensor");
}

}  // namespace

absl::Status CheckLayout(const v1::Layout& layout, std::string_view field) {
  if (layout.order() < v1::ORDER_UNSPECIFIED || layout.order() > v1::ORDER_BHND) {
    return BadArgument(StrCat(field, ".order"), static_cast<int>(layout.order()),
                       "must be ORDER_THD, ORDER_HTD, ORDER_BNHD or ORDER_BHND");
  }
  const bool paged = Paged(layout.order());
  if (paged != (layout.page_tokens() != 0)) {
    return BadArgument(
        StrCat(field, ".page_tokens"), layout.page_tokens(),
        paged ? "must be given for paged orders" : "must be 0 for orders without pages");
  }
  if (layout.page_tokens() > kMaxTokens) {
    return BadArgument(StrCat(field, ".page_tokens"), layout.page_tokens(),
                       StrCat("must be at most ", kMaxTokens));
  }
  if (!HasStrides(layout)) {
    return absl::OkStatus();
  }
  if (paged != (layout.page_stride() != 0)) {
    return BadArgument(
        StrCat(field, ".page_stride"), layout.page_stride(),
        paged ? "must be given with the other strides" : "must be 0 for orders without pages");
  }
  if (layout.token_stride() == 0) {
    return BadArgument(StrCat(field, ".token_stride"), 0, "must be given with the other strides");
  }
  if (layout.head_stride() == 0) {
    return BadArgument(StrCat(field, ".head_stride"), 0, "must be given with the other strides");
  }
  return absl::OkStatus();
}

absl::StatusOr<TensorPlan> PlanInput(const v1::TensorSpec& spec, uint64_t body_bytes) {
  absl::StatusOr<DType> dtype = ToDType(spec.dtype(), "tensor.dtype");
  if (!dtype.ok()) {
    return dtype.status();
  }
  const TensorShape shape{spec.shape().tokens(), spec.shape().kv_heads(), spec.shape().head_dim()};
  absl::StatusOr<TensorPlan> plan =
      Plan(*dtype, shape, spec.layout(), spec.keys_only(), spec.v_offset_bytes());
  if (!plan.ok()) {
    return plan.status();
  }
  if (body_bytes < plan->bytes || body_bytes > plan->max_bytes) {
    return BadArgument(
        "body_bytes", body_bytes,
        plan->bytes == plan->max_bytes
            ? StrCat("must be ", plan->bytes, " for this tensor")
            : StrCat("must be ", plan->bytes, "..", plan->max_bytes, " for this tensor"));
  }
  return plan;
}

absl::StatusOr<TensorPlan> PlanOutput(DType dtype, const v1::Layout& layout,
                                      const TensorShape& shape, bool keys_only,
                                      uint64_t max_bytes) {
  absl::StatusOr<TensorPlan> plan = Plan(dtype, shape, layout, keys_only, 0);
  if (plan.ok() && plan->bytes > max_bytes) {
    return absl::InvalidArgumentError(StrCat("the answer's tensor would hold ", plan->bytes,
                                             " bytes with this dtype and layout: "
                                             "must be at most ",
                                             max_bytes));
  }
  return plan;
}

void FillTensorSpec(const TensorPlan& plan, v1::Order order, v1::TensorSpec* out) {
  out->set_dtype(FromDType(plan.dtype));
  out->mutable_shape()->set_tokens(plan.shape.tokens);
  out->mutable_shape()->set_kv_heads(plan.shape.kv_heads);
  out->mutable_shape()->set_head_dim(plan.shape.head_dim);
  v1::Layout* layout = out->mutable_layout();
  layout->set_order(order == v1::ORDER_UNSPECIFIED ? v1::ORDER_THD : order);
  layout->set_page_tokens(plan.layout.page_tokens);
  layout->set_page_stride(plan.layout.page_stride);
  layout->set_token_stride(plan.layout.token_stride);
  layout->set_head_stride(plan.layout.head_stride);
  out->set_v_offset_bytes(plan.v_offset_bytes);
  out->set_keys_only(plan.keys_only);
}

}  // namespace kvshrink::service

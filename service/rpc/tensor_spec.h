// Tensors as requests describe them, turned into plans.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "kvshrink/v1/types.pb.h"
#include "service/engine/tensor_plan.h"

namespace kvshrink::service {

// A tensor that a body of `body_bytes` holds: every check before memory is given to it.
// INVALID_ARGUMENT naming the field.
absl::StatusOr<TensorPlan> PlanInput(const v1::TensorSpec& spec, uint64_t body_bytes);

// The checks of a layout that need no shape. INVALID_ARGUMENT naming the field.
absl::Status CheckLayout(const v1::Layout& layout, std::string_view field);

// K then V (or K alone) as a caller wants them; at most max_bytes. INVALID_ARGUMENT naming the
// field.
absl::StatusOr<TensorPlan> PlanOutput(DType dtype, const v1::Layout& layout,
                                      const TensorShape& shape, bool keys_only, uint64_t max_bytes);

// Describes a plan, strides and all.
void FillTensorSpec(const TensorPlan& plan, v1::Order order, v1::TensorSpec* out);

}  // namespace kvshrink::service

// What the RPCs do with shards beyond the codec's own calls.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kvshrink/codec.h"
#include "kvshrink/shard.h"
#include "service/engine/tensor_plan.h"

namespace kvshrink::service {

// A report of a shard whose source isn't known: sizes, ranks and raw blocks; its errors are 0.
ShardReport ReportOf(const Shard& shard);

// Unpacks every block, so that each check of the format has been made. Errors: DATA_LOSS naming the
// field.
absl::Status CheckBlocks(const Backend& backend, const Shard& shard);

// Decodes into a new byte string of plan.bytes bytes (gaps between strides are zero). `kv_heads`,
// ascending, picks heads; empty = all; plan.shape has as many heads as are picked. `basis`: that of
// the shard, or null. Errors: INVALID_ARGUMENT (a head that isn't there), FAILED_PRECONDITION (no
// basis), DATA_LOSS.
absl::StatusOr<std::string> DecodeToBytes(const Backend& backend, const Shard& shard,
                                          DecodeForm form, const TensorPlan& plan,
                                          std::span<const uint32_t> kv_heads, const Basis* basis);

}  // namespace kvshrink::service

// Between the messages of kvshrink.v1 and the types of the codec and the store.
#pragma once

#include <grpcpp/support/status.h>

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kvshrink/codec.h"
#include "kvshrink/v1/kvshrink.pb.h"
#include "service/store/store.h"

namespace kvshrink::service {

// Errors: INVALID_ARGUMENT naming `field`. Unspecified is an error here; the caller knows what it
// stands for.
absl::StatusOr<DType> ToDType(v1::DType dtype, std::string_view field);
absl::StatusOr<Profile> ToProfile(v1::Profile profile,
                                  std::string_view field);  // unspecified = default
absl::StatusOr<EncodeOptions> ToEncodeOptions(const v1::EncodeSpec& spec, uint32_t layer);
absl::StatusOr<Rope> ToRope(const v1::Rope& rope);
// That the chunk's last position and its embedding fit. INVALID_ARGUMENT naming encode.first_token
// or rope.<field>.
absl::Status CheckFit(const EncodeOptions& options, const TensorShape& shape);
absl::StatusOr<store::ChunkKey> ToChunkKey(const std::string& tenant, const v1::ChunkId& id,
                                           std::string_view field);

v1::DType FromDType(DType dtype);
v1::Profile FromProfile(Profile profile);
v1::Tier FromTier(store::TierName tier);

store::ShardMeta MetaOf(const ShardHeader& header, uint64_t bytes);
void FillShardInfo(const store::ShardMeta& meta, v1::ShardInfo* out);
void FillChunkInfo(const store::ChunkStat& stat, v1::ChunkInfo* out);
void FillStats(const ShardReport& report, v1::ShardStats* out);

// `retry_after_ms` goes into refusals (RESOURCE_EXHAUSTED) only.
void FillStatus(const absl::Status& status, uint32_t retry_after_ms, v1::ObjectStatus* out);
grpc::Status ToGrpc(const absl::Status& status);

// A violation in a shard that the caller sent: INVALID_ARGUMENT in place of DATA_LOSS.
absl::Status AsCallersFault(const absl::Status& status);

}  // namespace kvshrink::service

#include "service/rpc/convert.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "kvshrink/error.h"
#include "kvshrink/strcat.h"
#include "service/rpc/limits.h"

namespace kvshrink::service {
namespace {

// The messages number both enums one up, so that 0 is free for "unspecified".
static_assert(static_cast<int>(DType::kFp32) + 1 == v1::DTYPE_FP32);
static_assert(static_cast<int>(DType::kFp8E4m3) + 1 == v1::DTYPE_FP8_E4M3);
static_assert(static_cast<int>(RopePairing::kGptj) + 1 == v1::ROPE_PAIRING_GPTJ);
static_assert(static_cast<int>(RopeScaling::kYarnUntruncated) + 1 ==
              v1::ROPE_SCALING_YARN_UNTRUNCATED);
static_assert(static_cast<int>(Profile::kRaw) + 1 == v1::PROFILE_RAW);
static_assert(static_cast<int>(Profile::kKvs2c) + 1 == v1::PROFILE_KVS2C);

void FillKind(const KindReport& report, v1::KindStats* out) {
  out->set_bits_per_entry(report.bits_per_entry());
  out->set_relative_error(report.relative_error());
  out->set_max_block_relative_error(report.max_block_relative_error);
  out->set_blocks(report.blocks);
  out->set_raw_blocks(report.raw_blocks);
  out->set_escalated_blocks(report.escalated_blocks);
  size_t ranks = report.rank_histogram.size();
  while (ranks > 0 && report.rank_histogram[ranks - 1] == 0) {
    --ranks;
  }
  for (size_t rank = 0; rank < ranks; ++rank) {
    out->add_rank_histogram(report.rank_histogram[rank]);
  }
}

}  // namespace

absl::StatusOr<DType> ToDType(v1::DType dtype, std::string_view field) {
  if (dtype < v1::DTYPE_FP32 || dtype > v1::DTYPE_FP8_E4M3) {
    return BadArgument(field, static_cast<int>(dtype),
                       "must be DTYPE_FP32, DTYPE_FP16, DTYPE_BF16 or DTYPE_FP8_E4M3");
  }
  return static_cast<DType>(dtype - 1);
}

absl::StatusOr<Profile> ToProfile(v1::Profile profile, std::string_view field) {
  if (profile == v1::PROFILE_UNSPECIFIED) {
    return kDefaultProfile;
  }
  const int id = static_cast<int>(profile) - 1;
  const auto known = id >= 0 && id <= UINT8_MAX ? ProfileFromId(static_cast<uint8_t>(id))
                                                : std::optional<Profile>();
  if (!known.has_value()) {
    return BadArgument(field, static_cast<int>(profile), "is no profile of this build");
  }
  return *known;
}

absl::StatusOr<EncodeOptions> ToEncodeOptions(const v1::EncodeSpec& spec, uint32_t layer) {
  EncodeOptions options;
  absl::StatusOr<Profile> profile = ToProfile(spec.profile(), "encode.profile");
  if (!profile.ok()) {
    return profile.status();
  }
  options.profile = *profile;
  options.layer = layer;
  options.first_token = spec.first_token();
  options.max_relative_error = spec.max_relative_error();
  if (spec.has_raw_tokens()) {
    options.raw_tokens = spec.raw_tokens();
  }
  if (!std::isfinite(options.max_relative_error) || options.max_relative_error < 0) {
    return BadArgument("encode.max_relative_error", options.max_relative_error,
                       "must be finite and not negative");
  }
  options.bits_per_entry = spec.bits_per_entry();
  options.fixed_size = spec.fixed_size();
  if (const absl::Status rate = CheckRate(options); !rate.ok()) {
    return rate;
  }
  if (layer > kMaxLayer) {
    return BadArgument("layer", layer, StrCat("must be 0..", kMaxLayer));
  }
  if (spec.has_rope()) {
    absl::StatusOr<Rope> rope = ToRope(spec.rope());
    if (!rope.ok()) {
      return rope.status();
    }
    options.rope = *rope;
  }
  return options;
}

absl::StatusOr<Rope> ToRope(const v1::Rope& rope) {
  Rope out;
  out.theta = rope.theta();
  out.rotary_dim = rope.rotary_dim();
  if (rope.pairing() < 0 || rope.pairing() > v1::ROPE_PAIRING_GPTJ) {
    return BadArgument("rope.pairing", static_cast<int>(rope.pairing()), "must be NEOX or GPTJ");
  }
  if (rope.scaling() < 0 || rope.scaling() > v1::ROPE_SCALING_YARN_UNTRUNCATED) {
    return BadArgument("rope.scaling", static_cast<int>(rope.scaling()), "is unknown");
  }
  out.pairing = static_cast<RopePairing>(std::max(1, static_cast<int>(rope.pairing())) - 1);
  out.scaling = static_cast<RopeScaling>(std::max(1, static_cast<int>(rope.scaling())) - 1);
  out.position_offset = rope.position_offset();
  out.factor = rope.has_factor() ? rope.factor() : out.factor;
  out.original_max_position =
      rope.has_original_max_position() ? rope.original_max_position() : out.original_max_position;
  out.beta_fast = rope.has_beta_fast() ? rope.beta_fast() : out.beta_fast;
  out.beta_slow = rope.has_beta_slow() ? rope.beta_slow() : out.beta_slow;
  out.low_freq_factor = rope.has_low_freq_factor() ? rope.low_freq_factor() : out.low_freq_factor;
  out.high_freq_factor =
      rope.has_high_freq_factor() ? rope.high_freq_factor() : out.high_freq_factor;
  return out;
}

absl::Status CheckFit(const EncodeOptions& options, const TensorShape& shape) {
  if (uint64_t{options.first_token} + shape.tokens > kMaxPosition) {
    return BadArgument("encode.first_token", options.first_token,
                       StrCat("first_token + tokens must be at most ", kMaxPosition));
  }
  return options.rope.has_value() ? ValidateRope(*options.rope, shape.head_dim) : absl::OkStatus();
}

absl::StatusOr<store::ChunkKey> ToChunkKey(const std::string& tenant, const v1::ChunkId& id,
                                           std::string_view field) {
  if (id.namespace_().empty() || id.namespace_().size() > kMaxNamespaceBytes) {
    return BadArgument(StrCat(field, ".namespace"), StrCat(id.namespace_().size(), " bytes"),
                       StrCat("must be 1..", kMaxNamespaceBytes, " bytes of UTF-8"));
  }
  if (id.key().empty() || id.key().size() > kMaxKeyBytes) {
    return BadArgument(StrCat(field, ".key"), StrCat(id.key().size(), " bytes"),
                       StrCat("must be 1..", kMaxKeyBytes, " bytes"));
  }
  return store::ChunkKey{tenant, id.namespace_(), id.key()};
}

v1::DType FromDType(DType dtype) { return static_cast<v1::DType>(static_cast<int>(dtype) + 1); }

v1::Profile FromProfile(Profile profile) {
  return static_cast<v1::Profile>(static_cast<int>(profile) + 1);
}

v1::Tier FromTier(store::TierName tier) {
  switch (tier) {
    case store::TierName::kDevice:
      return v1::TIER_DEVICE;
    case store::TierName::kHost:
      return v1::TIER_HOST;
    case store::TierName::kDisk:
      return v1::TIER_DISK;
    case store::TierName::kCluster:
      return v1::TIER_CLUSTER;
  }
  return v1::TIER_UNSPECIFIED;
}

store::ShardMeta MetaOf(const ShardHeader& header, uint64_t bytes) {
  store::ShardMeta meta;
  meta.layer = header.layer;
  meta.profile = static_cast<uint8_t>(header.profile);
  meta.dtype = static_cast<uint8_t>(header.dtype);
  meta.tokens = header.shape.tokens;
  meta.kv_heads = header.shape.kv_heads;
  meta.head_dim = header.shape.head_dim;
  meta.first_token = header.first_token;
  meta.keys_only = header.keys_only;
  meta.raw_bytes = header.raw_bytes();
  meta.bytes = bytes;
  return meta;
}

void FillShardInfo(const store::ShardMeta& meta, v1::ShardInfo* out) {
  out->set_layer(meta.layer);
  out->set_profile(static_cast<v1::Profile>(meta.profile + 1));
  out->set_dtype(static_cast<v1::DType>(meta.dtype + 1));
  out->mutable_shape()->set_tokens(meta.tokens);
  out->mutable_shape()->set_kv_heads(meta.kv_heads);
  out->mutable_shape()->set_head_dim(meta.head_dim);
  out->set_first_token(meta.first_token);
  out->set_bytes(meta.bytes);
  out->set_keys_only(meta.keys_only);
}

void FillChunkInfo(const store::ChunkStat& stat, v1::ChunkInfo* out) {
  out->mutable_id()->set_namespace_(stat.key.name_space);
  out->mutable_id()->set_key(stat.key.key);
  out->set_committed(stat.committed);
  out->set_layers(stat.layers);
  // A listing may leave the shards out; all of a committed chunk's are there.
  out->set_layers_present(stat.committed ? stat.layers : static_cast<uint32_t>(stat.shards.size()));
  out->set_tokens(stat.tokens);
  out->set_raw_bytes(stat.raw_bytes);
  out->set_bytes(stat.bytes);
  for (store::TierName tier : stat.tiers) {
    out->add_tiers(FromTier(tier));
  }
  out->set_leased(stat.leased);
  out->set_created_unix_ms(stat.created_unix_ms);
}

void FillStats(const ShardReport& report, v1::ShardStats* out) {
  out->set_raw_bytes(report.raw_bytes);
  out->set_encoded_bytes(report.encoded_bytes);
  out->set_bits_per_entry(report.bits_per_entry());
  FillKind(report.k, out->mutable_k());
  if (report.v.entries > 0) {
    FillKind(report.v, out->mutable_v());
  }
}

void FillStatus(const absl::Status& status, uint32_t retry_after_ms, v1::ObjectStatus* out) {
  out->set_code(static_cast<int>(status.code()));
  out->set_message(std::string(status.message()));
  if (absl::IsResourceExhausted(status)) {
    out->set_retry_after_ms(retry_after_ms);
  }
}

grpc::Status ToGrpc(const absl::Status& status) {
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), std::string(status.message()));
}

absl::Status AsCallersFault(const absl::Status& status) {
  return absl::IsDataLoss(status) ? absl::InvalidArgumentError(status.message()) : status;
}

}  // namespace kvshrink::service

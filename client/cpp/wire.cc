#include "kvshrink/client/wire.h"

#include "kvshrink/client/status.h"

namespace kvshrink::client {
namespace {

// Both enums number the same things from 0 and from 1, with 0 for "not given".
constexpr int kProtoOffset = 1;

}  // namespace

static_assert(v1::DTYPE_FP32 == static_cast<int>(DType::kFp32) + kProtoOffset);
static_assert(v1::DTYPE_FP8_E4M3 == static_cast<int>(DType::kFp8E4m3) + kProtoOffset);
static_assert(v1::ROPE_PAIRING_GPTJ == static_cast<int>(RopePairing::kGptj) + kProtoOffset);
static_assert(v1::ROPE_SCALING_NONE == static_cast<int>(RopeScaling::kNone) + kProtoOffset);
static_assert(v1::ROPE_SCALING_YARN_UNTRUNCATED ==
              static_cast<int>(RopeScaling::kYarnUntruncated) + kProtoOffset);
static_assert(v1::PROFILE_RAW == static_cast<int>(Profile::kRaw) + kProtoOffset);
static_assert(v1::PROFILE_KVS2C == static_cast<int>(Profile::kKvs2c) + kProtoOffset);

v1::DType ToProto(DType dtype) {
  return static_cast<v1::DType>(static_cast<int>(dtype) + kProtoOffset);
}

v1::Profile ToProto(Profile profile) {
  return static_cast<v1::Profile>(static_cast<int>(profile) + kProtoOffset);
}

v1::Rope ToProto(const Rope& rope) {
  v1::Rope out;
  out.set_theta(rope.theta);
  out.set_rotary_dim(rope.rotary_dim);
  out.set_pairing(static_cast<v1::RopePairing>(static_cast<int>(rope.pairing) + kProtoOffset));
  out.set_scaling(static_cast<v1::RopeScaling>(static_cast<int>(rope.scaling) + kProtoOffset));
  out.set_position_offset(rope.position_offset);
  out.set_factor(rope.factor);
  out.set_original_max_position(rope.original_max_position);
  out.set_beta_fast(rope.beta_fast);
  out.set_beta_slow(rope.beta_slow);
  out.set_low_freq_factor(rope.low_freq_factor);
  out.set_high_freq_factor(rope.high_freq_factor);
  return out;
}

std::optional<DType> FromProto(v1::DType dtype) {
  if (dtype < v1::DTYPE_FP32 || dtype > v1::DTYPE_FP8_E4M3) {
    return std::nullopt;
  }
  return static_cast<DType>(static_cast<int>(dtype) - kProtoOffset);
}

std::optional<Profile> FromProto(v1::Profile profile) {
  const int id = static_cast<int>(profile) - kProtoOffset;
  return id < 0 || id > 255 ? std::nullopt : ProfileFromId(static_cast<uint8_t>(id));
}

std::string_view TierName(v1::Tier tier) {
  switch (tier) {
    case v1::TIER_DEVICE:
      return "device";
    case v1::TIER_HOST:
      return "host";
    case v1::TIER_DISK:
      return "disk";
    case v1::TIER_CLUSTER:
      return "cluster";
    default:
      return "unknown";
  }
}

absl::Status ToStatus(const v1::ObjectStatus& status) {
  if (status.code() == 0) {
    return absl::OkStatus();
  }
  const auto code = static_cast<absl::StatusCode>(status.code());
  const bool known =
      status.code() > 0 && status.code() <= static_cast<int>(absl::StatusCode::kUnauthenticated);
  return absl::Status(known ? code : absl::StatusCode::kUnknown, status.message());
}

absl::Status ToStatus(const grpc::Status& status, const std::string& server) {
  if (status.ok()) {
    return absl::OkStatus();
  }
  const bool not_there = status.error_code() == grpc::StatusCode::UNAVAILABLE &&
                         status.error_message().find("failed to connect") != std::string::npos;
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()),
                      StrCat("server ", server, ": ", status.error_message(),
                             not_there ? " - is kvshrinkd running there?" : ""));
}

}  // namespace kvshrink::client

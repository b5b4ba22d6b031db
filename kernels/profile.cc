#include "kvshrink/profile.h"

#include <array>

namespace kvshrink {
namespace {

constexpr std::array<ProfileInfo, 12> kProfiles = {{
    {Profile::kRaw, "raw", Family::kRaw, BlockCode::kRaw, "exact copy"},
    {Profile::kFp8, "fp8", Family::kFp8, BlockCode::kFp8,
     "e4m3 with a power-of-two scale per block"},
    {Profile::kTq2, "tq2", Family::kTq, BlockCode::kLevels4,
     "TurboQuant, 2 bits: rotation, fp16 norm per row"},
    {Profile::kTq3, "tq3", Family::kTq, BlockCode::kLevels8, "TurboQuant, 3 bits"},
    {Profile::kTq4, "tq4", Family::kTq, BlockCode::kLevels16, "TurboQuant, 4 bits"},
    {Profile::kEOptShrinkQ2, "eoptshrinkq2", Family::kEOptShrinkQ, BlockCode::kLevels4,
     "eOptShrinkQ as published: shrunk low rank, 2-bit residual"},
    {Profile::kKvs2, "kvs2", Family::kKvs, BlockCode::kLevels3,
     "closed-loop low rank, residual at 1.6 bits"},
    {Profile::kKvs3, "kvs3", Family::kKvs, BlockCode::kLevels6,
     "closed-loop low rank, residual at 2.6 bits"},
    {Profile::kKvs4, "kvs4", Family::kKvs, BlockCode::kLevels12,
     "closed-loop low rank, residual at 3.6 bits"},
    {Profile::kKvs2t, "kvs2t", Family::kKvs, BlockCode::kTrellis15,
     "closed-loop low rank, trellis-coded residual at 1.5 bits"},
    {Profile::kKvs3t, "kvs3t", Family::kKvs, BlockCode::kTrellis25,
     "closed-loop low rank, trellis-coded residual at 2.5 bits"},
    {Profile::kKvs2c, "kvs2c", Family::kKvs, BlockCode::kLevels3,
     "kvs2 with K in the metric of a calibrated basis"},
}};

}  // namespace

std::span<const ProfileInfo> AllProfiles() { return kProfiles; }

const ProfileInfo& GetProfileInfo(Profile profile) {
  return kProfiles[static_cast<size_t>(profile)];
}

std::optional<Profile> ProfileFromName(std::string_view name) {
  for (const ProfileInfo& info : kProfiles) {
    if (info.name == name) {
      return info.profile;
    }
  }
  return std::nullopt;
}

std::optional<Profile> ProfileFromId(uint8_t id) {
  if (id >= kProfiles.size()) {
    return std::nullopt;
  }
  return static_cast<Profile>(id);
}

}  // namespace kvshrink

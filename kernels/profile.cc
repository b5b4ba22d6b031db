#include "kvshrink/profile.h"

#include <array>

namespace kvshrink {
namespace {

constexpr std::array<ProfileInfo, 9> kProfiles = {{
    {Profile::kRaw, "raw", Family::kRaw, 0, "exact copy"},
    {Profile::kFp8, "fp8", Family::kFp8, 0, "e4m3 with a power-of-two scale per block"},
    {Profile::kTq2, "tq2", Family::kTq, 4, "TurboQuant, 2 bits: rotation, fp16 norm per row"},
    {Profile::kTq3, "tq3", Family::kTq, 8, "TurboQuant, 3 bits"},
    {Profile::kTq4, "tq4", Family::kTq, 16, "TurboQuant, 4 bits"},
    {Profile::kEOptShrinkQ2, "eoptshrinkq2", Family::kEOptShrinkQ, 4,
     "eOptShrinkQ as published: shrunk low rank, 2-bit residual"},
    {Profile::kKvs2, "kvs2", Family::kKvs, 3, "closed-loop low rank, residual at 1.6 bits"},
    {Profile::kKvs3, "kvs3", Family::kKvs, 6, "closed-loop low rank, residual at 2.67 bits"},
    {Profile::kKvs4, "kvs4", Family::kKvs, 12, "closed-loop low rank, residual at 3.6 bits"},
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

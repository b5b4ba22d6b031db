// Profiles: the named codec settings (proto/FORMAT.md section 3.1).
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

namespace kvshrink {

// Values are the bytes of the shard header.
enum class Profile : uint8_t {
  kRaw = 0,
  kFp8 = 1,
  kTq2 = 2,
  kTq3 = 3,
  kTq4 = 4,
  kEOptShrinkQ2 = 5,
  kKvs2 = 6,
  kKvs3 = 7,
  kKvs4 = 8,
};

// What a block's record is made of.
enum class Family : uint8_t { kRaw, kFp8, kTq, kEOptShrinkQ, kKvs };

struct ProfileInfo {
  Profile profile;
  std::string_view name;
  Family family;
  int levels;  // of the residual's alphabet; 0 where there is none
  std::string_view summary;
};

// All profiles of this build, by id.
std::span<const ProfileInfo> AllProfiles();
const ProfileInfo& GetProfileInfo(Profile profile);
std::optional<Profile> ProfileFromName(std::string_view name);
std::optional<Profile> ProfileFromId(uint8_t id);

inline constexpr Profile kDefaultProfile = Profile::kKvs2;

}  // namespace kvshrink

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
  kKvs2t = 9,
  kKvs3t = 10,
  kKvs2c = 11,
};

// What a block's record is made of.
enum class Family : uint8_t { kRaw, kFp8, kTq, kEOptShrinkQ, kKvs };

// How the coded rows of a block are stored (proto/FORMAT.md section 4).
enum class BlockCode : uint8_t {
  kZero = 0,
  kRaw = 1,
  kFp8 = 2,
  kLevels3 = 16,
  kLevels4 = 17,
  kLevels5 = 18,
  kLevels6 = 19,
  kLevels8 = 20,
  kLevels12 = 21,
  kLevels16 = 22,
  kTrellis15 = 32,  // 1.5 bits a value
  kTrellis20 = 33,
  kTrellis25 = 34,
  kTrellis30 = 35,
};

struct ProfileInfo {
  Profile profile;
  std::string_view name;
  Family family;
  BlockCode code;  // of most blocks
  std::string_view summary;
};

// All profiles of this build, by id.
std::span<const ProfileInfo> AllProfiles();
const ProfileInfo& GetProfileInfo(Profile profile);
std::optional<Profile> ProfileFromName(std::string_view name);
std::optional<Profile> ProfileFromId(uint8_t id);

// Profiles that code K in the metric of a calibrated basis (basis.h).
constexpr bool NeedsBasis(Profile profile) { return profile == Profile::kKvs2c; }

inline constexpr Profile kDefaultProfile = Profile::kKvs2;

}  // namespace kvshrink

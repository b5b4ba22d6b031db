// The rotary position embedding of a layer's keys (proto/FORMAT.md section 3.3). With it given,
// keys are coded as they were before the embedding, where a layer's keys have much more in common.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace kvshrink {

// Values are the bytes of the shard's extension.
enum class RopePairing : uint8_t {
  kNeox = 0,  // channel j turns with channel j + rotary_dim / 2
  kGptj = 1,  // channel 2 j turns with channel 2 j + 1
};

enum class RopeScaling : uint8_t {
  kNone = 0,
  kLinear = 1,
  kNtk = 2,  // of a fixed factor
  kYarn = 3,
  kLlama3 = 4,
  kYarnUntruncated = 5,  // yarn whose range of channels isn't rounded to whole ones
};

// Channels from rotary_dim on are not turned. A factor on the cosines and sines (yarn's attention
// factor) needs no mention: keys keep it.
struct Rope {
  double theta = 10000;
  uint32_t rotary_dim = 0;  // even; 0 in options: head_dim
  RopePairing pairing = RopePairing::kNeox;
  RopeScaling scaling = RopeScaling::kNone;
  // A token's angle is that of its position in the sequence plus this.
  int32_t position_offset = 0;

  // Numbers that the scaling doesn't take must be as here.
  double factor = 1;                 // all scalings
  double original_max_position = 0;  // yarn, llama3
  double beta_fast = 32;             // yarn: turns within original_max_position
  double beta_slow = 1;
  double low_freq_factor = 1;  // llama3
  double high_freq_factor = 4;

  bool operator==(const Rope&) const = default;
};

std::string_view RopePairingName(RopePairing pairing);  // "neox", "gptj"
std::optional<RopePairing> RopePairingFromName(std::string_view name);
// "none", "linear", "ntk", "yarn", "llama3", "yarn-untruncated"
std::string_view RopeScalingName(RopeScaling scaling);
std::optional<RopeScaling> RopeScalingFromName(std::string_view name);

// "theta=10000,dim=64,pairing=neox,...": what matters for the scaling, with numbers that read back
// the same.
std::string RopeText(const Rope& rope);

// What is wrong with a rope; `field` without "rope.".
struct RopeFault {
  std::string_view field;
  double value = 0;
  std::string rule;
};

// The first violation of FORMAT.md's rules, rotary_dim being set.
std::optional<RopeFault> FindRopeFault(const Rope& rope, uint32_t head_dim);

// Errors: INVALID_ARGUMENT naming rope.<field>. rotary_dim may be 0.
absl::Status ValidateRope(const Rope& rope, uint32_t head_dim);

}  // namespace kvshrink

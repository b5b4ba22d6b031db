#include "kvshrink/rope.h"

#include <array>
#include <charconv>
#include <cmath>

#include "kvshrink/error.h"

namespace kvshrink {
namespace {

constexpr std::array<std::string_view, 2> kPairings = {"neox", "gptj"};
constexpr std::array<std::string_view, 6> kScalings = {"none", "linear", "ntk",
                                                       "yarn", "llama3", "yarn-untruncated"};
constexpr double kMaxTheta = 1e15;
constexpr double kMaxFactor = 1e6;
constexpr double kMaxOriginalPosition = 2147483648.0;

template <typename Enum, size_t kCount>
std::optional<Enum> FromName(const std::array<std::string_view, kCount>& names,
                             std::string_view name) {
  for (size_t i = 0; i < kCount; ++i) {
    if (names[i] == name) {
      return static_cast<Enum>(i);
    }
  }
  return std::nullopt;
}

// The shortest text that reads back as the same number.
std::string Number(double value) {
  std::array<char, 32> text{};
  const auto end = std::to_chars(text.data(), text.data() + text.size(), value).ptr;
  return {text.data(), end};
}

// NaN is in no range.
bool Within(double value, double least, double most) { return value >= least && value <= most; }

std::optional<RopeFault> CheckLlama3(const Rope& rope) {
  if (!(rope.low_freq_factor > 0 && rope.low_freq_factor <= kMaxFactor)) {
    return RopeFault{"low_freq_factor", rope.low_freq_factor, "must be above 0, at most 1e6"};
  }
  if (!(rope.high_freq_factor > rope.low_freq_factor && rope.high_freq_factor <= kMaxFactor)) {
    return RopeFault{"high_freq_factor", rope.high_freq_factor,
                     "must be above low_freq_factor, at most 1e6"};
  }
  return std::nullopt;
}

std::optional<RopeFault> CheckYarn(const Rope& rope) {
  if (!(rope.beta_slow > 0 && rope.beta_slow <= kMaxFactor)) {
    return RopeFault{"beta_slow", rope.beta_slow, "must be above 0, at most 1e6"};
  }
  if (!Within(rope.beta_fast, rope.beta_slow, kMaxFactor)) {
    return RopeFault{"beta_fast", rope.beta_fast, "must be at least beta_slow, at most 1e6"};
  }
  return std::nullopt;
}

// A number that the scaling doesn't take would be lost without a word.
std::optional<RopeFault> CheckUnused(const Rope& rope) {
  struct Number {
    std::string_view name;
    double Rope::*value;
    bool taken;
  };
  const bool yarn =
      rope.scaling == RopeScaling::kYarn || rope.scaling == RopeScaling::kYarnUntruncated;
  const bool llama3 = rope.scaling == RopeScaling::kLlama3;
  const Number numbers[] = {
      {"factor", &Rope::factor, rope.scaling != RopeScaling::kNone},
      {"original_max_position", &Rope::original_max_position, yarn || llama3},
      {"beta_fast", &Rope::beta_fast, yarn},
      {"beta_slow", &Rope::beta_slow, yarn},
      {"low_freq_factor", &Rope::low_freq_factor, llama3},
      {"high_freq_factor", &Rope::high_freq_factor, llama3},
  };
  const Rope defaults;
  for (const Number& number : numbers) {
    if (!number.taken && rope.*number.value != defaults.*number.value) {
      return RopeFault{number.name, rope.*number.value,
                       StrCat("scaling '", RopeScalingName(rope.scaling), "' takes none")};
    }
  }
  return std::nullopt;
}

std::optional<RopeFault> CheckScaling(const Rope& rope) {
  if (auto fault = CheckUnused(rope)) {
    return fault;
  }
  if (rope.scaling == RopeScaling::kNone) {
    return std::nullopt;
  }
  if (!Within(rope.factor, 1, kMaxFactor)) {
    return RopeFault{"factor", rope.factor, "must be 1..1e6"};
  }
  if (rope.scaling == RopeScaling::kLinear || rope.scaling == RopeScaling::kNtk) {
    return std::nullopt;
  }
  if (!Within(rope.original_max_position, 1, kMaxOriginalPosition)) {
    return RopeFault{"original_max_position", rope.original_max_position, "must be 1..2^31"};
  }
  return rope.scaling == RopeScaling::kLlama3 ? CheckLlama3(rope) : CheckYarn(rope);
}

}  // namespace

std::string_view RopePairingName(RopePairing pairing) {
  return kPairings[static_cast<size_t>(pairing)];
}

std::optional<RopePairing> RopePairingFromName(std::string_view name) {
  return FromName<RopePairing>(kPairings, name);
}

std::string_view RopeScalingName(RopeScaling scaling) {
  return kScalings[static_cast<size_t>(scaling)];
}

std::optional<RopeScaling> RopeScalingFromName(std::string_view name) {
  return FromName<RopeScaling>(kScalings, name);
}

std::string RopeText(const Rope& rope) {
  std::string text = StrCat("theta=", Number(rope.theta));
  if (rope.rotary_dim != 0) {
    text += StrCat(",dim=", rope.rotary_dim);
  }
  text += StrCat(",pairing=", RopePairingName(rope.pairing));
  if (rope.position_offset != 0) {
    text += StrCat(",position_offset=", rope.position_offset);
  }
  if (rope.scaling == RopeScaling::kNone) {
    return text;
  }
  text += StrCat(",scaling=", RopeScalingName(rope.scaling), ",factor=", Number(rope.factor));
  if (rope.scaling == RopeScaling::kLinear || rope.scaling == RopeScaling::kNtk) {
    return text;
  }
  text += StrCat(",original_max_position=", Number(rope.original_max_position));
  const bool llama3 = rope.scaling == RopeScaling::kLlama3;
  return text + (llama3 ? StrCat(",low_freq_factor=", Number(rope.low_freq_factor),
                                 ",high_freq_factor=", Number(rope.high_freq_factor))
                        : StrCat(",beta_fast=", Number(rope.beta_fast),
                                 ",beta_slow=", Number(rope.beta_slow)));
}

std::optional<RopeFault> FindRopeFault(const Rope& rope, uint32_t head_dim) {
  if (!(rope.theta > 1 && rope.theta <= kMaxTheta)) {
    return RopeFault{"theta", rope.theta, "must be above 1, at most 1e15"};
  }
  if (static_cast<size_t>(rope.pairing) >= kPairings.size()) {
    return RopeFault{"pairing", static_cast<double>(rope.pairing), "must be 0 or 1"};
  }
  if (static_cast<size_t>(rope.scaling) >= kScalings.size()) {
    return RopeFault{"scaling", static_cast<double>(rope.scaling), "must be 0..5"};
  }
  const uint32_t least = rope.scaling == RopeScaling::kNtk ? 4 : 2;
  if (rope.rotary_dim < least || rope.rotary_dim > head_dim || rope.rotary_dim % 2 != 0) {
    return RopeFault{"rotary_dim", static_cast<double>(rope.rotary_dim),
                     StrCat("must be even, ", least, "..", head_dim)};
  }
  return CheckScaling(rope);
}

absl::Status ValidateRope(const Rope& rope, uint32_t head_dim) {
  Rope whole = rope;
  whole.rotary_dim = rope.rotary_dim == 0 ? head_dim : rope.rotary_dim;
  if (const auto fault = FindRopeFault(whole, head_dim)) {
    return BadArgument(StrCat("rope.", fault->field), fault->value, fault->rule);
  }
  return absl::OkStatus();
}

}  // namespace kvshrink

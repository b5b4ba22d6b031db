// Angles and turns of the rotary embedding (proto/FORMAT.md section 3.3).
#pragma once

#include <cmath>
#include <cstdint>

#include "kvshrink/rope.h"
#include "stages/portable.h"

namespace kvshrink::stages {

inline constexpr double kTwoPi = 6.283185307179586;

// yarn: the channel, as a real number, that makes `turns` turns within the original context.
KVS_FN double YarnChannel(const Rope& rope, double turns) {
  return rope.rotary_dim * std::log(rope.original_max_position / (turns * kTwoPi)) /
         (2 * std::log(rope.theta));
}

// yarn: how far channel j's frequency is divided by the factor, 0 to 1.
KVS_FN double YarnRamp(const Rope& rope, uint32_t j) {
  double first = YarnChannel(rope, rope.beta_fast);
  double last = YarnChannel(rope, rope.beta_slow);
  if (rope.scaling == RopeScaling::kYarn) {
    first = std::floor(first);
    last = std::ceil(last);
  }
  first = first < 0 ? 0 : first;
  last = last > rope.rotary_dim - 1.0 ? rope.rotary_dim - 1.0 : last;
  last = first == last ? last + 0.001 : last;
  const double ramp = (j - first) / (last - first);
  return ramp < 0 ? 0 : ramp > 1 ? 1 : ramp;
}

// llama3: the frequency f for one whose plain value is `plain`.
KVS_FN double Llama3Frequency(const Rope& rope, double plain) {
  const double turns = rope.original_max_position * plain / kTwoPi;
  if (turns < rope.low_freq_factor) {
    return plain / rope.factor;
  }
  if (turns > rope.high_freq_factor) {
    return plain;
  }
  const double smooth =
      (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
  return (1 - smooth) * plain / rope.factor + smooth * plain;
}

// Radians per position of pair j < rotary_dim / 2.
KVS_FN double RopeFrequency(const Rope& rope, uint32_t j) {
  const double dim = rope.rotary_dim;
  const double power = -2.0 * j / dim;
  const double plain = std::pow(rope.theta, power);
  switch (rope.scaling) {
    case RopeScaling::kNone:
      return plain;
    case RopeScaling::kLinear:
      return plain / rope.factor;
    case RopeScaling::kNtk:
      return std::pow(rope.theta * std::pow(rope.factor, dim / (dim - 2)), power);
    case RopeScaling::kYarn:
    case RopeScaling::kYarnUntruncated: {
      const double ramp = YarnRamp(rope, j);
      return ramp * plain / rope.factor + (1 - ramp) * plain;
    }
    case RopeScaling::kLlama3:
      return Llama3Frequency(rope, plain);
  }
  return plain;
}

// A turn by the angle whose cosine and sine these are.
template <typename T>
struct Turn {
  T cosine, sine;
};

// The turn by the sum of both angles.
template <typename T>
KVS_FN Turn<T> Compose(const Turn<T>& a, const Turn<T>& b) {
  return {a.cosine * b.cosine - a.sine * b.sine, a.cosine * b.sine + a.sine * b.cosine};
}

template <typename T>
KVS_FN void TurnPair(const Turn<T>& turn, T* a, T* b) {
  const T first = *a * turn.cosine - *b * turn.sine;
  *b = *b * turn.cosine + *a * turn.sine;
  *a = first;
}

}  // namespace kvshrink::stages

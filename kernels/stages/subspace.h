// Parts of the leading-subspace iteration that don't depend on how a backend multiplies.
#pragma once

#include <cmath>
#include <cstdint>

#include "stages/rotate.h"

namespace kvshrink::stages {

inline constexpr int kProbes = 16;
inline constexpr int kSubspaceRounds = 3;
inline constexpr uint32_t kProbeSeed = 16;  // rows of signs 16 .. 31

// Start of the iteration: entry `channel` of probe `probe`, fixed for all blocks.
KVS_FN float ProbeEntry(uint32_t probe, uint32_t channel) { return SignIsNegative(kProbeSeed + probe, channel) ? -1.0F : 1.0F; }

// Gram-Schmidt over `count` vectors of `length`, vector j at q + j * stride. A vector that the earlier ones span becomes zero. One pass
// loses orthogonality by the condition of the input, a second one restores it: call twice where it matters.
template <typename T>
void Orthonormalise(T* q, int length, int stride, int count) {
  for (int j = 0; j < count; ++j) {
    T* vector = q + j * stride;
    T before = T{0};
    for (int c = 0; c < length; ++c) {
      before += vector[c] * vector[c];
    }
    for (int i = 0; i < j; ++i) {
      const T* other = q + i * stride;
      T dot = T{0};
      for (int c = 0; c < length; ++c) {
        dot += vector[c] * other[c];
      }
      for (int c = 0; c < length; ++c) {
        vector[c] -= dot * other[c];
      }
    }
    T norm = T{0};
    for (int c = 0; c < length; ++c) {
      norm += vector[c] * vector[c];
    }
    // What is left of a dependent vector is rounding: a few units in the last place of its length.
    const T floor = before * T(1e-12);
    const T inverse = norm > floor && norm > T{0} ? T{1} / std::sqrt(norm) : T{0};
    for (int c = 0; c < length; ++c) {
      vector[c] *= inverse;
    }
  }
}

}  // namespace kvshrink::stages

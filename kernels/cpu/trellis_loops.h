// The SIMD loops of the trellis search and its decoder, compiled for several instruction sets and
// chosen once per process. No sum depends on the vector length.
#pragma once

#include <cstddef>
#include <cstdint>

#include "stages/trellis_search.h"

namespace kvshrink::cpu {

// Metrics and Advance as PlainTrellisLoops describes them.
struct TrellisLoops {
  void (*Metrics)(const stages::TrellisBranches<float>& branches, const float* x, float* metrics);
  void (*Advance)(const stages::TrellisCode& code, const float* metrics, int steps, float* sums);
  // row[c] = levels[c] / 32 * scale.
  void (*expand)(const int8_t* levels, float scale, size_t d, float* row);
};

const TrellisLoops& ChooseTrellisLoops();

}  // namespace kvshrink::cpu
